"""How a parent that replaces an earlier one handles the messages about VMs that a vmm sends."""

import errno
import os
import re
import select
import socket
from typing import Any, cast

import pytest

from tests.support.descriptors import open_descriptors
from tests.support.vmprocesses import is_reaped
from vmd.backlog import Backlog
from vmd.closing import close_all
from vmd.config.model import SeedConfig, VmConfig
from vmd.errors import OperatorError, PeerError
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.children import Pong, Quit
from vmd.ipc.messages.vm import (
    CancelTransfer,
    ConsoleSnapshot,
    EndSend,
    NicLink,
    Outcome,
    PauseDone,
    ReceiveVm,
    ResumeReceived,
    StartVm,
    StopVm,
    TakeDisksBack,
)
from vmd.ipc.messages.vmm import AskVms, EndTaken, Retire, VmExited, VmHeld, VmsHeld, VmSlotOver
from vmd.ipc.routes import BY_CLASS, Proc
from vmd.memfile import memory_file
from vmd.parent.adoption import INTERRUPTED, UNSEEN, Adopted, Adoption
from vmd.parent.core import Core
from vmd.parent.generations import Generation, Generations
from vmd.parent.migrations import Migrations
from vmd.parent.resources import Pty
from vmd.parent.truth import vm_known
from vmd.parent.vm import At, Receiving, Sending, State, Vm
from vmd.record import Record
from vmd.version import VERSION


class Line:
    """The channel to a vmm.  It records what is sent."""

    def __init__(self) -> None:
        self.channel = self
        self.label = "vmm"
        self.sent: list[Any] = []

    def send(self, message: Record, *, peerid: int = 0, fds: dict[str, list[int]] | None = None) -> None:
        """Record a message."""
        self.sent.append(message)
        for fd in (fd for each in (fds or {}).values() for fd in each):
            os.close(fd)


class Room:
    """Stands in for every other room.  It records its calls."""

    scores = None

    def __init__(self, core: Core) -> None:
        self.core = core
        self.calls: list[tuple[Any, ...]] = []
        self.taps: dict[int, Any] = {}
        self.left: dict[int, Any] = {}
        self.migrations = Migrations(core, cast("Any", self))
        self.logs: list[str] = []  # names of VMs whose log is read

    def vm_ended(self, vm: Vm, text: str) -> None:
        """Record that a VM has ended."""
        vm.ended(text)
        self.calls.append(("gone", vm.name, text))

    def kill(self, vm: Vm) -> None:
        """Record that a VM is killed."""
        self.calls.append(("killed", vm.name))

    def process_ended(self, message: VmExited) -> None:
        """Record that a process has ended."""
        self.calls.append(("exited", message.vmid, message.outcome))

    def give_up(self, vm: Vm, code: int, _text: str) -> None:
        """Record that receiving is given up."""
        self.calls.append(("given up", vm.name, code))

    def stay_paused(self, vm: Vm, code: int, _text: str) -> None:
        """Record that a VM stays paused."""
        self.calls.append(("paused", vm.name, code))

    def start_batch_in_time(self) -> None:
        """Record that waiting VMs are to be started."""
        self.calls.append(("batch",))

    def read_vm(self, reader: Any, vm: Vm) -> None:  # noqa: ANN401
        """Accept the log of a VM, and close it."""
        self.logs.append(vm.name)
        reader.close()

    def read_from(self, reader: Any, _name: str) -> None:  # noqa: ANN401
        """Accept a log, and close it."""
        reader.close()


@pytest.fixture
def room(core: Core) -> Room:
    """Return the stand-in for all other rooms."""
    return Room(core)


@pytest.fixture
def core() -> Core:
    """Return the state of a parent."""

    class Loop:
        def call_later(self, _delay_s: float, _callback: object, _source: object = None) -> object:
            return object()

    return Core(cast("Any", Loop()), cast("Any", None))


def adoption(core: Core, room: Room, *numbers: int, version: str = VERSION) -> tuple[Adoption, list[Line]]:
    """Return the room with one vmm for each number, and the vmms' channels."""
    over: list[Generation] = []
    generations = Generations()
    generations.on_over = over.append
    core.peers.channels[Proc.VMM] = cast("Any", generations)
    lines = [Line() for _ in numbers]
    for number, line in zip(numbers, lines, strict=True):
        generations.add(Generation(number, version, cast("Any", line), None, None))
    made = Adoption(core, generations, *cast("Any", (room, room, room, room)))
    return made, lines


