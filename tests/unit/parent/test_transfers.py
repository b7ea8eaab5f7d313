"""How the parent handles the messages about VMs that are sent and received, without any process (*cat. 4.7*)."""

import errno
import os
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from tests.support.parentvms import close_vms
from vmd.config.model import BootDevice, Config, DiskConfig, Forward, NicConfig, Owner, SeedConfig, VmConfig
from vmd.errors import HostError, OperatorError, VmdError
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.clients import (
    Caller,
    Failed,
    PauseRequest,
    ReceiveRequest,
    SendRequest,
    VmPaused,
    VmReceived,
    VmSent,
)
from vmd.ipc.messages.control import PassFiles
from vmd.ipc.messages.shared import Live, TransferProgress
from vmd.ipc.messages.vm import (
    CancelTransfer,
    PauseDone,
    PauseVm,
    ReceivedHeader,
    ReceivedMachine,
    ReceiveMemory,
    ReceiveVm,
    ResumeReceived,
    SendDone,
    SendVm,
    StopMode,
    StopVm,
    VmHalted,
    VmRunning,
)
from vmd.ipc.messages.vmm import VmSlot
from vmd.ipc.routes import Proc
from vmd.parent import vm as vms
from vmd.parent.clients import For
from vmd.parent.consoles import Consoles
from vmd.parent.core import Core
from vmd.parent.life import Life
from vmd.parent.opening import Opened
from vmd.parent.transfers import LOCK_PATIENCE_S, Transfers, require_same
from vmd.parent.vm import State, Vm
from vmd.record import Record

ROOT = Caller(uid=0, gid=0, pid=1)
USER = Caller(uid=1000, gid=1000, pid=2)
CLIENT, OTHER = 7, 8
AnyParent = Any  # stands in for vmd.parent.main.Parent
UNUSED = cast("Any", None)
DISKS = (DiskConfig(path="/disk"),)


class Peer:
    """The channel to vmm or to control.  It records messages, and closes their descriptors."""

    def __init__(self) -> None:
        self.sent: list[Record] = []
        self.answers: list[tuple[int, Record]] = []

    def send(self, message: Record, *, peerid: int, fds: dict[str, list[int]]) -> None:
        """Record a message, except the slots that come with VMs."""
        if not isinstance(message, VmSlot):
            self.sent.append(message)
            self.answers.append((peerid, message))
        for fd in (fd for each in fds.values() for fd in each):
            os.close(fd)


class Network:
    """Interfaces that are ready, unless `trouble` or `later` is set.  With `later` the answer comes by `on_failed`."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.plans = self
        self.trouble: Exception | None = None
        self.on_failed: Callable[[int, str], None] | None = None
        self.later = False

    def check(self, _vm: Vm, _config: VmConfig) -> None:
        """Accept the addresses."""

    def require_switches(self, _config: VmConfig) -> None:
        """Accept the switches."""

    def give_up(self, _vm: Vm) -> bool:
        """Return that no VM waits."""
        return False

    def launch(
        self, _vm: Vm, message: Record, fds: dict[str, list[int]], on_failed: Callable[[int, str], None]
    ) -> None:
        """Send the message to vmm, or let the VM wait."""
        if self.trouble is not None:
            raise self.trouble
        self.on_failed = on_failed
        if not self.later:
            self.core.peers.send(Proc.VMM, message, fds=fds)


class Disks:
    """Stands in for the room that opens files.

    Opening fails with the first error in `trouble`.  With `slow` it waits until `answer` is called.
    """

    def __init__(self) -> None:
        self.trouble: list[VmdError] = []
        self.notes: tuple[str, ...] = ()
        self.opened = 0
        self.patience_s = 0.0
        self.slow = False
        self.answer: Callable[[], None] | None = None
        self.found: Opened | None = None

    def open(
        self,
        _vm: Vm,
        _config: VmConfig,
        _user: int,
        on_opened: Callable[[Opened], None],
        on_failed: Callable[[VmdError], None],
        *,
        boots: bool,
        patience_s: float = 0.0,
        names_holder: bool = True,
        others_have: bool = False,
    ) -> None:
        """Answer without opening a file."""
        assert names_holder or not self.slow  # the holder is not named while the sender may have it
        assert not boots
        self.patience_s = patience_s

        def answer() -> None:
            self.answer = None
            if self.trouble:
                on_failed(self.trouble[0])
                return
            self.opened += 1
            opened = self.found or Opened()
            opened.notes = self.notes
            on_opened(opened)

        self.answer = answer
        if not self.slow:
            answer()

    def give_up(self, _vm: Vm) -> bool:
        """Drop the job.  Return whether there was one."""
        waited, self.answer = self.answer is not None, None
        return waited


class Parent:
    """The rooms that are needed, and their channels."""

    def __init__(self) -> None:
        self.later: list[Callable[[], None]] = []
        self.delays_s: list[float] = []
        self.core = Core(cast("Any", self), Config())
        self.vms, self.clients = self.core.vms, self.core.clients
        self.vmm, control = Peer(), Peer()
        self.core.peers.channels = cast("Any", {Proc.VMM: self.vmm, Proc.CONTROL: control})
        self.answers = control.answers
        self.network = Network(self.core)
        self.disks = Disks()
        openings = cast("Any", self.disks)
        self.life = Life(self.core, Consoles(self.core), openings, cast("Any", self.network), UNUSED)
        self.transfers = Transfers(self.core, self.life, openings, cast("Any", self.network))

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Start a timer, as the loop."""
        self.delays_s.append(delay_s)
        self.later.append(callback)


