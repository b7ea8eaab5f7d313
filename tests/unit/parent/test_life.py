"""Starts and ends of VMs: what a start requests, what each end releases, and which clients are answered."""

import errno
import os
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support.descriptors import open_descriptors
from tests.support.parentvms import close_vms
from tests.unit.parent.timers import Timers
from vmd.config.model import (
    AllowInstance,
    BootDevice,
    Config,
    DiskConfig,
    Globals,
    NicConfig,
    Owner,
    VmConfig,
    VmFlag,
    VmLimits,
)
from vmd.errors import VMD_VM_STOP_INVALID, HostError, OperatorError, PeerError, VmdError
from vmd.fileid import FileId
from vmd.ipc.fence import OUR_FAULT
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.clients import (
    Caller,
    Failed,
    Ok,
    ResizeRequest,
    StartRequest,
    StopAccepted,
    StopRequest,
    VmStarted,
    VmTerminated,
    WaitRequest,
)
from vmd.ipc.messages.priv import NicsFailed
from vmd.ipc.messages.vm import Outcome, PauseDone, StartVm, StopMode, StopVm, VmFailed, VmRunning
from vmd.ipc.messages.vmm import VmExited, VmSlot
from vmd.ipc.routes import Proc
from vmd.memfile import sealed_file
from vmd.parent import service
from vmd.parent.clients import For
from vmd.parent.consoles import Consoles
from vmd.parent.core import Core
from vmd.parent.endings import FAILED, KILLED, POWERED_OFF, STOPPED
from vmd.parent.groups import HOST, LIMIT
from vmd.parent.life import STOP_GRACE_S, Life
from vmd.parent.opening import ClientFiles, Opened
from vmd.parent.resources import Pty
from vmd.parent.vm import Receiving, State, Vm
from vmd.record import Record

ROOT, OTHER = Caller(uid=0, gid=0, pid=1), Caller(uid=2000, gid=200, pid=2)
CLIENT, SECOND = 7, 8
UNUSED = cast("Any", None)


class Peer:
    """A channel that records messages, except VmSlot, and closes their descriptors."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, Record]] = []

    def send(self, message: Record, *, peerid: int, fds: dict[str, list[int]]) -> None:
        """Record a message."""
        if not isinstance(message, VmSlot):
            self.sent.append((peerid, message))
        for fd in [one for each in fds.values() for one in each]:
            os.close(fd)

    def take(self) -> list[tuple[int, Record]]:
        """Return the messages since the last call, each with its receiver."""
        sent, self.sent = self.sent, []
        return sent


class Openings:
    """Stands in for the openers.  The test gives their answers."""

    def __init__(self) -> None:
        self.asked: dict[int, tuple[Callable[[Opened], None], Callable[[VmdError], None]]] = {}  # by vmid
        self.boots: list[bool] = []
        self.given: ClientFiles | None = None  # of the last job
        self.ended: list[str] = []  # VMs whose files nobody wants any more

    def require_answers(self, _user: int) -> None:
        """Accept every user: no opener hangs."""

    def open(
        self, vm: Vm, _config: VmConfig, _user: int, on_opened: Callable[[Opened], None],
        on_failed: Callable[[VmdError], None], *, boots: bool, given: ClientFiles | None = None, **_more: object,
    ) -> None:  # fmt: skip
        """Accept a job."""
        self.asked[vm.vmid] = on_opened, on_failed
        self.given = given
        self.boots.append(boots)

    def give_up(self, vm: Vm) -> bool:
        """Drop the job of a VM."""
        return self.asked.pop(vm.vmid, None) is not None

    def vm_ended(self, vm: Vm) -> None:
        """Record that nobody wants the files of a VM any more."""
        self.ended.append(vm.name)


class Network:
    """Interfaces that are ready at once.  With `trouble` they fail, and with `slow` the VM waits for them."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.trouble: VmdError | None = None
        self.slow = False
        self.waiting: dict[int, Callable[[int, str], None]] = {}
        self.released: list[int] = []

    def notes(self, config: VmConfig) -> list[str]:
        """Return a note for each interface."""
        return [f"note {index}" for index in range(len(config.nics))]

    def launch(self, vm: Vm, message: Record, fds: dict[str, list[int]], on_failed: Callable[[int, str], None]) -> None:
        """Send the message to vmm, or let the VM wait."""
        if self.trouble is not None or self.slow:
            for fd in [one for each in fds.values() for one in each]:
                os.close(fd)
        if self.trouble is not None:
            raise self.trouble
        if self.slow:
            self.waiting[vm.vmid] = on_failed
        else:
            self.core.peers.send(Proc.VMM, message, fds=fds)

    def give_up(self, vm: Vm) -> bool:
        """Drop a VM that waits."""
        return self.waiting.pop(vm.vmid, None) is not None

    def release(self, vmid: int) -> None:
        """Record that the interfaces of a VM are released."""
        self.released.append(vmid)


