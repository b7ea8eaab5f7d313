"""Consoles: their holders, their watchers, and their output after the end of a VM.  Ptys and backlogs are real."""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from tests.support.parentvms import close_vms
from tests.support.waiting import pause
from vmd.backlog import BACKLOG_BYTES, BacklogWriter
from vmd.config.model import Config, Owner, VmConfig
from vmd.errors import VMD_CONSOLE_TAKEN, HostError, OperatorError
from vmd.ipc.imsg import Envelope
from vmd.ipc.loop import Timer
from vmd.ipc.messages.clients import (
    Caller,
    ConsoleAttached,
    ConsoleBreak,
    ConsoleOutput,
    ConsoleReady,
    ConsoleRequest,
    ConsoleWatch,
    ConsoleWatched,
    Failed,
    Ok,
)
from vmd.ipc.messages.vm import ConsoleSnapshot, ConsoleSnapshotEnd, SendBreak
from vmd.ipc.routes import Proc
from vmd.parent.clients import For
from vmd.parent.consoles import (
    FORGOTTEN_MAX,
    PATIENCE_S,
    PENDING_MAX,
    PIECE_BYTES,
    QUIET_ROUNDS,
    VIEWER_PATIENCE_S,
    Consoles,
)
from vmd.parent.core import Core
from vmd.parent.resources import Pty
from vmd.parent.vm import State, Vm
from vmd.record import Record

ROOT, OTHER = Caller(uid=0, gid=0, pid=1), Caller(uid=2000, gid=200, pid=2)
HOLDER, SECOND, THIRD = 7, 8, 9
DATA = b"login: "


class Peer:
    """A channel that records messages and keeps their descriptors."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, Record]] = []
        self.fds: list[dict[str, list[int]]] = []

    def send(self, message: Record, *, peerid: int, fds: dict[str, list[int]]) -> None:
        """Record a message."""
        self.sent.append((peerid, message))
        self.fds.append(dict(fds))

    def take(self) -> list[Record]:
        """Return the messages since the last call, and close their descriptors."""
        sent, fds, self.sent, self.fds = self.sent, self.fds, [], []
        for fd in [one for named in fds for each in named.values() for one in each]:
            os.close(fd)
        return [message for _, message in sent]


class Rig:
    """The room, VMs with consoles, and a loop whose timers the test runs."""

    def __init__(self) -> None:
        self.timers: list[tuple[float, Timer]] = []
        self.core = Core(cast("Any", self), Config())
        self.vmm, self.control = Peer(), Peer()
        self.core.peers.channels = cast("Any", {Proc.VMM: self.vmm, Proc.CONTROL: self.control})
        self.consoles = Consoles(self.core)
        self.writers: dict[int, BacklogWriter] = {}

    def call_later(self, delay_s: float, callback: Callable[[], None], _source: object = None) -> Timer:
        """Start a timer, as the loop."""
        timer = Timer(0, callback)
        self.timers.append((delay_s, timer))
        return timer

    def run_timers(self) -> list[float]:
        """Run the present timers.  Return their delays."""
        timers, self.timers = self.timers, []
        for _, timer in timers:
            callback, timer.callback = timer.callback, None
            if callback is not None:
                callback()
        return [delay_s for delay_s, _ in timers]

    def vm(self, name: str = "a", uid: int = 0) -> Vm:
        """Return a running VM."""
        config = VmConfig(name=name, owner=Owner(uid=uid))
        vm = self.core.vms.find(0, name) or self.core.vms.add(config, from_config=True)
        vm.uid, vm._state, vm.pid = uid, State.RUNNING, 4711
        vm.open_console()
        assert vm.backlog is not None
        self.writers[vm.vmid] = BacklogWriter(os.dup(vm.backlog.fd))
        return vm

    def attach(self, vm: Vm, client: int = HOLDER, caller: Caller = ROOT, *, force: bool = False) -> None:
        """Request the console."""
        message = ConsoleRequest(name=vm.name, force=force)
        self.consoles.serve(message, caller, Envelope(message, client, 0, {}))

    def watch(self, vm: Vm, client: int, since: int | None = None, caller: Caller = ROOT) -> None:
        """Request output of the console."""
        message = ConsoleWatch(name=vm.name, since=since)
        self.consoles.serve_watch(message, caller, Envelope(message, client, 0, {}))

    def snapshot(self, vm: Vm, end: int = 0) -> None:
        """Let the VM process report the end of the output that is no longer in the pty."""
        message = ConsoleSnapshotEnd(end=end)
        self.consoles.on_snapshot_end(message, Envelope(message, vm.vmid, 0, {}))

    def end(self, vm: Vm) -> None:
        """End the VM."""
        self.consoles.on_ended(vm)
        vm._state, vm.pid = State.STOPPED, 0

    def answers(self, client: int) -> list[Record]:
        """Return the answers to a client since the last call."""
        found = [message for to, message in self.control.sent if to == client]
        self.control.sent = [each for each in self.control.sent if each[0] != client]
        return found


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Yield the room."""
    rig = Rig()
    yield rig
    rig.vmm.take()
    rig.consoles.close()
    rig.core.ending = True
    rig.consoles.on_client_gone(HOLDER)
    for _ in range(QUIET_ROUNDS + 1):
        rig.run_timers()
    close_vms(rig.core.vms)