@pytest.fixture
def parent() -> Iterator[AnyParent]:
    """Yield a parent that knows a VM `a` of vm.conf."""
    made = Parent()
    made.vms.add(VmConfig(name="a", owner=Owner(uid=5), memory_bytes=64 << 20), from_config=True)
    yield made
    close_vms(made.vms)


@pytest.fixture
def disks(parent: AnyParent) -> Disks:
    """Return disks that can be opened."""
    found: Disks = parent.disks
    return found


def envelope(client: int = CLIENT) -> Envelope:
    """Return the envelope of a client's request.  The stream is not in it, because control has it."""
    return Envelope(ReceiveRequest(name="x"), client, 0, {})


def running(parent: Parent, state: State = State.RUNNING) -> Vm:
    """Set the VM to running."""
    vm = parent.vms.get(0, "a")
    vm._state, vm.pid = state, 4711
    return vm


def send(parent: AnyParent, *, keep: bool = False) -> Vm:
    """Begin to send a VM."""
    vm: Vm = parent.vms.get(0, "a")
    parent.transfers.serve_send(SendRequest(name="a", keep=keep), ROOT, envelope())
    assert parent.vmm.sent == [SendVm(vmid=vm.vmid, keep=keep, one_shot=bool(vm.once_because))]
    assert vm.state is State.SENDING
    assert parent.answers.pop() == (CLIENT, PassFiles())
    parent.vmm.sent.clear()
    return vm


def done(parent: AnyParent, vm: Vm, text: str = "") -> None:
    """Let the VM process report the end of the sending."""
    parent.transfers.on_send_done(SendDone(vmid=vm.vmid, sent_bytes=100, text=text), UNUSED)


def exited(parent: AnyParent, vm: Vm, code: int, text: str) -> None:
    """Report the end of a VM's process to the clients of the transfer."""
    parent.life._answer_overtaken(vm, code, text)


def leave(parent: AnyParent, client: int) -> None:
    """Disconnect a client."""
    for wait in parent.clients.gone(client):
        parent.transfers.on_client_gone(wait.vmid)


def unpause(parent: AnyParent, vm: Vm) -> None:
    """Send a client's request to unpause the VM."""
    message = PauseRequest(vmid=vm.vmid, paused=False)
    parent.transfers.serve_pause(message, ROOT, Envelope(message, CLIENT, 0, {}))


def report_running(parent: AnyParent, vm: Vm, *, paused: bool) -> None:
    """Let the VM's process report that it runs."""
    pidfd = os.pidfd_open(os.getpid())
    parent.life.on_running(VmRunning(vmid=vm.vmid, paused=paused), Envelope(UNUSED, 0, 0, {"process": [pidfd]}))


# --- sending ---------------------------------------------------------------------------------------------------------


def test_sent(parent: AnyParent) -> None:
    """The client gets its answer when the VM's process has ended, because only then the disks are free."""
    running(parent)
    vm = send(parent)

    done(parent, vm)
    assert (vm.state, parent.answers) == (State.STOPPING, [])
    exited(parent, vm, 0, "sent")

    assert parent.answers == [(CLIENT, VmSent(vmid=vm.vmid, name="a", sent_bytes=100))]


@pytest.mark.parametrize("state", [State.RUNNING, State.PAUSED])
def test_sent_and_kept(parent: AnyParent, state: State) -> None:
    """The VM is as before."""
    running(parent, state)
    vm = send(parent, keep=True)

    done(parent, vm)

    assert vm.state is state
    assert vm.sending is None
    assert parent.answers == [(CLIENT, VmSent(vmid=vm.vmid, name="a", sent_bytes=100))]


def test_sent_while_it_runs(parent: AnyParent) -> None:
    """The VM's process gets the limits for its pause, and the client the results.  Invalid limits are refused."""
    vm = running(parent)
    for live in (Live(still_ms=0), Live(still_ms=3_600_001), Live(rounds=0), Live(rounds=1001)):
        with pytest.raises(OperatorError, match=r"\(limit is (3600000|1000)\)"):
            parent.transfers.serve_send(SendRequest(name="a", live=live), ROOT, envelope())
    assert (vm.state, parent.vmm.sent) == (State.RUNNING, [])

    live = Live(still_ms=3_600_000, rounds=1000)
    parent.transfers.serve_send(SendRequest(name="a", keep=True, live=live), ROOT, envelope())
    assert parent.vmm.sent == [SendVm(vmid=vm.vmid, keep=True, one_shot=False, live=live)]
    assert parent.answers.pop() == (CLIENT, PassFiles())
    parent.transfers.on_send_done(SendDone(vmid=vm.vmid, sent_bytes=100, rounds=3, still_ms=20), UNUSED)
    assert parent.answers == [(CLIENT, VmSent(vmid=vm.vmid, name="a", sent_bytes=100, rounds=3, still_ms=20))]


@pytest.mark.parametrize("state", [State.RUNNING, State.PAUSED])
def test_not_sent(parent: AnyParent, state: State) -> None:
    """The VM is as before.  The client is told this, and the reason."""
    running(parent, state)
    vm = send(parent)

    done(parent, vm, "the stream was closed")

    assert vm.state is state
    assert parent.answers == [
        (CLIENT, Failed(code=errno.EIO, text="vm a was not sent, and is as before: the stream was closed"))
    ]