class Rig(Timers):
    """The room, and stand-ins for all that it uses."""

    def __init__(self) -> None:
        super().__init__()
        self.stopped = False
        self.core = Core(cast("Any", self), Config())
        self.core.serving = True
        self.vmm, self.control = Peer(), Peer()
        self.core.peers.channels = cast("Any", {Proc.VMM: self.vmm, Proc.CONTROL: self.control})
        self.openings, self.network = Openings(), Network(self.core)
        self.devices: list[int] = []
        self.consoles = Consoles(self.core)
        self.life = Life(
            self.core, self.consoles, cast("Any", self.openings), cast("Any", self.network), cast("Any", self)
        )

    def answer_devices(self, vmid: int) -> None:
        """Record the VM, as the room of status."""
        self.devices.append(vmid)

    def stop(self) -> None:
        """Stop, as the loop."""
        self.stopped = True

    def add(self, name: str = "a", **fields: Any) -> Vm:  # noqa: ANN401 - of a VmConfig
        """Return a VM of vm.conf."""
        config = VmConfig(name=name, owner=Owner(uid=os.getuid()), disks=(DiskConfig(path="/d"),)).replace(**fields)
        return self.core.vms.add(config, from_config=True)

    def ask(self, vm: Vm, client: int = CLIENT, caller: Caller = ROOT) -> None:
        """Send a client's request to start a VM."""
        message = StartRequest(name=vm.name)
        self.life.serve_start(message, caller, Envelope(message, client, 0, {}))

    def opened(self, vm: Vm, **found: object) -> None:
        """Answer that the files of a VM are open."""
        opened = Opened()
        for name, value in found.items():
            setattr(opened, name, value)
        self.openings.asked.pop(vm.vmid)[0](opened)

    def running(self, vm: Vm) -> None:
        """Answer that a starting VM runs."""
        self.opened(vm)
        self.life.on_running(VmRunning(vmid=vm.vmid), Envelope(VmRunning(vmid=vm.vmid), 0, 0, {}))

    def run(self, vm: Vm) -> Vm:
        """Start a VM, and wait until it runs."""
        self.ask(vm)
        self.running(vm)
        self.control.take()
        self.vmm.take()
        return vm

    def exited(self, vm: Vm, outcome: Outcome = Outcome.POWER_OFF, text: str = "") -> None:
        """Report that the process of a VM has ended."""
        self.life.on_exited(VmExited(vmid=vm.vmid, pid=1, outcome=outcome, text=text), UNUSED)

    def stop_vm(self, vm: Vm, client: int = CLIENT, *, force: bool = False, wait: bool = False) -> None:
        """Send a client's request to stop a VM."""
        message = StopRequest(name=vm.name, force=force, wait=wait)
        self.life.serve_stop(message, ROOT, Envelope(message, client, 0, {}))


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """Yield the room."""
    monkeypatch.setattr(service, "notify", lambda *_: True)
    rig = Rig()
    yield rig
    rig.consoles.close()
    for leaving in rig.consoles.leaving:
        leaving._pty.close()
    close_vms(rig.core.vms)


def stop_of(vm: Vm, mode: StopMode) -> tuple[int, Record]:
    """Return the message to vmm that stops a VM, with its receiver."""
    return 0, StopVm(vmid=vm.vmid, mode=mode)


# --- starts ---------------------------------------------------------------------------------------------------


def test_a_start_from_the_request_to_the_answer(rig: Rig) -> None:
    """Files are opened first, then interfaces, then vmm is told.

    The answer comes when the guest runs, with all notes.
    """
    vm = rig.add(nics=(NicConfig(),))
    rig.ask(vm)
    assert (vm.state, rig.vmm.take(), rig.control.take()) == (State.STARTING, [], [])
    rig.opened(vm, notes=("odd length",), boot_name="bsd")
    ((_, start),) = rig.vmm.take()
    assert isinstance(start, StartVm)
    assert (start.vmid, start.config, start.boot_name) == (vm.vmid, vm.config, "bsd")
    rig.life.on_running(VmRunning(vmid=vm.vmid), Envelope(VmRunning(vmid=vm.vmid), 0, 0, {}))

    assert vm.pty is not None
    started = VmStarted(vmid=vm.vmid, name="a", pid=0, tty=vm.pty.path, notes=("odd length", "note 0"))
    assert rig.control.take() == [(CLIENT, started)]
    assert vm.state is State.RUNNING


def test_a_start_is_for_the_owner(rig: Rig) -> None:
    """It is refused for every user when the daemon ends, or if the VM already runs."""
    vm = rig.add()
    with pytest.raises(OperatorError) as refused:
        rig.ask(vm, caller=OTHER)
    assert refused.value.number == errno.EPERM
    rig.ask(vm)
    with pytest.raises(OperatorError):
        rig.ask(vm, SECOND)
    rig.core.ending = True
    with pytest.raises(OperatorError, match="vmd is stopping"):
        rig.ask(rig.add("b"))
    assert [*rig.openings.asked] == [vm.vmid]


