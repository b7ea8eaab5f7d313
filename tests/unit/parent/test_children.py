"""The parent reaps children that end late: after the first look at them."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support.descriptors import open_descriptors
from tests.support.vmprocesses import is_reaped
from vmd.config.model import IDS
from vmd.errors import HostError
from vmd.files.prober import IMGPROBE_ENTRY
from vmd.ipc.messages.clients import Caller
from vmd.ipc.routes import Proc
from vmd.parent import children as module
from vmd.parent import usage
from vmd.parent.adoption import Adopted
from vmd.parent.children import CALM_S, LATE_S, LATEST_S, LOCK_FD, PRIV_ENDS_S, Children, Delay
from vmd.privsep.cell import Cell
from vmd.privsep.spawn import Child


class Loop:
    """A loop whose timers the test runs."""

    def __init__(self) -> None:
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Start a timer."""
        self.timers.append((delay_s, callback))

    def run(self) -> list[float]:
        """Run the present timers.  Return their delays."""
        timers, self.timers = self.timers, []
        for _, callback in timers:
            callback()
        return [delay_s for delay_s, _ in timers]


class Process:
    """A child that ends when the test calls `end`."""

    def __init__(self) -> None:
        reading, self.writing = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self.writing)
            os.read(reading, 1)
            os._exit(0)
        os.close(reading)

    def end(self) -> None:
        """End the process, and wait for that without reaping it."""
        os.close(self.writing)
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def is_reaped(self) -> bool:
        """Return whether the process was reaped."""
        return is_reaped(self.pid)


@pytest.fixture
def process() -> Process:
    """Return a child process."""
    return Process()


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], tuple[Children, Loop]]:
    """Return a function that makes `Children`, with these children of an earlier program."""
    cell = SimpleNamespace(ids=None, root_fd=-1)
    monkeypatch.setattr(Cell, "build", lambda _uid, _gid: cell)
    monkeypatch.setattr(module, "vmm_place", lambda _cell, _first_id: cell)
    monkeypatch.setattr(module, "group_place", lambda: None)

    def made(left: list[int]) -> tuple[Children, Loop]:
        monkeypatch.setattr(usage, "children", lambda _pid: left)
        return Children(0, 0, 1 << 16), Loop()

    return made


Make = Callable[[list[int]], tuple[Children, Loop]]


def test_children_of_an_earlier_program_may_end_late(make: Make, process: Process) -> None:
    """The delay between looks doubles up to a limit.  There are no more looks when all have ended."""
    children, loop = make([process.pid])
    children.begin(cast("Any", loop))
    assert len(loop.timers) == 1
    children.bury()  # other calls start no further timers
    delays = [delay for _ in range(8) for delay in loop.run()]
    assert delays == [LATE_S * 2**number for number in range(6)] + [LATEST_S] * 2

    process.end()
    loop.run()

    assert process.is_reaped()
    assert not loop.timers


def test_a_killed_child_may_end_late(make: Make, process: Process) -> None:
    """There are no looks at a child that runs and was not killed."""
    children, loop = make([])
    children.begin(cast("Any", loop))
    child = Child("slow", process.pid)
    children.adopt(child)
    children.bury()
    assert not loop.timers

    child.killed = True  # a process that storage blocks does not end at once
    children.bury()
    assert loop.run() == [LATE_S]
    process.end()
    loop.run()

    assert (process.is_reaped(), child.pidfd, loop.timers) == (True, -1, [])


def test_an_adopted_process_is_reaped_like_a_child(make: Make, process: Process) -> None:
    """An earlier daemon has started it.  When it is killed, it may also end late."""
    children, loop = make([])
    children.begin(cast("Any", loop))
    child = Adopted("slow", os.pidfd_open(process.pid))
    children.adopt(child)
    children.bury()
    assert not loop.timers

    child.killed = True
    children.bury()
    process.end()
    loop.run()
    assert process.is_reaped()
    assert not loop.timers


# --- starts -----------------------------------------------------------------------------------------------------