def is_open(fd: int) -> bool:
    """Return whether a descriptor is open."""
    return os.path.exists(f"/proc/self/fd/{fd}")


def ptys() -> int:
    """Return how many masters of ptys this process has open."""
    count = 0
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            count += os.readlink(f"/proc/self/fd/{number}").endswith("ptmx")
    return count


# --- the holder -----------------------------------------------------------------------------------------------


def test_the_holder_gets_earlier_output_first(rig: Rig) -> None:
    """The VM process is asked first, so that no byte is also in the pty.  Later output comes through the pty."""
    vm = rig.vm()
    rig.writers[vm.vmid].write(DATA + b"later")
    rig.attach(vm)
    assert rig.vmm.sent == [(vm.vmid, ConsoleSnapshot(vmid=vm.vmid))]
    assert rig.answers(HOLDER) == []
    rig.snapshot(vm, len(DATA))

    assert vm.pty is not None
    attached = ConsoleAttached(vmid=vm.vmid, name="a", tty=vm.pty.path)
    assert rig.answers(HOLDER) == [ConsoleOutput(data=DATA), attached]


def test_long_output_comes_in_pieces(rig: Rig) -> None:
    """The pieces are the whole backlog, in order."""
    vm = rig.vm()
    data = os.urandom(BACKLOG_BYTES + 1000)
    rig.writers[vm.vmid].write(data)
    rig.attach(vm)
    rig.snapshot(vm, len(data))

    pieces = [message.data for message in rig.answers(HOLDER) if isinstance(message, ConsoleOutput)]
    assert b"".join(pieces) == data[-BACKLOG_BYTES:]
    assert max(map(len, pieces)) == PIECE_BYTES


def test_a_console_has_one_holder(rig: Rig) -> None:
    """A second client gets a message that names the holder."""
    vm = rig.vm()
    rig.attach(vm)
    with pytest.raises(OperatorError, match=r"is in use by root \(pid 1\)") as refused:
        rig.attach(vm, SECOND)
    assert refused.value.number == errno.EBUSY
    rig.core.clients.gone(HOLDER)
    rig.attach(vm, SECOND)
    rig.snapshot(vm)  # this answers the first request, whose client has left
    assert rig.answers(SECOND) == []
    rig.snapshot(vm)
    assert [type(message) for message in rig.answers(SECOND)] == [ConsoleAttached]


@pytest.mark.parametrize("ask", [Rig.attach, Rig.watch])
def test_a_console_is_for_users_who_control_the_vm(rig: Rig, ask: Callable[..., None]) -> None:
    """Others are refused, while the VM runs and after its end."""
    vm = rig.vm()
    with pytest.raises(OperatorError) as refused:
        ask(rig, vm, SECOND, caller=OTHER)
    assert refused.value.number == errno.EPERM
    rig.writers[vm.vmid].write(b"secret")
    rig.end(vm)
    with pytest.raises(OperatorError):
        ask(rig, vm, SECOND, caller=OTHER)
    assert rig.answers(SECOND) == []


