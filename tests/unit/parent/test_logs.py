"""Warnings of the parent about logs that end (docs/security.md)."""

import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from tests.support.descriptors import open_descriptors
from vmd.config.model import Config, Owner, VmConfig
from vmd.errors import HostError, PeerError
from vmd.ipc.imsg import Envelope
from vmd.ipc.logpair import JOURNAL_FD
from vmd.ipc.messages.children import Ping, Pong, Quit
from vmd.ipc.messages.log import LogSource
from vmd.ipc.messages.vmm import VmLog
from vmd.log import JOURNAL, LEAF, STDERR, log
from vmd.parent import logs as module
from vmd.parent.core import Core
from vmd.parent.logs import AGAIN_S, END_S, OUR_ROOM_BYTES, PING_S, PINGS_MAX, QUEUE_MAX, SHUT_S, Logs
from vmd.parent.vm import Vm
from vmd.record import Record

SHUT = "vm a: one of its processes has shut down its log: nothing is logged till its next start"


class Loop:
    """The test calls the callbacks of files and timers."""

    def __init__(self) -> None:
        self.files: dict[int, Callable[[int], object]] = {}
        self.timers: list[tuple[float, Callable[[], object]]] = []

    def add(self, fd: int, on_ready: Callable[[int], object], _events: int = 0) -> None:
        """Add a file."""
        self.files[fd] = on_ready

    def remove(self, fd: int) -> None:
        """Remove a file."""
        del self.files[fd]

    def call_later(self, delay_s: float, call: Callable[[], object]) -> None:
        """Start a timer."""
        self.timers.append((delay_s, call))