def test_a_pause_that_was_requested_before_stays(parent: AnyParent) -> None:
    """It takes effect while the VM is being sent.  When sending fails, the VM is paused."""
    running(parent)
    vm = send(parent)
    vm.pause_changed(paused=True)
    states = [vm.state]

    done(parent, vm, "the stream was closed by its reader")

    assert [*states, vm.state] == [State.SENDING, State.PAUSED]


@pytest.mark.parametrize("state", [
    State.STOPPED, State.WAITING, State.STARTING, State.SENDING, State.RECEIVING, State.STOPPING,
])  # fmt: skip
def test_only_running_and_paused_vms_are_sent(parent: AnyParent, state: State) -> None:
    """The error names the state."""
    running(parent, state)
    with pytest.raises(OperatorError, match="vm a is"):
        parent.transfers.serve_send(SendRequest(name="a"), ROOT, envelope())
    assert parent.vmm.sent == []


def test_a_client_that_leaves_cancels_its_transfer(parent: AnyParent) -> None:
    """An incomplete stream is of no use.  Another client that leaves changes nothing."""
    running(parent)
    vm = send(parent)
    leave(parent, OTHER)
    assert parent.vmm.sent == []

    leave(parent, CLIENT)

    assert parent.vmm.sent == [CancelTransfer(vmid=vm.vmid)]


def test_process_that_dies_while_it_sends(parent: AnyParent) -> None:
    """The client gets the reason."""
    running(parent)
    vm = send(parent)

    exited(parent, vm, errno.EIO, "vm process was killed by SIGKILL")

    assert parent.answers == [(CLIENT, Failed(code=errno.EIO, text="vm a: vm process was killed by SIGKILL"))]
    assert vm.sending is None


def test_progress_goes_to_the_client_that_waits(parent: AnyParent) -> None:
    """When no client waits, it is dropped."""
    running(parent)
    vm = send(parent)
    message = TransferProgress(done_bytes=1, total_bytes=2)
    cover = Envelope(message, vm.vmid, 0, {})
    parent.transfers.on_progress(message, cover)
    assert parent.answers == [(CLIENT, message)]

    done(parent, vm)
    parent.answers.clear()
    parent.transfers.on_progress(message, cover)
    parent.transfers.on_progress(message, Envelope(message, 99, 0, {}))
    assert parent.answers == []


# --- receiving -------------------------------------------------------------------------------------------------------


def receive(parent: AnyParent, name: str = "b", *, paused: bool = False) -> Vm:
    """Begin to receive a VM."""
    parent.transfers.serve_receive(ReceiveRequest(name=name, paused=paused), ROOT, envelope())
    vm: Vm = parent.vms.get(0, name)
    assert parent.vmm.sent == [ReceiveVm(vmid=vm.vmid, name=name, verbosity=0)]
    assert vm.state is State.RECEIVING
    assert parent.answers.pop() == (CLIENT, PassFiles())
    parent.vmm.sent.clear()
    return vm


def header(parent: AnyParent, vm: Vm, *, one_shot: bool = False, **changes: object) -> None:
    """Let the VM's process report the header of the stream."""
    config = VmConfig(name="sent", memory_bytes=128 << 20, vcpus=2, disks=DISKS).replace(**changes)
    message = ReceivedHeader(vmid=vm.vmid, config=config, one_shot=one_shot)
    parent.transfers.on_received_header(message, UNUSED)


def complete(parent: AnyParent, vm: Vm) -> None:
    """Let the VM's process report that it has read the whole machine."""
    parent.transfers.on_received_machine(ReceivedMachine(vmid=vm.vmid), UNUSED)


def last_failure(parent: AnyParent) -> Failed:
    """Return the last answer to the client, which is a failure."""
    client, message = parent.answers[-1]
    assert client == CLIENT
    assert isinstance(message, Failed)
    return message


def test_received(parent: AnyParent, disks: Disks) -> None:
    """The VM gets a new name, the configuration of the stream, and root as its owner."""
    vm = receive(parent)
    header(parent, vm, owner=Owner(uid=5), memory_bytes=256 << 20)
    assert parent.vmm.sent == [ReceiveMemory(vmid=vm.vmid)]
    assert disks.opened == 1  # checks that they exist, while the sender still has the VM
    disks.notes = ("disk a: is odd",)
    complete(parent, vm)

    resumed = parent.vmm.sent[-1]
    assert isinstance(resumed, ResumeReceived)
    assert (resumed.config.name, resumed.config.owner, resumed.config.vcpus) == ("b", Owner(), 2)
    assert disks.opened == 2
    assert vm.notes == ("disk a: is odd",)
    report_running(parent, vm, paused=False)

    assert (vm.state, vm.pid) == (State.RUNNING, os.getpid())
    assert vm.running_config == resumed.config
    assert vm.pty is not None
    assert parent.answers == [
        (CLIENT, VmReceived(vmid=vm.vmid, name="b", pid=os.getpid(), tty=vm.pty.path, paused=False))
    ]
    vm.drop_pty()


def test_received_and_paused(parent: AnyParent, disks: Disks) -> None:
    """The request asked for the pause."""
    vm = receive(parent, paused=True)
    header(parent, vm)
    complete(parent, vm)
    assert parent.vmm.sent[-1].paused
    report_running(parent, vm, paused=True)
    assert vm.state is State.PAUSED
    assert vm.receiving is None
    vm.drop_pty()


