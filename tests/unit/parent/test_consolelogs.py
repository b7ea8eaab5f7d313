"""Which VMs have a console log, what its writer and openers are told, and what is logged when they fail."""

import contextlib
import errno
import os
import pwd
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support.descriptors import open_descriptors
from vmd.config.model import Config, ConsoleLog, Owner, VmConfig
from vmd.errors import HostError, OperatorError
from vmd.ipc.logfile import FD_ANSWER, FD_COURIER, unpack
from vmd.ipc.messages.children import Ping, Pong, Quit
from vmd.ipc.messages.clients import Caller, ConsoleLogAt, ConsoleLogRequest
from vmd.ipc.messages.consolelog import ConsoleFile, ConsoleKept, DropConsole, KeepConsole
from vmd.log import log
from vmd.parent import consolelogs
from vmd.parent.access import NOGROUP
from vmd.parent.consolelogs import AT_A_TIME, ConsoleLogs
from vmd.parent.core import Core
from vmd.parent.vm import Vm
from vmd.record import Record

ENVELOPE = cast("Any", None)


class Child:
    """A process that does nothing."""

    def __init__(self) -> None:
        self.killed = False
        self.pidfd = 99

    def kill(self) -> None:
        """Note that it was killed."""
        self.killed = True

    def reap(self) -> None:
        """Return None: it has not ended."""


class Opener(Child):
    """A logfile process.  The test calls `answer` for it."""

    def __init__(self, arguments: list[str], fds: dict[int, int]) -> None:
        super().__init__()
        self.wanted = unpack(arguments)
        self.writer = os.dup(fds[FD_ANSWER])
        self.courier = socket.socket(fileno=os.dup(fds[FD_COURIER]))

    def answer(self, text: str) -> None:
        """Answer whether there is a file, and end."""
        os.write(self.writer, f"{text}\n".encode())
        self.end()

    def end(self) -> None:
        """Close all descriptors."""
        os.close(self.writer)
        self.courier.close()


class Timer:
    """A timer that can be cancelled."""

    def __init__(self, loop: "Loop", timer: tuple[float, Callable[[], None]]) -> None:
        self.loop = loop
        self.timer = timer

    def cancel(self) -> None:
        """Remove the timer, if it has not expired."""
        with contextlib.suppress(ValueError):
            self.loop.timers.remove(self.timer)


class Loop:
    """Callbacks that the test calls."""

    def __init__(self) -> None:
        self.readers: dict[int, Callable[[int], None]] = {}
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def add(self, fd: int, call: Callable[[int], None]) -> None:
        """Add a descriptor."""
        self.readers[fd] = call

    def remove(self, fd: int) -> None:
        """Remove a descriptor."""
        del self.readers[fd]

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Timer:
        """Start a timer."""
        self.timers.append((delay_s, call))
        return Timer(self, (delay_s, call))

    def read(self) -> None:
        """Call the callbacks of all descriptors."""
        for call in list(self.readers.values()):
            call(1)

    def fire(self, delay_s: float) -> None:
        """Run the timers of this delay."""
        for timer in [timer for timer in self.timers if timer[0] == delay_s]:
            self.timers.remove(timer)
            timer[1]()