class Rig:
    """A VM whose process has a log that ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loop = Loop()
        self.core = Core(cast("Any", self.loop), Config())
        self.logs = Logs(self.core, cast("Any", None))
        self.vm: Vm = self.core.vms.add(VmConfig(name="a"), from_config=True)
        self.said: list[str] = []
        monkeypatch.setattr("vmd.parent.logs.log.warn", self.said.append)
        self.vm.begin_start(0)
        ours, theirs = socket.socketpair()
        theirs.close()
        message = VmLog(vmid=self.vm.vmid)
        self.logs.on_vm_log(message, Envelope(message, 0, 0, {"log": [ours.detach()]}))
        self.vm.begin_run(4711)

    def hang_up(self) -> None:
        """Report the end of the log."""
        (on_ready,) = self.loop.files.values()
        on_ready(0)

    def look(self) -> list[str]:
        """Run the timer; return the warnings."""
        ((delay_s, look),) = self.loop.timers
        assert delay_s == SHUT_S
        look()
        return self.said


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """Yield a rig."""
    made = Rig(monkeypatch)
    yield made
    for source in made.logs._ended:  # kept for the next process "log", which never comes
        source.sock.close()


def test_a_running_vm_without_its_log_is_named(rig: Rig) -> None:
    """One of its processes has shut down the log."""
    rig.hang_up()

    assert rig.look() == [SHUT]


def test_a_vm_that_has_ended_is_not_named(rig: Rig) -> None:
    """Its log has ended with it."""
    rig.hang_up()
    rig.vm.ended("stopped")

    assert rig.look() == []


def test_a_vm_that_is_slow_to_start_again_is_not_named(rig: Rig) -> None:
    """Its files are still being opened.  The log that ended belongs to its last run."""
    rig.hang_up()
    rig.vm.ended("stopped")
    rig.vm.begin_start(0)

    assert rig.look() == []


def test_a_vm_whose_process_has_another_log_is_not_named(rig: Rig) -> None:
    """It was started again at once, and the log that ended belongs to its last run."""
    rig.hang_up()
    rig.vm.ended("stopped")
    rig.vm.begin_start(0)
    ours, theirs = socket.socketpair()
    rig.logs.read_vm(ours, rig.vm)
    rig.vm.begin_run(4712)

    assert rig.look() == []
    for end in (ours, theirs):
        end.close()


# --- the process ------------------------------------------------------------------------------------------------


class FakeChild:
    """The process `log`."""

    def __init__(self, pidfd: int) -> None:
        self.pidfd = pidfd
        self.status: int | None = None
        self.killed = False

    def kill(self) -> None:
        """Be killed."""
        self.killed = True

    def reap(self, _timeout_s: float = 0) -> int | None:
        """Return how it ended."""
        return self.status


class Channel:
    """The channel to the process.  It notes messages, and closes their descriptors."""

    def __init__(self) -> None:
        self.sent: list[Record] = []
        self.closed = self.flushed = False

    def send(self, message: Record, *, fds: dict[str, list[int]] | None = None) -> None:
        """Note a message."""
        self.sent.append(message)
        for fd in (fds or {}).get("source", []):
            os.close(fd)

    def sources(self) -> list[str]:
        """Return the names of the sources that it has got."""
        return [message.name for message in self.sent if isinstance(message, LogSource)]

    def close(self) -> None:
        """Be closed."""
        self.closed = True

    def flush_blocking(self, timeout_s: float) -> None:
        """Send all."""
        assert timeout_s == END_S
        self.flushed = True


class Process:
    """The room, whose processes are not real."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loop = Loop()
        self.core = Core(cast("Any", self.loop), Config())
        self.children: list[FakeChild] = []
        self.channels: list[Channel] = []
        self.trouble: HostError | None = None
        self.now_s = 1000.0
        self.said: list[str] = []
        self.logs = Logs(self.core, self.attach)
        monkeypatch.setattr(module, "spawn", self.spawn)
        monkeypatch.setattr("time.monotonic", lambda: self.now_s)
        monkeypatch.setattr("vmd.parent.logs.log.error", self.said.append)
        monkeypatch.setattr("vmd.parent.logs.log.setup", lambda *_words, fd=2: self.own.append(fd))
        self.own: list[int] = []  # descriptors that the parent writes its lines to

    def spawn(self, title: str, arguments: list[str], **more: Any) -> FakeChild:  # noqa: ANN401
        """Replaces `spawn`."""
        assert (title, arguments[0], more["outlives"]) == ("log", "log", True)
        if self.trouble is not None:
            raise self.trouble
        self.children.append(FakeChild(9000 + len(self.children)))
        return self.children[-1]

    def attach(self, sock: socket.socket, *_words: object, **more: object) -> Any:  # noqa: ANN401
        """Replaces `Process.attach`."""
        assert more["queue_limit"] == QUEUE_MAX
        sock.close()
        self.channels.append(Channel())
        return self.channels[-1]

    def timers(self) -> list[float]:
        """Return the delays of the timers, without those of pings."""
        return [delay_s for delay_s, _ in self.loop.timers if delay_s != PING_S or delay_s == AGAIN_S]

    def fire(self, name: str) -> None:
        """Run the timers that call a method of this name."""
        due = [call for _, call in self.loop.timers if getattr(call, "__name__", "") == name]
        self.loop.timers = [each for each in self.loop.timers if each[1] not in due]
        for call in due:
            call()

    def end(self, status: int) -> None:
        """Let the process end."""
        child = self.children[-1]
        child.status = status
        self.loop.files[child.pidfd](1)

    def close(self) -> None:
        """Close everything."""
        for source in (*self.logs._sources, *self.logs._ended):
            source.sock.close()
        for fd in self.own:
            if fd > 2:
                os.close(fd)


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Process]:
    """Give the room.  The process `log` is started.  No descriptor is left."""
    before = open_descriptors()
    process = Process(monkeypatch)
    process.logs.start(cast("Any", object()))
    yield process
    process.close()
    assert open_descriptors() == before


def test_the_parent_writes_to_the_process(process: Process) -> None:
    """Like every other process."""
    assert len(process.own) == 1
    assert process.channels[0].sent == [LogSource(name="vmd", vmid=0, owner_uid=0)]


