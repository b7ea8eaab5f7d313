"""What streamprobe answers about streams, and what its VM process believes of that (hostile-input 55)."""

import os
import random
import select

import pytest

from tests.support import saved
from vmd.config.model import DiskConfig, NicConfig, VmConfig
from vmd.ipc.imsg import pack
from vmd.vm import streamprobe
from vmd.vm.kinds import DISK, ENTROPY, INTERFACE
from vmd.vm.stream import VERSION, Pipe, StreamWriter
from vmd.vm.streamprobe import ANSWER_MAX, HEAD, HEADER, Beginning, probe, unpack

BEHIND = b"and then its memory"


def stream(header: bytes) -> int:
    """Return a file with such a stream in it, at its beginning."""
    fd = os.memfd_create("stream", os.MFD_CLOEXEC)
    writer = StreamWriter(Pipe(fd, select.POLLOUT))
    writer.header(header)
    writer.hasher.close()
    os.write(fd, BEHIND)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def answer(data: bytes) -> "Beginning | str":
    """Return what is said of a stream that is nothing but this."""
    fd = os.memfd_create("stream", os.MFD_CLOEXEC)
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    try:
        return unpack(probe(Pipe(fd, select.POLLIN)))
    finally:
        os.close(fd)


def test_nothing_is_read_beyond_the_header() -> None:
    """Whoever has the descriptor, too, goes on behind it; the header comes along as it is."""
    config = VmConfig(name="sent", nics=(NicConfig(), NicConfig()), disks=(DiskConfig(path="/disk"),))
    raw = pack(saved.header(config=config))
    fd = stream(raw)

    beginning = unpack(probe(Pipe(fd, select.POLLIN)))

    assert beginning == Beginning(version=VERSION, counts=(1, 2, 1, 0, 0), header=raw)
    assert isinstance(beginning, Beginning)
    assert beginning.kinds == [ENTROPY, INTERFACE, INTERFACE, DISK]
    assert beginning.read_bytes == os.lseek(fd, 0, os.SEEK_CUR)
    assert os.read(fd, 100) == BEHIND
    os.close(fd)


@pytest.mark.parametrize("header", [
    b"", b"\xc0", b"\x90", pack(saved.machine_state()), b"\xdc\xff\xf0" + b"\xc0" * 0xFFF0,
])  # fmt: skip
def test_impossible_headers(header: bytes) -> None:
    """The digest is right, and what it is of is none."""
    fd = stream(header)
    text = unpack(probe(Pipe(fd, select.POLLIN)))
    os.close(fd)

    assert isinstance(text, str)
    assert text.startswith("the stream is not usable: ")


def test_every_beginning_of_a_stream_is_too_little() -> None:
    """One sentence for each, and no other exception."""
    fd = stream(pack(saved.header()))
    whole = os.read(fd, 1 << 20).removesuffix(BEHIND)
    os.close(fd)

    assert answer(b"") == "the stream is empty"
    for length in (*range(1, 60), *range(60, len(whole), 97), len(whole) - 1):
        assert answer(whole[:length]) == f"the stream ends after {length} bytes, before its end"
    assert isinstance(answer(whole), Beginning)


def test_damage_is_found() -> None:
    """Before anybody looks at what the header says."""
    fd = stream(pack(saved.header()))
    whole = bytearray(os.read(fd, 1 << 20))
    os.close(fd)
    whole[30] ^= 1

    assert answer(bytes(whole)) == "the stream is damaged: the digest of its header is wrong"


BAD = {
    "nothing": b"",
    "another-kind": b"\3" + bytes(HEAD.size),
    "too-little": HEAD.pack(HEADER, 3, 1, 0, 0, 0, 0)[:-1],
    "too-much": HEAD.pack(HEADER, 3, 1, 0, 0, 0, 0) + bytes(ANSWER_MAX),
    "more-devices-than-slots": HEAD.pack(HEADER, 3, 1, 20, 10, 0, 0),
}


@pytest.mark.parametrize("raw", BAD.values(), ids=BAD)
def test_an_answer_of_a_process_that_was_taken_over(raw: bytes) -> None:
    """It says how many processes are started, so that is bounded; the rest is read by a process that is confined."""
    with pytest.raises(ValueError, match=r"answer of|devices"):
        unpack(raw)


def test_random_answers() -> None:
    """ValueError, or something of the right form."""
    generator = random.Random(12)
    for _ in range(2000):
        raw = generator.randbytes(generator.randrange(HEAD.size + 4))
        try:
            found = unpack(raw)
        except ValueError:
            continue
        assert isinstance(found, str) or len(found.kinds) <= streamprobe.DEVICES_MAX


def test_nobody_reads_the_answer() -> None:
    """The VM process was ended meanwhile, which is no failure of its streamprobe."""
    reader, writer = os.pipe()
    os.close(reader)
    streamprobe.say(b"answer", writer)
    os.close(writer)