def known(core: Core, name: str, state: State, generation: int = 1, **fields: Any) -> Vm:  # noqa: ANN401
    """Return a VM that the earlier parent knew."""
    vm = core.vms.add(VmConfig(name=name), from_config=True)
    vm.restore_state(state)
    for field, value in fields.items():
        setattr(vm, field, value)
    return vm


def expect(room: Adoption, core: Core, generation: int = 1) -> None:
    """Ask the vmms.  All running VMs belong to the generation with this number."""
    vms = [vm_known(vm, generation if vm.alive and vm.state is not State.STARTING else 0, None) for vm in core.vms]
    for vm in core.vms:  # which the truth does not contain
        vm.sending = vm.receiving = None
    room.expect(vms, list(room.generations))


def report_vm(room: Adoption, line: Line, message: VmHeld) -> None:
    """Have a vmm report a VM, without descriptors."""
    room.on_held(message, Envelope(message, 0, 0, {}), cast("Any", line))


def report_list_end(room: Adoption, line: Line, *vms: int) -> None:
    """Have a vmm report the end of its list."""
    message = VmsHeld(version=VERSION, vms=vms, spare=1)
    fds = {"process": [os.pidfd_open(os.getpid())]}
    room.on_process = lambda _generation, child: os.close(child.pidfd)
    room.on_all_held(message, Envelope(message, 0, 0, fds), cast("Any", line))


def adopted(core: Core, room: Room, vm: Vm, **held: Any) -> list[Record]:  # noqa: ANN401
    """Adopt one VM that vmm reports with these fields.  Return what its vmm was told after the question."""
    made, (line,) = adoption(core, room, 1)
    expect(made, core)
    report_vm(made, line, VmHeld(vmid=vm.vmid, **held))
    report_list_end(made, line, vm.vmid)
    made.when_serving()
    assert isinstance(line.sent.pop(0), AskVms)
    return line.sent


@pytest.mark.parametrize(("before", "held", "state"), [
    (State.RUNNING, {"running": True}, State.RUNNING),
    (State.STARTING, {"running": True}, State.RUNNING),
    (State.RUNNING, {"running": True, "paused": True}, State.PAUSED),
    (State.PAUSED, {"running": True}, State.RUNNING),
    (State.RUNNING, {"running": True, "stopping": True}, State.STOPPING),
    (State.RUNNING, {}, State.STARTING),
])  # fmt: skip
def test_the_state_that_vmm_reports_is_right(
    core: Core, room: Room, before: State, held: dict[str, bool], state: State
) -> None:
    """The time of the state begins now if the earlier parent knew another state.  Otherwise it is kept."""
    vm = known(core, "a", before, since_s=5.0)
    assert adopted(core, room, vm, **held) == []
    assert vm.state is state
    assert (vm.since_s == 5.0) == (before is state)
    assert room.calls == []


def test_a_vm_that_has_ended_meanwhile(core: Core, room: Room) -> None:
    """Its end is handled once clients are served, because a guest that reset itself is started again."""
    vm = known(core, "a", State.RUNNING)
    assert adopted(core, room, vm, running=True, outcome=Outcome.REBOOT) == []
    assert room.calls == [("exited", vm.vmid, Outcome.REBOOT)]
    assert vm.alive


@pytest.mark.parametrize(("held", "told", "state", "at"), [
    ({}, CancelTransfer, State.SENDING, At.MEMORY),
    ({"two_way": True}, CancelTransfer, State.SENDING, At.MEMORY),
    ({"two_way": True, "written": True}, EndSend, State.SENDING, At.UNDOING),
    ({"two_way": True, "written": True, "letting_go": True}, None, State.SENDING, At.COMMITTING),
    ({"two_way": True, "written": True, "let_go": True}, None, State.IN_DOUBT, At.COMMITTED),
    ({"two_way": True, "written": True, "let_go": True, "undoing": True}, None, State.SENDING, At.UNDOING),
])  # fmt: skip
def test_the_client_that_sent_a_vm_has_gone(
    core: Core, room: Room, held: dict[str, bool], told: type[Record] | None, state: State, at: At
) -> None:
    """The VM stays here.  Once its disks were let go, it is in doubt, because it may run elsewhere."""
    vm = known(core, "a", State.SENDING, sending=Sending(keep=False, state=State.RUNNING, carried=True))
    sent = adopted(core, room, vm, running=True, sending=True, **held)
    assert [type(message) for message in sent] == ([told] if told else [])
    assert vm.state is state
    assert vm.sending is not None
    assert vm.sending.at is at
    assert vm.sending.state is State.RUNNING
    assert not any(isinstance(message, EndSend) and message.sent for message in sent)


