"""The lines of all processes: whose they are, how they are written, and what holds back those who write too much."""

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from vmd.ipc import process as process_module
from vmd.ipc.imsg import Envelope
from vmd.ipc.logpair import logpair
from vmd.ipc.messages.log import LogSource
from vmd.log import ERR, INFO, JOURNAL, LINE_MAX, LOG_DAEMON, STDERR, SYSLOG, WARNING, RateLimit, log
from vmd.logger import sink as sink_module
from vmd.logger.main import (
    BATCH,
    LAST_WORDS_S,
    OWNER_BURST,
    OWNER_INTERVAL_S,
    PAUSE_S,
    SAY_AGAIN_S,
    VM_BURST,
    VM_INTERVAL_S,
    Logger,
)
from vmd.logger.sink import WAITING_MAX, Sink, entry
from vmd.logger.source import TITLE_MAX, Line, Source

NAME = "vm/db1"


OPEN: list[socket.socket] = []  # sockets of a test, which are closed after it
SINKS: list[Sink] = []  # whose threads are ended after it


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Close the sockets of a test after it, and end the threads."""
    yield
    while SINKS:
        sink = SINKS.pop()
        setattr(sink, "_deliver", sys.exit)  # noqa: B010 - the thread never ends by itself
        sink.put(line_of(Written().source))
    for thread in threading.enumerate():
        if thread.name == "writer":
            thread.join()
    while OPEN:
        OPEN.pop().close()


class Written:
    """The writing end of a source, and the source."""

    def __init__(self, name: str = NAME, vmid: int = 3, limits: tuple[RateLimit, ...] = ()) -> None:
        reader, self.writer = logpair()
        OPEN.extend((reader, self.writer))
        self.source = Source(reader, name, vmid, limits)

    def lines(self, *packets: bytes) -> list[tuple[int, str]]:
        """Write packets; return the lines that arrive."""
        for packet in packets:
            self.writer.send(packet)
        found: list[tuple[int, str]] = []
        while (lines := self.source.receive()) is not None:
            found += [(line.severity, line.text) for line in lines]
            if self.source.ended:
                break
        return found


@pytest.fixture
def written() -> Written:
    """A VM's source."""
    return Written()


# --- sources ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", [f"{NAME}: up", f"{NAME}/vioblk0: up", f"{NAME}/{'x' * (TITLE_MAX - 1)}: up", f"{NAME}: a: b"]
)
def test_a_line_of_the_vm_itself_is_as_it_is(written: Written, text: str) -> None:
    """Its title is that of the VM's process, or of one of its devices."""
    assert written.lines(b"<6>" + text.encode()) == [(INFO, text)]


@pytest.mark.parametrize(
    "text",
    [
        "vm/db2: up", "vm/db10: up", "vmd: up", f"{NAME}", f"{NAME} up", f"{NAME}/: up", f"{NAME}/a/b: up",
        f"{NAME}/a b: up", f"{NAME}x/a: up", f"{NAME}/{'x' * TITLE_MAX}: up", "", ": up",
    ],
)  # fmt: skip
def test_no_line_of_a_vm_has_another_name(written: Written, text: str) -> None:
    """A taken-over device could otherwise speak for another VM, or for the daemon."""
    assert written.lines(b"<6>" + text.encode()) == [(INFO, f"{NAME}: {text}")]


def test_a_line_is_one_line(written: Written) -> None:
    """Control characters are shown, and other bytes, too."""
    assert written.lines(f"<4>{NAME}: a\nb\x1b".encode() + b"\xff") == [(WARNING, f"{NAME}: a\\x0ab\\x1b\\xff")]


@pytest.mark.parametrize("packet", [b"<8>x\n", b"<x>x\n", b"<6 x\n", b"x6>x\n", b"<>6\n", b"<\n"])
def test_a_packet_without_a_severity_is_an_interpreter_s(written: Written, packet: bytes) -> None:
    """It is an error."""
    assert written.lines(packet) == [(ERR, f"{NAME}: {packet.decode().rstrip()}")]


def test_an_interpreter_s_lines_are_put_together(written: Written) -> None:
    """It writes them in any pieces.  The rest comes at the end of the source."""
    assert written.lines(b"Trace", b"back:\n  File\n\nend") == [
        (ERR, f"{NAME}: Traceback:"), (ERR, f"{NAME}:   File"), (ERR, f"{NAME}: "),
    ]  # fmt: skip
    written.writer.shutdown(socket.SHUT_WR)

    assert written.lines() == [(ERR, f"{NAME}: end")]
    assert written.source.ended


