"""The format of the stream of a sent VM, and all errors in it (hostile-input 55)."""

import _thread
import errno
import hashlib
import os
import random
import select
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.waiting import pause
from vmd.errors import HostError
from vmd.ipc.streams import MAGIC
from vmd.vm import stream
from vmd.vm.stream import (
    COUNT,
    DIGEST_BYTES,
    END,
    GPA,
    HASHERS,
    HEADER_MAX,
    MEMORY,
    OLDEST,
    PIECE_BYTES,
    PREAMBLE,
    RUN,
    RUNS,
    RUNS_BYTES_MAX,
    RUNS_MAX,
    SECTION,
    STATE,
    STILL,
    VERSION,
    Cancelled,
    Pipe,
    StreamError,
    StreamReader,
    StreamWriter,
)

DEADLINE_S = 60.0
MEMORY_BYTES = 4096
STATE_MAX = 1000
HEADER, RECORD = b"what it is", b"what it was doing"
IN_ORDER = ((0, b"first run of memory"), (1024, b"and the second"))


class Sink:
    """Takes the content of a stream into its own memory."""

    def __init__(self, memory_bytes: int = MEMORY_BYTES) -> None:
        self.memory = bytearray(memory_bytes)
        self.states: list[bytes] = []
        self.header = b""

    def take(self, gpa: int, data: memoryview) -> None:
        """Store a run of memory."""
        if gpa + len(data) > len(self.memory):
            raise ValueError(f"no memory at {gpa:#x}")
        self.memory[gpa : gpa + len(data)] = data

    def read(self, pipe: Pipe) -> None:
        """Read a whole stream."""
        reader = StreamReader(pipe)
        self.header = reader.header()
        reader.sections_until_end(self.take, self.states.append, state_max=STATE_MAX)


def source(raw: bytes) -> Pipe:
    """Return a pipe that reads a stream from a file."""
    fd = os.memfd_create("stream", os.MFD_CLOEXEC)
    os.write(fd, raw)
    os.lseek(fd, 0, os.SEEK_SET)
    return Pipe(fd, select.POLLIN)


def read(raw: bytes) -> Sink:
    """Read a stream to its end."""
    sink, pipe = Sink(), source(raw)
    try:
        sink.read(pipe)
    finally:
        pipe.close()
    return sink


def write(pipe: Pipe, runs: tuple[tuple[int, bytes], ...] = IN_ORDER) -> None:
    """Write a stream with a header, memory, a record and its end."""
    writer = StreamWriter(pipe)
    try:
        writer.header(HEADER)
        for gpa, data in runs:
            writer.memory(gpa, memoryview(data))
        writer.state(RECORD)
        writer.end()
    finally:
        writer.hasher.close()


def written(runs: tuple[tuple[int, bytes], ...] = IN_ORDER) -> bytes:
    """Return the bytes of a stream."""
    fd = os.memfd_create("stream", os.MFD_CLOEXEC)
    pipe = Pipe(fd, select.POLLOUT)
    write(pipe, runs)
    assert pipe.moved_bytes == os.fstat(fd).st_size
    raw = os.pread(fd, pipe.moved_bytes, 0)
    pipe.close()
    return raw


def preamble(body: bytes = HEADER, *, magic: bytes = MAGIC, version: int = VERSION, length: int | None = None) -> bytes:
    """Return the beginning of a stream, with a correct digest."""
    raw = PREAMBLE.pack(magic, version, len(body) if length is None else length) + body
    return raw + hashlib.sha256(raw).digest()


def section(kind: int, body: bytes, *, flags: int = 0, length: int | None = None) -> bytes:
    """Return a section with a correct digest."""
    raw = SECTION.pack(kind, flags, len(body) if length is None else length) + body
    return raw + hashlib.sha256(raw).digest()


def runs(*runs: tuple[int, int], data: bytes, count: int | None = None) -> bytes:
    """Return a section of runs of memory, with a correct digest."""
    table = b"".join(RUN.pack(gpa, length) for gpa, length in runs)
    return section(RUNS, COUNT.pack(len(runs) if count is None else count) + table + data)


def end(count: int) -> bytes:
    """Return the end of a stream with `count` sections."""
    return section(END, COUNT.pack(count))