@pytest.mark.parametrize(
    ("status", "how"), [(3, "ended with status 3"), (0, "ended with status 0"), (-9, "was killed by SIGKILL")]
)
def test_a_process_that_ends_is_replaced(process: Process, status: int, how: str) -> None:
    """The next one gets all logs, so that no line is lost.  Two starts are some time apart."""
    writer = process.logs.open("vmm")
    process.now_s += 1
    process.end(status)
    assert process.said == [f"process log {how}; starting another one"]
    assert process.children[0].pidfd not in process.loop.files
    assert process.channels[0].closed
    assert [delay for delay, call in process.loop.timers if call.__name__ == "_restart"] == [AGAIN_S - 1]
    other = process.logs.open("priv")
    assert len(process.channels) == 1
    process.fire("_restart")
    assert sorted(process.channels[1].sources()) == ["priv", "vmd", "vmm"]
    process.now_s += AGAIN_S + 1
    process.end(status)
    assert [delay for delay, call in process.loop.timers if call.__name__ == "_restart"] == [0]
    writer.close()
    other.close()


@pytest.mark.parametrize(("form", "there"), [(JOURNAL, True), (JOURNAL, False), (STDERR, True)])
def test_the_process_writes_to_the_journal(
    process: Process, monkeypatch: pytest.MonkeyPatch, form: str, there: bool
) -> None:
    """By a socket of its own, if there is a journal.  The parent keeps no copy."""
    journal, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    fd = journal.fileno()
    given: list[dict[int, int]] = []
    spawn = process.spawn

    def note(title: str, arguments: list[str], **more: Any) -> FakeChild:  # noqa: ANN401 - as spawn
        given.append(more["fds"])
        return spawn(title, arguments, **more)

    monkeypatch.setattr(module, "spawn", note)
    monkeypatch.setattr("vmd.parent.service.journal_socket", lambda: journal if there else None)
    process.logs._form = form
    process.end(1)
    process.fire("_restart")

    used = form == JOURNAL and there
    assert given == [{JOURNAL_FD: fd} if used else {}]
    assert (journal.fileno() == -1) == used
    journal.close()
    other.close()


def test_a_log_that_ends_between_two_processes_is_read(process: Process) -> None:
    """Its last lines are often the reason.  The one after the next does not get it."""
    writer = process.logs.open("vmm")
    process.end(1)
    (source,) = [each for each in process.logs._sources if each.name == "vmm"]
    writer.close()
    process.loop.files[source.sock.fileno()](0)
    process.fire("_restart")
    assert sorted(process.channels[1].sources()) == ["vmd", "vmm"]
    assert source.sock.fileno() == -1
    process.end(1)
    process.fire("_restart")
    assert process.channels[2].sources() == ["vmd"]


def test_a_log_that_ends_is_closed(process: Process) -> None:
    """The process has it, and reads it to its end."""
    writer = process.logs.open("vmm")
    (source,) = [each for each in process.logs._sources if each.name == "vmm"]
    writer.close()
    process.loop.files[source.sock.fileno()](0)
    assert source.sock.fileno() == -1


def test_a_process_that_cannot_be_started_again(process: Process) -> None:
    """It is tried again and again, by one timer."""
    process.end(1)
    process.trouble = HostError("fork", 11)
    for _ in range(3):
        process.fire("_restart")
        assert process.said[-1].endswith(f"trying again in {AGAIN_S:.0f} s")
        assert sum(call.__name__ == "_restart" for _, call in process.loop.timers) == 1
    process.trouble = None
    process.fire("_restart")
    assert len(process.channels) == 2