@pytest.mark.parametrize(("held", "told"), [
    ({}, [CancelTransfer]), ({"lent": True}, [TakeDisksBack]), ({"lent": True, "returning": True}, []),
])  # fmt: skip
def test_a_vm_that_was_paused_for_a_snapshot(core: Core, room: Room, held: dict[str, bool], told: list[Any]) -> None:
    """The VM continues as soon as it has its disks again."""
    vm = known(core, "a", State.RUNNING)
    assert [type(message) for message in adopted(core, room, vm, running=True, lending=True, **held)] == told
    assert vm.state is State.SAVING
    vm.stay()
    assert vm.state.value == "running"


def test_a_vm_that_was_going_back_to_a_snapshot_is_killed(core: Core, room: Room) -> None:
    """Its disks may differ from those that its guest has seen, so it must not continue."""
    vm = known(core, "a", State.RUNNING, going_back=True)
    assert adopted(core, room, vm, running=True, lending=True, lent=True) == []
    assert room.calls == [("killed", "a")]


def test_a_vm_in_doubt_stays_so(core: Core, room: Room) -> None:
    """The question where it runs is tried again, if the locks of its disks can answer it."""
    vm = known(core, "a", State.IN_DOUBT)
    vm.sending = Sending(keep=False, state=State.PAUSED, carried=True)
    vm.sending.locks_travel = True
    adopted(core, room, vm, running=True, paused=True, sending=True, two_way=True, written=True, let_go=True)
    assert vm.state is State.IN_DOUBT
    assert vm.sending.locks_travel
    assert vm.sending.retry is not None
    assert vm.sending.state is State.PAUSED


@pytest.mark.parametrize(("held", "judged", "calls"), [
    ({}, False, [("given up", "a", errno.ECANCELED)]),
    ({"complete": True}, True, [("paused", "a", errno.EINTR)]),
    ({"complete": True}, False, [("given up", "a", errno.ECANCELED)]),
    ({"complete": True, "resumed": True}, True, []),
])  # fmt: skip
def test_a_vm_that_was_being_received(
    core: Core, room: Room, held: dict[str, bool], judged: bool, calls: list[object]
) -> None:
    """An incomplete VM is given up.  A complete one may be the only copy, so it stays, paused."""
    vm = known(core, "a", State.RECEIVING, receiving=Receiving(paused=True))
    if judged:
        vm.running_config = vm.config
    adopted(core, room, vm, arriving=True, **held)
    assert room.calls == calls
    assert vm.receiving is not None
    assert vm.receiving.paused
    assert vm.receiving.resumed == held.get("resumed", False)


def test_vms_that_no_vmm_has(core: Core, room: Room) -> None:
    """A VM that ran has ended.  A VM that was about to start is enqueued again.  Others keep their state."""
    made, (line,) = adoption(core, room, 1)
    known(core, "ran", State.RUNNING)
    known(core, "started", State.STARTING)
    given = known(core, "given", State.STARTING)
    given.once_because = "its kernel was given by a client that has gone"
    known(core, "off", State.STOPPED)
    known(core, "waiting", State.WAITING)
    expect(made, core)
    report_list_end(made, line)
    made.when_serving()
    assert room.calls == [
        ("gone", "ran", UNSEEN), ("gone", "started", INTERRUPTED), ("batch",), ("gone", "given", INTERRUPTED),
    ]  # fmt: skip
    states = [(vm.name, vm.state.value) for vm in core.vms]
    assert states == [
        ("ran", "stopped"), ("started", "waiting"), ("given", "stopped"), ("off", "stopped"), ("waiting", "waiting"),
    ]  # fmt: skip
    assert made.generations.of == {}