@pytest.mark.parametrize("origin", ["", "/etc/vm.conf:7"])
def test_notes_about_a_start_are_logged(rig: Rig, capfd: pytest.CaptureFixture[str], origin: str) -> None:
    """With the place of the VM in vm.conf, if it has one."""
    vm = rig.add()
    rig.life.note(vm, vm.config.replace(origin=origin), ["one thing", "another"])

    where = f"{origin}: " if origin else ""
    errors = capfd.readouterr().err
    assert [f"{where}vm a: {note}\n" in errors for note in ("one thing", "another")] == [True, True]
    assert vm.notes == ("one thing", "another")


def test_files_that_cannot_be_opened_end_the_start(rig: Rig, capfd: pytest.CaptureFixture[str]) -> None:
    """The client that started the VM, and clients that wait for its end, get the reason.

    The next start is possible.
    """
    vm = rig.add()
    rig.ask(vm)
    rig.life.serve_wait(WaitRequest(name="a"), ROOT, Envelope(WaitRequest(name="a"), SECOND, 0, {}))
    rig.openings.asked.pop(vm.vmid)[1](OperatorError(errno.ENOENT, "vm a: disk /d: not there"))

    assert rig.control.take() == [
        (SECOND, VmTerminated(vmid=vm.vmid, name="a", text="disk /d: not there", how=FAILED)),
        (CLIENT, Failed(code=errno.ENOENT, text="vm a: disk /d: not there")),
    ]
    assert (vm.state, vm.pty, rig.network.released) == (State.STOPPED, None, [vm.vmid])
    assert capfd.readouterr().err.count("disk /d: not there") == 1
    rig.ask(vm)


def test_interfaces_that_fail_end_the_start(rig: Rig) -> None:
    """They fail at once, or later.  A VM of vm.conf stays known."""
    vm = rig.add()
    rig.network.trouble = HostError("open /dev/net/tun", errno.EACCES)
    rig.ask(vm)
    rig.opened(vm, couriers=[os.open(os.devnull, os.O_RDONLY)])
    assert rig.control.take() == [(CLIENT, Failed(code=errno.EACCES, text="open /dev/net/tun: Permission denied"))]
    rig.network.trouble, rig.network.slow = None, True
    rig.ask(vm)
    rig.opened(vm)
    rig.network.waiting.pop(vm.vmid)(errno.EPIPE, "priv has ended")

    assert rig.control.take() == [(CLIENT, Failed(code=errno.EPIPE, text="vm a: priv has ended"))]
    assert (vm.state, rig.core.vms.find(0, "a"), rig.vmm.take()) == (State.STOPPED, vm, [])


def test_a_vm_described_by_a_client_is_removed_if_its_start_fails(rig: Rig) -> None:
    """Its name is free again."""
    config = VmConfig(name="mine", disks=(DiskConfig(path="/d"),))
    message = StartRequest(name="mine", config=config)
    rig.life.serve_start(message, ROOT, Envelope(message, CLIENT, 0, {}))
    (vm,) = rig.core.vms
    with pytest.raises(OperatorError):
        rig.life.serve_start(message, ROOT, Envelope(message, SECOND, 0, {}))
    rig.openings.asked.pop(vm.vmid)[1](OperatorError(errno.ENOENT, "no kernel"))

    assert [*rig.core.vms] == []
    rig.core.config = Config(settings=Globals(limit_vms=0))
    with pytest.raises(OperatorError, match="limit vms"):
        rig.life.serve_start(message, ROOT, Envelope(message, CLIENT, 0, {}))
    assert [*rig.core.vms] == []
    with pytest.raises(OperatorError):
        rig.life.serve_start(message, OTHER, Envelope(message, CLIENT, 0, {}))


def test_vms_of_a_configuration_start_in_batches(rig: Rig, capfd: pytest.CaptureFixture[str]) -> None:
    """After the delay the next batch follows.  A VM that cannot start is left out, with the reason."""
    rig.core.config = Config(settings=Globals(start_parallel=2, start_delay_s=30))
    vms = [rig.add(name) for name in "abc"] + [rig.add("d", fault="no such owner")]
    for vm in vms:
        vm.enqueue()
    rig.core.serving = False
    rig.life.start_batch()
    assert [*rig.openings.asked] == []
    rig.core.serving = True
    rig.life.start_batch()
    assert [*rig.openings.asked] == [vm.vmid for vm in vms[:2]]
    rig.fire(30)

    assert [vm.state for vm in vms] == [State.STARTING, State.STARTING, State.STARTING, State.STOPPED]
    assert "no such owner" in vms[3].text
    assert f"vm d: {vms[3].text}\n" in capfd.readouterr().err
    assert rig.life.batch_timer is None