def test_a_vm_that_has_not_answered_many_viewers(rig: Rig) -> None:
    """The number of unanswered requests to a VM process is limited."""
    vm = rig.vm()
    for client in range(100, 100 + PENDING_MAX):
        rig.attach(vm, client)
        rig.core.clients.gone(client)
    with pytest.raises(OperatorError, match=f"does not answer its {PENDING_MAX} viewers") as refused:
        rig.attach(vm)
    assert refused.value.number == errno.EAGAIN


def test_a_console_is_taken_over_by_force(rig: Rig) -> None:
    """The earlier holder is told, and loses the pty a moment later.  The VM process gets a new pty."""
    vm = rig.vm()
    rig.attach(vm)
    rig.snapshot(vm)
    rig.answers(HOLDER)
    rig.vmm.take()
    before = vm.pty
    rig.attach(vm, SECOND, Caller(uid=0, gid=0, pid=5), force=True)

    assert vm.pty is not None
    assert before is not None
    assert vm.pty.path != before.path
    assert rig.answers(HOLDER) == [
        Failed(code=VMD_CONSOLE_TAKEN, text="the console of vm a was taken over by root (pid 5)")
    ]
    (fds,) = rig.vmm.fds
    assert {name: os.fstat(fd).st_rdev for name, (fd,) in fds.items()} == {
        "tty": os.fstat(vm.pty.master).st_rdev, "tty_slave": os.fstat(vm.pty.slave).st_rdev,
    }  # fmt: skip
    assert is_open(before.master)
    assert rig.run_timers() == [PATIENCE_S]
    assert not is_open(before.slave)
    rig.snapshot(vm)
    assert rig.answers(SECOND) == [ConsoleAttached(vmid=vm.vmid, name="a", tty=vm.pty.path)]


def test_repeated_takeovers_cost_one_pty(rig: Rig) -> None:
    """If the pty of an earlier takeover still waits to be closed, the next takeover closes it at once."""
    vm = rig.vm()
    before = ptys()
    for client in range(4):
        rig.attach(vm, 100 + client, force=True)

    rig.vmm.take()
    assert ptys() == before + 1
    rig.run_timers()
    assert ptys() == before