class Parent:
    """The part of the parent that the room needs."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.core = Core(cast("Any", self.loop), Config())
        self.room = ConsoleLogs(self.core, self.attach)
        self.room.start(cast("Any", self), cast("Any", None))
        self.openers: list[Opener] = []
        self.sent: list[Record] = []
        self.on_lost: Callable[..., None] = lambda *_: None
        self.starts = 0
        self.writers: list[Child] = []
        self.flushed = 0
        self.trouble: Exception | None = None  # of a start

    def start(self, _proc: object, _open_log: object) -> tuple[Child, None]:
        """Start the process that writes logs."""
        self.starts += 1
        if self.trouble is not None:
            raise self.trouble
        self.writers.append(Child())
        return self.writers[-1], None

    def start_log_file(self, _open_log: object, _name: str, arguments: list[str], fds: dict[int, int]) -> Opener:
        """Start a process that opens a log."""
        if self.trouble is not None:
            raise self.trouble
        self.openers.append(Opener(arguments, fds))
        return self.openers[-1]

    def attach(self, *_arguments: object, on_lost: Callable[..., None], **_more: object) -> Any:  # noqa: ANN401 - us
        """Return this object as the channel."""
        self.on_lost = on_lost
        self.closed = False
        return self

    def send(self, message: Record, *, fds: dict[str, list[int]] | None = None) -> None:
        """Record a message."""
        self.sent.append(message)
        for fd in (fd for each in (fds or {}).values() for fd in each):
            os.close(fd)

    def close(self) -> None:
        """Note that the channel was closed."""
        self.closed = True

    def flush_blocking(self, _timeout_s: float) -> None:
        """Note that all that was sent has arrived."""
        self.flushed = len(self.sent)

    def run(self, name: str = "a", wanted: ConsoleLog | None = None, owner: Owner | None = None) -> Vm:
        """Return a running VM."""
        config = VmConfig(name=name, console_log=wanted or ConsoleLog(path="/v/%n"), owner=owner or Owner())
        vm = self.core.vms.add(config, from_config=True)
        vm.open_console()
        vm.begin_start(0)
        vm.begin_run(1)
        self.room.look(vm)
        return vm

    def told(self) -> list[Record]:
        """Return the messages to the process since the last call, except pings."""
        told: list[Record] = [each for each in self.sent if isinstance(each, TOLD)]
        self.sent = []
        return told

    def report_log(self, number: int = 1, **what: Any) -> None:  # noqa: ANN401 - fields of the message
        """Have the process report the state of a log."""
        self.room.on_kept(ConsoleKept(number=number, **what), ENVELOPE)


TOLD = (KeepConsole, ConsoleFile, DropConsole)


@pytest.fixture
def parent() -> Iterator[Parent]:
    """Yield a parent without VMs."""
    made = Parent()
    yield made
    made.room.children = None
    for kept in list(made.room.kept.values()):
        made.room._forget(kept)
    for vm in made.core.vms:
        vm.drop_pty()


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of logged lines."""
    found: list[str] = []
    for name in ("info", "warn", "error"):
        monkeypatch.setattr(log, name, found.append)
    return found


def test_from_the_start_to_the_end_of_a_vm(parent: Parent) -> None:
    """A file is opened at the start, and another one whenever the process wants it.  The log ends with the VM."""
    vm = parent.run(owner=Owner(uid=4711, gid=4712))
    assert parent.told() == [KeepConsole(number=1, name="a"), ConsoleFile(number=1, size_bytes=10 << 20)]
    (opener,) = parent.openers
    assert (opener.wanted.path, opener.wanted.uid, opener.wanted.gid) == ("/v/a", 4711, 4712)
    assert opener.wanted.shared
    opener.answer("")
    parent.loop.read()
    parent.report_log(files=1)
    parent.report_log(files=1, text="No space left on device")
    assert parent.told() == []
    parent.report_log(files=1, wants_file=True)
    parent.report_log(files=1, wants_file=True, lost=1)
    assert parent.told() == [ConsoleFile(number=1, size_bytes=10 << 20)]
    parent.openers[1].answer("")
    parent.loop.read()

    console = vm.take_console()
    parent.room.look(vm)
    assert console is not None
    console[0].close()
    assert parent.told() == [DropConsole(number=1)]
    parent.report_log(files=2, ended=True)
    assert not parent.room.kept


