"""streamprobe: reads the beginning of a stream, for a VM process that can still start others and so must not.

Runs as  its VM's id, in the cell, confined to its descriptors before it reads the first byte; for a moment
Peers    its VM process (starts it, and reads one answer)
Holds    a stream, for reading, and a pipe's writing end

It reads exactly preamble and header, so that whoever has the stream, too, can read on.  Its answer says how many
devices of each kind there are, which is all that the VM process has to know before it confines itself; with that comes
the header, for then.
"""

import os
import select
from struct import Struct

from vmd.privsep.confine import STREAMPROBE, confine
from vmd.record import Record
from vmd.vm.header import read_header
from vmd.vm.kinds import KINDS, Kind
from vmd.vm.stream import DIGEST_BYTES, HEADER_MAX, PREAMBLE, Pipe, StreamError, StreamReader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

FD_ANSWER, FD_STREAM = 3, 4
HEADER, ERROR = 1, 2
HEAD = Struct(f"<BI{len(KINDS)}B")  # HEADER, version of the format, devices of each kind; the header behind it
ANSWER_MAX = HEAD.size + HEADER_MAX
DEVICES_MAX = 30  # between the host bridge and vmmci


class Beginning(Record):
    """How a stream begins."""

    version: int
    counts: tuple[int, ...]  # of devices, in the order of KINDS
    header: bytes  # not looked at

    @property
    def kinds(self) -> list[Kind]:
        """The kind of each device, in the order of their slots."""
        return [kind for kind, count in zip(KINDS, self.counts, strict=True) for _ in range(count)]

    @property
    def read_bytes(self) -> int:
        """How far the stream has been read."""
        return PREAMBLE.size + len(self.header) + DIGEST_BYTES


def probe(pipe: Pipe) -> bytes:
    """Return the answer about a stream."""
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
    """Return what an answer says: how a stream begins, or the sentence why it is none.

    Raises ValueError for an answer that no streamprobe gives.
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
    """Write an answer; the VM process that was to read it may have ended."""
    try:
        while answer:
            answer = answer[os.write(fd, answer) :]
    except BrokenPipeError:
        return


def main() -> "NoReturn":
    """Answer and be gone: at once, for somebody waits for that, and there is nothing to put away."""
    confine(STREAMPROBE)
    say(probe(Pipe(FD_STREAM, select.POLLIN)), FD_ANSWER)
    os._exit(0)
