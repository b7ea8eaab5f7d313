"""Snapshots of VMs, in the parent: the order of the steps, what each failure leaves, and the client's answer."""

import errno
import os
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support.descriptors import open_descriptors
from tests.unit.parent.timers import Timers
from vmd.config.model import Config, DiskConfig, Owner, VmConfig
from vmd.errors import HostError, OperatorError, PeerError, VmdError
from vmd.ipc import courier
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.clients import Caller, Failed, SnapshotRequest, SnapshotsDone
from vmd.ipc.messages.imgwriter import (
    ChangeSnapshots,
    FinishSnapshots,
    SnapshotsChanged,
    SnapshotsFailed,
    SnapshotsReady,
    SnapshotWord,
)
from vmd.ipc.messages.shared import DiskImages, ImageLink, SnapshotAction, SnapshotInfo
from vmd.ipc.messages.vm import CancelTransfer, DisksBack, DisksLent, LendDisks, TakeDisksBack
from vmd.ipc.routes import Proc
from vmd.parent.core import Core
from vmd.parent.opening import Opened
from vmd.parent.snapshots import AT_A_TIME, BUSY, END_LOOK_S, SILENT_S, Snapshots
from vmd.parent.vm import DeviceChange, Receiving, State, Vm
from vmd.record import Record

CLIENT = 7
ROOT, OTHER = Caller(uid=0, gid=0, pid=1), Caller(uid=2000, gid=200, pid=2)
LIST, CREATE, DELETE, GO_BACK = SnapshotAction
CHANGES = (CREATE, DELETE, GO_BACK)
UNUSED = cast("Any", None)


class Peer:
    """Notes the messages that are sent.  It closes the descriptors, and keeps their names."""

    def __init__(self) -> None:
        self.sent: list[Record] = []
        self.named: list[set[str]] = []  # names of the descriptors of each message
        self.too_long = False
        self.label, self.closed = "imgwriter/web", False

    def send(self, message: Record, *, peerid: int = 0, fds: dict[str, list[int]] | None = None) -> None:
        """Note a message."""
        for fd in [fd for each in (fds or {}).values() for fd in each]:
            os.close(fd)
        if self.too_long:
            raise ValueError("66000 bytes")
        assert peerid in (0, CLIENT)
        self.sent.append(message)
        self.named.append(set(fds or {}))

    def take(self) -> list[Record]:
        """Return the messages since the last call."""
        sent, self.sent = self.sent, []
        self.named = []
        return sent

    def close(self) -> None:
        """Note that the channel is closed."""
        self.closed = True


class Writer:
    """An imgwriter.  It has ended only when it is killed, and the test says so."""

    def __init__(self) -> None:
        self.killed = False
        self.pidfd = 3

    def kill(self) -> None:
        """Note it."""
        self.killed = True