def test_a_reload_changes_the_log(parent: Parent) -> None:
    """Another size takes effect at once.  Another path is opened.  Without a path the log ends."""
    vm = parent.run()
    parent.openers[0].answer("")
    parent.loop.read()
    parent.report_log(files=1)
    parent.told()

    for wanted, told in (
        (ConsoleLog(path="/v/%n", size_bytes=1 << 20), [ConsoleFile(number=1, size_bytes=1 << 20)]),
        (ConsoleLog(path="/v/b", size_bytes=1 << 20), [ConsoleFile(number=1, size_bytes=1 << 20)]),
        (None, [DropConsole(number=1)]),
    ):
        vm.config = vm.config.replace(console_log=wanted)
        parent.room.look(vm)
        parent.room.look(vm)
        assert parent.told() == told
    assert [opener.wanted.path for opener in parent.openers] == ["/v/a", "/v/b"]
    parent.openers[1].end()


def test_a_log_that_cannot_be_opened_or_written(parent: Parent, lines: list[str]) -> None:
    """The failure is logged once and shown until it is over.  Then it is logged how many bytes are lost."""
    vm = parent.run()
    for number in range(3):
        parent.openers[number].answer("Permission denied")
        parent.loop.read()
        parent.loop.fire(consolelogs.AGAIN_S)
    (trouble,) = parent.room.troubles(vm.vmid)
    assert trouble.text == "/v/a: Permission denied"
    parent.openers[3].answer("")
    parent.loop.read()
    for _ in range(5):
        parent.report_log(files=1, text="No space left on device", lost=7)
        parent.report_log(files=1, lost=7)

    assert list(parent.room.troubles(vm.vmid)) == []
    assert lines == [
        "vm a: console log /v/a: Permission denied: what it prints is not kept",
        "vm a: console log /v/a is written again",
        "vm a: console log /v/a: No space left on device: what it prints is not kept",
        "vm a: console log /v/a is written again; 7 bytes are lost",
    ]


def test_an_opener_that_storage_blocks(parent: Parent, lines: list[str]) -> None:
    """The opener is killed.  No other one is started before it has ended."""
    parent.run()
    parent.loop.fire(consolelogs.ANSWER_S)
    assert parent.openers[0].killed
    for _ in range(3):
        parent.loop.fire(consolelogs.AGAIN_S)
    assert len(parent.openers) == 1
    parent.openers[0].pidfd = -1
    parent.loop.fire(consolelogs.AGAIN_S)

    assert len(parent.openers) == 2
    assert lines == ["vm a: console log /v/a: its storage does not answer: what it prints is not kept"]
    for opener in parent.openers:
        opener.end()


def test_few_files_are_opened_at_a_time(parent: Parent) -> None:
    """The other logs wait for their turn, which also comes when a VM whose log is being opened ends."""
    vms = [parent.run(f"vm{number}") for number in range(AT_A_TIME + 3)]
    assert len(parent.openers) == AT_A_TIME
    parent.openers[0].answer("")
    parent.loop.read()
    assert len(parent.openers) == AT_A_TIME + 1
    vms[1].drop_pty()
    parent.room.look(vms[1])
    parent.report_log(number=2, ended=True)
    assert parent.openers[1].killed
    assert len(parent.openers) == AT_A_TIME + 2
    for opener in parent.openers[1:]:
        opener.end()


def test_a_new_process_continues_the_logs(parent: Parent, lines: list[str]) -> None:
    """It gets all logs.  The log of a VM that has ended meanwhile is completed."""
    first, second = parent.run("a"), parent.run("b")
    for opener in parent.openers:
        opener.answer("")
    parent.loop.read()
    second.drop_pty()
    parent.room.look(second)
    parent.told()

    parent.on_lost(parent, None)
    assert parent.closed
    parent.loop.fire(consolelogs.RESTART_S)

    assert parent.starts == 2
    assert parent.told() == [
        KeepConsole(number=1, name="a"), ConsoleFile(number=1, size_bytes=10 << 20),
        KeepConsole(number=2, name="b"), ConsoleFile(number=2, size_bytes=10 << 20), DropConsole(number=2),
    ]  # fmt: skip
    assert lines == ["process consolelog has ended; starting another one"]
    assert first.alive
    for opener in parent.openers[2:]:
        opener.end()