# --- stops ----------------------------------------------------------------------------------------------------


def test_stop_answers_at_once_or_at_the_end(rig: Rig) -> None:
    """A client that waits twice is answered once."""
    vm = rig.run(rig.add())
    rig.stop_vm(vm)
    assert rig.control.take() == [(CLIENT, StopAccepted(vmid=vm.vmid, name="a"))]
    assert rig.vmm.take() == [stop_of(vm, StopMode.GRACEFUL)]
    with pytest.raises(OperatorError, match="already stopping"):
        rig.stop_vm(vm, SECOND)
    for _ in range(2):
        rig.stop_vm(vm, SECOND, force=True, wait=True)
    assert rig.control.take() == []
    rig.exited(vm, Outcome.ENDED)

    assert rig.control.take() == [(SECOND, VmTerminated(vmid=vm.vmid, name="a", text="", how=KILLED))]
    with pytest.raises(OperatorError) as refused:
        rig.stop_vm(vm)
    assert refused.value.number == VMD_VM_STOP_INVALID


@pytest.mark.parametrize("at", ["files", "interfaces"])
def test_a_vm_without_a_process_is_stopped_without_vmm(rig: Rig, at: str) -> None:
    """vmm gets no message, but the client that started the VM gets its answer."""
    vm = rig.add()
    rig.network.slow = True
    rig.ask(vm)
    if at == "interfaces":
        rig.opened(vm)
    rig.stop_vm(vm, SECOND, wait=True)

    text = "stopped before its guest began"
    assert rig.control.take() == [
        (SECOND, VmTerminated(vmid=vm.vmid, name="a", text=text, how=KILLED)),
        (CLIENT, Failed(code=errno.EIO, text=f"vm a: {text}")),
    ]
    assert (rig.vmm.take(), vm.state, vm.pty) == ([], State.STOPPED, None)
    assert vm.vmid in rig.network.released


def test_a_vm_that_waits_for_its_turn_is_not_started(rig: Rig) -> None:
    """A stop is answered at once."""
    vm = rig.add()
    vm.enqueue()
    rig.stop_vm(vm)
    ((client, terminated),) = rig.control.take()
    assert (client, isinstance(terminated, VmTerminated), vm.state) == (CLIENT, True, State.STOPPED)
    rig.life.start_batch()
    assert rig.openings.asked == {}


def test_wait_is_for_vms_that_run_and_for_their_owners(rig: Rig) -> None:
    """A client may wait once."""
    vm = rig.add()
    message = WaitRequest(name="a")
    with pytest.raises(OperatorError, match="is not running"):
        rig.life.serve_wait(message, ROOT, Envelope(message, CLIENT, 0, {}))
    rig.run(vm)
    with pytest.raises(OperatorError) as refused:
        rig.life.serve_wait(message, OTHER, Envelope(message, CLIENT, 0, {}))
    assert refused.value.number == errno.EPERM
    rig.life.serve_wait(message, ROOT, Envelope(message, CLIENT, 0, {}))
    with pytest.raises(OperatorError, match="already waited for"):
        rig.life.serve_wait(message, ROOT, Envelope(message, CLIENT, 0, {}))
    rig.exited(vm)
    assert rig.control.take() == [(CLIENT, VmTerminated(vmid=vm.vmid, name="a", text="", how=POWERED_OFF))]


def test_a_daemon_without_vms_ends_at_once(rig: Rig, capfd: pytest.CaptureFixture[str]) -> None:
    """There is nobody to wait for."""
    rig.add()
    rig.life.stop_all()
    assert (rig.stopped, rig.core.ending, rig.timers) == (True, True, [])
    assert "stopping" not in capfd.readouterr().err


def test_a_vm_that_does_not_run_takes_no_room(rig: Rig) -> None:
    """One that runs does."""
    rig.core.config = Config(settings=Globals(limit_vms=1))
    a, b = (rig.add(name) for name in "ab")
    rig.run(b)
    with pytest.raises(OperatorError, match="vm a: "):
        rig.ask(a)
    rig.exited(b)
    rig.ask(a)
    assert a.state is State.STARTING


def test_others_learn_that_a_process_has_ended(rig: Rig) -> None:
    """Such as the room of snapshots, whether the guest goes on or not."""
    gone: list[str] = []
    rig.life.on_gone = lambda vm: gone.append(vm.name)
    vm = rig.run(rig.add())
    rig.exited(vm, Outcome.REBOOT)
    assert gone == ["a"]
    rig.running(vm)
    rig.exited(vm)
    assert gone == ["a", "a"]