def test_a_takeover_that_fails_changes_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder keeps the console, and the new pty is closed."""
    vm = rig.vm()
    rig.attach(vm)
    rig.vmm.take()
    pty, before = vm.pty, len(os.listdir("/proc/self/fd"))

    def fail(self: Pty, uid: int, gid: int | None) -> None:
        raise HostError(f"give {self.path} to {uid}, {gid}", errno.EPERM)

    monkeypatch.setattr(Pty, "give_to", fail)
    with pytest.raises(HostError):
        rig.attach(vm, SECOND, force=True)

    assert (vm.pty, rig.vmm.sent, rig.answers(HOLDER)) == (pty, [], [])
    assert len(os.listdir("/proc/self/fd")) == before
    assert rig.core.clients.waits(HOLDER, For.CONSOLE, vm.vmid)


def test_only_the_holder_sends_a_break(rig: Rig) -> None:
    """Another client of the same user is refused."""
    vm = rig.vm()
    rig.attach(vm)
    rig.vmm.take()
    message = ConsoleBreak(name="a")
    with pytest.raises(OperatorError, match="is not attached here"):
        rig.consoles.serve_break(message, ROOT, Envelope(message, SECOND, 0, {}))
    assert rig.vmm.take() == []
    rig.consoles.serve_break(message, ROOT, Envelope(message, HOLDER, 0, {}))

    assert (rig.vmm.take(), rig.answers(HOLDER)) == ([SendBreak(vmid=vm.vmid)], [Ok()])


def test_the_client_that_starts_a_vm_gets_its_console(rig: Rig) -> None:
    """It gets the console before the first byte of output, if there is no holder.  Later clients are refused."""
    vm = rig.vm()
    assert vm.pty is not None
    rig.consoles.give(vm, ROOT, HOLDER)
    rig.consoles.give(vm, ROOT, SECOND)
    assert rig.answers(HOLDER) == [ConsoleReady(vmid=vm.vmid, name="a", tty=vm.pty.path)]
    assert rig.answers(SECOND) == []
    with pytest.raises(OperatorError, match="is in use"):
        rig.attach(vm, THIRD)


def test_a_new_vm_process_gets_the_snapshot_requests_again(rig: Rig) -> None:
    """There is one request for each waiting client, because the earlier process does not answer any more."""
    vm = rig.vm()
    rig.attach(vm)
    rig.attach(vm, SECOND, force=True)
    rig.vmm.take()
    rig.consoles.repeat_snapshots(vm)

    assert rig.vmm.take() == [ConsoleSnapshot(vmid=vm.vmid)] * 2


# --- watchers -------------------------------------------------------------------------------------------------


def test_a_watcher_gets_new_output(rig: Rig) -> None:
    """It gets present output at once, and otherwise the next output."""
    vm = rig.vm()
    rig.writers[vm.vmid].write(DATA)
    rig.watch(vm, SECOND)
    watched = ConsoleWatched(vmid=vm.vmid, name="a", end=len(DATA), lost=0, running=True)
    assert rig.answers(SECOND) == [ConsoleOutput(data=DATA), watched]
    rig.watch(vm, SECOND, len(DATA))
    rig.watch(vm, THIRD, 3)
    assert rig.answers(THIRD) == [ConsoleOutput(data=DATA[3:]), watched]
    rig.run_timers()
    assert rig.answers(SECOND) == []
    rig.writers[vm.vmid].write(b"me")
    rig.run_timers()

    assert rig.answers(SECOND) == [ConsoleOutput(data=b"me"), watched.replace(end=len(DATA) + 2)]
    assert rig.timers == []


def test_a_slow_watcher_is_told_how_much_is_lost(rig: Rig) -> None:
    """The answer has the number of bytes that were wanted and are not in the backlog any more."""
    vm = rig.vm()
    rig.writers[vm.vmid].write(bytes(BACKLOG_BYTES + 10))
    rig.watch(vm, SECOND, 4)
    (watched,) = [message for message in rig.answers(SECOND) if isinstance(message, ConsoleWatched)]

    assert (watched.lost, watched.end) == (6, BACKLOG_BYTES + 10)


def test_many_watchers_cost_one_timer(rig: Rig) -> None:
    """No timer runs when nobody waits any more."""
    vm = rig.vm()
    for client in range(100, 110):
        rig.watch(vm, client, 0)
    assert len(rig.timers) == 1
    for client in range(100, 110):
        rig.core.clients.gone(client)
    rig.run_timers()
    assert rig.timers == []


# --- ends -----------------------------------------------------------------------------------------------------


def test_the_rest_of_the_output_goes_to_the_holder(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pty stays until everything was read.  Watchers and waiting clients get the rest in their answers."""
    now_s = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    vm = rig.vm()
    rig.attach(vm)
    rig.snapshot(vm)
    rig.answers(HOLDER)
    rig.watch(vm, SECOND, 0)
    rig.attach(vm, THIRD, force=True)
    rig.core.clients.gone(HOLDER)
    assert vm.pty is not None
    master, path = vm.pty.master, vm.pty.path
    viewer = os.open(path, os.O_RDWR | os.O_NOCTTY)
    rig.writers[vm.vmid].write(b"bye")
    rig.end(vm)

    watched = ConsoleWatched(vmid=vm.vmid, name="a", end=3, lost=0, running=False)
    assert rig.answers(SECOND) == [ConsoleOutput(data=b"bye"), watched]
    assert rig.answers(THIRD) == [ConsoleOutput(data=b"bye"), Failed(code=errno.ESRCH, text="vm a is not running")]
    now_s[0] += VIEWER_PATIENCE_S - 1
    rig.run_timers()
    assert is_open(master)
    assert os.read(viewer, 100) == b"bye"
    for _ in range(QUIET_ROUNDS + 1):
        rig.run_timers()
    assert (is_open(master), rig.consoles.leaving) == (False, set())
    os.close(viewer)