def test_a_process_that_does_not_answer_is_replaced(parent: Parent, lines: list[str]) -> None:
    """It was stopped, or hangs.  It is killed before another one writes the same files."""
    parent.run()
    for _ in range(consolelogs.PINGS_MAX + 1):
        parent.loop.fire(consolelogs.PING_S)
    parent.loop.fire(consolelogs.RESTART_S)

    assert (parent.closed, parent.starts) == (False, 2)
    assert [writer.killed for writer in parent.writers] == [True, False]
    assert lines == ["process consolelog has not answered for 15 s; starting another one"]
    for opener in parent.openers:
        opener.end()


def open_all(parent: Parent) -> None:
    """Let all openers succeed."""
    for opener in parent.openers:
        opener.answer("")
    parent.loop.read()


def end(parent: Parent, vm: Vm) -> None:
    """Let a VM end."""
    vm.ended("off")
    vm.drop_pty()
    parent.room.look(vm)


def test_where_a_client_finds_a_log(parent: Parent) -> None:
    """Whoever may control the VM may ask.  A VM without a log says how to give it one."""
    answers: list[tuple[int, Record]] = []
    cast("Any", parent.core.clients).answer = lambda client, message: answers.append((client, message))
    vm = parent.run(wanted=ConsoleLog(path="/v/%n.log", keep=3))
    envelope = cast("Any", SimpleNamespace(peerid=7))
    for request in (ConsoleLogRequest(name="a"), ConsoleLogRequest(vmid=vm.vmid)):
        parent.room.serve(request, Caller(uid=0, gid=0, pid=1), envelope)
    assert answers == [(7, ConsoleLogAt(vmid=vm.vmid, name="a", path="/v/a.log", keep=3))] * 2
    with pytest.raises(OperatorError, match="read the console log of vm a"):
        parent.room.serve(ConsoleLogRequest(name="a"), Caller(uid=1000, gid=1000, pid=1), envelope)
    vm.config = vm.config.replace(console_log=None)
    with pytest.raises(OperatorError, match=r"vm a has no console log: see `console log` in vm\.conf"):
        parent.room.serve(ConsoleLogRequest(name="a"), Caller(uid=0, gid=0, pid=1), envelope)
    open_all(parent)


def test_a_process_that_answers_its_pings_stays(parent: Parent) -> None:
    """Each answer counts for all pings before.  A ping for an earlier process is dropped."""
    parent.run()
    open_all(parent)
    for _ in range(consolelogs.PINGS_MAX * 2):
        parent.loop.fire(consolelogs.PING_S)
        parent.room.on_pong(Pong(), ENVELOPE)
    assert parent.starts == 1
    assert sum(isinstance(each, Ping) for each in parent.sent) == consolelogs.PINGS_MAX * 2
    parent.on_lost(parent, None)
    parent.sent = []
    parent.loop.fire(consolelogs.PING_S)
    assert parent.sent == []


def test_the_end_of_an_earlier_process_is_ignored(parent: Parent, lines: list[str]) -> None:
    """Another one writes the logs already."""
    parent.run()
    open_all(parent)
    parent.on_lost(cast("Any", object()), None)
    assert (parent.closed, parent.starts, lines) == (False, 1, [])


def test_no_process_without_a_log(parent: Parent) -> None:
    """None is started again if the last log has ended meanwhile, or if the daemon ends."""
    vm = parent.run()
    open_all(parent)
    parent.on_lost(parent, None)
    end(parent, vm)
    assert not parent.room.kept
    parent.loop.fire(consolelogs.RESTART_S)
    assert parent.starts == 1

    parent.run("b")
    assert parent.starts == 2
    parent.on_lost(parent, None)
    parent.room.close()
    parent.loop.fire(consolelogs.RESTART_S)
    assert parent.starts == 2
    parent.openers[-1].end()