def test_openers_do_not_outlive_the_process_that_wants_the_files(rig: Rig) -> None:
    """That is so when a guest resets itself, when it ends, and when it cannot be started."""
    vm = rig.run(rig.add())
    rig.exited(vm, Outcome.REBOOT)
    assert rig.openings.ended == ["a"]
    rig.running(vm)
    rig.exited(vm)
    assert set(rig.openings.ended[1:]) == {"a"}

    rig.openings.ended.clear()
    rig.ask(vm)
    rig.openings.asked.pop(vm.vmid)[1](OperatorError(errno.ENOENT, "disk /a: No such file or directory"))
    assert rig.openings.ended == ["a"]


def test_a_daemon_that_ends_asks_all_guests_and_then_kills_them(rig: Rig) -> None:
    """It ends after its last VM.  Guests that do not shut down in time are killed."""
    a, b, c = (rig.add(name) for name in "abc")
    rig.run(a)
    rig.run(b)
    rig.ask(c)  # has no process yet
    rig.life.stop_all()
    assert rig.vmm.take() == [stop_of(vm, StopMode.GRACEFUL) for vm in (a, b)]
    assert (c.state, rig.core.ending) == (State.STOPPED, True)
    rig.exited(a)
    rig.fire(STOP_GRACE_S)
    assert rig.vmm.take() == [stop_of(b, StopMode.KILL)]
    assert not rig.stopped
    rig.exited(b, Outcome.KILLED)
    for delay_s in {each for each, _ in rig.timers}:
        rig.fire(delay_s)
    assert rig.stopped


# --- ends -----------------------------------------------------------------------------------------------------


def test_the_answer_to_a_start_says_why_the_vm_could_not_be_built(rig: Rig) -> None:
    """It has the errno that the VM's process reported."""
    vm = rig.add()
    rig.ask(vm)
    rig.opened(vm)
    rig.life.on_failed(VmFailed(vmid=vm.vmid, code=errno.ENOEXEC, text="not a kernel"), UNUSED)
    assert rig.control.take() == []
    rig.exited(vm, Outcome.FAILED)

    assert rig.control.take() == [(CLIENT, Failed(code=errno.ENOEXEC, text="vm a: not a kernel"))]
    assert (vm.state, vm.text) == (State.STOPPED, "not a kernel")
    with pytest.raises(PeerError, match="which does not run"):
        rig.exited(vm)


def test_a_guest_that_resets_itself_starts_again(rig: Rig) -> None:
    """Console and id stay.  Clients that wait for an answer of the earlier process get an error."""
    vm = rig.run(rig.add())
    pty, vmid = vm.pty, vm.vmid
    rig.core.clients.wait(SECOND, For.PAUSE, vmid)
    rig.core.clients.wait(CLIENT, For.END, vmid)
    rig.exited(vm, Outcome.REBOOT)
    assert rig.control.take() == [(SECOND, Failed(code=errno.EAGAIN, text="vm a: was reset by its guest meanwhile"))]
    assert rig.devices == [vmid]
    rig.running(vm)
    assert (vm.state, vm.pty, vm.vmid, vm.guest_resets) == (State.RUNNING, pty, vmid, 1)
    assert rig.network.released == []
    rig.exited(vm)
    assert rig.control.take() == [(CLIENT, VmTerminated(vmid=vmid, name="a", text="", how=POWERED_OFF))]


def test_a_guest_that_cannot_start_again_has_failed(rig: Rig) -> None:
    """Its disk has gone meanwhile.  The text of its end has this reason."""
    vm = rig.run(rig.add())
    rig.core.clients.wait(CLIENT, For.END, vm.vmid)
    rig.exited(vm, Outcome.REBOOT)
    rig.openings.asked.pop(vm.vmid)[1](OperatorError(errno.ENOENT, "disk /d: not there"))

    text = "cannot reboot: disk /d: not there"
    assert rig.control.take() == [(CLIENT, VmTerminated(vmid=vm.vmid, name="a", text=text, how=FAILED))]
    assert rig.network.released == [vm.vmid] * len(rig.network.released) != []


