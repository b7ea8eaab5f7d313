"""A console log has all output in order, and reports what it lacks."""

import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from vmd.backlog import BACKLOG_BYTES, Backlog, BacklogWriter, LoggedBacklog
from vmd.consolelog import keeper
from vmd.consolelog.keeper import MISSING, OVERRUN_BYTES, Keeper, State
from vmd.ipc import courier
from vmd.ipc.messages.consolelog import SILENT

DEADLINE_S = 60.0
LIMIT = 1 << 20


class Log:
    """A VM's backlog, and its keeper.  `reports` are the messages to the parent."""

    def __init__(self, start: int = 0) -> None:
        self.backlog = Backlog.create(start)
        self.guest = BacklogWriter(os.dup(self.backlog.fd))
        self.reports: list[State] = []
        self.changed = threading.Condition()
        self.keepers: list[Keeper] = []
        self.begin()

    def begin(self) -> Keeper:
        """Start a keeper, as a process that was started again would."""
        self.keeper = Keeper("a", LoggedBacklog(os.dup(self.backlog.fd), self.backlog.start), self.report, self.call)
        self.keepers.append(self.keeper)
        return self.keeper

    def report(self, state: State) -> None:
        """Record a report to the parent."""
        self.reports.append(state)

    def call(self, call: Callable[[], None]) -> None:
        """Call at once, because there is no main thread here."""
        with self.changed:
            call()
            self.changed.notify_all()

    def until(self, condition: Callable[[], bool]) -> None:
        """Have the keeper look until a condition holds."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline_s, vars(self.keeper._state)
            self.keeper.look()
            with self.changed:
                self.changed.wait(0.01)

    def written(self) -> bool:
        """Return whether all output is written."""
        return self.keeper.backlog.logged == self.guest.shown and not self.keeper._busy_s

    def print(self, data: bytes) -> None:
        """Let the guest print, and wait until the output is written."""
        self.guest.write(data)
        self.until(self.written)

    def give(self, path: Path | str, limit: int = LIMIT) -> None:
        """Open a file for the log, and wait until the keeper has it."""
        files = self.keeper._state.files
        asks, gives = courier.pair()
        self.keeper.take_file(asks, limit)
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        give(gives, fd)
        self.until(lambda: self.keeper._state.files > files and not self.keeper._busy_s)

    def end(self) -> State:
        """End the log; return the last report."""
        self.keeper.end()
        self.until(lambda: self.keeper.ended and bool(self.reports) and self.reports[-1].ended)
        return self.reports[-1]


def give(sock: socket.socket, fd: int) -> None:
    """Pass a file, as a logfile process does."""
    with sock:
        sock.settimeout(DEADLINE_S)
        assert courier.give(sock, {"log": [fd]})
    os.close(fd)


@pytest.fixture
def log() -> Iterator[Log]:
    """Yield the log of a guest that has printed nothing."""
    log = Log(start=77)
    yield log
    log.keeper.end()
    log.until(lambda: log.keeper.ended)
    log.backlog.close()
    for each in log.keepers:
        each.backlog.close()


def test_the_log_has_all_output_in_order(log: Log, tmp_path: Path) -> None:
    """This includes output before the first file and at the end.  Output is appended to an existing file."""
    path = tmp_path / "a.log"
    path.write_bytes(b"of an earlier life\n")
    said = bytearray(b"first words\n")
    log.guest.write(bytes(said))
    log.give(path)
    random = Random(5)
    for _ in range(40):
        piece = random.randbytes(random.randrange(1, 9000))
        said += piece
        log.print(piece)
    log.guest.write(b"last words")

    end = log.end()

    assert path.read_bytes() == b"of an earlier life\n" + said + b"last words"
    assert (end.lost, end.text, end.files) == (0, "", 1)


def test_a_full_log_waits_for_the_next_file(log: Log, tmp_path: Path) -> None:
    """It requests one.  Until that comes, the file grows by at most OVERRUN_BYTES.  Nothing is lost."""
    first, second = tmp_path / "1", tmp_path / "2"
    limit = 65536
    log.give(first, limit)
    said = bytearray()
    for number in range(limit // 1000):
        said += b"%06d\n" % number * 142
        log.print(bytes(said[-994:]))
    assert not log.reports[-1].wants_file
    while len(said) < limit + OVERRUN_BYTES + 3000:
        said += b"x" * 3000
        log.guest.write(bytes(said[-3000:]))
        log.until(lambda: log.written() or first.stat().st_size >= limit + OVERRUN_BYTES)
    log.until(lambda: log.reports[-1].wants_file)
    assert first.stat().st_size == limit + OVERRUN_BYTES

    log.give(second, limit)
    log.until(log.written)

    assert first.read_bytes() + second.read_bytes() == said
    assert (log.reports[-1].wants_file, log.reports[-1].lost) == (False, 0)


def test_full_storage_is_reported_once_and_lost_output_is_counted(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 KiB wait for free space.  The log says where more output is missing."""
    monkeypatch.setattr(keeper, "RETRY_S", 0.01)
    log.give("/dev/full")
    said = bytearray()
    for number in range(30):
        said += b"%06d\n" % number * 1000
        log.guest.write(bytes(said[-7000:]))
        log.until(lambda: bool(log.keeper._state.text))
    log.until(lambda: log.reports[-1].text == "No space left on device")
    assert [state.text for state in log.reports if state.text] == ["No space left on device"]
    assert not log.reports[-1].wants_file  # another file would have no more space

    log.give(tmp_path / "a.log")
    log.until(log.written)

    lost = len(said) - BACKLOG_BYTES
    assert (tmp_path / "a.log").read_bytes() == MISSING.format(lost).encode() + said[lost:]
    assert (log.reports[-1].text, log.end().lost) == ("", lost)