def test_into_a_configured_vm(parent: AnyParent, disks: Disks) -> None:
    """Name and owner stay.  The rest comes from the stream, until the VM ends."""
    vm = receive(parent, "a")
    header(parent, vm)
    complete(parent, vm)
    config = parent.vmm.sent[-1].config
    assert (config.name, config.owner, config.memory_bytes) == ("a", Owner(uid=5), 128 << 20)
    assert vm.config.memory_bytes == 64 << 20

    vm.ended("powered off by the guest")

    assert vm.running_config is None
    vm.drop_pty()


@pytest.mark.parametrize("state", [State.RUNNING, State.PAUSED, State.STARTING, State.SENDING, State.STOPPING])
def test_not_into_a_vm_that_is_not_stopped(parent: AnyParent, state: State) -> None:
    """A VM that is being received is refused, too."""
    running(parent, state)
    with pytest.raises(OperatorError, match=f"vm a exists, and is {state.value}"):
        parent.transfers.serve_receive(ReceiveRequest(name="a"), ROOT, envelope())
    assert parent.vmm.sent == []


@pytest.mark.parametrize(("name", "caller", "ending", "what"), [
    ("../b", ROOT, False, "invalid VM name"), ("", ROOT, False, "invalid VM name"),
    ("b" * 64, ROOT, False, "vm name too long"), ("b", ROOT, True, "vmd is stopping"),
])  # fmt: skip
def test_refused_before_it_begins(
    parent: AnyParent, name: str, caller: Caller, ending: bool, what: str
) -> None:
    """Nothing is left of the request."""
    parent.core.ending = ending
    with pytest.raises(VmdError, match=what):
        parent.transfers.serve_receive(ReceiveRequest(name=name), caller, envelope())
    assert [vm.name for vm in parent.vms] == ["a"]


@pytest.mark.parametrize(("changes", "what"), [
    ({"memory_bytes": 1}, "memory size must be at least 1MB"), ({"vcpus": 0}, "invalid number of vcpus: 0"),
    ({"sev": True}, "encrypted memory"), ({"kernel": "/vmlinuz\0"}, "boot image: not an absolute path"),
    ({"kernel": "vmlinuz"}, "boot image: not an absolute path"), ({"initrd": "\0"}, "initrd: not an absolute path"),
    ({"kernel": "/" * 5000}, "boot image path too long"),
])  # fmt: skip
def test_invalid_configurations_in_a_stream(
    parent: AnyParent, disks: Disks, changes: dict[str, Any], what: str
) -> None:
    """They are refused while the sender still has the VM.  The process is ended, and the client gets the reason."""
    vm = receive(parent)
    header(parent, vm, **changes)
    assert parent.vmm.sent == [StopVm(vmid=vm.vmid, mode=StopMode.KILL)]
    assert vm.receiving is not None
    assert what in vm.receiving.failure
    vm.drop_pty()


@pytest.mark.parametrize("trouble", [
    OperatorError(errno.ENOENT, "disk /disk: No such file or directory"),
    HostError("open disk", errno.EMFILE),
])  # fmt: skip
def test_disks_that_are_not_here(
    parent: AnyParent, disks: Disks, trouble: VmdError
) -> None:
    """They are refused while the sender still has the VM, too."""
    disks.trouble = [trouble]
    vm = receive(parent)
    header(parent, vm)
    assert parent.vmm.sent == [StopVm(vmid=vm.vmid, mode=StopMode.KILL)]
    assert vm.receiving is not None
    assert vm.receiving.failure in str(trouble)
    assert vm.receiving.failure

    disks.trouble.clear()
    complete(parent, vm)  # its process continues as if nothing had happened
    assert disks.opened == 0
    assert parent.vmm.sent == [StopVm(vmid=vm.vmid, mode=StopMode.KILL)]
    vm.drop_pty()