def test_a_guest_that_cannot_even_be_tried_to_start_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Such as on a host without descriptors.  The reason is logged, and is the text of its end."""
    vm = rig.run(rig.add())
    rig.core.clients.wait(CLIENT, For.END, vm.vmid)

    def fail(*_given: object, **_more: object) -> None:
        raise HostError("make a pty", errno.EMFILE)

    monkeypatch.setattr(rig.life, "start", fail)
    rig.exited(vm, Outcome.REBOOT)
    text = "cannot reboot: make a pty: Too many open files"
    assert rig.control.take() == [(CLIENT, VmTerminated(vmid=vm.vmid, name="a", text=text, how=FAILED))]
    assert f"vm a: {text}\n" in capfd.readouterr().err


def test_a_vm_whose_process_ends_waits_for_nothing_more(rig: Rig) -> None:
    """A VM that is received may still have waited for its files or its interfaces."""
    vm = rig.run(rig.add())
    rig.network.waiting[vm.vmid] = lambda _code, _text: None
    rig.openings.asked[vm.vmid] = cast("Any", None)
    rig.exited(vm)
    assert (rig.network.waiting, rig.openings.asked, rig.network.released) == ({}, {}, [vm.vmid])


@pytest.mark.parametrize("received", [False, True])
def test_what_is_known_of_a_guest_that_runs(rig: Rig, received: bool) -> None:
    """Its pid is that of its process, whose descriptor is not kept.  It has its limits from then on.

    Others learn of a VM that has arrived.
    """
    before = open_descriptors()
    arrived: list[Vm] = []
    scored: list[int] = []
    rig.life.on_received = arrived.append
    rig.life.scores = cast("Any", SimpleNamespace(give_usual=scored.append))
    vm = rig.add()
    vm.open_console()
    vm.restore_state(State.RECEIVING if received else State.STARTING)
    vm.receiving = Receiving(paused=False) if received else None
    limited: list[Vm] = []
    rig.life.bounds.on_limits = limited.append
    figures = sealed_file("figures", 8)
    envelope = Envelope(UNUSED, 0, 0, {"process": [os.pidfd_open(os.getpid())], "figures": [figures]})
    rig.life.on_running(VmRunning(vmid=vm.vmid), envelope)
    assert (vm.pid, scored, arrived) == (os.getpid(), [os.getpid()], [vm] if received else [])
    assert (vm.figures, limited) == (figures, [vm])
    vm.take_figures(None)
    vm.drop_pty()
    assert open_descriptors() == before


def test_a_guest_that_resets_itself_again_and_again_is_stopped(rig: Rig) -> None:
    """It would keep the host busy."""
    vm = rig.run(rig.add())
    for _ in range(10):
        rig.exited(vm, Outcome.REBOOT)
        if vm.state is State.STOPPED:
            break
        rig.running(vm)
    assert (vm.state, vm.text) == (State.STOPPED, "restarted too quickly")
    assert rig.openings.asked == {}


# --- exceptions in handlers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "state", "killed"),
    [
        (VmExited(vmid=1, pid=1, outcome=Outcome.POWER_OFF, text=""), State.STOPPED, False),
        (NicsFailed(vmid=1, ticket=1, code=1, text=""), State.STOPPED, False),
        (VmRunning(vmid=1), State.STOPPING, True),
        (PauseDone(vmid=1, paused=True), State.RUNNING, False),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, Record) else None,
)
def test_a_bug_ends_only_vms_of_unknown_state(rig: Rig, message: Record, state: State, killed: bool) -> None:
    """A VM ends if its state is no longer known.  Waiting clients are answered in any case."""
    vm = rig.run(rig.add())
    rig.core.clients.wait(CLIENT, For.PAUSE, vm.vmid)
    rig.life.give_up(vm.vmid, message)

    assert vm.state is state
    assert rig.vmm.take() == ([stop_of(vm, StopMode.KILL)] if killed else [])
    answered = [] if killed else [(CLIENT, True)]
    assert [(client, OUR_FAULT in repr(answer)) for client, answer in rig.control.take()] == answered
    rig.life.give_up(99, ResizeRequest(disk="x", size_bytes=1))


# --- VMs that clients describe ----------------------------------------------------------------------------------

USER = Caller(uid=os.getuid() or 2000, gid=os.getgid(), pid=3)


def ask_described(
    rig: Rig, caller: Caller = ROOT, template: str = "", files: tuple[str, ...] = (), **fields: object
) -> None:
    """Let a client start a VM that it describes."""
    given = {"disks": (DiskConfig(path="/mine"),)} | fields
    message = StartRequest(name="mine", template=template, config=VmConfig(name="mine").replace(**given), files=files)
    rig.life.serve_start(message, caller, Envelope(message, CLIENT, 0, {}))


def test_only_root_starts_a_vm_that_no_file_describes(rig: Rig) -> None:
    """Other users make instances of the VMs that allow it."""
    with pytest.raises(OperatorError, match=r"only root may start a VM that vm\.conf does not describe") as refused:
        ask_described(rig, USER)
    assert refused.value.number == errno.EPERM
    assert ([*rig.core.vms], rig.openings.asked) == ([], {})
    ask_described(rig)
    assert [vm.name for vm in rig.core.vms] == ["mine"]


def test_the_name_of_an_instance_is_new(rig: Rig) -> None:
    """Whatever VM has the id that is next."""
    template = rig.add("template")
    ask_described(rig, template="template")
    assert [(vm.name, vm.config.parent) for vm in rig.core.vms] == [("template", ""), ("mine", "template")]
    with pytest.raises(OperatorError, match="vm mine already exists") as refused:
        ask_described(rig, template="template")
    assert refused.value.number == errno.EEXIST
    with pytest.raises(OperatorError, match="vm mine: template none not found"):
        ask_described(rig, template="none")
    assert (template.state, len(rig.openings.asked)) == (State.STOPPED, 1)


def test_a_user_who_makes_an_instance_takes_no_address_of_another_vm(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may: the two VMs need not run at the same time."""
    monkeypatch.setattr(Pty, "give_to", lambda *_: None)
    nic = NicConfig(lladdr=bytes.fromhex("021122334455"))
    allow = AllowInstance(owner=Owner(uid=USER.uid), flags=~VmFlag(0))
    rig.add("template", allow=allow)
    rig.add("other", nics=(nic,))
    with pytest.raises(OperatorError, match="lladdr 02:11:22:33:44:55 is that of another vm"):
        ask_described(rig, USER, "template", nics=(nic,), given=VmFlag.NETWORK, disks=())
    ask_described(rig, ROOT, "template", nics=(nic,), given=VmFlag.NETWORK)