def in_thread(work: Callable[[], None]) -> Callable[[], None]:
    """Run `work` in a thread.  Return a function that waits for it and raises its exception."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def join() -> None:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
        if raised:
            raise raised[0]

    return join


# --- reading what was written -------------------------------------------------------------------------------------


def test_format() -> None:
    """Every byte is at its documented place."""
    runs = [section(MEMORY, GPA.pack(gpa) + data) for gpa, data in IN_ORDER]

    assert written() == preamble() + b"".join(runs) + section(STATE, RECORD) + end(3)


def test_a_stream_in_a_file_is_read() -> None:
    """Header, memory and record are read, the memory to its addresses."""
    sink = read(written())

    assert (sink.header, sink.states) == (HEADER, [RECORD])
    for gpa, data in IN_ORDER:
        assert sink.memory[gpa : gpa + len(data)] == data


def test_format_of_runs() -> None:
    """Every byte is at its documented place.  A later run overwrites an earlier one, in any order of addresses."""
    fd = os.memfd_create("stream", os.MFD_CLOEXEC)
    writer = StreamWriter(Pipe(fd, select.POLLOUT))
    writer.header(HEADER)
    writer.runs([(8, 3), (0, 2), (9, 1)], memoryview(b"abcdef"))
    writer.memory(0, memoryview(b"x"))
    writer.state(RECORD)
    writer.end()
    writer.hasher.close()
    raw = os.pread(fd, writer.pipe.moved_bytes, 0)
    writer.pipe.close()

    first = runs((8, 3), (0, 2), (9, 1), data=b"abcdef")
    assert raw == preamble() + first + section(MEMORY, GPA.pack(0) + b"x") + section(STATE, RECORD) + end(3)
    assert read(raw).memory[:12] == b"xe" + bytes(6) + b"afc" + bytes(1)


def test_the_most_runs_of_a_section() -> None:
    """One more run is refused."""
    most = [(each, 1) for each in range(RUNS_MAX - 1)]
    data = random.Random(2).randbytes(PIECE_BYTES)
    last = (RUNS_MAX - 1, PIECE_BYTES - RUNS_MAX + 1)
    raw = preamble() + runs(*most, last, data=data) + section(STATE, RECORD) + end(2)
    sink, pipe = Sink(PIECE_BYTES), source(raw)
    sink.read(pipe)
    pipe.close()
    assert sink.memory == data

    with pytest.raises(StreamError, match=f"section 0: {RUNS_MAX + 1} runs of memory in"):
        read(preamble() + runs(*most, (0, 1), (0, 1), data=data[: RUNS_MAX + 1]))


def pair_of_pipe() -> tuple[int, int]:
    """Return the reading and the writing end of a pipe."""
    return os.pipe2(os.O_CLOEXEC)


def pair_of_sockets() -> tuple[int, int]:
    """Return two ends of a socket, which ssh gives to its programs."""
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


def pair_that_does_not_wait() -> tuple[int, int]:
    """Return the ends of a non-blocking pipe."""
    return os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)


def refuse_nowait(*_: object) -> int:
    """Fail as pwritev(2) does on a kernel without RWF_NOWAIT for pipes."""
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


@pytest.mark.parametrize("old_kernel", [False, True])
@pytest.mark.parametrize("pair", [pair_of_pipe, pair_of_sockets, pair_that_does_not_wait])
def test_machine_moves_through_a_small_pipe(
    monkeypatch: pytest.MonkeyPatch, pair: Callable[[], tuple[int, int]], old_kernel: bool
) -> None:
    """A pipe that holds a few pages moves more than one piece of memory."""
    if old_kernel:
        monkeypatch.setattr(os, "pwritev", refuse_nowait)
    data = random.Random(1).randbytes(PIECE_BYTES + 12345)
    reading, writing = pair()
    ours, theirs = Pipe(reading, select.POLLIN), Pipe(writing, select.POLLOUT)
    join = in_thread(lambda: write(theirs, ((0, data),)))
    sink = Sink(2 * PIECE_BYTES)

    sink.read(ours)

    join()
    assert sink.memory[: len(data)] == data
    assert sink.states == [RECORD]
    assert ours.moved_bytes == theirs.moved_bytes
    ours.close()
    theirs.close()


def test_the_largest_header_and_the_largest_state() -> None:
    """Both are read.  One byte more is refused, of the header before it is read."""
    header, state = bytes(HEADER_MAX), bytes(STATE_MAX)
    sink = read(preamble(header) + section(STATE, state) + end(1))
    assert (sink.header, sink.states) == (header, [state])
    with pytest.raises(StreamError, match=f"announces a header of {HEADER_MAX + 1} bytes"):
        read(preamble(bytes(HEADER_MAX + 1)))


def test_a_part_that_is_too_large_for_one_write() -> None:
    """The next part comes after its rest."""
    parts = [bytes(PIECE_BYTES) + b"rest", bytes(PIECE_BYTES)]
    fd = os.memfd_create("stream", os.MFD_CLOEXEC)
    pipe = Pipe(fd, select.POLLOUT)
    pipe.write(*parts)
    assert pipe.moved_bytes == sum(map(len, parts))
    assert os.pread(fd, 3 * PIECE_BYTES, 0) == b"".join(parts)
    pipe.close()


def test_nothing_after_the_end_is_read() -> None:
    """Later bytes of the descriptor are left for the next reader."""
    raw, sink = written(), Sink()
    pipe = source(raw + b"the next one")

    sink.read(pipe)

    assert os.read(pipe.fd, 100) == b"the next one"
    pipe.close()


# --- bad streams --------------------------------------------------------------------------------------------------


def test_every_prefix_is_refused() -> None:
    """The error tells after how many bytes the stream ends."""
    raw = written()
    for length in range(len(raw)):
        with pytest.raises(StreamError, match=rf"ends after {length} bytes" if length else "is empty"):
            read(raw[:length])


def test_every_flipped_bit_is_noticed() -> None:
    """A flipped bit at a thousand places gives an error, also in lengths and kinds."""
    raw = written()
    generator = random.Random(55)
    for _ in range(1000):
        place = generator.randrange(len(raw) * 8)
        damaged = bytearray(raw)
        damaged[place // 8] ^= 1 << place % 8
        with pytest.raises(StreamError):
            read(bytes(damaged))


def test_flips_in_memory_are_damage() -> None:
    """Only the digest can find such an error."""
    raw = bytearray(written())
    raw[raw.index(IN_ORDER[1][1])] ^= 1
    with pytest.raises(StreamError, match="is damaged: the digest of a section is wrong"):
        read(bytes(raw))


@pytest.mark.parametrize("foreign", [b"\x7fELF" + bytes(200), bytes(100), b"QFI\xfb" + bytes(500), b"#!/bin/sh\n" * 20])
def test_other_files_are_recognised(foreign: bytes) -> None:
    """The user has redirected the wrong file."""
    with pytest.raises(StreamError, match="is not a virtual machine that was sent by vmctl send"):
        read(foreign)


@given(st.binary(max_size=300))
def test_random_sections_are_refused(raw: bytes) -> None:
    """Random bytes follow a good header."""
    with pytest.raises(StreamError):
        read(preamble() + raw)


def test_other_version_is_named() -> None:
    """The error has the version of the stream and the versions that we read."""
    for version in (0, OLDEST - 1, VERSION + 1, (1 << 32) - 1):
        said = f"has version {version} of the format, this vmd reads versions {OLDEST} to {VERSION}"
        with pytest.raises(StreamError, match=said):
            read(preamble(version=version))


@pytest.mark.parametrize(("sections", "what"), [
    ([section(9, b"")], "section 0 of kind 9"),
    ([section(0, b"")], "section 0 of kind 0"),
    ([section(STATE, b"", flags=1)], "unknown flags 0x1 in section 0"),
    ([section(MEMORY, GPA.pack(0))], "of kind 1 and length 8"),
    ([section(MEMORY, b"1234567")], "of kind 1 and length 7"),
    ([section(MEMORY, b"", length=GPA.size + PIECE_BYTES + 1)], "of kind 1 and length"),
    ([section(STATE, b"", length=STATE_MAX + 1)], "of kind 2 and length 1001"),
    ([section(STATE, RECORD), section(END, b"1234567")], "section 1 of kind 3 and length 7"),
    ([section(STATE, RECORD), end(2)], "has 1 sections where its end says 2"),
    ([section(STATE, RECORD), end(0)], "has 1 sections where its end says 0"),
    ([section(MEMORY, GPA.pack(MEMORY_BYTES) + b"x")], "is not usable: section 0: no memory at 0x1000"),
    ([section(MEMORY, GPA.pack((1 << 64) - 1) + b"x")], "is not usable: section 0: no memory"),
    ([section(RUNS, b"1234567")], "of kind 4 and length 7"),
    ([section(RUNS, b"", length=RUNS_BYTES_MAX + 1)], "of kind 4 and length"),
    ([runs(data=b"")], "is not usable: section 0: 0 runs of memory in 8 bytes"),
    ([runs((0, 1), data=b"x", count=2)], "section 0: 2 runs of memory in 25 bytes"),
    ([runs((0, 1), data=b"", count=1 << 60)], "section 0: 1152921504606846976 runs of memory in 24 bytes"),
    ([runs((0, 1), (4, 1), data=b"x")], "section 0: memory at 0x4: 1 bytes where 0 are left"),
    ([runs((0, 0), data=b"x")], "section 0: memory at 0x0: 0 bytes where 1 are left"),
    ([runs((0, (1 << 64) - 1), data=b"x")], "section 0: memory at 0x0: 18446744073709551615 bytes where 1 are left"),
    ([runs((0, 1), data=b"xy")], "section 0: 1 bytes behind the last run of memory"),
    ([runs((MEMORY_BYTES - 1, 2), data=b"xy")], "section 0: no memory at 0xfff"),
])  # fmt: skip
def test_wrong_sections_are_refused(sections: list[bytes], what: str) -> None:
    """Kinds, lengths, flags, addresses and counts are wrong, with correct digests."""
    with pytest.raises(StreamError, match=what):
        read(preamble() + b"".join(sections))


@pytest.mark.parametrize("version", range(OLDEST, STILL + 1))
def test_earlier_versions_have_no_runs(version: int) -> None:
    """Their writers knew no sections of that kind."""
    with pytest.raises(StreamError, match="has a section 0 of kind 4 and length"):
        read(preamble(version=version) + runs((0, 1), data=b"x"))


def test_a_record_is_used_only_if_its_digest_is_correct() -> None:
    """A damaged record is not passed on."""
    raw, sink = bytearray(written()), Sink()
    raw[raw.index(RECORD)] ^= 1
    pipe = source(bytes(raw))

    with pytest.raises(StreamError):
        sink.read(pipe)

    assert sink.states == []
    pipe.close()


@pytest.mark.parametrize("place", range(HASHERS + 2))
def test_a_record_is_used_only_if_all_earlier_sections_are_correct(place: int) -> None:
    """Any one of the runs is damaged, while several runs are still being hashed."""
    runs = tuple((gpa, f"run {gpa}".encode()) for gpa in range(0, (HASHERS + 2) * 16, 16))
    raw, sink = bytearray(written(runs)), Sink()
    raw[raw.index(runs[place][1])] ^= 1
    pipe = source(bytes(raw))

    with pytest.raises(StreamError, match="is damaged: the digest of a section is wrong"):
        sink.read(pipe)

    assert sink.states == []
    pipe.close()


@pytest.mark.parametrize("raw", [
    preamble(length=0xFFFFFFFF), preamble(length=HEADER_MAX + 1),
    preamble() + section(STATE, b"", length=1 << 63), preamble() + section(MEMORY, b"", length=(1 << 64) - 1),
    preamble() + section(MEMORY, b"", length=GPA.size + PIECE_BYTES + 1),
])  # fmt: skip
def test_a_claimed_length_takes_no_memory(raw: bytes) -> None:
    """Nothing is allocated for a length before its bytes have come."""
    tracemalloc.start()
    try:
        with pytest.raises(StreamError):
            read(raw)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


# --- the other end ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old_kernel", [False, True])
def test_writing_to_a_reader_that_sleeps_can_be_cancelled(monkeypatch: pytest.MonkeyPatch, old_kernel: bool) -> None:
    """It can be cancelled in the middle of a piece for which the pipe has no room."""
    if old_kernel:
        monkeypatch.setattr(os, "pwritev", refuse_nowait)
    reading, writing = pair_of_pipe()
    pipe = Pipe(writing, select.POLLOUT)
    join = in_thread(lambda: write(pipe, ((0, bytes(1 << 20)),)))
    room = select.poll()
    room.register(writing, select.POLLOUT)
    while room.poll(0):
        os.sched_yield()

    pipe.cancelled = True

    with pytest.raises(Cancelled):
        join()
    os.close(reading)
    pipe.close()


def test_reading_from_a_writer_that_sleeps_can_be_cancelled() -> None:
    """This happens when a VM is stopped while it is being received."""
    reading, writing = pair_of_pipe()
    pipe = Pipe(reading, select.POLLIN)
    join = in_thread(lambda: Sink().read(pipe))
    os.write(writing, written()[:100])

    pipe.cancelled = True

    with pytest.raises(Cancelled):
        join()
    os.close(writing)
    pipe.close()


def test_a_peer_that_does_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer of one pipe writes nothing, and the peer of the other one reads nothing."""
    monkeypatch.setattr(stream, "IDLE_TIMEOUT_S", 0.04)
    monkeypatch.setattr(stream, "LOOK_S", 0.02)
    reading, writing = pair_of_pipe()

    with pytest.raises(StreamError, match="has not moved"):
        Pipe(reading, select.POLLIN).read(1)
    with pytest.raises(StreamError, match="has not moved"):
        Pipe(writing, select.POLLOUT).write(bytes(1 << 20))

    os.close(reading)
    os.close(writing)


