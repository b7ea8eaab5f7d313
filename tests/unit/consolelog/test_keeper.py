"""A console log has all output in order, and reports what it lacks."""

import errno
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, cast

import pytest

from vmd.backlog import BACKLOG_BYTES, Backlog, BacklogWriter, LoggedBacklog
from vmd.consolelog import keeper
from vmd.consolelog.keeper import MISSING, OVERRUN_BYTES, RETRY_S, SAY_S, STUCK_S, TRIES, Keeper, State
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
    for each in log.keepers:
        each.end()
    log.until(lambda: all(each.ended for each in log.keepers))
    log.backlog.close()
    for each in log.keepers:
        each.backlog.close()
    del log.guest  # unmaps the backlog


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


# --- one step at a time -------------------------------------------------------------------------------------------


class Output:
    """A backlog whose numbers the test sets."""

    def __init__(self) -> None:
        self.printed = self.logged = 0
        self.found: list[tuple[int, bytes]] = []

    def shown(self) -> int:
        """Return how much was printed."""
        return self.printed

    def fresh(self) -> tuple[int, bytes]:
        """Return the next output, and how much is missing before it."""
        return self.found.pop(0) if self.found else (0, b"")

    def log(self, count: int) -> None:
        """Note what is written or lost."""
        self.logged += count


class Steps:
    """A keeper without a thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(keeper, "start_thread", lambda *_: None)
        self.now_s = 1000.0
        monkeypatch.setattr("time.monotonic", lambda: self.now_s)
        self.reports: list[State] = []
        self.output = Output()
        self.keeper = Keeper("a", cast("Any", self.output), self.reports.append, lambda call: call())

    def woken(self) -> bool:
        """Return whether the thread was woken since the last call."""
        woken, self.keeper._woken = self.keeper._woken, False
        return woken


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """A keeper without a thread."""
    return Steps(monkeypatch)


@pytest.mark.parametrize(
    ("printed", "file", "retry_s", "wakes"),
    [
        (10, 0, 0.0, True),
        (10, 5, 0.0, True),
        (9, 5, 0.0, False),  # all is written
        (10, -1, 0.0, False),
        (10, 5, 1000.0, True),
        (10, 5, 1000.1, False),
    ],
)
def test_the_thread_works_only_if_there_is_something_to_write(
    steps: Steps, printed: int, file: int, retry_s: float, wakes: bool
) -> None:
    """And a file, and the last failure is some time ago.  Without output nothing costs a system call."""
    steps.output.printed, steps.output.logged = printed, 9
    steps.keeper._file, steps.keeper._retry_s = file, retry_s

    assert steps.keeper.look() is wakes
    assert steps.woken() is wakes
    assert steps.reports == []


def test_a_write_that_takes_long(steps: Steps) -> None:
    """It is reported once, and withdrawn with the state that the log had.  Meanwhile the guest counts as printing."""
    steps.keeper._state.text = "old"
    steps.keeper._busy_s = steps.now_s
    for passed_s, prints, texts in (
        (0.0, True, []), (STUCK_S, True, []), (0.1, False, [SILENT]), (1.0, False, [SILENT]),
    ):  # fmt: skip
        steps.now_s += passed_s
        assert steps.keeper.look() is prints
        assert [state.text for state in steps.reports] == texts
    assert not steps.woken()
    steps.keeper._busy_s = 0.0
    for _ in range(2):
        assert steps.keeper.look() is False
        assert [state.text for state in steps.reports] == [SILENT, "old"]


def test_reports_of_losses_only_are_rare(steps: Steps) -> None:
    """A guest can cause them.  Any other change is reported at once, and nothing is reported twice."""
    heard = []
    for passed_s, change in (
        (0.0, {}),
        (0.0, {"lost": 1}),
        (1.0, {"lost": 2}),
        (SAY_S - 1.1, {"lost": 3}),
        (0.1, {"lost": 4}),
        (1.0, {"lost": 5, "text": "full"}),
        (0.0, {"wants_file": True}),
        (SAY_S, {}),
        (0.0, {"ended": True}),
    ):
        steps.now_s += passed_s
        for name, value in change.items():
            setattr(steps.keeper._state, name, value)
        steps.reports.clear()
        steps.keeper._say()
        heard += [[state.lost for state in steps.reports]]
    assert heard == [[], [1], [], [], [4], [5], [5], [], [5]]


def test_storage_that_fails(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another file may help, unless the file system is full.  The next try comes some time later."""
    steps.output.found = [(0, b"x")]
    steps.keeper.take_file(None, LIMIT)
    for number, wants_file in ((errno.ENOSPC, False), (errno.EDQUOT, False), (errno.EIO, True)):

        def fail(_fd: int, _data: bytes, number: int = number) -> int:
            raise OSError(number, os.strerror(number))

        fd = steps.keeper._file = os.open(os.devnull, os.O_WRONLY)
        steps.output.found = [(0, b"x")]
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", fail)
            steps.keeper._write_all()
        state = steps.keeper._state
        assert (state.text, state.wants_file) == (os.strerror(number), wants_file)
        assert steps.keeper._retry_s == steps.now_s + RETRY_S
        assert (steps.keeper._file == -1) == wants_file == (not os.path.exists(f"/proc/self/fd/{fd}"))
        if not wants_file:
            os.close(fd)


def test_output_that_the_backlog_has_lost(steps: Steps, tmp_path: Path) -> None:
    """It is counted, and the log says where it is missing.  A guest that prints too fast is read at the next look."""
    steps.keeper.take_file(None, LIMIT)
    fd = steps.keeper._file = os.open(tmp_path / "a", os.O_WRONLY | os.O_CREAT)
    steps.output.found = [(7, b""), (5, b"abc"), (0, b"def")]
    steps.keeper._write_all()
    assert (tmp_path / "a").read_bytes() == MISSING.format(12).encode() + b"abcdef"
    assert (steps.keeper._state.lost, steps.output.logged) == (12, 18)
    steps.output.found = [(1, b"")] * TRIES + [(0, b"late")]
    steps.keeper._write_all()
    assert steps.output.found == [(0, b"late")]
    assert steps.keeper._state.lost == 12 + TRIES
    steps.output.printed, steps.output.logged = 10, 4
    steps.keeper._count_rest()
    steps.output.printed = 0  # a lie of the VM's process
    steps.keeper._count_rest()
    assert steps.keeper._state.lost == 12 + TRIES + 6
    os.close(fd)


def test_only_the_latest_file_counts(steps: Steps) -> None:
    """The courier of an earlier one is closed.  A process that sends none leaves the present file."""
    (first, other), (second, gone) = courier.pair(), courier.pair()
    other.close()
    gone.close()
    steps.keeper.take_file(first, 1)
    assert steps.woken()
    steps.keeper.take_file(second, 2)
    assert (first.fileno(), steps.keeper._next, steps.keeper._limit) == (-1, second, 2)
    steps.keeper.take_file(None, 3)
    assert (steps.keeper._next, steps.keeper._limit) == (second, 3)
    steps.keeper._file = 5
    steps.keeper._fetch(second)
    assert (steps.keeper._file, steps.keeper._state.files, second.fileno()) == (5, 0, -1)