def test_a_line_without_an_end_is_cut(written: Written) -> None:
    """Otherwise it would fill the memory of the log."""
    assert written.lines(b"x" * LINE_MAX) == []
    assert written.lines(b"y") == [(ERR, f"{NAME}: {'x' * LINE_MAX}y")]
    assert written.lines(b"z\n") == [(ERR, f"{NAME}: z")]


def test_an_empty_packet_is_no_end(written: Written) -> None:
    """It has a sender, and the end has none."""
    assert written.lines(b"") == []
    assert not written.source.ended

    written.writer.close()
    assert written.lines() == []
    assert written.source.ended


def test_a_line_has_the_pid_of_its_sender(written: Written) -> None:
    """The kernel says which process that is."""
    written.writer.send(f"<6>{NAME}: up".encode())
    written.writer.send(b"raw\n")

    found = [line for _ in range(2) for line in written.source.receive() or ()]

    assert [line.pid for line in found] == [os.getpid()] * 2
    assert all(line.source is written.source for line in found)


def test_all_limits_must_allow_a_line() -> None:
    """Those of the VM and of its owner."""
    limits = RateLimit(2, 3600.0), RateLimit(1, 3600.0)
    made = Written(limits=limits)

    assert [made.source.allows() for _ in range(2)] == [True, False]


# --- the sink -----------------------------------------------------------------------------------------------------


class Ending(threading.Thread):
    """A thread that may end by SystemExit."""

    def run(self) -> None:
        """Run until then."""
        with contextlib.suppress(SystemExit):
            super().run()


class Output:
    """A place for the lines, in place of standard error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, form: str = STDERR, journal: bool = False) -> None:
        self.reading, self.writing = os.pipe()
        monkeypatch.setattr(sink_module, "OUTPUT_FD", self.writing)
        threads = SimpleNamespace(Thread=Ending, Condition=threading.Condition)
        monkeypatch.setattr(sink_module, "threading", threads)
        self.journal: socket.socket | None = None
        theirs: socket.socket | None = None
        if journal:
            self.journal, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            OPEN.extend((self.journal, theirs))
        self.calls: list[Callable[[], None]] = []
        self.sink = Sink(form, theirs, self.calls.append)
        SINKS.append(self.sink)

    def shown(self) -> bytes:
        """Return what was written, as soon as all is."""
        assert self.sink.wait_idle(60.0)
        os.set_blocking(self.reading, False)
        with contextlib.suppress(BlockingIOError):
            return os.read(self.reading, 1 << 16)
        return b""


def line_of(source: Source, text: str = f"{NAME}: up", severity: int = INFO, pid: int = 77) -> Line:
    """Return a line."""
    return Line(source, severity, text, pid)


@pytest.mark.parametrize(
    ("form", "shown"),
    [(STDERR, b"vm/db1: up\n"), (JOURNAL, b"<6>vm/db1: up\n"), (SYSLOG, b"<30>vmd[77]: vm/db1: up")],
)
def test_lines_have_the_form_of_the_place(
    monkeypatch: pytest.MonkeyPatch, written: Written, form: str, shown: bytes
) -> None:
    """With the pid of the process that has written them."""
    output = Output(monkeypatch, form)

    output.sink.put(line_of(written.source))

    assert output.shown() == shown
    assert written.source.waiting == 0


def test_lines_in_the_journal_have_fields(written: Written) -> None:
    """Only a VM's lines name a VM."""
    source = written.source
    assert entry(line_of(source)).decode() == (
        f"PRIORITY=6\nSYSLOG_FACILITY={LOG_DAEMON >> 3}\nSYSLOG_IDENTIFIER=vmd\nSYSLOG_PID=77\n"
        "VM_ID=3\nVM_NAME=db1\nMESSAGE=vm/db1: up\n"
    )
    source.vmid = 0
    assert entry(line_of(source, pid=0)).decode() == (
        "PRIORITY=6\nSYSLOG_FACILITY=3\nSYSLOG_IDENTIFIER=vmd\nMESSAGE=vm/db1: up\n"
    )