def test_a_process_that_does_not_answer_is_replaced(process: Process) -> None:
    """An answer counts for all pings before."""
    for _ in range(PINGS_MAX):
        process.fire("_ping")
    process.logs.on_pong(Pong(), cast("Any", None))
    for _ in range(PINGS_MAX):
        process.fire("_ping")
    assert sum(isinstance(message, Ping) for message in process.channels[0].sent) == 2 * PINGS_MAX
    assert [child.killed for child in process.children] == [False]
    process.fire("_ping")
    assert [child.killed for child in process.children] == [True]
    assert process.said == [f"process log has not answered for {PINGS_MAX * PING_S:.0f} s; starting another one"]
    process.end(-9)  # late: the next one is not lost by that
    process.fire("_restart")
    assert len(process.channels) == 2
    for _ in range(PINGS_MAX):
        process.fire("_ping")
    assert not process.children[1].killed


@pytest.mark.parametrize("error", [None, PeerError("log", "is mad")])
def test_a_process_whose_channel_ends(process: Process, error: PeerError | None) -> None:
    """It is killed if it has broken the protocol.  Else it ends by itself."""
    process.logs._on_lost(cast("Any", process.channels[0]), error)
    assert process.children[0].killed == (error is not None)
    process.fire("_ping")
    assert process.channels[0].sources() == ["vmd"]


@pytest.mark.parametrize("hangs", [False, True])
def test_the_end_of_the_daemon(process: Process, hangs: bool) -> None:
    """The process writes all lines before it ends.  One that hangs is killed."""
    process.children[0].status = None if hangs else 0
    process.logs.end()
    assert isinstance(process.channels[0].sent[-1], Quit)
    assert (process.channels[0].flushed, process.children[0].killed) == (True, hangs)


def test_a_log_of_a_vm_that_is_no_socket(process: Process) -> None:
    """It breaks the protocol, and the descriptor is closed."""
    fd = os.open(os.devnull, os.O_RDONLY)
    message = VmLog(vmid=1)
    with pytest.raises(PeerError, match="the log of vm 1 is no socket"):
        process.logs.on_vm_log(message, Envelope(message, 0, 0, {"log": [fd]}))


def test_the_log_of_the_vm_in_reserve(process: Process) -> None:
    """It belongs to no VM yet."""
    ours, theirs = socket.socketpair()
    message = VmLog(vmid=0)
    process.logs.on_vm_log(message, Envelope(message, 0, 0, {"log": [ours.detach()]}))
    assert process.channels[0].sent[-1] == LogSource(name="vm", vmid=0, owner_uid=0)
    vm = process.core.vms.add(VmConfig(name="a", owner=Owner(uid=70)), from_config=True)
    ours, other = socket.socketpair()
    process.logs.read_vm(ours, vm)
    assert process.channels[0].sent[-1] == LogSource(name="vm/a", vmid=vm.vmid, owner_uid=70)
    theirs.close()
    other.close()


@pytest.mark.parametrize("form", [LEAF, STDERR])
def test_the_parent_writes_its_last_lines_itself(process: Process, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """If it has written them to the process before."""
    fd = os.open(os.devnull, os.O_WRONLY)
    monkeypatch.setattr(log, "fd", fd)
    monkeypatch.setattr(log, "form", form)
    process.children[0].status = 0
    process.logs.end()

    assert process.own[1:] == ([2] if form == LEAF else [])
    assert os.path.exists(f"/proc/self/fd/{fd}") == (form != LEAF)
    if form != LEAF:
        os.close(fd)


def test_a_log_that_cannot_be_passed_on(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor is free.  The parent's log names it, and the next process gets it."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "fcntl", refuse)
        writer = process.logs.open("vmm")
    assert process.said == ["log of vmm: cannot be passed on: Too many open files"]
    process.end(1)
    process.fire("_restart")
    assert "vmm" in process.channels[1].sources()
    writer.close()


@pytest.mark.root
def test_the_parent_writes_the_most_lines(process: Process) -> None:
    """More of its lines may wait than of other processes."""
    with socket.socket(fileno=os.dup(process.own[0])) as writer:
        assert writer.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= OUR_ROOM_BYTES
