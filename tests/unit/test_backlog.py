"""The last output of a console, in memory that a VM process writes and the parent reads."""

import fcntl
import os
import random
import struct
from collections.abc import Iterator

import pytest

from tests.support.descriptors import open_descriptors
from vmd.backlog import (
    BACKLOG_BYTES,
    BEGUN,
    COUNTERS,
    FILE_BYTES,
    LOGGED,
    PASSED,
    SHOWN,
    Backlog,
    BacklogWriter,
    LoggedBacklog,
)


@pytest.fixture
def backlog() -> Iterator[Backlog]:
    """A new backlog."""
    backlog = Backlog.create()
    yield backlog
    backlog.close()


def writer_of(backlog: Backlog) -> BacklogWriter:
    """Return the writer in a VM process."""
    return BacklogWriter(os.dup(backlog.fd))


def test_random_output_is_kept_and_passed_on(backlog: Backlog) -> None:
    """It equals a plain record, while the ring wraps around many times and writers change."""
    noise = random.Random(3)
    writer = writer_of(backlog)
    printed, passed = b"", 0
    for step in range(400):
        data = noise.randbytes(noise.choice((1, 1, 7, 300, 5000, BACKLOG_BYTES + 5 if step % 50 == 0 else 2)))
        printed += data
        writer.write(data)
        passed = max(passed, len(printed) - BACKLOG_BYTES)
        assert writer.waiting == len(printed) - passed
        if noise.random() < 0.5:
            piece = writer.next_piece(4096)
            assert bytes(piece) == printed[passed : passed + len(piece)]
            assert len(piece) > 0
            writer.pass_on(len(piece))
            passed += len(piece)
        if step % 37 == 0:
            writer = writer_of(backlog)  # the guest has reset itself
        output = backlog.read()
        assert output.data == printed[-BACKLOG_BYTES:]
        assert (output.end, output.passed) == (len(printed), passed)
        before = noise.randrange(len(printed) + 1)
        assert output.since(before) == printed[max(before, len(printed) - BACKLOG_BYTES) :]
        assert backlog.read(before).data == printed[max(0, len(printed) - BACKLOG_BYTES) : before]


def test_a_later_life_continues_to_count() -> None:
    """Positions in the output count through all lives of a VM.  Output of earlier lives is not there."""
    backlog = Backlog.create(100_000)
    writer = writer_of(backlog)
    writer.write(b"hello")

    output = backlog.read()

    assert (output.data, output.end) == (b"hello", 100_005)
    assert (output.since(100_002), output.since(7)) == (b"llo", b"hello")
    assert writer.pass_all() == 100_005
    assert writer.waiting == 0
    backlog.close()


def test_its_size_is_sealed(backlog: Backlog) -> None:
    """A VM process can neither grow it nor truncate it under a reader."""
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(backlog.fd, size)


def test_any_counters_are_tolerated(backlog: Backlog) -> None:
    """A VM process that was taken over may write anything."""
    noise = random.Random(4)
    values = (0, 1, BACKLOG_BYTES, 1 << 32, (1 << 63) - 1, (1 << 64) - 1)
    for _ in range(300):
        counters = [noise.choice((*values, noise.getrandbits(64))) for _ in (SHOWN, PASSED, BEGUN)]
        os.pwrite(backlog.fd, COUNTERS.pack(*counters), 0)
        for upto in (None, 0, -5, 10, 1 << 63):
            output = backlog.read(upto)
            assert len(output.data) <= BACKLOG_BYTES
            assert output.end - len(output.data) <= output.passed <= output.end
            assert len(output.since(noise.getrandbits(64))) <= BACKLOG_BYTES


def test_a_file_that_is_too_short(tmp_path: str) -> None:
    """The writer refuses it."""
    fd = os.memfd_create("short")
    os.write(fd, struct.pack("<Q", 1))
    with pytest.raises(ValueError, match="length"):
        BacklogWriter(fd)


def test_its_form_is_that_of_every_version() -> None:
    """A parent reads the backlogs of VMs that an earlier version has started."""
    assert (BACKLOG_BYTES, FILE_BYTES, COUNTERS.size) == (65536, 69632, 24)
    assert (SHOWN, PASSED, BEGUN, LOGGED) == (0, 1, 2, 3)


def test_failures_leave_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither that of a new file, nor that of a file that is too short for the log."""
    before = open_descriptors()
    short = os.memfd_create("short")
    with pytest.raises(ValueError, match="length"):
        LoggedBacklog(short, 0)

    def fail(*_arguments: object) -> int:
        raise OSError(28, "no")

    monkeypatch.setattr(fcntl, "fcntl", fail)
    with pytest.raises(OSError, match="no"):
        Backlog.create()
    assert open_descriptors() == before


def test_fresh_output_for_the_log(backlog: Backlog) -> None:
    """Each byte is given once."""
    writer_of(backlog).write(b"hello")
    log = LoggedBacklog(os.dup(backlog.fd), 0)
    assert (log.shown(), log.fresh()) == (5, (0, b"hello"))
    log.log(2)
    assert log.fresh() == (0, b"llo")
    log.log(3)
    assert log.fresh() == (0, b"")
    writer_of(backlog).write(b"x" * BACKLOG_BYTES + b"end")
    assert [log.fresh()[0], len(log.fresh()[1])] == [3, BACKLOG_BYTES - 8]
    log.close()


@pytest.mark.parametrize("logged", [0, 7, (1 << 63) + 5, (1 << 64) - 1])
def test_any_count_of_the_log_is_tolerated(backlog: Backlog, logged: int) -> None:
    """A VM process may have written it.  The process that writes logs of other VMs, too, must go on."""
    os.pwrite(backlog.fd, COUNTERS.pack((1 << 64) - 1, 0, (1 << 64) - 1), 0)
    os.pwrite(backlog.fd, logged.to_bytes(8, "little"), 24)
    log = LoggedBacklog(os.dup(backlog.fd), 0)
    assert log.logged == logged
    log.log(10)
    assert int.from_bytes(os.pread(backlog.fd, 8, 24), "little") == (logged + 10) % (1 << 64)
    log.close()