class Spawned:
    """Notes the processes that are started.  None is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, list[str], dict[str, Any]]] = []
        self.trouble: Exception | None = None
        self.made: list[FakeChild] = []
        monkeypatch.setattr(module, "spawn", self.spawn)

    def spawn(self, title: str, arguments: list[str], **more: Any) -> "FakeChild":  # noqa: ANN401
        """Replaces `spawn`."""
        if self.trouble is not None:
            raise self.trouble
        self.calls.append((title, arguments, more))
        self.made.append(FakeChild(title, 1000 + len(self.made)))
        return self.made[-1]


class FakeChild:
    """A child that ends when it is killed, or when the test says so."""

    def __init__(self, title: str, pid: int) -> None:
        self.title, self.pid, self.pidfd = title, pid, 99
        self.killed = False
        self.ended = False
        self.stuck = False
        self.status: int | None = None
        self.waited_s: list[float] = []

    def kill(self) -> None:
        """Be killed."""
        self.killed = True
        self.ended = not self.stuck

    def reap(self, timeout_s: float = 0) -> int | None:
        """Be reaped."""
        self.waited_s.append(timeout_s)
        return 0 if self.ended else None


class Lock:
    """The lock of a vmm."""

    def __init__(self, *, there: bool = True) -> None:
        self.there = there

    def share(self) -> int:
        """Replaces `LifeLock.share`."""
        return os.open(os.devnull, os.O_RDONLY) if self.there else -1


def open_log(_name: str) -> socket.socket:
    """Replaces `Logs.open`."""
    reader, writer = socket.socketpair()
    reader.close()
    return writer


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch, make: "Make") -> Iterator[Spawned]:
    """No process is started.  No descriptor is left."""
    before = open_descriptors()
    yield Spawned(monkeypatch)
    assert open_descriptors() == before


@pytest.mark.parametrize("proc", [Proc.PRIV, Proc.CONTROL, Proc.VMM, Proc.OPENER, Proc.IMGWRITER, Proc.CONSOLELOG])
def test_what_a_process_gets(make: Make, spawned: Spawned, proc: Proc) -> None:
    """A channel and a log.  Only a vmm gets the lock, and only a vmm and a console log outlive the daemon."""
    children, _ = make([])
    children._lock = cast("Any", Lock())
    child, ours = children.start(proc, open_log)
    ((title, arguments, more),) = spawned.calls

    assert (title, arguments[0]) == (proc.name.lower(), proc.name.lower())
    assert child is cast("Any", spawned.made[0])
    assert list(more["fds"]) == ([LOCK_FD] if proc is Proc.VMM else [])
    assert more["outlives"] == (proc in (Proc.VMM, Proc.CONSOLELOG))
    assert children.are_ours(Caller(uid=12345, gid=0, pid=1000))
    ours.close()


def test_a_probe_and_the_opener_of_a_log_are_children_too(
    make: Make, spawned: Spawned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that have ended are reaped when the next one starts."""
    children, _ = make([])
    started: list[tuple[object, ...]] = []
    ours, theirs = socket.socketpair()

    def start_probe(cell: object, log_fd: int, *, entry: str, title: str) -> tuple[FakeChild, socket.socket]:
        started.append((cell, os.path.exists(f"/proc/self/fd/{log_fd}"), entry, title))
        return FakeChild("probe", 77), ours

    monkeypatch.setattr(module, "start_probe", start_probe)
    child, sock = children.start_probe(open_log, entry="x.y:main", title="seeder")
    assert (child.pid, sock, started) == (77, ours, [(children.cell, True, "x.y:main", "seeder")])
    assert children.are_ours(Caller(uid=12345, gid=0, pid=77))
    cast("Any", child).ended = True
    log_file = children.start_log_file(open_log, "web", ["a", "b"], {5: 6})
    ((title, arguments, more),) = spawned.calls
    assert (title, arguments, more["fds"], more["entry"]) == ("logfile/web", ["a", "b"], {5: 6}, module.LOGFILE_ENTRY)
    assert more["place"] is children._places[Proc.OPENER]
    assert children._children == [log_file]
    cast("Any", log_file).ended = True
    children.start_probe(open_log)
    assert started[1][2:] == (IMGPROBE_ENTRY, "imgprobe")
    assert len(children._children) == 1
    for end in (ours, theirs):
        end.close()