class Rig(Timers):
    """The room, with the processes and rooms around it."""

    def __init__(self) -> None:
        super().__init__()
        self.core = Core(cast("Any", self), Config())
        self.core.write = lambda: self.written.append(self.vm.going_back)
        self.written: list[bool] = []  # each time that the state is written: whether the VM goes back
        self.vmm, self.control = Peer(), Peer()
        self.core.peers.channels = cast("Any", {Proc.VMM: self.vmm, Proc.CONTROL: self.control})
        self.writers: list[Writer] = []
        self.channels: list[Peer] = []
        self.cannot_start: VmdError | None = None
        self.too_long = False
        self.killed: list[Vm] = []
        self.revived: list[tuple[Vm, bool]] = []
        self.cannot_revive: VmdError | None = None
        self.opening: tuple[Callable[[Opened], None], Callable[[VmdError], None]]
        self.asked: dict[str, Any] = {}  # of the last opening
        self.room = Snapshots(self.core, cast("Any", self), cast("Any", self.attach))
        self.released: list[int] = []
        network = SimpleNamespace(release=self.released.append)
        self.room.life = cast("Any", SimpleNamespace(kill=self.killed.append, network=network, vm_ended=self.vm_ended))
        self.room.transfers = cast("Any", self)
        self.room.start(cast("Any", SimpleNamespace(start=self.start, bury=lambda: None)), UNUSED)
        disks = (DiskConfig(path="/root.qcow2"),)
        self.vm = self.core.vms.add(VmConfig(name="web", owner=Owner(uid=0), disks=disks), from_config=True)

    # Other rooms.

    def start(self, proc: Proc, _open_log: object) -> tuple[Writer, socket.socket]:
        """Replaces `Children.start`."""
        assert proc is Proc.IMGWRITER
        if self.cannot_start is not None:
            raise self.cannot_start
        self.writers.append(Writer())
        return self.writers[-1], UNUSED

    def attach(self, _sock: socket.socket, _proc: Proc, _label: str, *, on_lost: object) -> Peer:
        """Replaces `Process.attach`."""
        self.on_lost = cast("Callable[[object, PeerError | None], None]", on_lost)
        self.channels.append(Peer())
        self.channels[-1].too_long = self.too_long
        return self.channels[-1]

    def require_answers(self, _user: int) -> None:
        """Replaces `Openings.require_answers`."""

    def open(
        self, _vm: Vm, config: VmConfig, user: int, on_opened: Callable[[Opened], None],
        on_failed: Callable[[VmdError], None], **more: object,
    ) -> None:  # fmt: skip
        """Replaces `Openings.open`."""
        self.opening = on_opened, on_failed
        self.asked = {"cdrom": config.cdrom, "user": user, **more}

    def begin_revival(self, vm: Vm, stream: int, *, paused: bool) -> None:
        """Replaces `Transfers.begin_revival`."""
        os.close(stream)
        assert not vm.disk_work  # it could not be started
        vm.begin_reboot()
        vm.drop_transfer()
        self.revived.append((vm, paused))
        if self.cannot_revive is not None:
            raise self.cannot_revive

    def vm_ended(self, vm: Vm, text: str) -> None:
        """Replaces `Life.vm_ended`."""
        vm.ended(text)
        self.room.on_gone(vm)

    # What tests do.

    def run(self, state: State = State.RUNNING, kind: str = "qcow2") -> None:
        """Let the VM run."""
        self.vm.restore_state(state)
        link = ImageLink(path="/root.qcow2", format=kind)
        self.vm.disks = (DiskImages(images=(link,)),)

    def ask(self, action: SnapshotAction, tag: str | None = None, caller: Caller = ROOT) -> None:
        """Let a client ask."""
        usual = "" if action is LIST else "one"
        message = SnapshotRequest(name="web", action=action, tag=usual if tag is None else tag)
        self.room.serve(message, caller, Envelope(message, CLIENT, 0, {}))

    def begin(self, action: SnapshotAction, state: State = State.STOPPED) -> None:
        """Let a client ask.  The imgwriter has got its job, and a running VM has been asked to lend its disks."""
        if state is not State.STOPPED:
            self.run(state)
        self.ask(action)
        if state is State.STOPPED:
            self.opening[0](Opened())
        else:
            self.say(SnapshotWord())
        assert isinstance(self.channels[-1].take()[0], ChangeSnapshots)

    def lend(self, text: str = "") -> None:
        """Let the VM have lent its disks."""
        self.room.on_lent(DisksLent(vmid=self.vm.vmid, text=text), UNUSED)

    def back(self, text: str = "") -> None:
        """Let the VM have taken its disks back."""
        self.room.on_back(DisksBack(vmid=self.vm.vmid, text=text), UNUSED)

    def say(self, *messages: Record) -> None:
        """Let the imgwriter send messages."""
        for message in messages:
            self.room.on_message(message, cast("Any", self.channels[-1]))

    def lose(self) -> None:
        """Let the channel of the imgwriter end, and then the process."""
        self.on_lost(self.channels[-1], None)
        self.end()

    def end(self) -> None:
        """Let the imgwriter end.  It must have been killed, because it may hang."""
        assert self.writers[-1].killed
        assert self.channels[-1].closed
        self.writers[-1].pidfd = -1
        self.fire(END_LOOK_S)

    def failure(self) -> tuple[int, str]:
        """Return why the request has failed, as the client is told.  The VM has no job any more."""
        (failed,) = self.control.take()
        assert isinstance(failed, Failed)
        assert (self.room.at_work, self.vm.disk_work) == ([], "")
        return failed.code, failed.text

    def succeeded(self, action: SnapshotAction) -> None:
        """The client is told of the success.  The VM has no job any more."""
        assert self.control.take() == [
            SnapshotsDone(vmid=self.vm.vmid, name="web", tag="" if action is LIST else "one")
        ]
        assert (self.room.at_work, self.vm.disk_work) == ([], "")


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Give the room.  Afterwards no descriptor is left, and no job."""
    before = open_descriptors()
    rig = Rig()
    yield rig
    assert rig.room.at_work == []
    assert rig.room.jobs == {}
    assert open_descriptors() == before


# --- requests -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "tag", "error"),
    [
        (LIST, "one", "a list takes no tag"),
        (DELETE, "", "every other action needs one"),
        (GO_BACK, "", "every other action needs one"),
        (CREATE, "", "name of a snapshot"),
        (CREATE, "7", "name of a snapshot"),
    ],
)
def test_a_tag_fits_its_action(rig: Rig, action: SnapshotAction, tag: str, error: str) -> None:
    """A client may send any text."""
    with pytest.raises(OperatorError, match=error):
        rig.ask(action, tag)


@pytest.mark.parametrize("action", SnapshotAction)
@pytest.mark.parametrize(
    ("case", "error"),
    [
        ("other user", "use the snapshots of vm web"),
        ("daemon ends", "vmd is stopping"),
        ("no disks", "vm web has no disks"),
        ("raw", "vm web: disk /root.qcow2: is raw: only qcow2 images have snapshots"),
        ("starts", "vm web is starting"),
        ("grows", "vm web: disk0 is being changed"),
        ("in use", "a clone is being made"),
        ("waits for its disks", "vm web still waits for its disks"),
    ],
)
def test_a_request_that_cannot_be_served(rig: Rig, action: SnapshotAction, case: str, error: str) -> None:
    """It is refused before a process is started or the VM is paused."""
    if case == "daemon ends":
        rig.core.ending = True
    elif case == "no disks":
        rig.vm.config = rig.vm.config.replace(disks=())
    elif case == "raw":
        rig.run(kind="raw")
    elif case == "starts":
        rig.run(State.STARTING)
    elif case == "grows":
        rig.vm.begin_change(DeviceChange("disk0"))
    elif case == "in use":
        rig.vm.begin_disk_work("a clone is being made")
    elif case == "waits for its disks":
        rig.run(State.PAUSED)
        rig.vm.receiving = Receiving(paused=False)
    state = rig.vm.state

    with pytest.raises(OperatorError, match=error):
        rig.ask(action, caller=OTHER if case == "other user" else ROOT)

    assert (rig.writers, rig.asked, rig.vm.state) == ([], {}, state)


@pytest.mark.parametrize("state", [State.STOPPED, State.RUNNING])
def test_one_request_at_a_time_for_a_vm(rig: Rig, state: State) -> None:
    """Neither a second request nor a start disturbs it."""
    rig.begin(CREATE, state)
    for action in SnapshotAction:
        with pytest.raises(OperatorError) as refused:
            rig.ask(action)
        assert refused.value.number in (errno.EBUSY, errno.EINVAL)
    with pytest.raises(OperatorError):
        rig.vm.require_startable()
    rig.lose()
    if state is State.RUNNING:
        rig.lend()
        rig.back()
    assert rig.failure()[0] == errno.EIO


def test_a_list_does_not_disturb_a_running_vm_and_is_alone(rig: Rig) -> None:
    """It lends its disks without being paused.  A second list waits for its turn."""
    rig.begin(LIST, State.RUNNING)
    assert rig.vmm.take() == [LendDisks(vmid=rig.vm.vmid, look=True)]
    assert rig.vm.state is State.RUNNING
    with pytest.raises(OperatorError, match=BUSY):
        rig.ask(LIST)
    rig.lend()
    row = SnapshotInfo(tag="old", date_s=1, clock_ns=0, state_bytes=0, disks=1, of_disks=1)
    rig.say(row)
    assert rig.control.take() == [row]
    rig.say(SnapshotsChanged())
    rig.lose()
    rig.succeeded(LIST)
    assert (rig.vm.state, rig.vmm.take()) == (State.RUNNING, [])


def test_the_base_of_a_disk_may_have_any_format(rig: Rig) -> None:
    """Snapshots are in the disk's own image."""
    rig.run(State.RUNNING)
    top, base = ImageLink(path="/root.qcow2", format="qcow2"), ImageLink(path="/base", format="raw")
    rig.vm.disks = (DiskImages(images=(top, base)),)
    rig.ask(LIST)
    rig.lose()
    assert rig.failure()[0] == errno.EIO
    rig.vm.disks = (DiskImages(images=(base.replace(path="/root"), top)),)
    with pytest.raises(OperatorError, match="disk /root: is raw: only qcow2 images have snapshots"):
        rig.ask(LIST)