MIB = 1 << 20


@pytest.mark.parametrize(
    ("caller", "memory", "most"),
    [(ROOT, 512 * MIB, 1024 * MIB), (ROOT, 2048 * MIB, 2048 * MIB), (USER, 128 * MIB, 256 * MIB),
     (USER, 512 * MIB, 512 * MIB)],
)  # fmt: skip
def test_how_large_a_boot_image_of_a_client_may_be(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caller: Caller, memory: int, most: int
) -> None:
    """It is copied to memory of the host for reboots.  A user has less of it than root."""
    monkeypatch.setattr(Pty, "give_to", lambda *_: None)
    allow = AllowInstance(owner=Owner(uid=USER.uid), flags=~VmFlag(0))
    rig.add("template", allow=allow)
    ask_described(
        rig, caller, "template", ("kernel",), memory_bytes=memory, kernel="/bsd",
        given=VmFlag.MEMORY | VmFlag.KERNEL, disks=(),
    )  # fmt: skip

    given = rig.openings.given
    assert given is not None
    assert (given.copy_max, [*given.copies]) == (most, ["kernel"])


def test_a_boot_image_for_one_start_is_not_copied(rig: Rig) -> None:
    """The VM of vm.conf boots its own image after a reset."""
    vm = rig.add()
    message = StartRequest(name="a", files=("kernel",))
    rig.life.serve_start(message, ROOT, Envelope(message, CLIENT, 0, {}))
    given = rig.openings.given
    assert given is not None
    assert (given.copy_max, given.copies, given.check_mode) == (0, {}, True)
    assert vm.once_because


# --- reset of all VMs -----------------------------------------------------------------------------------------


def test_a_reset_ends_with_its_last_vm(rig: Rig) -> None:
    """Then its clients are answered, and the VMs of the file that has been loaded meanwhile follow."""
    a, b = rig.run(rig.add("a")), rig.run(rig.add("b"))
    for vm in (a, b):
        vm.resetting, vm.from_config = True, False
    a.successor = VmConfig(name="a", owner=Owner(uid=os.getuid()), disks=(DiskConfig(path="/new"),))
    rig.core.clients.wait(CLIENT, For.RESET)
    rig.exited(a, Outcome.KILLED)
    assert rig.control.take() == []
    new = rig.core.vms.get(0, "a")
    assert (new.state, new.config.disks[0].path) == (State.STARTING, "/new")
    rig.exited(b, Outcome.KILLED)
    assert rig.control.take() == [(CLIENT, Ok())]
    assert [vm.name for vm in rig.core.vms] == ["a"]


def test_after_a_reset_without_new_vms_ids_begin_with_1(rig: Rig) -> None:
    """As after a start of the daemon."""
    vms = [rig.run(rig.add(name)) for name in "abc"]
    for vm in vms:
        vm.resetting, vm.from_config = True, False
    for vm in vms:
        rig.exited(vm, Outcome.KILLED)

    assert rig.add("d").vmid == 1


def test_the_end_of_the_daemon_is_logged(rig: Rig, capfd: pytest.CaptureFixture[str]) -> None:
    """With the number of VMs, and for how long it waits for them."""
    rig.run(rig.add())
    rig.add("stopped")
    rig.life.stop_all()
    rig.life.stop_all()
    assert capfd.readouterr().err.count(f"stopping 1 VMs, {STOP_GRACE_S:.0f} s at most") == 1