def test_a_vmm_that_reports_late_is_not_waited_for(core: Core, room: Room) -> None:
    """Its VMs keep the state that was known, and are adopted when the vmm reports them."""
    made, (line,) = adoption(core, room, 1)
    settled: list[int] = []
    made.on_settled = lambda: settled.append(1)
    vm = known(core, "a", State.RUNNING)
    expect(made, core)
    assert settled == []
    (generation,) = made.generations
    made.give_up(generation)
    assert settled == [1]
    assert vm.state.value == "running"
    assert vm.vmid in made.generations.of
    report_vm(made, line, VmHeld(vmid=vm.vmid, running=True, paused=True))
    report_list_end(made, line, vm.vmid)
    assert vm.state.value == "paused"
    assert room.calls == []


def test_a_vm_that_is_reported_after_the_end_of_the_list(core: Core, room: Room) -> None:
    """There was no room for its descriptors before.  It has not ended."""
    made, (line,) = adoption(core, room, 1)
    vm = known(core, "a", State.RUNNING)
    expect(made, core)
    report_list_end(made, line, vm.vmid)
    assert made.waiting
    report_vm(made, line, VmHeld(vmid=vm.vmid, running=True))
    assert not made.waiting
    made.when_serving()
    assert room.calls == []


def test_without_a_vmm_nothing_is_waited_for(core: Core, room: Room) -> None:
    """Every vmm has ended with the daemon."""
    made, _ = adoption(core, room)
    settled: list[int] = []
    made.on_settled = lambda: settled.append(1)
    known(core, "a", State.RUNNING)
    expect(made, core)
    made.when_serving()
    assert settled == [1]
    assert room.calls == [("gone", "a", UNSEEN)]


def test_messages_for_the_earlier_parent_do_not_count(core: Core, room: Room) -> None:
    """Messages about a VM are ignored until vmm has reported it.  The report contains all that they would say."""
    made, (line,) = adoption(core, room, 1)
    vm = known(core, "a", State.RUNNING)
    exited = VmExited(vmid=vm.vmid, pid=1, outcome=Outcome.REBOOT, text="")
    expect(made, core)
    channel = cast("Any", line)
    assert made.is_stale(exited, channel)
    assert made.is_stale(PauseDone(vmid=vm.vmid, paused=True), channel)
    assert not made.is_stale(VmSlotOver(group=1), channel)
    report_vm(made, line, VmHeld(vmid=vm.vmid, running=True))
    assert not made.is_stale(exited, channel)


def test_a_vmm_that_reports_vms_without_a_request(core: Core, room: Room) -> None:
    """A report without a request breaks the protocol, and so does a second report of the whole list."""
    made, (line,) = adoption(core, room, 1)
    with pytest.raises(PeerError, match="without a request"):
        report_vm(made, line, VmHeld(vmid=1))
    expect(made, core)
    report_list_end(made, line)
    with pytest.raises(PeerError, match="without a request"):
        report_list_end(made, line)


def test_an_unknown_vm_is_left_alone(core: Core, room: Room) -> None:
    """An error is logged, and the VM runs on."""
    made, (line,) = adoption(core, room, 1)
    expect(made, core)
    report_vm(made, line, VmHeld(vmid=77, running=True))
    assert len(core.vms) == 0
    assert not any(isinstance(message, StopVm) for message in line.sent)


# --- generations ---------------------------------------------------------------------------------------------


def types(messages: list[Any]) -> list[Any]:
    """Return the types of messages."""
    return [type(message) for message in messages]


def start(vmid: int) -> StartVm:
    """Return the message that starts a VM."""
    return StartVm(vmid=vmid, config=VmConfig(name="x"), boot_name="", verbosity=0)