def test_requests_for_many_vms(rig: Rig) -> None:
    """Each has a process of its own, so there is a limit."""
    for number in range(AT_A_TIME):
        vm = rig.core.vms.add(VmConfig(name=f"v{number}", disks=(DiskConfig(path="/d"),)), from_config=True)
        message = SnapshotRequest(name=vm.name, action=LIST)
        rig.room.serve(message, ROOT, Envelope(message, CLIENT, 0, {}))
    with pytest.raises(OperatorError, match=f"snapshots of {AT_A_TIME} VMs are being changed already") as refused:
        rig.ask(LIST)
    assert refused.value.number == errno.EBUSY
    for job in list(rig.room.at_work):
        rig.room._fail(job, HostError("open", errno.EIO))


# --- stopped VMs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", CHANGES)
def test_a_stopped_vm(rig: Rig, action: SnapshotAction) -> None:
    """The change is made when all disks are prepared.  The client is answered when the disks are free again."""
    rig.vm.config = rig.vm.config.replace(cdrom="/cd.iso")
    rig.begin(action)
    assert (rig.asked["cdrom"], rig.asked["user"], rig.asked["boots"]) == ("", 0, False)
    (writer,) = rig.channels
    assert writer.take() == []
    rig.say(SnapshotWord(), SnapshotsReady())
    assert writer.take() == [FinishSnapshots(commit=True, first_last=action is CREATE)]
    rig.say(SnapshotsChanged())
    assert rig.control.take() == []
    rig.on_lost(writer, None)
    rig.fire(END_LOOK_S)
    assert rig.control.take() == []
    with pytest.raises(OperatorError, match=BUSY):
        rig.vm.require_startable()
    rig.end()

    rig.succeeded(action)
    rig.vm.require_startable()
    assert rig.vmm.take() == []
    assert rig.killed == []