def test_a_process_that_cannot_be_started(parent: Parent, lines: list[str]) -> None:
    """It is tried again, once at a time, however many VMs have a log."""
    parent.trouble = HostError("start a process", errno.ENOMEM)
    parent.run("a")
    parent.run("b")
    assert (parent.starts, len(parent.loop.timers)) == (1, 1)
    parent.loop.fire(consolelogs.RESTART_S)
    assert (parent.starts, len(parent.loop.timers)) == (2, 1)
    parent.trouble = None
    parent.loop.fire(consolelogs.RESTART_S)
    assert [each for each in parent.told() if isinstance(each, KeepConsole)] == [
        KeepConsole(number=1, name="a"), KeepConsole(number=2, name="b")
    ]  # fmt: skip
    assert lines == ["console logs are not written: start a process: Cannot allocate memory"] * 2
    open_all(parent)


def test_the_end_of_the_daemon(parent: Parent) -> None:
    """The process is told to end, and this message is waited for.  No file is opened any more."""
    vm = parent.run()
    open_all(parent)
    parent.room.close()
    assert isinstance(parent.sent[-1], Quit)
    assert parent.flushed == len(parent.sent)
    vm.config = vm.config.replace(console_log=ConsoleLog(path="/v/other"))
    parent.room.look(vm)
    assert len(parent.openers) == 1


def test_the_turns_are_taken_in_order(parent: Parent) -> None:
    """A log that waits for its turn, and whose VM ends, is opened in its turn, and then ended."""
    vms = [parent.run(f"vm{number}") for number in range(AT_A_TIME + 2)]
    parent.told()
    end(parent, vms[-1])
    assert parent.told() == []
    for number in range(2):
        parent.openers[number].answer("")
        parent.loop.read()
    names = [opener.wanted.path for opener in parent.openers]
    assert names == [f"/v/vm{number}" for number in range(AT_A_TIME + 2)]
    size = 10 << 20
    assert parent.told() == [
        ConsoleFile(number=AT_A_TIME + 1, size_bytes=size), ConsoleFile(number=AT_A_TIME + 2, size_bytes=size),
        DropConsole(number=AT_A_TIME + 2),
    ]  # fmt: skip
    for opener in parent.openers[2:]:
        opener.end()


@pytest.mark.parametrize(
    "trouble", [HostError("start a process", errno.ENOMEM), OSError(errno.EMFILE, "x"), ValueError("x")]
)
def test_an_opener_that_cannot_be_started(parent: Parent, lines: list[str], trouble: Exception) -> None:
    """The log says so, and it is tried again.  Nothing stays open."""
    before = open_descriptors()
    vm = parent.run("b")
    open_all(parent)
    parent.report_log(files=1)
    kept = open_descriptors()
    parent.trouble = trouble
    parent.report_log(files=1, wants_file=True)
    assert open_descriptors() == kept
    (line,) = lines
    assert line.startswith("vm b: console log /v/b: ")
    parent.trouble = None
    parent.loop.fire(consolelogs.AGAIN_S)
    assert len(parent.openers) == 2
    parent.openers[1].answer("")
    parent.loop.read()
    end(parent, vm)
    parent.report_log(files=2, ended=True)
    assert open_descriptors() == before


def test_an_opener_that_ends_without_an_answer(parent: Parent, lines: list[str]) -> None:
    """That is a failure, too.  A pipe that has nothing to read yet is not."""
    vm = parent.run()
    parent.loop.read()
    assert list(parent.room.troubles(vm.vmid)) == []
    parent.openers[0].end()
    parent.loop.read()
    text = "/v/a: the process that should open it has ended"
    assert [trouble.text for trouble in parent.room.troubles(vm.vmid)] == [text]
    assert lines == [f"vm a: console log {text}: what it prints is not kept"]