def test_messages_find_the_vmm_of_their_vm(core: Core, room: Room) -> None:
    """New VMs start in the newest vmm.

    A guest that resets itself moves there.  The older vmm ends with its last VM.
    """
    made, (old, new) = adoption(core, room, 1, 2)
    generations = made.generations
    for generation in generations:
        generation.told = True
    first = generations.all[1]
    generations.of = {1: first, 2: first}
    generations.send(start(3))
    generations.send(StopVm(vmid=1, mode=cast("Any", 0)))
    assert types(new.sent) == [StartVm]
    assert types(old.sent) == [StopVm]
    generations.send(start(1))
    expected: list[Any] = [EndTaken, Retire]
    assert types(old.sent[1:]) == expected
    generations.settle(2)
    expected = [EndTaken, Quit]
    assert types(old.sent[3:]) == expected
    assert [generations.number(vmid) for vmid in (1, 2, 3)] == [2, 0, 2]
    generations.remove(first)
    generations.send(Quit())
    assert types(new.sent) == [StartVm, StartVm, Quit]


def test_the_newest_vmm_stays_without_vms(core: Core, room: Room) -> None:
    """The next VMs are started there."""
    made, (line,) = adoption(core, room, 1)
    made.generations.all[1].told = True
    made.generations.send(start(1))
    made.generations.settle(1)
    assert types(line.sent) == [StartVm, EndTaken]


def test_a_message_about_an_unknown_vm_reaches_no_vmm(core: Core, room: Room) -> None:
    """Its descriptors are closed."""
    made, (line,) = adoption(core, room, 1)
    fd = os.memfd_create("x")
    made.generations.send(StopVm(vmid=9, mode=cast("Any", 0)), fds={"x": [fd]})
    assert line.sent == []
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


@pytest.mark.parametrize("version", ["0.1.0", VERSION])
def test_a_vmm_of_the_first_release_does_not_know_vhost(core: Core, room: Room, version: str) -> None:
    """It would reject the message, so the frames of its VMs are moved by a process."""
    made, (line,) = adoption(core, room, 1, version=version)
    plain = NicLink(name="tap0", lladdr=bytes(6), host_mac=bytes(6), locked=False, local=False, mtu=1500)
    nics = plain.replace(vhost=True), plain
    for message in (
        StartVm(vmid=1, config=VmConfig(name="a"), boot_name="", verbosity=0, nics=nics),
        ResumeReceived(vmid=1, config=VmConfig(name="a"), paused=False, nics=nics),
    ):
        fds = [os.memfd_create("vhost"), os.memfd_create("packets")]
        made.generations.send(message, fds={"vhosts": fds})
        sent: Any = line.sent[-1]
        assert type(sent) is type(message)
        assert [nic.vhost for nic in sent.nics] == [version == VERSION, False]
        for fd in fds:  # it was closed, or was sent with the message
            with pytest.raises(OSError, match="Bad file"):
                os.fstat(fd)


def test_the_version_that_a_vmm_reports_counts(core: Core, room: Room, capfd: pytest.CaptureFixture[str]) -> None:
    """The earlier parent had noted another one.  That is worth a warning, and an equal version is not."""
    for noted, said in ((VERSION, ""), ("0.0.1", f"vmm-1 is of version {VERSION}, not 0.0.1")):
        made, (line,) = adoption(core, room, 1, version=noted)
        expect(made, core)
        report_list_end(made, line)
        assert made.generations.all[1].version == VERSION
        err = capfd.readouterr().err
        assert said in err
        assert ("is of version" in err) == bool(said)


def test_a_vmm_of_the_first_release_gets_no_seed(core: Core, room: Room) -> None:
    """It would reject the message.  A VM with a seed is refused.  A VM that is received continues without the seed."""
    made, (line,) = adoption(core, room, 1, version="0.1.0")
    newest = made.generations

    def seed() -> dict[str, list[int]]:
        return {"seed": [os.memfd_create("seed")]}

    before = open_descriptors()
    with pytest.raises(OperatorError, match=re.escape("needs a later vmm than that of vmd 0.1.0")):
        newest.send(StartVm(vmid=1, config=VmConfig(name="a"), boot_name="", verbosity=0), fds=seed())
    assert line.sent == []
    assert open_descriptors() == before
    for message in (
        StartVm(vmid=1, config=VmConfig(name="a"), boot_name="", verbosity=0),
        ReceiveVm(vmid=2, name="b", verbosity=0),
    ):
        newest.send(message, fds=seed() if isinstance(message, ReceiveVm) else {})
    assert [type(message) for message in line.sent] == [StartVm, ReceiveVm]
    assert open_descriptors() == before