def test_standard_error_replaces_a_journal_that_is_gone(monkeypatch: pytest.MonkeyPatch, written: Written) -> None:
    """There the line has the severity, as the journal reads it from a stream."""
    output = Output(monkeypatch, journal=True)
    assert output.journal is not None
    output.sink.put(line_of(written.source))
    assert output.shown() == b""
    assert output.journal.recv(1000).endswith(b"MESSAGE=vm/db1: up\n")
    output.journal.close()

    output.sink.put(line_of(written.source))

    assert output.shown() == b"<6>vm/db1: up\n"


def test_lost_lines_are_counted(monkeypatch: pytest.MonkeyPatch, written: Written) -> None:
    """As soon as a line can be written again, the log says how many are missing."""
    output = Output(monkeypatch)
    monkeypatch.setattr(sink_module, "OUTPUT_FD", 999)
    for _ in range(3):
        output.sink.put(line_of(written.source))
    assert output.sink.wait_idle(60.0)
    monkeypatch.setattr(sink_module, "OUTPUT_FD", output.writing)

    for _ in range(2):
        output.sink.put(line_of(written.source))

    assert output.shown() == b"log: 3 lines could not be written\nvm/db1: up\nvm/db1: up\n"


def test_a_source_waits_for_room(monkeypatch: pytest.MonkeyPatch, written: Written) -> None:
    """Each has so many lines; it goes on when half of them are written."""
    output = Output(monkeypatch)
    other = Written("vm/other")
    with output.sink._changed:  # the writer waits for this
        rooms = [output.sink.put(line_of(written.source)) for _ in range(WAITING_MAX)]
        assert rooms == [True] * (WAITING_MAX - 1) + [False]
        assert not output.sink.has_room(written.source, lambda: None)
        assert output.sink.has_room(other.source, lambda: None)
        assert not output.sink.wait_idle(0.0)

    assert output.sink.wait_idle(60.0)

    assert written.source.waiting == 0
    assert len(output.calls) == 1
    assert output.sink.has_room(written.source, lambda: None)


# --- the process --------------------------------------------------------------------------------------------------


class Taken:
    """A sink that keeps the lines, and has room for so many of each source."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.room = 1 << 30
        self.on_room: Callable[[], None] = lambda: None
        self.idle = True

    def put(self, line: Line) -> bool:
        """Keep a line."""
        self.lines.append(line.text)
        self.room -= 1
        return self.room > 0

    def has_room(self, _source: Source, on_room: Callable[[], None]) -> bool:
        """Return whether there is room."""
        self.on_room = on_room
        return self.room > 0

    def wait_idle(self, _timeout_s: float) -> bool:
        """Return whether all lines are written."""
        return self.idle


class Rig:
    """The process, which is not run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        theirs, parent = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        monkeypatch.setattr(process_module, "CHANNEL_FD", theirs.detach())
        self.logger = Logger()
        self.logger.parent.close()
        parent.close()
        self.sink = Taken()
        monkeypatch.setattr(self.logger, "sink", self.sink, raising=False)
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.listening: set[int] = set()
        loop = self.logger.loop
        monkeypatch.setattr(loop, "add", lambda fd, _call: self.listening.add(fd))
        monkeypatch.setattr(loop, "remove", self.listening.remove)
        monkeypatch.setattr(loop, "call_later", lambda s, call: self.timers.append((s, call)))

    def add(self, name: str = NAME, limits: tuple[RateLimit, ...] = ()) -> Written:
        """Add a source."""
        made = Written(name, 3, limits)
        self.logger.sources.add(made.source)
        self.logger.listen(made.source)
        return made


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """The process, which is not run."""
    made = Rig(monkeypatch)
    yield made
    made.logger.loop.close()


def say(made: Written, count: int) -> None:
    """Write so many lines."""
    for number in range(count):
        made.writer.send(f"<6>{NAME}: {number}".encode())