# --- why a VM ended -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lack", "memory_bytes", "outcome", "text"),
    [
        (LIMIT, 3 << 30, Outcome.KILLED, "memory limit of 3.0G reached: killed by signal 9"),
        (LIMIT, 0, Outcome.FAILED, "memory limit reached: killed by signal 9"),
        (HOST, 3 << 30, Outcome.KILLED, "host out of memory: killed by signal 9"),
        (LIMIT, 3 << 30, Outcome.ENDED, "killed by signal 9"),
        ("", 3 << 30, Outcome.KILLED, "killed by signal 9"),
    ],
)
def test_a_vm_that_the_kernel_kills_for_lack_of_memory(
    rig: Rig, lack: str, memory_bytes: int, outcome: Outcome, text: str
) -> None:
    """The sentence names the limit that is in force, and only if the VM ended by that."""
    vm = rig.run(rig.add(limit=VmLimits(memory_bytes=memory_bytes)))
    vm.memory_lack = lack
    rig.core.clients.wait(CLIENT, For.END, vm.vmid)
    rig.exited(vm, outcome, "killed by signal 9")
    ((_, ended),) = rig.control.take()
    assert isinstance(ended, VmTerminated)
    assert (ended.text, vm.text) == (text, text)
    rig.run(vm)
    rig.exited(vm, Outcome.KILLED, "killed by signal 9")
    assert vm.text == "killed by signal 9"


def test_a_guest_that_resets_itself_when_it_is_stopped(rig: Rig) -> None:
    """OpenBSD does that.  The VM is not started again."""
    vm = rig.run(rig.add())
    rig.stop_vm(vm, wait=True)
    rig.exited(vm, Outcome.REBOOT)

    assert rig.control.take() == [(CLIENT, VmTerminated(vmid=vm.vmid, name="a", text="stopped as asked", how=STOPPED))]
    assert (vm.state, rig.openings.asked) == (State.STOPPED, {})


@pytest.mark.parametrize(
    ("device", "why"),
    [
        (BootDevice.CDROM, "it was booted from the CD"),
        (BootDevice.NET, "it was booted from the network"),
        (BootDevice.DISK, "only that start said what to boot"),
    ],
)
def test_a_vm_that_was_started_in_another_way_once(rig: Rig, device: BootDevice, why: str) -> None:
    """Its reset ends it.  The next start is one by vm.conf again."""
    vm = rig.add(cdrom="/cd.iso")
    message = StartRequest(name="a", boot_device=device)
    rig.life.serve_start(message, ROOT, Envelope(message, CLIENT, 0, {}))
    rig.running(vm)
    rig.exited(vm, Outcome.REBOOT)
    assert (vm.state, vm.text) == (State.STOPPED, f"rebooted; not started again because {why}")
    rig.run(vm)
    rig.exited(vm, Outcome.REBOOT)
    assert vm.state is State.STARTING


def test_disks_that_are_other_files_after_a_reset(rig: Rig, capfd: pytest.CaptureFixture[str]) -> None:
    """The guest has them, and the operator is told.  A start by a user may have any files."""
    vm = rig.add()
    first, second = ({"disk /d": FileId(device=1, inode=inode)} for inode in (2, 3))
    rig.ask(vm)
    rig.opened(vm, files=first)
    rig.life.on_running(VmRunning(vmid=vm.vmid), Envelope(VmRunning(vmid=vm.vmid), 0, 0, {}))
    for files in (first, second):
        assert "is not the file" not in capfd.readouterr().err
        rig.exited(vm, Outcome.REBOOT)
        rig.opened(vm, files=files)
        rig.life.on_running(VmRunning(vmid=vm.vmid), Envelope(VmRunning(vmid=vm.vmid), 0, 0, {}))
    assert "disk /d is not the file that its guest had before it was reset" in capfd.readouterr().err
    assert vm.files == second


# --- batches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("delay_s", "left_s"), [(30, 20.0), (5, 5), (60, 20.0)])
def test_a_reload_does_not_start_a_batch_before_its_time(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, delay_s: int, left_s: float
) -> None:
    """The host is as busy as before.  A shorter delay counts."""
    rig.core.config = Config(settings=Globals(start_parallel=1, start_delay_s=30))
    vms = [rig.add(name) for name in "ab"]
    for vm in vms:
        vm.enqueue()
    rig.life.start_batch()
    waited = rig.life.batch_timer
    assert waited is not None
    monkeypatch.setattr(time, "monotonic", lambda: waited.due_s - 20.0)
    rig.core.config = Config(settings=Globals(start_parallel=1, start_delay_s=delay_s))
    rig.life.start_batch_in_time()

    assert waited.callback is None
    assert [delay for delay, timer in rig.timers if timer.callback is not None] == [left_s]
    assert [*rig.openings.asked] == [vms[0].vmid]
    rig.fire(left_s)
    assert [*rig.openings.asked] == [vm.vmid for vm in vms]


def test_a_reload_starts_vms_at_once_where_no_batch_waits(rig: Rig) -> None:
    """Without a limit, as many VMs start at a time as the host has processors."""
    rig.core.config = Config(settings=Globals(start_parallel=0))
    vms = [rig.add(f"v{number}") for number in range((os.cpu_count() or 1) + 1)]
    for vm in vms:
        vm.enqueue()
    rig.life.start_batch_in_time()

    assert [*rig.openings.asked] == [vm.vmid for vm in vms[:-1]]
    assert vms[-1].state is State.WAITING