@pytest.mark.parametrize(
    "cls",
    [cls for cls, info in BY_CLASS.items() if (Proc.PARENT, Proc.VMM) in info.routes and "config" in cls.fields],
    ids=lambda cls: cls.__name__,
)
def test_no_vmm_gets_the_secrets_of_a_seed(core: Core, room: Room, cls: type[Any]) -> None:
    """This holds for every message that contains the configuration of a VM."""
    made, (line,) = adoption(core, room, 1)
    made.generations.of[1] = made.generations.all[1]
    seed = SeedConfig(user="alice", hostname="web", password="$6$x", user_data="/root/data")
    plain = {int: 1, str: "", bool: False}
    needed = {name: plain.get(kind) for name, kind in cls.fields.items() if name not in cls.defaults}
    made.generations.send(cls(**{**needed, "config": VmConfig(name="a", seed=seed)}))

    assert line.sent[-1].config == VmConfig(name="a", seed=SeedConfig(user="alice", hostname="web"))


# --- what is taken over -----------------------------------------------------------------------------------------


def held_fds(vm: Vm) -> dict[str, list[int]]:
    """Return the descriptors of a VM that runs, as vmm sends them; its process is this test."""
    backlog = Backlog.create(0)
    shown = os.dup(backlog.fd)
    backlog.close()
    pty = Pty()
    fds = {
        "process": [os.pidfd_open(os.getpid())], "memory": [memory_file("memory")], "taps": [os.dup(0)],
        "boot": [memory_file("kernel")], "tty": [os.dup(pty.master)], "tty_slave": [os.dup(pty.slave)],
        "shown": [shown],
    }  # fmt: skip
    pty.close()
    return fds


def test_the_descriptors_of_a_vm_are_taken_over(core: Core, room: Room) -> None:
    """The next parent is told of the VM.  Descriptors that this VM does not need are closed."""
    before = open_descriptors()
    made, (line,) = adoption(core, room, 1)
    vm = known(core, "a", State.RUNNING)
    expect(made, core)
    core.touched.clear()
    taken: list[Vm] = []
    made.on_taken = taken.append
    message = VmHeld(vmid=vm.vmid, running=True)
    made.on_held(message, Envelope(message, 0, 0, held_fds(vm)), cast("Any", line))

    assert (vm.pid, vm.state, taken, core.touched) == (os.getpid(), State.RUNNING, [vm], {vm.vmid})
    assert vm.memory is not None
    assert vm.backlog is not None
    assert (vm.pty is not None, vm.kept) == (True, {})
    vm.drop_pty()
    vm.take_memory(None)
    assert open_descriptors() == before


def test_a_vm_whose_process_has_ended_meanwhile(core: Core, room: Room) -> None:
    """It has no process id: nothing is asked about a process of another program."""
    made, (line,) = adoption(core, room, 1)
    vm = known(core, "a", State.RUNNING)
    expect(made, core)
    made.on_taken = lambda _vm: None
    fds = held_fds(vm)
    close_all(fds.pop("process"))
    message = VmHeld(vmid=vm.vmid, running=True)
    made.on_held(message, Envelope(message, 0, 0, fds), cast("Any", line))

    assert vm.pid == 0
    vm.drop_pty()
    vm.take_memory(None)


def test_files_that_a_vm_keeps_for_its_next_boot(core: Core, room: Room) -> None:
    """The earlier parent has written which ones there are; others are closed.  The log is read on."""
    before = open_descriptors()
    made, (line,) = adoption(core, room, 1)
    vm = known(core, "a", State.RUNNING, kept={"kernel": -1, "seed": -1})
    expect(made, core)
    vm.kept = {}
    ours, theirs = socket.socketpair()
    fds = held_fds(vm) | {
        "initrd": [memory_file("initrd")], "seed": [memory_file("seed")], "log": [theirs.detach()]
    }  # fmt: skip
    boot, seed = fds["boot"][0], fds["seed"][0]
    message = VmHeld(vmid=vm.vmid, running=True)
    made.on_held(message, Envelope(message, 0, 0, fds), cast("Any", line))

    assert (vm.kept, room.logs) == ({"kernel": boot, "seed": seed}, ["a"])
    ours.close()
    vm.drop_files()
    vm.drop_pty()
    vm.take_memory(None)
    assert open_descriptors() == before