def test_trouble_of_an_ended_vm(parent: Parent, lines: list[str]) -> None:
    """It is not shown any more, and the rest is lost, which is logged.  Nothing is tried again."""
    vm = parent.run()
    open_all(parent)
    parent.report_log(files=1, text="No space left on device", lost=5)
    parent.report_log(number=99, files=1, text="no such log")
    assert [trouble.text for trouble in parent.room.troubles(vm.vmid)] == [
        "/v/a: No space left on device; 5 bytes are lost"
    ]
    assert list(parent.room.troubles(99)) == []
    end(parent, vm)
    assert list(parent.room.troubles(vm.vmid)) == []
    parent.report_log(files=1, wants_file=True, lost=7, text="No space left on device")
    parent.openers[1].answer("Permission denied")
    parent.loop.read()
    parent.loop.fire(consolelogs.AGAIN_S)
    assert len(parent.openers) == 2
    parent.report_log(files=1, ended=True, lost=7)
    assert lines[-1] == "vm a: console log /v/a: 7 bytes of what it printed are lost"


def test_what_two_processes_have_lost(parent: Parent, lines: list[str]) -> None:
    """It is added.  The trouble of the earlier process has ended with it."""
    vm = parent.run()
    open_all(parent)
    parent.report_log(files=1, text="No space left on device", lost=5)
    parent.on_lost(parent, None)
    assert list(parent.room.troubles(vm.vmid)) == []
    parent.loop.fire(consolelogs.RESTART_S)
    parent.openers[1].answer("")
    parent.loop.read()
    parent.report_log(files=1, text="No space left on device", lost=2)
    assert [trouble.text for trouble in parent.room.troubles(vm.vmid)] == [
        "/v/a: No space left on device; 7 bytes are lost"
    ]


def test_trouble_that_comes_and_goes(parent: Parent, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is logged again after a minute, and so is its end.  Another trouble is logged at once."""
    now_s = [1000.0]
    monkeypatch.setattr("vmd.parent.consolelogs.time.monotonic", lambda: now_s[0])
    parent.run()
    open_all(parent)
    for text, passed_s, count in (
        ("full", 0, 1), ("", 0, 2), ("full", 59, 2), ("", 0, 2), ("full", 1, 3), ("other", 0, 4), ("", 0, 5),
    ):  # fmt: skip
        now_s[0] += passed_s
        parent.report_log(files=1, text=text)
        assert len(lines) == count
    assert lines[1].endswith("is written again")


def test_a_new_life_has_a_new_log(parent: Parent) -> None:
    """The rest of the old life's output is written first, with the same file."""
    vm = parent.run()
    open_all(parent)
    parent.told()
    vm.drop_pty()
    vm.open_console()
    parent.room.look(vm)
    assert parent.told() == [
        DropConsole(number=1), KeepConsole(number=2, name="a"), ConsoleFile(number=2, size_bytes=10 << 20)
    ]
    parent.openers[1].end()


@pytest.mark.parametrize(
    ("owner", "ids"),
    [
        (Owner(uid=0), (0, 0, (), False)),
        (Owner(uid=0, gid=7), (0, 7, (), True)),
        (Owner(uid=54321), (54321, NOGROUP, (NOGROUP,), False)),
        (Owner(uid=54321, gid=7), (54321, 7, (7,), True)),
    ],
)
def test_who_opens_the_file(owner: Owner, ids: tuple[int, int, tuple[int, ...], bool]) -> None:
    """The owner of the VM does.  A group may read the file only if vm.conf names one."""
    asked = consolelogs.file_of("/v/a", ConsoleLog(path="/v/%n", size_bytes=5, keep=2), owner)
    assert (asked.uid, asked.gid, asked.groups, asked.shared) == ids
    assert (asked.path, asked.size_bytes, asked.keep) == ("/v/a", 5, 2)


def test_the_primary_group_of_a_user() -> None:
    """It is that of the user database."""
    nobody = pwd.getpwnam("nobody")
    assert consolelogs.primary_group(nobody.pw_uid) == nobody.pw_gid
    assert consolelogs.primary_group(0) == 0