def test_a_title_of_its_own(make: Make, spawned: Spawned) -> None:
    """Its log is that of the kind."""
    children, _ = make([])
    _, ours = children.start(Proc.CONTROL, open_log, "control/reserve")
    assert (spawned.calls[0][0], spawned.calls[0][1][0]) == ("control/reserve", "control")
    ours.close()


def test_a_host_without_the_lock(make: Make, spawned: Spawned) -> None:
    """A vmm is started without it."""
    children, _ = make([])
    children._lock = cast("Any", Lock(there=False))
    _, ours = children.start(Proc.VMM, open_log)
    assert spawned.calls[0][2]["fds"] == {}
    ours.close()


def test_a_process_that_cannot_be_started(make: Make, spawned: Spawned) -> None:
    """Nothing is left of it."""
    children, _ = make([])
    children._lock = cast("Any", Lock())
    spawned.trouble = HostError("fork", 11)
    for start in (lambda: children.start(Proc.VMM, open_log), lambda: children.start_log_file(open_log, "a", [], {})):
        with pytest.raises(HostError, match="fork"):
            start()
    assert children._children == []


@pytest.mark.parametrize("proc", [Proc.CONTROL, Proc.VMM])
def test_a_child_of_a_kind_is_killed(make: Make, spawned: Spawned, proc: Proc) -> None:
    """Once.  There may be several vmms, which are never killed by their kind."""
    children, _ = make([])
    _, ours = children.start(proc, open_log)
    ours.close()
    assert not children.ended_well(proc)
    spawned.made[0].status = 0
    assert children.ended_well(proc) == (proc is Proc.CONTROL)
    spawned.made[0].status = 1
    assert not children.ended_well(proc)
    children.kill(proc)
    assert spawned.made[0].killed == (proc is Proc.CONTROL)
    children.kill(proc)


@pytest.mark.parametrize(
    ("caller", "ours"),
    [
        (Caller(uid=70, gid=0, pid=1), True),  # the user of processes without privileges
        (Caller(uid=71, gid=0, pid=1), False),
        (Caller(uid=1 << 16, gid=0, pid=1), True),  # the first id
        (Caller(uid=(1 << 16) + IDS, gid=0, pid=1), True),  # priv
        (Caller(uid=(1 << 16) + IDS + 1, gid=0, pid=1), False),
        (Caller(uid=(1 << 16) - 1, gid=0, pid=1), False),
        (Caller(uid=0, gid=0, pid=1), False),
        (Caller(uid=0, gid=0, pid=1000), True),  # an opener that runs as root
    ],
)
def test_who_belongs_to_the_daemon(make: Make, spawned: Spawned, caller: Caller, ours: bool) -> None:
    """Such a process may not use the control socket."""
    children, _ = make([])
    children._uid = 70
    _, channel = children.start(Proc.OPENER, open_log)
    channel.close()
    assert children.are_ours(caller) == ours


def test_the_end_of_all_children(make: Make, spawned: Spawned, capfd: pytest.CaptureFixture[str]) -> None:
    """Each has time to end by itself, and priv has more.  One that does not is killed, and named in the log."""
    children, _ = make([])
    closed: list[bool] = []
    children._groups_place = cast("Any", SimpleNamespace(close=lambda: closed.append(True)))
    for proc in (Proc.PRIV, Proc.CONTROL, Proc.OPENER):
        children.start(proc, open_log)[1].close()
    priv, control, opener = spawned.made
    control.ended, opener.stuck = True, True
    for child in spawned.made:
        child.waited_s.clear()
    children.reap(5.0)

    assert 5.0 < priv.waited_s[0] <= PRIV_ENDS_S
    assert max(control.waited_s + opener.waited_s) <= 5.0
    assert (priv.killed, control.killed, opener.killed) == (True, False, True)
    said = capfd.readouterr().err
    assert ("priv does not end; killing it" in said, "control does not end" in said) == (True, False)
    assert (children._children, closed) == (cast("Any", [opener]), [True])