def test_a_closed_reader_gives_an_error() -> None:
    """The error tells that the reader has closed the stream."""
    reading, writing = pair_of_pipe()
    os.close(reading)
    pipe = Pipe(writing, select.POLLOUT)

    with pytest.raises(StreamError, match="was closed by its reader"):
        write(pipe)

    pipe.close()


def test_a_full_disk_gives_an_error() -> None:
    """The error has the kernel's text."""
    pipe = Pipe(os.open("/dev/full", os.O_WRONLY | os.O_CLOEXEC), select.POLLOUT)

    with pytest.raises(StreamError, match="cannot be written: No space left on device"):
        write(pipe)

    pipe.close()


def test_a_descriptor_of_the_wrong_kind(tmp_path: Path) -> None:
    """The descriptor cannot be written, or cannot be read."""
    file = tmp_path / "file"
    file.write_bytes(b"")
    unwritable = Pipe(os.open(file, os.O_RDONLY | os.O_CLOEXEC), select.POLLOUT)
    unreadable, sink = Pipe(os.open(file, os.O_WRONLY | os.O_CLOEXEC), select.POLLIN), Sink()

    with pytest.raises(StreamError, match="cannot be written: Bad file descriptor"):
        write(unwritable)
    with pytest.raises(StreamError, match="cannot be read: Bad file descriptor"):
        sink.read(unreadable)

    unwritable.close()
    unreadable.close()
    unreadable.close()  # the second call does nothing


