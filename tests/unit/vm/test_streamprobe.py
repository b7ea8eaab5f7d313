"""The answers of streamprobe about streams, and how the VM process checks them (hostile-input 55)."""

import os
import random
import select
from collections.abc import Callable

import pytest

from tests.support import saved
from vmd.config.model import DiskConfig, NicConfig, VmConfig
from vmd.ipc.imsg import pack
from vmd.privsep.confine import STREAMPROBE
from vmd.vm import streamprobe
from vmd.vm.kinds import DISK, ENTROPY, INTERFACE
from vmd.vm.stream import HEADER_MAX, VERSION, Pipe, StreamWriter
from vmd.vm.streamprobe import ANSWER_MAX, HEAD, HEADER, Beginning, probe, unpack

REST = b"and then its memory"


def stream(header: bytes) -> int:
    """Return a file with a stream that has this header, open at its start."""
    fd = os.memfd_create("stream", os.MFD_CLOEXEC)
    writer = StreamWriter(Pipe(fd, select.POLLOUT))
    writer.header(header)
    writer.hasher.close()
    os.write(fd, REST)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def answer(data: bytes) -> "Beginning | str":
    """Return the answer about a stream with this content."""
    fd = os.memfd_create("stream", os.MFD_CLOEXEC)
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    try:
        return unpack(probe(Pipe(fd, select.POLLIN)))
    finally:
        os.close(fd)


def test_nothing_is_read_beyond_the_header() -> None:
    """The VM process reads on after the header.  The answer has the header unchanged."""
    config = VmConfig(name="sent", nics=(NicConfig(), NicConfig()), disks=(DiskConfig(path="/disk"),))
    raw = pack(saved.header(config=config))
    fd = stream(raw)

    beginning = unpack(probe(Pipe(fd, select.POLLIN)))

    assert beginning == Beginning(version=VERSION, counts=(1, 2, 1, 0, 0), header=raw)
    assert isinstance(beginning, Beginning)
    assert beginning.kinds == [ENTROPY, INTERFACE, INTERFACE, DISK]
    assert beginning.read_bytes == os.lseek(fd, 0, os.SEEK_CUR)
    assert os.read(fd, 100) == REST
    os.close(fd)


@pytest.mark.parametrize("header", [
    b"", b"\xc0", b"\x90", pack(saved.machine_state()), b"\xdc\xff\xf0" + b"\xc0" * 0xFFF0,
])  # fmt: skip
def test_impossible_headers_are_refused(header: bytes) -> None:
    """The digest is correct, but its data is no header."""
    fd = stream(header)
    text = unpack(probe(Pipe(fd, select.POLLIN)))
    os.close(fd)

    assert isinstance(text, str)
    assert text.startswith("the stream is not usable: ")


def test_every_prefix_of_a_header_is_refused() -> None:
    """Each gives an error with its length, and no other exception."""
    fd = stream(pack(saved.header()))
    whole = os.read(fd, 1 << 20).removesuffix(REST)
    os.close(fd)

    assert answer(b"") == "the stream is empty"
    for length in (*range(1, 60), *range(60, len(whole), 97), len(whole) - 1):
        assert answer(whole[:length]) == f"the stream ends after {length} bytes, before its end"
    assert isinstance(answer(whole), Beginning)


def test_damage_is_found() -> None:
    """The digest is checked before the header is decoded."""
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


@pytest.mark.parametrize("raw", [
    HEAD.pack(HEADER, 3, 1, 0, 0, 0, 0), HEAD.pack(HEADER, 3, 1, 0, 0, 0, 0) + bytes(HEADER_MAX),
    HEAD.pack(HEADER, 3, 1, 20, 9, 0, 0) + b"x",
])  # fmt: skip
def test_the_smallest_and_the_largest_answer(raw: bytes) -> None:
    """A header of any length that a stream may have, and as many devices as there are slots."""
    found = unpack(raw)
    assert isinstance(found, Beginning)
    assert found.header == raw[HEAD.size :]


@pytest.mark.parametrize(("nics", "fit"), [(29, True), (30, False)])
def test_as_many_devices_as_there_are_slots(nics: int, fit: bool) -> None:
    """One of them is entropy."""
    config = VmConfig(name="sent", nics=(NicConfig(),) * nics)
    fd = stream(pack(saved.header(config=config)))
    found = unpack(probe(Pipe(fd, select.POLLIN)))
    os.close(fd)
    if fit:
        assert isinstance(found, Beginning)
        assert len(found.kinds) == 30
    else:
        assert found == "the stream is not usable: it has 31 devices"


def test_it_is_confined_before_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it reads, says one answer, and ends.  Its descriptors come after those of every process."""
    steps: list[object] = []

    def note(step: str, result: object = None) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            steps.append((step, *arguments))
            return result

        return call

    monkeypatch.setattr(streamprobe, "confine", note("confine"))
    monkeypatch.setattr(streamprobe, "Pipe", note("pipe", "its stream"))
    monkeypatch.setattr(streamprobe, "probe", note("probe", b"answer"))
    monkeypatch.setattr(streamprobe, "say", note("say"))
    assert streamprobe.main() == 0
    assert steps == [
        ("confine", STREAMPROBE), ("pipe", 4, select.POLLIN), ("probe", "its stream"), ("say", b"answer", 3)
    ]


@pytest.mark.parametrize("raw", BAD.values(), ids=BAD)
def test_a_bad_answer_is_refused(raw: bytes) -> None:
    """The answer determines how many processes are started, so their number has a limit."""
    with pytest.raises(ValueError, match=r"answer of|devices"):
        unpack(raw)


def test_random_answers_raise_value_error_or_are_in_bounds() -> None:
    """A random answer raises ValueError, or has the right form."""
    generator = random.Random(12)
    for _ in range(2000):
        raw = generator.randbytes(generator.randrange(HEAD.size + 4))
        try:
            found = unpack(raw)
        except ValueError:
            continue
        assert isinstance(found, str) or len(found.kinds) <= streamprobe.DEVICES_MAX


def test_a_closed_pipe_is_no_failure() -> None:
    """The VM process has ended, so nobody reads the answer.  That is no failure of its streamprobe."""
    reader, writer = os.pipe()
    os.close(reader)
    streamprobe.say(b"answer", writer)
    os.close(writer)