@pytest.mark.parametrize("leaves", [False, True])
def test_a_viewer_that_does_not_read(rig: Rig, monkeypatch: pytest.MonkeyPatch, leaves: bool) -> None:
    """The pty is closed when nobody has read for VIEWER_PATIENCE_S, or for PATIENCE_S if the viewer has left."""
    now_s = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    vm = rig.vm()
    rig.attach(vm)
    pty = vm.pty
    assert pty is not None
    rig.writers[vm.vmid].write(b"bye")
    rig.end(vm)
    while pty.unread_bytes() != 3:  # the kernel takes a moment
        pause()
    left: list[str] = []
    rig.consoles.when_left(lambda: left.append("all"), 1000.0)
    if leaves:
        rig.consoles.on_client_gone(HOLDER)
    patience_s = PATIENCE_S if leaves else VIEWER_PATIENCE_S
    rig.timers = [each for each in rig.timers if each[0] < 1000.0]
    rig.run_timers()
    now_s[0] += patience_s - 0.1
    rig.run_timers()
    assert (is_open(pty.master), left) == (True, [])
    now_s[0] += 0.2
    rig.run_timers()
    assert (is_open(pty.master), left) == (False, ["all"])


def test_a_daemon_that_ends_waits_for_viewers_with_a_timeout(rig: Rig) -> None:
    """The callback is called at the timeout in any case, and at once if there is no viewer."""
    called: list[str] = []
    rig.consoles.when_left(lambda: called.append("nobody"), 2.0)
    assert called == ["nobody"]
    vm = rig.vm()
    rig.attach(vm)
    rig.writers[vm.vmid].write(b"bye")
    rig.end(vm)
    rig.consoles.when_left(lambda: called.append("somebody"), 2.0)
    for delay_s, timer in rig.timers:
        if delay_s == 2.0 and timer.callback is not None:
            timer.callback()

    assert called == ["nobody", "somebody"]
    assert rig.consoles.leaving


def test_the_last_output_is_kept_until_the_next_start(rig: Rig) -> None:
    """Clients that come later get it.  After the next start they get the new console."""
    vm = rig.vm()
    rig.writers[vm.vmid].write(DATA)
    rig.end(vm)
    with pytest.raises(OperatorError, match="vm a is not running") as refused:
        rig.attach(vm, SECOND)
    assert (refused.value.number, rig.answers(SECOND)) == (errno.ESRCH, [ConsoleOutput(data=DATA)])
    rig.watch(vm, THIRD, 2)
    watched = ConsoleWatched(vmid=vm.vmid, name="a", end=len(DATA), lost=0, running=False)
    assert rig.answers(THIRD) == [ConsoleOutput(data=DATA[2:]), watched]
    again = rig.vm()
    rig.attach(again, SECOND)
    assert rig.answers(SECOND) == []


def test_the_kept_output_of_removed_vms_is_bounded(rig: Rig) -> None:
    """The output of known VMs does not count.  It is found by name, or by the last id."""
    kept = rig.vm("kept")
    rig.writers[kept.vmid].write(b"kept")
    rig.end(kept)
    vmids = []
    for number in range(FORGOTTEN_MAX + 2):
        vm = rig.vm(f"vm{number}")
        vmids.append(vm.vmid)
        rig.writers[vm.vmid].write(b"x%d" % number)
        rig.end(vm)
        rig.core.vms.remove(vm)
    last = rig.vm("last")
    rig.end(last)

    assert [*rig.consoles.kept] == ["kept", *(f"vm{number}" for number in range(2, FORGOTTEN_MAX + 2)), "last"]
    message = ConsoleWatch(vmid=vmids[-1])
    rig.consoles.serve_watch(message, ROOT, Envelope(message, SECOND, 0, {}))
    assert rig.answers(SECOND)[0] == ConsoleOutput(data=b"x%d" % (FORGOTTEN_MAX + 1))