def test_how_soon_a_process_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, unless it ends again and again."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    delay = Delay()
    assert [delay.next_s() for _ in range(9)] == [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0]
    now[0] += CALM_S
    assert [delay.next_s() for _ in range(2)] == [0.0, 0.25]
    now[0] += CALM_S - 1
    assert delay.next_s() == 0.5


# --- control groups ---------------------------------------------------------------------------------------------


class Place:
    """Where control groups are made."""

    def __init__(self, *, limited: bool = True, trouble: Exception | None = None) -> None:
        self.limited, self.trouble = limited, trouble
        self.adopted: list[str] = []

    def groups(self, _vmm: int) -> object:
        """Make groups."""
        if self.trouble is not None:
            raise self.trouble
        return SimpleNamespace(limited=self.limited, top="/sys/fs/cgroup/vmd-guests-0")

    def adopt(self, top: str) -> None:
        """Take over groups."""
        self.adopted.append(top)


def test_control_groups_of_a_vmm(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    """A host without them, or without a controller, is named in the log; VMs run without."""
    children, _ = make([])
    assert children.make_groups(1) is None
    children._groups_place = cast("Any", Place())
    assert children.make_groups(1) is not None
    assert capfd.readouterr().err == ""
    children._groups_place = cast("Any", Place(limited=False))
    assert children.make_groups(1) is not None
    assert "has no controller pids: tasks of VMs are not limited by it" in capfd.readouterr().err
    children._groups_place = cast("Any", Place(trouble=HostError("make a group", 13)))
    assert children.make_groups(1) is None
    assert "make a group: Permission denied: VMs have no control groups of their own" in capfd.readouterr().err


def test_control_groups_of_an_earlier_daemon(make: Make, tmp_path: Path) -> None:
    """They are taken over, so that they are removed at the end."""
    children, _ = make([])
    assert children.adopt_groups(str(tmp_path), limited=True) is None
    place = Place()
    children._groups_place = cast("Any", place)
    assert children.adopt_groups("", limited=True) is None
    adopted = children.adopt_groups(str(tmp_path), limited=True)
    assert adopted is not None
    assert (adopted.top, adopted.limited, place.adopted) == (str(tmp_path), True, [str(tmp_path)])


def test_a_host_that_cannot_make_control_groups(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The daemon starts."""

    def refuse() -> None:
        raise HostError("find the control groups of version 2", 19)

    monkeypatch.setattr("vmd.parent.groups.place", refuse)
    assert module.group_place() is None
    assert "VMs have no control groups of their own" in capfd.readouterr().err


@pytest.mark.parametrize("lacks", ["users", "pids", ""])
def test_a_host_without_namespaces(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], lacks: str
) -> None:
    """The log says what that costs, and the daemon starts."""

    def users(_first_id: int) -> int:
        if lacks == "users":
            raise HostError("make a user namespace", 1)
        return 7

    def pids() -> int:
        if lacks == "pids":
            raise HostError("make a pid namespace", 1)
        return 8

    old: list[int] = []
    monkeypatch.setattr(module, "user_namespace", users)
    monkeypatch.setattr("vmd.privsep.linux.new_pids", pids)
    monkeypatch.setattr("vmd.privsep.linux.old_pids", old.append)
    monkeypatch.setattr(module, "VmmCell", lambda _cell, users_fd, own_pids: (users_fd, own_pids))
    cell = cast("Any", SimpleNamespace(ids=None, root_fd=-1))
    assert module.vmm_place(cell, 1 << 16) == cast("Any", (None if lacks == "users" else 7, lacks != "pids"))
    said = capfd.readouterr().err
    assert ("their processes could signal each other" in said) == (lacks == "users")
    assert ("what runs below vmm could outlive the daemon" in said) == (lacks == "pids")
    assert (cell.ids is None, old) == (lacks == "users", [] if lacks == "pids" else [8])
