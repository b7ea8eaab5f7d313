"""streamprobe: reads the beginning of a stream for a VM process, which is not confined yet and must not read it.

Runs as  its VM's id, in the cell, confined to its descriptors before it reads the first byte; it ends after one answer
Peers    its VM process (starts it, and reads one answer)
Holds    a stream, for reading, and a pipe's writing end

It reads exactly the preamble and the header, so the VM process can read on with its own descriptor of the stream.  Its
answer says how many devices of each kind there are: the VM process starts their processes, and confines itself.  The
answer also has the header, which the VM process looks at only after that.
"""

import os
import select
from struct import Struct

from vmd.privsep.confine import STREAMPROBE, confine
from vmd.record import Record
from vmd.vm.header import read_header
from vmd.vm.kinds import KINDS, Kind
from vmd.vm.stream import DIGEST_BYTES, HEADER_MAX, PREAMBLE, Pipe, StreamError, StreamReader

FD_ANSWER, FD_STREAM = 3, 4
HEADER, ERROR = 1, 2
HEAD = Struct(f"<BI{len(KINDS)}B")  # HEADER, version of the format, number of devices of each kind; the header follows
ANSWER_MAX = HEAD.size + HEADER_MAX
DEVICES_MAX = 30  # slots of PCI between the host bridge and vmmci


class Beginning(Record):
    """The beginning of a stream, as streamprobe reports it."""

    version: int
    counts: tuple[int, ...]  # the number of devices of each kind, in the order of KINDS
    header: bytes  # not unpacked

    @property
    def kinds(self) -> list[Kind]:
        """The kind of each device, in the order of their slots."""
        return [kind for kind, count in zip(KINDS, self.counts, strict=True) for _ in range(count)]

    @property
    def read_bytes(self) -> int:
        """How many bytes of the stream streamprobe has read."""
        return PREAMBLE.size + len(self.header) + DIGEST_BYTES


def probe(pipe: Pipe) -> bytes:
    """Read the beginning of a stream, and return the answer."""
    reader = StreamReader(pipe)
    try:
        raw = reader.header()
        config = read_header(reader.version, raw).config
        counts = [kind.count(config) for kind in KINDS]
        if sum(counts) > DEVICES_MAX:
            raise ValueError(f"it has {sum(counts)} devices")
    except StreamError as error:
        return bytes((ERROR,)) + f"the stream {error}".encode(errors="replace")
    except ValueError as error:
        return bytes((ERROR,)) + f"the stream is not usable: {error}".encode(errors="replace")
    return HEAD.pack(HEADER, reader.version, *counts) + raw


def unpack(answer: bytes) -> Beginning | str:
    """Unpack an answer: the beginning of the stream, or a sentence that says why the stream cannot be used.

    Raises ValueError for an answer that streamprobe never gives.
    """
    if answer[:1] == bytes((ERROR,)):
        return answer[1:].decode(errors="replace")
    if not HEAD.size <= len(answer) <= ANSWER_MAX or answer[0] != HEADER:
        raise ValueError(f"answer of {len(answer)} bytes")
    _, version, *counts = HEAD.unpack_from(answer)
    if sum(counts) > DEVICES_MAX:
        raise ValueError(f"{sum(counts)} devices")
    return Beginning(version=version, counts=tuple(counts), header=answer[HEAD.size :])


def say(answer: bytes, fd: int) -> None:
    """Write the answer.  The VM process that reads it may have ended, which is no error."""
    try:
        while answer:
            answer = answer[os.write(fd, answer) :]
    except BrokenPipeError:
        return


def main() -> int:
    """Run process streamprobe."""
    confine(STREAMPROBE)
    say(probe(Pipe(FD_STREAM, select.POLLIN)), FD_ANSWER)
    return 0