def test_a_vm_that_never_ran_keeps_earlier_output(rig: Rig) -> None:
    """Its start has failed, so the output before that is still of use."""
    vm = rig.vm()
    rig.writers[vm.vmid].write(DATA)
    rig.end(vm)
    vm = rig.vm()
    vm.pid = 0
    rig.end(vm)

    rig.watch(vm, SECOND)
    assert rig.answers(SECOND)[0] == ConsoleOutput(data=DATA)


def test_a_viewer_that_reads_slowly(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte that it reads gives it more time."""
    now_s = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    vm = rig.vm()
    rig.attach(vm)
    pty = vm.pty
    assert pty is not None
    viewer = os.open(pty.path, os.O_RDWR | os.O_NOCTTY)
    rig.writers[vm.vmid].write(b"bye")
    rig.end(vm)
    for unread in (3, 2, 1):
        while pty.unread_bytes() != unread:  # the kernel takes a moment
            pause()
        rig.run_timers()
        now_s[0] += VIEWER_PATIENCE_S - 1
        rig.run_timers()
        assert is_open(pty.master)
        assert len(os.read(viewer, 1)) == 1
    os.close(viewer)


@pytest.mark.parametrize(("since", "lost"), [(-5, 10), (0, 10), (1, 9), (10, 0), (11, 0), (BACKLOG_BYTES + 15, 0)])
def test_how_much_a_watcher_has_lost(rig: Rig, since: int, lost: int) -> None:
    """It is never less than nothing, and what a client claims to have seen is not believed."""
    vm = rig.vm()
    rig.writers[vm.vmid].write(bytes(BACKLOG_BYTES + 10))
    rig.end(vm)
    rig.watch(vm, SECOND, since)
    (watched,) = [message for message in rig.answers(SECOND) if isinstance(message, ConsoleWatched)]
    assert (watched.lost, watched.end) == (lost, BACKLOG_BYTES + 10)


def test_a_console_is_taken_over_while_the_vm_starts(rig: Rig) -> None:
    """Its process has been given the pty already, so the pty stays.  The earlier holder is told."""
    vm = rig.vm()
    rig.attach(vm)
    rig.vmm.take()
    vm.pid = 0
    pty = vm.pty
    rig.attach(vm, SECOND, force=True)
    assert (vm.pty, rig.vmm.fds, rig.timers) == (pty, [{}], [])
    assert [type(message) for message in rig.answers(HOLDER)] == [Failed]


def test_others_learn_that_a_console_has_ended(rig: Rig) -> None:
    """Such as the room of console logs.  A VM without a console has none that could end."""
    changed: list[str] = []
    rig.consoles.on_change = lambda vm: changed.append(f"{vm.name}: {vm.pty}")
    vm = rig.vm()
    rig.end(vm)
    rig.end(vm)
    assert changed == ["a: None"]


def test_a_daemon_that_ends_does_not_wait_for_a_viewer(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A viewer that reads nothing has as long as nobody."""
    now_s = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    vm = rig.vm()
    rig.attach(vm)
    pty = vm.pty
    assert pty is not None
    rig.writers[vm.vmid].write(b"bye")
    rig.end(vm)
    while pty.unread_bytes() != 3:  # the kernel takes a moment
        pause()
    rig.core.ending = True
    rig.run_timers()
    now_s[0] += PATIENCE_S + 0.1
    rig.run_timers()
    assert not is_open(pty.master)


def test_messages_of_processes_without_a_console(rig: Rig) -> None:
    """A process may send them at any time.  Nobody is answered."""
    vm = rig.vm()
    rig.attach(vm)
    rig.consoles.on_snapshot_end(ConsoleSnapshotEnd(end=0), Envelope(ConsoleSnapshotEnd(end=0), 99, 0, {}))
    vm.drop_pty()
    rig.snapshot(vm)
    assert rig.answers(HOLDER) == []
    with pytest.raises(OperatorError, match="vm a is not running"):
        rig.watch(vm, SECOND)
    rig.consoles.give(vm, ROOT, SECOND)
    assert rig.answers(SECOND) == []