def test_without_a_console(parent: AnyParent, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configured VM that cannot be received, because no pty is left, can be started later."""

    def no_room() -> None:
        raise HostError("open a pty for the console", errno.EMFILE)

    monkeypatch.setattr(vms, "Pty", no_room)
    with pytest.raises(HostError, match="open a pty"):
        parent.transfers.serve_receive(ReceiveRequest(name="a"), ROOT, envelope())

    vm = parent.vms.get(0, "a")
    assert (vm.state, vm.receiving) == (State.STOPPED, None)


def test_disks_that_its_sender_still_has(parent: AnyParent, disks: Disks) -> None:
    """At first this is no error.  When the machine is complete, the parent waits until the sender releases them."""
    disks.trouble = [OperatorError(errno.EBUSY, "disk /disk is in use")]
    vm = receive(parent)
    header(parent, vm)
    assert parent.vmm.sent == [ReceiveMemory(vmid=vm.vmid)]
    disks.slow = True
    complete(parent, vm)
    assert (vm.state, disks.answer is None) == (State.RECEIVING, False)
    assert 0 < disks.patience_s <= LOCK_PATIENCE_S

    disks.trouble.clear()
    assert disks.answer is not None
    disks.answer()

    assert isinstance(parent.vmm.sent[-1], ResumeReceived)
    vm.drop_pty()


@pytest.fixture
def waiting(parent: AnyParent, disks: Disks) -> Iterator[Vm]:
    """Yield a VM whose disks are still in use."""
    disks.trouble = [OperatorError(errno.EBUSY, "disk /disk is in use")]
    vm = receive(parent)
    header(parent, vm)
    complete(parent, vm)
    assert vm.receiving is not None
    vm.receiving.deadline_s = 0.0
    parent.vmm.sent.clear()
    yield vm
    vm.drop_pty()


def test_disks_that_stay_in_use(parent: AnyParent, waiting: Vm) -> None:
    """After ten seconds the VM stays paused, and the client is told what to do."""
    assert waiting.state is State.PAUSED
    assert waiting.text == "disk /disk is in use"
    assert last_failure(parent).code == errno.EBUSY
    assert last_failure(parent).text == (
        "vm b was received and stays paused: disk /disk is in use; `vmctl unpause b` tries again"
    )


def test_unpause_tries_again(parent: AnyParent, waiting: Vm, disks: Disks) -> None:
    """It fails at first, and then succeeds.  Each time the client that asked is answered."""
    for _ in range(2):
        parent.answers.clear()
        unpause(parent, waiting)
        assert disks.patience_s == 0
        assert "stays paused" in last_failure(parent).text
        assert (waiting.state, parent.clients.take(For.PAUSE, waiting.vmid)) == (State.PAUSED, [])

    disks.trouble.clear()
    unpause(parent, waiting)
    assert isinstance(parent.vmm.sent[-1], ResumeReceived)
    parent.answers.clear()
    report_running(parent, waiting, paused=False)

    assert parent.answers == [(CLIENT, VmPaused(vmid=waiting.vmid, name="b", paused=False))]
    assert (waiting.state, parent.clients.take(For.PAUSE, waiting.vmid), waiting.text) == (State.RUNNING, [], "")


def test_a_vm_that_waits_for_its_disks_cannot_be_sent(parent: AnyParent, waiting: Vm) -> None:
    """It has no machine yet."""
    with pytest.raises(OperatorError, match="vm b still waits for its disks: disk /disk is in use"):
        parent.transfers.serve_send(SendRequest(name="b"), ROOT, envelope())


@pytest.mark.parametrize("later", [False, True])
def test_interfaces_that_fail(
    parent: AnyParent, disks: Disks, later: bool
) -> None:
    """The VM stays paused, as without its disks, because it may be the only copy."""
    vm = receive(parent)
    header(parent, vm)
    parent.network.later = later
    if not later:
        parent.network.trouble = OperatorError(errno.EADDRINUSE, "tap7 is in use")
    complete(parent, vm)
    if later:
        parent.network.on_failed(errno.EADDRINUSE, "tap7 is in use")

    assert (vm.state, vm.text) == (State.PAUSED, "tap7 is in use")
    assert last_failure(parent).code == errno.EADDRINUSE
    assert "stays paused: tap7 is in use" in last_failure(parent).text
    parent.network.trouble, parent.network.later = None, False
    unpause(parent, vm)
    assert isinstance(parent.vmm.sent[-1], ResumeReceived)
    vm.drop_pty()


def test_client_that_leaves_too_early(parent: AnyParent, disks: Disks) -> None:
    """The VM of the sender continues, and this one ends."""
    vm = receive(parent)
    header(parent, vm)

    leave(parent, CLIENT)

    assert parent.vmm.sent[-1] == StopVm(vmid=vm.vmid, mode=StopMode.KILL)
    assert vm.receiving is not None
    assert vm.receiving.failure == "receiving was interrupted"
    vm.drop_pty()


def test_client_that_leaves_too_late(parent: AnyParent, disks: Disks) -> None:
    """Everything was read, so this may be the only copy, and it continues."""
    disks.trouble = [OperatorError(errno.EBUSY, "disk /disk is in use")]
    vm = receive(parent)
    header(parent, vm)
    disks.slow = True
    complete(parent, vm)

    leave(parent, CLIENT)

    assert not any(isinstance(message, StopVm) for message in parent.vmm.sent)
    disks.trouble.clear()
    assert disks.answer is not None
    disks.answer()
    assert isinstance(parent.vmm.sent[-1], ResumeReceived)
    vm.drop_pty()


def test_stopped_meanwhile(parent: AnyParent, disks: Disks) -> None:
    """Later messages of its process do not change its state to running or paused."""
    vm = receive(parent)
    header(parent, vm)
    vm.begin_stop(force=False)
    disks.trouble = [OperatorError(errno.ENOENT, "disk /disk: No such file or directory")]
    complete(parent, vm)
    parent.transfers.stay_paused(vm, errno.EIO, "no interfaces")
    assert vm.state is State.STOPPING
    assert parent.answers == []

    report_running(parent, vm, paused=False)

    assert vm.state is State.STOPPING
    vm.drop_pty()


def test_waiting_for_disks_ends_with_the_vm(parent: AnyParent, disks: Disks) -> None:
    """Otherwise another VM that is received under the same name would be resumed before it is complete."""
    vm = receive(parent, "a")
    header(parent, vm)
    disks.slow = True
    complete(parent, vm)
    assert disks.answer is not None

    parent.life.kill(vm)

    assert not disks.give_up(vm)
    assert parent.vmm.sent[-1] == StopVm(vmid=vm.vmid, mode=StopMode.KILL)  # it has a process
    vm.drop_pty()


@pytest.mark.parametrize(("device", "once"), [
    (BootDevice.AUTO, False), (BootDevice.DISK, False), (BootDevice.CDROM, True), (BootDevice.NET, True),
])  # fmt: skip
def test_one_shot_boots_stay_so(
    parent: AnyParent, disks: Disks, device: BootDevice, once: bool
) -> None:
    """The guest of an installer does not start the installation again when it resets itself (cat. 4.4)."""
    vm = receive(parent)
    header(parent, vm, boot_device=device)
    assert bool(vm.once_because) is once
    header(parent, vm, boot_device=device, one_shot=True)
    assert vm.once_because
    vm.drop_pty()


@pytest.mark.parametrize("once", [False, True])
def test_one_shot_boots_are_sent_as_such(parent: AnyParent, once: bool) -> None:
    """A boot image that only this start had is missing at the receiver, too."""
    running(parent).once_because = "it was so" if once else ""
    send(parent)


# --- receiving, step by step -----------------------------------------------------------------------------------------


@pytest.fixture
def slots(parent: AnyParent, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list.  Each time vmm gets slots, it gets the number of messages that vmm has had before."""
    given: list[int] = []
    monkeypatch.setattr(parent.core.slots, "give", lambda: given.append(len(parent.vmm.sent)))
    return given


def new_seeds(monkeypatch: pytest.MonkeyPatch) -> list[Vm]:
    """Return a list of the VMs that get a new seed from now on."""
    found: list[Vm] = []
    new_seed = Vm.new_seed

    def note(vm: Vm) -> None:
        found.append(vm)
        new_seed(vm)

    monkeypatch.setattr(Vm, "new_seed", note)
    return found


def test_vmm_has_a_slot_before_it_receives(parent: AnyParent, slots: list[int]) -> None:
    """Without one it would start the process without a user id of its own."""
    parent.transfers.serve_receive(ReceiveRequest(name="b"), ROOT, envelope())

    assert slots == [0]
    assert [type(message) for message in parent.vmm.sent] == [ReceiveVm]
    parent.vms.get(0, "b").drop_pty()


def test_a_vm_that_goes_back_to_a_snapshot_has_a_slot_and_a_seed(
    parent: AnyParent, slots: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps its user, its console and its running configuration.  Its process is a new one."""
    seeds = new_seeds(monkeypatch)
    vm = running(parent)
    vm.uid, vm.running_config = 1000, vm.config.replace(vcpus=2)
    vm.open_console()
    tty = vm.pty
    reading, writing = os.pipe()

    parent.transfers.begin_revival(vm, reading, paused=True)

    assert (slots, seeds) == ([0], [vm])
    assert [type(message) for message in parent.vmm.sent] == [ReceiveVm]
    assert (vm.state, vm.uid, vm.pty) == (State.RECEIVING, 1000, tty)
    assert vm.receiving is not None
    assert (vm.receiving.paused, vm.receiving.config) == (True, vm.config.replace(vcpus=2))
    os.close(writing)
    vm.drop_pty()


def test_a_vm_does_not_go_back_to_a_snapshot_when_vmd_ends(parent: AnyParent) -> None:
    """Its stream is closed, and the caller ends the VM."""
    vm = running(parent)
    vm.open_console()
    parent.core.ending = True
    reading, writing = os.pipe()

    with pytest.raises(OperatorError, match="vmd is stopping"):
        parent.transfers.begin_revival(vm, reading, paused=False)

    with pytest.raises(BrokenPipeError):
        os.write(writing, b"x")
    assert parent.vmm.sent == []
    os.close(writing)
    vm.drop_pty()


def test_a_vm_that_could_not_be_received_is_forgotten(parent: AnyParent, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not in vm.conf, so nothing is left of it."""

    def no_room() -> None:
        raise HostError("open a pty for the console", errno.EMFILE)

    monkeypatch.setattr(vms, "Pty", no_room)
    with pytest.raises(HostError, match="open a pty"):
        parent.transfers.serve_receive(ReceiveRequest(name="b"), ROOT, envelope())

    assert parent.vms.find(0, "b") is None
    assert parent.vms.find(0, "a") is not None
    assert parent.vmm.sent == []


def test_a_received_vm_has_a_seed_of_its_own(parent: AnyParent, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seed exists before the process that writes into it."""
    seeds = new_seeds(monkeypatch)
    vm = receive(parent)
    assert seeds == [vm]
    vm.drop_pty()


def test_a_vm_that_is_being_stopped_is_not_resumed(parent: AnyParent, disks: Disks) -> None:
    """Its disks are not opened again.  The same holds if it is being received again meanwhile."""
    vm = receive(parent)
    header(parent, vm)
    receiving = vm.receiving
    assert receiving is not None
    opened = disks.opened
    parent.transfers.resume(vm, receiving.__class__(paused=False))
    vm.begin_stop(force=False)
    parent.transfers.resume(vm, receiving)
    assert disks.opened == opened
    vm.drop_pty()


def test_a_paused_vm_that_arrives_is_paused(parent: AnyParent) -> None:
    """A request to pause it is answered at once, without a message to vmm."""
    vm = receive(parent)
    message = PauseRequest(vmid=vm.vmid, paused=True)
    parent.answers.clear()
    vm._state = State.PAUSED

    parent.transfers.serve_pause(message, ROOT, Envelope(message, CLIENT, 0, {}))

    assert parent.answers == [(CLIENT, VmPaused(vmid=vm.vmid, name="b", paused=True))]
    assert parent.vmm.sent == []
    vm.drop_pty()


def test_the_log_says_how_a_running_vm_left(parent: AnyParent, capfd: pytest.CaptureFixture[str]) -> None:
    """For a VM that ran during the send, the log has the rounds and the pause."""
    for rounds in (0, 3):
        vm = running(parent)
        send(parent, keep=True)
        message = SendDone(vmid=vm.vmid, sent_bytes=100, text="", rounds=rounds, still_ms=20)
        parent.transfers.on_send_done(message, UNUSED)
        said = capfd.readouterr().err
        assert ("3 rounds, stood still for 20 ms" in said) == bool(rounds)
        assert "sent vm 1, 100 bytes" in said


def test_a_vm_in_doubt_is_for_the_room_of_migrations(parent: AnyParent, monkeypatch: pytest.MonkeyPatch) -> None:
    """That room decides whether the VM may be unpaused, so it gets the client and `force`."""
    asked: list[tuple[Vm, int, bool]] = []
    vm = running(parent, State.IN_DOUBT)
    monkeypatch.setattr(
        parent.transfers.migrations, "unpause", lambda vm, client, *, force: asked.append((vm, client, force))
    )
    for force in (False, True):
        message = PauseRequest(vmid=vm.vmid, paused=False, force=force)
        parent.transfers.serve_pause(message, ROOT, Envelope(message, CLIENT, 0, {}))
    assert asked == [(vm, CLIENT, False), (vm, CLIENT, True)]
    assert parent.vmm.sent == []


def test_a_client_of_a_removed_vm_leaves(parent: AnyParent) -> None:
    """There is nothing to cancel."""
    parent.transfers.on_client_gone(4711)
    assert parent.vmm.sent == []


# --- standing still, and what the log says ---------------------------------------------------------------------------


def pause(parent: AnyParent, *, paused: bool = True, force: bool = False, client: int = CLIENT) -> None:
    """Send a client's request."""
    message = PauseRequest(name="a", paused=paused, force=force)
    parent.transfers.serve_pause(message, ROOT, Envelope(message, client, 0, {}))


@pytest.mark.parametrize(("before", "after"), [(State.RUNNING, State.PAUSED), (State.PAUSED, State.RUNNING)])
@pytest.mark.parametrize("force", [False, True])
def test_paused_and_unpaused(
    parent: AnyParent, capfd: pytest.CaptureFixture[str], before: State, after: State, force: bool
) -> None:
    """The client is answered when the VM's process has done it, with its notes, which are in the log, too."""
    vm = running(parent, before)
    paused = after is State.PAUSED
    pause(parent, paused=paused, force=force)
    assert parent.vmm.sent == [PauseVm(vmid=vm.vmid, paused=paused, force=force)]
    assert (vm.state, parent.answers) == (before, [])
    parent.transfers.on_pause_done(PauseDone(vmid=vm.vmid, paused=paused, notes=("the clock jumps",)), UNUSED)
    assert vm.state is after
    assert parent.answers == [
        (CLIENT, VmPaused(vmid=vm.vmid, name="a", paused=paused, notes=("the clock jumps",)))
    ]
    done = "paused" if paused else "unpaused"
    log = capfd.readouterr().err
    assert f"a: {done} vm 1 successfully\n" in log
    assert "vm a: the clock jumps\n" in log


def test_the_clients_that_pause_are_answered_one_after_the_other(parent: AnyParent) -> None:
    """Each answer of the process is for the client that has waited longest."""
    vm = running(parent)
    pause(parent)
    pause(parent, client=OTHER)
    for paused in (True, True):
        parent.transfers.on_pause_done(PauseDone(vmid=vm.vmid, paused=paused), UNUSED)
    assert [client for client, _ in parent.answers] == [CLIENT, OTHER]


def test_a_vm_that_cannot_be_unpaused(parent: AnyParent, capfd: pytest.CaptureFixture[str]) -> None:
    """The client and the log get the reason."""
    vm = running(parent, State.PAUSED)
    pause(parent, paused=False)
    parent.transfers.on_pause_done(PauseDone(vmid=vm.vmid, paused=True, text="disk0: its lock is lost"), UNUSED)
    assert vm.state is State.PAUSED
    assert parent.answers == [(CLIENT, Failed(code=errno.EIO, text="vm a: disk0: its lock is lost"))]
    assert capfd.readouterr().err == "vmd: vm a: disk0: its lock is lost\n"


def test_a_user_who_may_not_pause_a_vm(parent: AnyParent) -> None:
    """Nothing is asked of the VM."""
    running(parent)
    message = PauseRequest(name="a", paused=True)
    with pytest.raises(OperatorError, match="pause vm a"):
        parent.transfers.serve_pause(message, USER, Envelope(message, CLIENT, 0, {}))
    assert parent.vmm.sent == []


def test_a_vm_that_pauses_itself(parent: AnyParent, capfd: pytest.CaptureFixture[str]) -> None:
    """The log says why, and how to continue it.  Such a message about a paused VM changes nothing."""
    vm = running(parent)
    for text in ("disk0: No space left on device", "again"):
        parent.transfers.on_vm_halted(VmHalted(vmid=vm.vmid, text=text), UNUSED)
    assert (vm.state, vm.text) == (State.PAUSED, "disk0: No space left on device")
    assert capfd.readouterr().err == (
        "vmd: vm a: paused: disk0: No space left on device; `vmctl unpause a` continues it once that is mended\n"
    )


def test_the_smallest_limits_of_a_live_send(parent: AnyParent) -> None:
    """A millisecond, and one round."""
    vm = running(parent)
    live = Live(still_ms=1, rounds=1)
    parent.transfers.serve_send(SendRequest(name="a", live=live), ROOT, envelope())
    assert parent.vmm.sent == [SendVm(vmid=vm.vmid, keep=False, one_shot=False, live=live)]


def test_the_end_of_a_send_that_is_over(parent: AnyParent) -> None:
    """A process that reports it twice, or without a request, changes nothing."""
    vm = running(parent)
    done(parent, vm)
    done(parent, vm, "the stream was closed")
    assert (vm.state, parent.answers) == (State.RUNNING, [])


def test_the_log_says_what_begins(parent: AnyParent, capfd: pytest.CaptureFixture[str]) -> None:
    """A transfer may take long, or never end."""
    running(parent)
    send(parent)
    vm = receive(parent)
    log = capfd.readouterr().err
    assert "a: sending vm 1\n" in log
    assert f"b: receiving vm {vm.vmid}\n" in log
    vm.drop_pty()


def test_a_stream_without_a_seed(parent: AnyParent, disks: Disks) -> None:
    """The empty file for a seed is closed, so that no device is made for it.  A stream with one fills the file."""
    vm = receive(parent)
    header(parent, vm, seed=SeedConfig())
    (fd,) = vm.kept.values()
    header(parent, vm)
    assert vm.kept == {}
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    vm.drop_pty()


def test_a_vm_that_was_being_sent_goes_back_to_a_snapshot(parent: AnyParent) -> None:
    """Nothing is sent any more: its process has ended."""
    vm = running(parent)
    vm.open_console()
    vm.begin_send(keep=True)
    reading, writing = os.pipe()
    parent.transfers.begin_revival(vm, reading, paused=False)
    assert (vm.sending, vm.state) == (None, State.RECEIVING)
    os.close(writing)
    vm.drop_pty()


SAME = VmConfig(name="a", vcpus=2, memory_bytes=64 << 20, disks=DISKS, nics=(NicConfig(),))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({}, ""),
        ({"drive": True}, "with 1 CD drives, and this one has 0"),
        ({"cdrom": "/c"}, "with 1 CD drives, and this one has 0"),
        ({"vcpus": 1}, "with 1 virtual CPUs, and this one has 2"),
        ({"memory_bytes": 1 << 20}, "with 1048576 bytes of memory, and this one has 67108864"),
        ({"disks": ()}, "with 0 disks, and this one has 1"),
        ({"nics": (NicConfig(), NicConfig())}, "with 2 network interfaces, and this one has 1"),
        ({"seed": SeedConfig()}, "with 1 seeds, and this one has 0"),
        ({"disks": (DiskConfig(path="/other"),)}, ""),
    ],
    ids=str,
)
def test_a_snapshot_of_another_machine(other: dict[str, Any], words: str) -> None:
    """Its devices would not find what they need.  Other paths do not matter: those of the VM count."""
    if not words:
        require_same(SAME, SAME.replace(**other))
        return
    with pytest.raises(OperatorError, match=f"the snapshot is of a machine {words}"):
        require_same(SAME, SAME.replace(**other))


def test_a_header_that_nobody_waits_for(parent: AnyParent, disks: Disks) -> None:
    """A VM's process may send one at any time."""
    vm = running(parent)
    header(parent, vm)
    assert (vm.state, vm.running_config, parent.vmm.sent, disks.opened) == (State.RUNNING, None, [], 0)


def test_settings_in_a_stream_that_only_vm_conf_gives(parent: AnyParent, disks: Disks) -> None:
    """A user's VM gets no port of this host from a stream."""
    vm = receive(parent, "a")
    header(parent, vm, nics=(NicConfig(local=True, forwards=(Forward(port=8022, to=22),)),))
    assert vm.receiving is not None
    assert "interface 0: forward tcp port 8022 to port 22: only" in vm.receiving.failure
    vm.drop_pty()


@pytest.mark.parametrize(("name", "caller", "vhost"), [("a", ROOT, True), ("b", ROOT, True), ("b", USER, False)])
def test_whose_frames_the_kernel_may_move(
    parent: AnyParent, disks: Disks, name: str, caller: Caller, vhost: bool
) -> None:
    """Those of a VM of vm.conf, or of root.  A stream of a user cannot ask for that."""
    parent.transfers.serve_receive(ReceiveRequest(name=name), caller, envelope())
    vm = parent.vms.get(0, name)
    header(parent, vm, nics=(NicConfig(vhost=True),))
    assert vm.running_config is not None
    assert vm.running_config.nics[0].vhost == vhost
    vm.drop_pty()


def test_the_log_says_that_a_vm_goes_back(parent: AnyParent, capfd: pytest.CaptureFixture[str]) -> None:
    """Its process is another one from then on."""
    vm = running(parent)
    vm.open_console()
    reading, writing = os.pipe()
    parent.transfers.begin_revival(vm, reading, paused=False)
    assert "a: going back to a snapshot (vm 1)\n" in capfd.readouterr().err
    os.close(writing)
    vm.drop_pty()