def test_the_event_of_a_change(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Clients that watch the VM are told, with the tag, and the log has it."""
    events: list[tuple[str, Vm, dict[str, str]]] = []
    monkeypatch.setattr(rig.core.events, "add", lambda what, vm, **more: events.append((what, vm, more)))
    for action in (LIST, DELETE):
        rig.begin(action)
        rig.say(*(() if action is LIST else (SnapshotsReady(),)), SnapshotsChanged())
        rig.lose()

    assert events == [("snapshot", rig.vm, {"text": "deleted snapshot", "value": "one"})]
    assert "vmd: web: deleted snapshot one\n" in capfd.readouterr().err


def test_disks_that_cannot_be_opened(rig: Rig) -> None:
    """The VM can be started afterwards."""
    rig.ask(CREATE)
    rig.opening[1](OperatorError(errno.EACCES, "disk /root.qcow2: Permission denied"))

    assert rig.failure() == (errno.EACCES, "vm web: disk /root.qcow2: Permission denied")
    rig.vm.require_startable()
    assert rig.writers == []


@pytest.mark.parametrize("state", [State.STOPPED, State.RUNNING, State.PAUSED])
@pytest.mark.parametrize("action", SnapshotAction)
def test_an_imgwriter_that_cannot_be_started(rig: Rig, action: SnapshotAction, state: State) -> None:
    """The VM is as before."""
    rig.cannot_start = HostError("start imgwriter", errno.ENOMEM)
    if state is State.STOPPED:
        rig.ask(action)
        opened = Opened()
        opened.couriers = [os.dup(0)]
        rig.opening[0](opened)
        assert rig.failure() == (errno.ENOMEM, "vm web: start imgwriter: Cannot allocate memory")
    else:
        rig.run(state)
        with pytest.raises(HostError, match="start imgwriter"):
            rig.ask(action)
    assert (rig.vm.state, rig.vm.disk_work, rig.vmm.take()) == (state, "", [])


@pytest.mark.parametrize("action", [CREATE, GO_BACK])
def test_a_host_without_free_descriptors(rig: Rig, monkeypatch: pytest.MonkeyPatch, action: SnapshotAction) -> None:
    """The VM is as before, and what was opened already is closed."""
    pair = courier.pair
    made: list[object] = []

    def full(*_words: object) -> Any:  # noqa: ANN401
        if made or action is CREATE:
            raise OSError(errno.EMFILE, "Too many open files")
        made.append(1)
        return pair()

    monkeypatch.setattr("os.pipe2" if action is CREATE else "vmd.ipc.courier.pair", full)
    rig.run()
    with pytest.raises(HostError, match="make a courier: Too many open files"):
        rig.ask(action)
    assert (rig.vm.state, rig.vm.disk_work, rig.writers) == (State.RUNNING, "", [])


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("state", [State.STOPPED, State.RUNNING])
def test_a_job_that_is_too_long_for_a_message(rig: Rig, state: State, ended: bool) -> None:
    """The client is told, and the VM is as before, however soon the imgwriter ends."""
    rig.too_long = True
    if state is State.RUNNING:
        rig.run()
    rig.ask(CREATE)
    if state is State.STOPPED:
        rig.opening[0](Opened())
    if ended:
        rig.writers[0].pidfd = -1
    rig.fire(0)
    if not ended:
        rig.end()

    assert rig.failure() == (errno.E2BIG, "vm web: configuration too long: 66000 bytes")
    assert (rig.vm.state, rig.vmm.take()) == (state, [])


@pytest.mark.parametrize("ready", [False, True])
def test_an_imgwriter_that_fails(rig: Rig, capfd: pytest.CaptureFixture[str], ready: bool) -> None:
    """Client and log get its reason, with the name of the VM once."""
    rig.begin(DELETE)
    if ready:
        rig.say(SnapshotsReady())
    rig.say(SnapshotsFailed(code=errno.ENOENT, text="disk /root.qcow2: has no snapshot one"))
    rig.lose()

    assert rig.failure() == (errno.ENOENT, "vm web: disk /root.qcow2: has no snapshot one")
    assert "vmd: vm web: disk /root.qcow2: has no snapshot one" in capfd.readouterr().err


def test_an_imgwriter_that_dies(rig: Rig) -> None:
    """The client is told when it has ended."""
    rig.begin(DELETE)
    rig.lose()

    assert rig.failure() == (errno.EIO, "vm web: imgwriter has ended: Input/output error")


@pytest.mark.parametrize("word", [None, SnapshotWord(), SnapshotsReady()])
def test_an_imgwriter_that_is_silent(rig: Rig, word: Record | None) -> None:
    """Each message gives it more time.  A silent imgwriter is killed, because its storage hangs."""
    rig.begin(CREATE)
    if word is not None:
        first = rig.timers.copy()
        rig.say(word)
        assert first[0][1].callback is None
    rig.fire(SILENT_S)
    rig.end()

    assert rig.failure() == (errno.ETIMEDOUT, "vm web: its disks do not answer")


@pytest.mark.parametrize("message", [SnapshotsReady(), SnapshotsChanged(), SnapshotsFailed(code=1, text="x")])
def test_a_message_without_a_job(rig: Rig, message: Record) -> None:
    """It breaks the protocol, and so does a second result."""
    with pytest.raises(PeerError, match="a request that was not made"):
        rig.room.on_message(message, cast("Any", Peer()))
    rig.begin(DELETE)
    rig.say(SnapshotsReady(), SnapshotsChanged())
    with pytest.raises(PeerError, match="a request that was not made"):
        rig.say(message)
    rig.lose()
    rig.succeeded(DELETE)


def test_a_list_that_was_not_requested(rig: Rig) -> None:
    """It does not reach the client."""
    rig.begin(DELETE)
    with pytest.raises(PeerError, match="sent a list that was not requested"):
        rig.say(SnapshotInfo(tag="x", date_s=1, clock_ns=0, state_bytes=0, disks=1, of_disks=1))
    rig.lose()
    assert rig.failure()[0] == errno.EIO


def test_the_daemon_ends(rig: Rig) -> None:
    """A change that is only prepared leaves the disks unchanged."""
    rig.begin(CREATE)
    rig.room.close()
    assert rig.writers[0].killed
    assert rig.room.vm_of(cast("Any", rig.channels[0])) == rig.vm.vmid
    rig.lose()
    assert rig.room.vm_of(cast("Any", rig.channels[0])) == 0
    assert rig.channels[0].take() == []


# --- running VMs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [State.RUNNING, State.PAUSED])
@pytest.mark.parametrize("action", [CREATE, DELETE])
@pytest.mark.parametrize("lends_first", [False, True])
def test_a_running_vm(rig: Rig, action: SnapshotAction, state: State, lends_first: bool) -> None:
    """It is paused when the imgwriter works.  The change is made when both are ready, and then the VM continues."""
    rig.run(state)
    rig.ask(action)
    (writer,) = rig.channels
    assert (rig.vm.state, rig.vmm.sent) == (State.SAVING, [])
    assert writer.named == [{"couriers", "stream"} if action is CREATE else {"couriers"}]
    rig.say(SnapshotWord())
    assert rig.vmm.named == [{"courier", "stream"} if action is CREATE else {"courier"}]
    assert rig.vmm.take() == [LendDisks(vmid=rig.vm.vmid)]
    rig.say(SnapshotWord())
    writer.take()
    for lends in (lends_first, not lends_first):
        assert writer.take() == []
        if lends:
            rig.lend()
        else:
            rig.say(SnapshotsReady())
    assert writer.take() == [FinishSnapshots(commit=True, first_last=action is CREATE)]
    rig.say(SnapshotsChanged())
    rig.on_lost(writer, None)
    assert rig.vmm.take() == []
    rig.end()
    assert rig.vmm.take() == [TakeDisksBack(vmid=rig.vm.vmid)]
    assert (rig.control.take(), rig.vm.state) == ([], State.SAVING)
    rig.back()

    rig.succeeded(action)
    assert rig.vm.state is state
    assert rig.killed == []


def test_the_clock_of_a_snapshot(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says how long the machine has run.  A clock of the host that was set back makes it 0."""
    monkeypatch.setattr("time.time_ns", lambda: 1000 * 10**9)
    for started_s, ran_s in ((400.0, 600), (1001.0, 0)):
        rig.run()
        rig.vm.started_s = started_s
        rig.ask(CREATE)
        change = rig.channels[-1].take()[0]
        assert isinstance(change, ChangeSnapshots)
        assert (change.date_ns, change.clock_ns) == (1000 * 10**9, ran_s * 10**9)
        rig.lose()
        rig.failure()


@pytest.mark.parametrize("when", ["before it lends", "after it has lent"])
@pytest.mark.parametrize("action", [CREATE, DELETE, GO_BACK])
def test_a_running_vm_whose_imgwriter_dies(rig: Rig, action: SnapshotAction, when: str) -> None:
    """It takes its disks back, and continues."""
    rig.begin(action, State.RUNNING)
    rig.vmm.take()
    if when == "after it has lent":
        rig.lend()
    rig.lose()
    if when == "before it lends":
        assert rig.vmm.take() == []
        rig.lend()
    assert rig.vmm.take() == [TakeDisksBack(vmid=rig.vm.vmid)]
    rig.back()

    assert rig.failure() == (errno.EIO, "vm web: imgwriter has ended: Input/output error")
    assert (rig.vm.state, rig.killed) == (State.RUNNING, [])


@pytest.mark.parametrize("action", SnapshotAction)
def test_a_running_vm_whose_imgwriter_dies_at_once(rig: Rig, action: SnapshotAction) -> None:
    """The VM was not asked to lend its disks, so it continues at once."""
    rig.run()
    rig.ask(action)
    rig.lose()

    assert rig.failure()[0] == errno.EIO
    assert (rig.vm.state, rig.vmm.take()) == (State.RUNNING, [])


@pytest.mark.parametrize("action", CHANGES)
def test_a_vm_that_cannot_lend_its_disks(rig: Rig, action: SnapshotAction) -> None:
    """The imgwriter changes nothing, and the client gets the VM's reason."""
    rig.begin(action, State.RUNNING)
    rig.vmm.take()
    rig.say(SnapshotsReady())
    rig.lend("cannot be paused")
    assert rig.channels[0].take() == [FinishSnapshots(commit=False, first_last=action is CREATE)]
    rig.say(SnapshotsChanged())
    rig.lose()
    assert rig.vmm.take() == [TakeDisksBack(vmid=rig.vm.vmid)]
    rig.back()

    assert rig.failure() == (errno.EIO, "vm web: cannot be paused")
    assert (rig.vm.state, rig.vm.going_back, rig.killed) == (State.RUNNING, False, [])


def test_disks_that_cannot_be_taken_back(rig: Rig) -> None:
    """The snapshot is made, but the client is told that the VM has a problem."""
    rig.begin(CREATE, State.RUNNING)
    rig.say(SnapshotsReady())
    rig.lend()
    rig.say(SnapshotsChanged())
    rig.lose()
    rig.back("disk0: read: Input/output error")

    assert rig.failure() == (errno.EIO, "vm web: disk0: read: Input/output error")


def test_disks_that_were_not_requested(rig: Rig) -> None:
    """A VM that lends its disks twice breaks the protocol.  A late message of a VM that was given up is ignored."""
    rig.run()
    rig.lend()
    rig.back()
    assert (rig.vmm.take(), rig.control.take()) == ([], [])
    rig.begin(CREATE, State.RUNNING)
    rig.lend()
    with pytest.raises(PeerError, match="lent its disks without a request"):
        rig.lend()
    rig.back()  # too early
    assert rig.control.take() == []
    rig.lose()
    rig.back()
    assert rig.failure()[0] == errno.EIO


def test_a_job_of_an_earlier_parent(rig: Rig) -> None:
    """The VM was adopted while it was saved: it takes its disks back, and continues."""
    rig.run()
    rig.vm.begin_send(keep=True, state=State.SAVING)
    rig.vmm.take()
    rig.lend()
    assert rig.vmm.take() == [TakeDisksBack(vmid=rig.vm.vmid)]
    rig.back()
    assert rig.vm.state is State.RUNNING


@pytest.mark.parametrize("lent", [False, True])
def test_a_client_that_disconnects(rig: Rig, lent: bool) -> None:
    """A VM that is still lending its disks is told to stop that.  Later the change is completed."""
    rig.begin(CREATE, State.RUNNING)
    rig.vmm.take()
    if lent:
        rig.lend()
    rig.room.on_client_gone(rig.vm.vmid + 1)
    assert rig.vmm.take() == []
    rig.room.on_client_gone(rig.vm.vmid)
    assert rig.vmm.take() == ([] if lent else [CancelTransfer(vmid=rig.vm.vmid)])
    if not lent:
        rig.lend("cancelled")
    rig.lose()
    rig.back()
    assert rig.failure()[0] == errno.EIO


@pytest.mark.parametrize("action", SnapshotAction)
@pytest.mark.parametrize("when", ["lends", "changes", "imgwriter has ended"])
def test_a_vm_that_ends_meanwhile(rig: Rig, action: SnapshotAction, when: str) -> None:
    """Before the change, the job fails.  Afterwards the change is completed."""
    rig.begin(action, State.RUNNING)
    if when != "lends":
        rig.lend()
        if action is not LIST:
            rig.say(SnapshotsReady())
    if when == "imgwriter has ended":
        rig.say(*(() if action is GO_BACK else (SnapshotsChanged(),)))
        rig.lose()
    rig.vm_ended(rig.vm, "killed")
    if when == "changes" and action is not LIST:
        assert not rig.writers[0].killed
        rig.say(SnapshotsChanged())
        rig.lose()
    elif when != "imgwriter has ended":
        rig.end()

    if when == "lends" or (when == "changes" and action is LIST):
        assert rig.failure() == (errno.ECANCELED, "vm web: has ended meanwhile")
    elif action is GO_BACK and when == "imgwriter has ended":
        assert rig.failure()[0] == errno.EIO
    else:
        rig.succeeded(action)
    assert rig.vm.state is State.STOPPED


# --- back to a snapshot -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [State.RUNNING, State.PAUSED])
def test_a_running_vm_goes_back(rig: Rig, state: State) -> None:
    """Its process is replaced when the disks are changed.  The state is written before the change."""
    rig.begin(GO_BACK, state)
    rig.lend()
    assert rig.written == []
    rig.say(SnapshotsReady())
    assert rig.written == [True]
    assert rig.channels[0].take() == [FinishSnapshots(commit=True)]
    rig.vmm.take()
    rig.say(SnapshotsChanged())
    assert rig.killed == [rig.vm]
    assert rig.vm.revive is not None
    rig.vm.revive()
    assert rig.revived == [(rig.vm, state is State.PAUSED)]
    rig.say(SnapshotWord())  # it still gives the machine to the new process
    rig.lose()
    assert (rig.control.take(), rig.vmm.take(), rig.killed) == ([], [], [rig.vm])  # the new process is not killed
    rig.room.on_received(rig.vm)

    rig.succeeded(GO_BACK)


@pytest.mark.parametrize("ended", [False, True])
def test_a_vm_that_cannot_continue_with_its_snapshot(rig: Rig, ended: bool) -> None:
    """The client is told that the disks are the snapshot's."""
    rig.begin(GO_BACK, State.RUNNING)
    rig.lend()
    rig.say(SnapshotsReady(), SnapshotsChanged())
    assert rig.vm.revive is not None
    if not ended:
        rig.cannot_revive = OperatorError(errno.ENOMEM, "no memory is left")
    rig.vm.revive()
    if ended:
        rig.vm.code = errno.EPROTO
        rig.vm_ended(rig.vm, "the machine has another processor")
    rig.lose()

    if ended:
        text = "vm web: its disks are the snapshot's, but it did not continue: the machine has another processor"
        assert rig.failure() == (errno.EPROTO, text)
    else:
        assert rig.failure() == (errno.ENOMEM, "vm web: no memory is left")
        assert rig.released == [rig.vm.vmid]
    assert rig.vm.state is State.STOPPED


def test_a_vm_whose_disks_may_be_changed_partly_does_not_continue(rig: Rig) -> None:
    """The imgwriter has died within the change: the guest's memory does not fit its disks any more."""
    rig.begin(GO_BACK, State.RUNNING)
    rig.lend()
    rig.say(SnapshotsReady())
    rig.vmm.take()
    rig.lose()

    assert (rig.killed, rig.vmm.take()) == ([rig.vm], [])
    rig.vm_ended(rig.vm, "killed")
    assert rig.failure() == (errno.EIO, "vm web: imgwriter has ended: Input/output error")


def test_a_vm_that_ends_within_the_change_is_not_revived(rig: Rig) -> None:
    """A user has stopped it.  It can be started again, from the disks of the snapshot."""
    rig.begin(GO_BACK, State.RUNNING)
    rig.lend()
    rig.say(SnapshotsReady())
    rig.vm_ended(rig.vm, "stopped")
    rig.say(SnapshotsChanged())
    rig.lose()

    rig.succeeded(GO_BACK)
    assert (rig.killed, rig.revived) == ([], [])
    rig.vm.require_startable()