def test_all_vms_of_an_owner_share_a_limit(rig: Rig) -> None:
    """Besides, each has its own.  Processes of the daemon have none."""

    def source(name: str, vmid: int, owner: int) -> Source:
        reader, writer = logpair()
        OPEN.append(writer)
        message = LogSource(name=name, vmid=vmid, owner_uid=owner)
        rig.logger.on_source(message, Envelope(message, 0, 0, {"source": [reader.detach()]}), None)  # type: ignore[arg-type]
        (added,) = [each for each in rig.logger.sources if each.name == name]
        OPEN.append(added.sock)
        return added

    a, b, other, daemon = source("vm/a", 1, 70), source("vm/b", 2, 70), source("vm/c", 3, 71), source("vmm", 0, 0)
    assert rig.listening == {each.fileno() for each in (a, b, other, daemon)}
    assert [(each.name, each.vmid) for each in (a, daemon)] == [("vm/a", 1), ("vmm", 0)]
    bursts = [[limit.burst for limit in each.limits] for each in (a, b, other, daemon)]
    assert bursts == [[VM_BURST, OWNER_BURST]] * 3 + [[]]
    assert [limit.interval_s for limit in a.limits] == [VM_INTERVAL_S, OWNER_INTERVAL_S]
    assert a.limits[1] is b.limits[1]
    assert a.limits[0] is not b.limits[0]
    assert a.limits[1] is not other.limits[1]
    assert VM_BURST < OWNER_BURST


def test_sources_take_turns(rig: Rig) -> None:
    """One that has more lines goes on later."""
    made = rig.add()
    say(made, BATCH + 2)

    rig.logger.on_readable(made.source)
    assert len(rig.sink.lines) == BATCH
    rig.logger.on_readable(made.source)

    assert len(rig.sink.lines) == BATCH + 2
    assert rig.listening == {made.source.fileno()}


def test_a_source_without_room_is_not_read(rig: Rig) -> None:
    """It is read again when there is room; its lines wait in its socket."""
    made = rig.add()
    say(made, 3)
    rig.sink.room = 2

    rig.logger.on_readable(made.source)
    assert len(rig.sink.lines) == 2
    assert rig.listening == set()
    rig.sink.on_room()

    assert rig.listening == {made.source.fileno()}


def test_a_source_that_writes_too_much_pauses(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log says so now and then."""
    now = [1000.0]
    monkeypatch.setattr("vmd.logger.main.time.monotonic", lambda: now[0])
    made = rig.add(limits=(RateLimit(1, 1e9),))
    said = "vmd: vm db1 writes too many lines: not all of them will be here"
    monkeypatch.setattr(log, "title", "vmd")

    for passed_s, expected in ((0.0, [f"{NAME}: 0", said]), (SAY_AGAIN_S - 1, []), (1.0, [said])):
        now[0] += passed_s
        say(made, 1)
        rig.sink.lines.clear()
        rig.logger.on_readable(made.source)
        assert rig.sink.lines == expected
        assert rig.listening == set()
        (again,) = rig.timers
        assert again[0] == PAUSE_S
        rig.timers.clear()
        again[1]()
        assert rig.listening == {made.source.fileno()}


def test_a_source_that_has_ended_is_forgotten(rig: Rig) -> None:
    """Its last lines are written."""
    made = rig.add()
    say(made, 1)
    made.writer.close()

    rig.logger.on_readable(made.source)

    assert rig.sink.lines == [f"{NAME}: 0"]
    assert (rig.listening, rig.logger.sources) == (set(), set())
    assert made.source.sock.fileno() == -1


def test_the_last_lines_of_all_sources_are_written(rig: Rig) -> None:
    """After Quit the process ends as soon as that is done.  One source cannot use up the time of the others."""
    made = rig.add(), rig.add("vm/other")
    say(made[0], BATCH)
    say(made[1], BATCH + 5)
    rig.logger.told_to_quit = True

    rig.logger.finish()

    assert len(rig.sink.lines) == 2 * BATCH + 5


def test_a_log_nobody_reads_does_not_keep_the_process(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives up after a while."""
    now = [1000.0]

    def tick() -> float:
        now[0] += 0.1
        return now[0]

    monkeypatch.setattr("vmd.logger.main.time.monotonic", tick)
    made = rig.add()
    rig.sink.idle = False
    rig.logger.told_to_quit = True

    rig.logger.finish()

    assert LAST_WORDS_S <= now[0] - 1000.0 < LAST_WORDS_S + 1
    assert made.source in rig.logger.sources


def test_the_last_lines_after_the_daemon_has_died(rig: Rig) -> None:
    """The process ends when all others have ended."""
    made = rig.add()
    say(made, 2)
    made.writer.close()

    rig.logger.finish()

    assert len(rig.sink.lines) == 2
    assert rig.logger.sources == set()