def test_the_threads_of_digests_end() -> None:
    """Each reader and writer ends its threads, after success and after an error."""
    before = _thread._count()
    read(written())
    with pytest.raises(StreamError):
        read(written()[:-DIGEST_BYTES])
    wait_for_threads(before)


def wait_for_threads(count: int) -> None:
    """Wait until there are at most `count` threads: a joined thread, even of an earlier test, counts for a moment."""
    deadline = time.monotonic() + DEADLINE_S
    while _thread._count() > count:
        assert time.monotonic() < deadline
        pause()


def test_a_host_that_starts_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """If any of the threads cannot start, there is an error, and the others end."""
    before = _thread._count()
    for there_are in range(HASHERS):
        started: list[str] = []

        def start(name: str, work: Callable[[], object], started: list[str] = started, most: int = there_are) -> None:
            if len(started) == most:
                raise HostError(f"start thread {name}", errno.EAGAIN)
            started.append(name)
            work()

        raw = written()
        with monkeypatch.context() as patch:
            patch.setattr(stream, "start_thread", start)
            with pytest.raises(HostError, match="start thread hasher"):
                read(raw)

        wait_for_threads(before)


def test_a_reader_waits_for_its_hashers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads no further into a buffer that is still being hashed, however many sections there are."""
    made: list[stream.Hasher] = []

    class Counted(stream.Hasher):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    raw = written(tuple((gpa, b"memory") for gpa in range(0, 160, 16)))
    monkeypatch.setattr(stream, "Hasher", Counted)
    assert read(raw).states == [RECORD]
    assert len(made) == HASHERS


def test_memory_is_read_while_all_hashers_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """All hashers wait until one more run than there are hashers was read.  Their runs must not share a buffer."""
    generator = random.Random(2)
    runs = tuple((gpa, generator.randbytes(100)) for gpa in range(0, (HASHERS + 1) * 100, 100))
    raw, sink, all_there, late = written(runs), Sink(), threading.Event(), []

    class Digest:
        def __init__(self, data: bytes = b"") -> None:
            self.digest_of = hashlib.sha256(data)
            self.digest = self.digest_of.digest

        def update(self, data: bytes) -> None:
            if not all_there.wait(DEADLINE_S):
                late.append(data)
            self.digest_of.update(data)

    def take(gpa: int, data: memoryview) -> None:
        sink.memory[gpa : gpa + len(data)] = data
        if gpa == runs[-1][0]:
            all_there.set()

    monkeypatch.setattr(stream, "hashlib", SimpleNamespace(sha256=Digest))
    monkeypatch.setattr(sink, "take", take)
    pipe = source(raw)

    sink.read(pipe)

    assert (sink.states, late) == ([RECORD], [])
    pipe.close()