@pytest.mark.parametrize("case", ["all", "no master", "no slave", "neither", "no pty", "no output"])
def test_a_console_that_cannot_be_taken_over(
    core: Core, room: Room, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    """The VM gets another pty, and its process is told.  Without its output the VM is only partly adopted."""
    before = open_descriptors()
    made, (line,) = adoption(core, room, 1)
    vm = known(core, "a", State.RUNNING, console_user="somebody", uid=os.getuid())
    expect(made, core)
    fds = held_fds(vm)
    path = os.ttyname(fds["tty_slave"][0])
    for name in {"no master": ["tty"], "no slave": ["tty_slave"], "neither": ["tty", "tty_slave"],
                 "no output": ["shown"]}.get(case, []):  # fmt: skip
        os.close(fds.pop(name)[0])
    if case == "no pty":
        os.close(fds["tty_slave"][0])
        fds["tty_slave"] = [memory_file("other")]
    message = VmHeld(vmid=vm.vmid, running=True)
    made.on_held(message, Envelope(message, 0, 0, fds), cast("Any", line))

    said = capfd.readouterr().err
    assert ("is only partly adopted, and runs on" in said) == (case == "no output")
    assert (vm.pty is None) == (case == "no output")
    told = [each for each in line.sent if isinstance(each, ConsoleSnapshot)]
    if case in ("all", "no output"):
        assert told == []
    else:
        assert vm.pty is not None
        assert (told, f"its console is now {vm.pty.path}" in said) == ([ConsoleSnapshot(vmid=vm.vmid)], True)
    if case == "all":
        assert vm.pty is not None
        assert (vm.pty.path, vm.console_user) == (path, "")
    vm.drop_pty()
    vm.take_memory(None)
    assert open_descriptors() == before


def test_the_number_of_adopted_vms_is_logged(core: Core, room: Room, capfd: pytest.CaptureFixture[str]) -> None:
    """Those that no vmm has are not counted."""
    made, (line,) = adoption(core, room, 1)
    vms = [known(core, name, State.RUNNING) for name in "abc"]
    expect(made, core)
    for vm in vms[:2]:
        report_vm(made, line, VmHeld(vmid=vm.vmid, running=True))
    report_list_end(made, line, *(vm.vmid for vm in vms[:2]))
    assert "2 VMs of an earlier vmd are adopted" in capfd.readouterr().err


def test_a_message_about_no_vm_is_never_for_the_earlier_parent(core: Core, room: Room) -> None:
    """A vmm answers pings before it has reported its VMs."""
    made, (line,) = adoption(core, room, 1)
    assert known(core, "a", State.RUNNING).vmid == 1
    expect(made, core)
    assert not made.is_stale(Pong(), cast("Any", line))


@pytest.mark.parametrize("ours", [False, True])
def test_a_process_that_was_taken_over_ends(ours: bool) -> None:
    """It need not be a child of this parent.  If it is one, it is reaped."""
    reader, writer = os.pipe()
    if ours:
        pid = os.fork()
        if not pid:
            os.close(writer)
            os.read(reader, 1)
            os._exit(3)
    else:  # a grandchild, whose pid comes through a pipe
        back, there = os.pipe()
        middle = os.fork()
        if not middle:
            pid = os.fork()
            if pid:
                os.write(there, str(pid).encode())
                os._exit(0)
            os.close(writer)
            os.read(reader, 1)
            os._exit(3)
        pid = int(os.read(back, 16))
        os.waitpid(middle, 0)
        os.close(back)
        os.close(there)
    pidfd = os.pidfd_open(pid)
    child = Adopted("vmm", pidfd)
    assert (child.pid, child.reap(), child.pidfd) == (pid, None, pidfd)
    os.close(writer)
    assert select.select([pidfd], [], [], 60.0)[0] == [pidfd]

    assert (child.reap(), child.status, child.pidfd) == (0, 0, -1)
    assert not os.path.exists(f"/proc/self/fd/{pidfd}")
    assert child.reap() == 0
    child.kill()
    assert is_reaped(pid)
    os.close(reader)
