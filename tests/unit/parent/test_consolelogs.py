"""Which VMs have a console log, what its writer and openers are told, and what is logged when they fail."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from vmd.config.model import Config, ConsoleLog, Owner, VmConfig
from vmd.ipc.logfile import FD_ANSWER, FD_COURIER, unpack
from vmd.ipc.messages.consolelog import ConsoleFile, ConsoleKept, DropConsole, KeepConsole
from vmd.log import log
from vmd.parent import consolelogs
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

    def start(self, _proc: object, _open_log: object) -> tuple[Child, None]:
        """Start the process that writes logs."""
        self.starts += 1
        return Child(), None

    def start_log_file(self, _open_log: object, _name: str, arguments: list[str], fds: dict[int, int]) -> Opener:
        """Start a process that opens a log."""
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


def test_a_process_that_does_not_answer_is_replaced(parent: Parent) -> None:
    """It was stopped, or hangs."""
    parent.run()
    for _ in range(consolelogs.PINGS_MAX + 1):
        parent.loop.fire(consolelogs.PING_S)
    parent.loop.fire(consolelogs.RESTART_S)

    assert (parent.closed, parent.starts) == (False, 2)
    for opener in parent.openers:
        opener.end()