def test_output_that_is_never_written_is_counted_at_the_end(log: Log) -> None:
    """The log of this VM never had a file."""
    log.guest.write(b"x" * 100)

    assert log.end().lost == 100


def test_a_log_that_was_removed_is_created_again(log: Log, tmp_path: Path) -> None:
    """Another program removes it.  Output from then on waits for the new file."""
    path = tmp_path / "a.log"
    log.give(path)
    log.print(b"before\n")
    path.unlink()
    log.guest.write(b"after\n")
    log.until(lambda: log.reports[-1].wants_file)

    log.give(path)
    log.until(log.written)

    assert path.read_bytes() == b"after\n"


def test_a_log_that_was_truncated_has_space_again(log: Log, tmp_path: Path) -> None:
    """Some programs copy logs and then truncate them."""
    path = tmp_path / "a.log"
    log.give(path, 65536)
    log.print(b"x" * 60000)
    os.truncate(path, 0)
    log.print(b"y" * 60000)

    assert path.read_bytes() == b"y" * 60000
    assert not log.reports[-1].wants_file


def test_the_next_keeper_continues_where_the_last_one_ended(log: Log, tmp_path: Path) -> None:
    """The earlier one was killed, perhaps with its daemon.

    Nothing is written twice, and all of the backlog is written.
    """
    path = tmp_path / "a.log"
    log.give(path)
    log.print(b"before\n")
    log.keeper.end()
    log.until(lambda: log.keeper.ended)
    log.guest.write(b"meanwhile\n")

    log.begin()
    log.give(path)
    log.print(b"after\n")

    assert path.read_bytes() == b"before\nmeanwhile\nafter\n"


def test_storage_that_does_not_answer_is_reported_once(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that does not return blocks only this log.  When it returns, the report is withdrawn."""
    reader, writer = os.pipe()
    log.give(tmp_path / "a.log")
    os.dup2(writer, log.keeper._file)  # a pipe without a reader stands in for storage that blocks
    log.print(b"x" * BACKLOG_BYTES)
    log.guest.write(b"y" * BACKLOG_BYTES)
    log.until(lambda: log.keeper._busy_s > 0)  # the write does not return
    monkeypatch.setattr(keeper, "STUCK_S", -DEADLINE_S)
    for _ in range(10):
        log.keeper.look()
    assert [state.text for state in log.reports].count(SILENT) == 1

    monkeypatch.setattr(keeper, "STUCK_S", DEADLINE_S)
    while log.keeper.backlog.logged < log.guest.shown:
        if select.select([reader], [], [], 0.01)[0]:
            os.read(reader, 1 << 16)
    log.until(lambda: log.reports[-1].text == "")
    os.close(reader)
    os.close(writer)


def test_a_vm_that_lies_about_what_it_has_printed(log: Log, tmp_path: Path) -> None:
    """Its process may write any counters.  The keeper continues."""
    path = tmp_path / "a.log"
    random = Random(11)
    for _ in range(200):
        values = [random.choice((0, 1, 77, 1 << 16, 1 << 32, (1 << 63) - 1, (1 << 64) - 1)) for _ in range(4)]
        os.pwrite(log.backlog.fd, struct.pack("<4Q", *values), 0)
        log.keeper.look()
        if random.random() < 0.05:
            log.begin()
            log.give(path, 1 << 30)
    log.until(lambda: not log.keeper._busy_s)

    assert all(each.backlog.logged >= 0 for each in log.keepers)
    assert not log.keeper.ended
