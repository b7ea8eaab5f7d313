"""Changes of a VM: who may make them, with whose rights files are opened, and what each answer causes."""

import errno
import os
from collections.abc import Callable
from typing import Any, cast

import pytest

from vmd.config.model import Config, DiskConfig, Owner, Rights, VmConfig
from vmd.errors import HostError, OperatorError, PeerError, VmdError
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.clients import Caller, DiscInserted, DiscRequest, Failed, Resized, ResizeRequest
from vmd.ipc.messages.opener import OpenFiles
from vmd.ipc.messages.vm import ChangeDisc, DiscChanged, DiskResized, ResizeDisk
from vmd.ipc.routes import Proc
from vmd.parent.changes import SIZE_MAX, Changes
from vmd.parent.core import Core
from vmd.parent.opening import Opened
from vmd.parent.vm import State, Vm
from vmd.record import Record

CLIENT = 7
OWNER, OTHER, ROOT = Caller(uid=1000, gid=100, pid=1), Caller(uid=2000, gid=200, pid=2), Caller(uid=0, gid=0, pid=3)
DISKS = (DiskConfig(path="/d0"), DiskConfig(path="/d1", format="qcow2"))
RIGHTS = Rights(disks=Owner(uid=5, gid=6), cdrom=Owner(uid=5, gid=6))
CONFIG = VmConfig(
    name="a", owner=Owner(uid=1000), disks=DISKS, cdrom="/old.iso", rights=RIGHTS, origin="vm.conf:1"
)  # fmt: skip
GIB = 1 << 30
UNUSED = cast("Any", None)


class Peer:
    """A channel that records messages, and closes their descriptors."""

    def __init__(self) -> None:
        self.sent: list[Record] = []
        self.fds: list[list[str]] = []

    def send(self, message: Record, *, peerid: int, fds: dict[str, list[int]]) -> None:
        """Record a message."""
        assert peerid in (0, CLIENT)
        self.sent.append(message)
        self.fds.append([name for name, each in fds.items() if each])
        for fd in (fd for each in fds.values() for fd in each):
            os.close(fd)

    def take(self) -> list[Record]:
        """Return the messages since the last call."""
        sent, self.sent = self.sent, []
        return sent


class Openings:
    """Stands in for the openers.  The test gives their answers."""

    def __init__(self) -> None:
        self.jobs: list[tuple[int, OpenFiles]] = []  # with the user that asked
        self.answers: list[tuple[Callable[[Opened], None], Callable[[VmdError], None]]] = []
        self.hanging = False

    def require_answers(self, _user: int) -> None:
        """Refuse if openers of the user hang."""
        if self.hanging:
            raise OperatorError(errno.EBUSY, "their storage does not answer")

    def open_for(
        self,
        _change: object,
        _vm: Vm,
        user: int,
        job: OpenFiles,
        on_opened: Callable[[Opened], None],
        on_failed: Callable[[VmdError], None],
    ) -> None:
        """Accept a job."""
        self.jobs.append((user, job))
        self.answers.append((on_opened, on_failed))

    def job(self) -> tuple[int, OpenFiles]:
        """Return the only job since the last call."""
        ((user, job),) = self.jobs
        self.jobs.clear()
        return user, job

    def opened(self, **found: object) -> Opened:
        """Answer the oldest job with success.  All files come over one courier."""
        opened = Opened()
        opened.couriers = [os.open(os.devnull, os.O_RDONLY)]
        for name, value in found.items():
            setattr(opened, name, value)
        self.answers.pop(0)[0](opened)
        return opened

    def failed(self, error: VmdError) -> None:
        """Answer the oldest job with an error."""
        self.answers.pop(0)[1](error)


class Rig:
    """The room, a VM, its owner, and the channels."""

    def __init__(self) -> None:
        self.core = Core(UNUSED, Config())
        self.vmm, self.control = Peer(), Peer()
        self.core.peers.channels = cast("Any", {Proc.VMM: self.vmm, Proc.CONTROL: self.control})
        self.openings = Openings()
        self.changes = Changes(self.core, cast("Any", self.openings))
        self.vm = self.core.vms.add(CONFIG, from_config=True)
        self.vm.uid = 1000

    def run(self, config: VmConfig = CONFIG) -> None:
        """Set the VM to running."""
        self.vm._state, self.vm.pid = State.RUNNING, 4711
        self.vm.running_config = config

    def resize(self, disk: str = "disk1", size_bytes: int = GIB, caller: Caller = OWNER) -> None:
        """Request a larger disk."""
        message = ResizeRequest(name="a", disk=disk, size_bytes=size_bytes)
        self.changes.serve_resize(message, caller, Envelope(message, CLIENT, 0, {}))

    def disc(self, path: str, caller: Caller = OWNER, *, force: bool = False) -> None:
        """Request another disc."""
        message = DiscRequest(name="a", path=path, force=force)
        self.changes.serve_disc(message, caller, Envelope(message, CLIENT, 0, {}))


@pytest.fixture
def rig() -> Rig:
    """Return the room."""
    return Rig()


def is_open(fd: int) -> bool:
    """Return whether a descriptor is open."""
    return os.path.exists(f"/proc/self/fd/{fd}")


# --- permissions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", [Rig.resize, lambda rig, **more: rig.disc("/x", **more)], ids=["disk", "disc"])
def test_only_users_who_control_the_vm_may_change_it(rig: Rig, ask: Callable[..., None]) -> None:
    """For other users nothing is opened."""
    with pytest.raises(OperatorError, match="its owner is") as refused:
        ask(rig, caller=OTHER)
    assert refused.value.number == errno.EPERM
    assert (rig.openings.jobs, rig.vm.changing) == ([], None)

    ask(rig, caller=ROOT)
    assert rig.openings.job()[0] == 0


@pytest.mark.parametrize("word", ["disk1", "1", "/d1"])
def test_a_disk_has_three_names(rig: Rig, word: str) -> None:
    """The names are its number, with or without `disk`, and its path."""
    rig.resize(word)
    assert rig.openings.job()[1].disks == (DISKS[1],)


@pytest.mark.parametrize("word", ["disk2", "2", "-1", "disk", "", "/d", "\u00b2", "9" * 5000])
def test_a_disk_that_does_not_exist(rig: Rig, word: str) -> None:
    """The message lists the VM's disks."""
    with pytest.raises(OperatorError, match=r"it has disk0 \(/d0\), disk1 \(/d1\)$") as refused:
        rig.resize(word)
    assert refused.value.number == errno.ENODEV
    assert rig.vm.changing is None


@pytest.mark.parametrize("size", [0, -512, 1, 511, 513, SIZE_MAX + 1, 1 << 63, 1 << 64])
def test_an_impossible_size_of_a_disk(rig: Rig, size: int) -> None:
    """It is refused before anything is opened."""
    with pytest.raises(OperatorError, match="bytes") as refused:
        rig.resize(size_bytes=size)
    assert (refused.value.number, rig.openings.jobs, rig.vm.changing) == (errno.EINVAL, [], None)
    rig.resize(size_bytes=(1 << 63) - 512)


@pytest.mark.parametrize("path", ["x.iso", "./x", "/a\0b", "/" + "x" * 5000])
def test_an_impossible_path_of_a_disc(rig: Rig, path: str) -> None:
    """A relative path is refused, because the daemon does not know the client's directory.  So is a NUL."""
    with pytest.raises(OperatorError) as refused:
        rig.disc(path)
    assert (refused.value.number, rig.openings.jobs, rig.vm.changing) == (errno.EINVAL, [], None)


def test_a_path_with_a_backslash(rig: Rig) -> None:
    """A backslash has no special meaning in a path."""
    rig.disc("/a\\0b")
    assert rig.openings.job()[1].cdrom == "/a\\0b"


def test_one_change_at_a_time(rig: Rig) -> None:
    """The second client gets a message that names the present change, which continues."""
    rig.resize()
    with pytest.raises(OperatorError, match="disk1 is being changed"):
        rig.disc("")
    rig.openings.opened()
    rig.openings.opened()
    assert [type(answer) for answer in rig.control.take()] == [Resized]
    rig.disc("")


def test_no_change_when_the_daemon_ends_or_openers_hang(rig: Rig) -> None:
    """After the refusal no change of the VM is recorded as under way."""
    rig.openings.hanging = True
    with pytest.raises(OperatorError, match="storage does not answer"):
        rig.resize()
    assert rig.vm.changing is None
    rig.core.ending = True
    with pytest.raises(OperatorError, match="vmd is stopping"):
        rig.resize()
    assert (rig.vm.changing, rig.openings.jobs) == (None, [])


# --- disks ----------------------------------------------------------------------------------------------------


def test_a_disk_of_a_vm_that_does_not_run(rig: Rig) -> None:
    """First the caller's right to write is checked.  Then the disk grows with the rights of the user who named it."""
    rig.resize()
    user, job = rig.openings.job()
    assert (user, job.uid, job.only_writable, job.resize_bytes) == (1000, 1000, True, 0)
    first = rig.openings.opened(couriers=[os.open(os.devnull, os.O_RDONLY)])
    assert first.couriers == []
    user, job = rig.openings.job()
    assert (user, job.uid, job.gid, job.only_writable, job.resize_bytes, job.in_conf) == (1000, 5, 6, False, GIB, True)
    assert rig.openings.opened().couriers == []

    resized = Resized(vmid=rig.vm.vmid, name="a", disk="disk1", path="/d1", size_bytes=GIB)
    assert rig.control.take() == [resized]
    assert (rig.vmm.sent, rig.vm.changing) == ([], None)


def test_a_disk_of_a_vm_that_runs(rig: Rig) -> None:
    """The VM's process makes the disk larger, after the caller's right to write was checked."""
    rig.run()
    rig.resize()
    rig.openings.opened()
    assert rig.vmm.take() == [ResizeDisk(vmid=rig.vm.vmid, index=1, size_bytes=GIB)]
    assert (rig.control.take(), rig.vm.changing is None) == ([], False)
    rig.changes.on_disk_resized(DiskResized(vmid=rig.vm.vmid), UNUSED)

    resized = Resized(vmid=rig.vm.vmid, name="a", disk="disk1", path="/d1", size_bytes=GIB, running=True)
    assert (rig.control.take(), rig.vm.changing) == ([resized], None)


def test_a_disk_whose_file_was_replaced(rig: Rig) -> None:
    """The caller may write to the new file.  That does not prove the right to the file that the guest has open."""
    rig.run()
    rig.vm.files = {"disk /d1": (1, 2)}
    rig.resize()
    rig.openings.opened(files={"disk /d1": (1, 3)})

    (failed,) = rig.control.take()
    assert isinstance(failed, Failed)
    assert (failed.code, rig.vmm.sent, rig.vm.changing) == (errno.ESTALE, [], None)
    assert "it was replaced meanwhile" in failed.text


@pytest.mark.parametrize("running", [False, True])
def test_a_disk_that_does_not_become_larger(rig: Rig, running: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """The client gets the message once, with the VM's name once.  The next change is possible."""
    if running:
        rig.run()
    rig.resize()
    rig.openings.opened()
    if running:
        rig.changes.on_disk_resized(DiskResized(vmid=rig.vm.vmid, code=errno.ENOSPC, text="no room"), UNUSED)
    else:
        rig.openings.failed(OperatorError(errno.ENOSPC, "vm a: no room"))

    assert rig.control.take() == [Failed(code=errno.ENOSPC, text="vm a: no room")]
    assert "vm a: disk1 was not changed: no room" in capfd.readouterr().err
    assert rig.vm.changing is None


def test_an_opener_that_fails_for_a_reason_of_the_host(rig: Rig) -> None:
    """The answer has the errno of the host."""
    rig.resize()
    rig.openings.failed(HostError("open /d1", errno.EIO))

    (failed,) = rig.control.take()
    assert isinstance(failed, Failed)
    assert (failed.code, failed.text) == (errno.EIO, "vm a: open /d1: Input/output error")


# --- discs ----------------------------------------------------------------------------------------------------


def test_a_disc_for_a_vm_that_does_not_run(rig: Rig) -> None:
    """The next start has the disc, with the caller's rights.  The file is closed now."""
    rig.disc("/new.iso")
    user, job = rig.openings.job()
    assert (user, job.uid, job.cdrom, job.in_conf) == (1000, 1000, "/new.iso", False)
    opened = rig.openings.opened(notes=("odd length",))

    assert rig.control.take() == [DiscInserted(vmid=rig.vm.vmid, name="a", path="/new.iso", notes=("odd length",))]
    assert (opened.couriers, rig.vmm.sent) == ([], [])
    assert (rig.vm.config.cdrom, rig.vm.config.drive) == ("/new.iso", True)
    assert rig.vm.config.rights.cdrom == Owner(uid=1000, gid=100)
    assert rig.vm.config.rights.disks == RIGHTS.disks


def test_a_disc_for_a_vm_that_runs(rig: Rig) -> None:
    """The VM's process gets the file.  The configuration changes only after its answer."""
    rig.run()
    rig.vm.files = {"disk /d0": (1, 1), "cdrom /old.iso": (1, 2)}
    rig.vm.next_config = CONFIG.replace(vcpus=2)
    rig.disc("/new.iso", force=True)
    rig.openings.opened(files={"cdrom /new.iso": (1, 3)})
    assert rig.vmm.take() == [ChangeDisc(vmid=rig.vm.vmid, path="/new.iso", force=True)]
    assert rig.vmm.fds == [["courier"]]
    assert rig.vm.config.cdrom == "/old.iso"
    rig.changes.on_disc_changed(DiscChanged(vmid=rig.vm.vmid), UNUSED)

    assert rig.control.take() == [DiscInserted(vmid=rig.vm.vmid, name="a", path="/new.iso", running=True)]
    configs = (rig.vm.config, rig.vm.running_config, rig.vm.next_config)
    assert [config and (config.cdrom, config.vcpus) for config in configs] == [
        ("/new.iso", 1), ("/new.iso", 1), ("/new.iso", 2),
    ]  # fmt: skip
    assert rig.vm.files == {"disk /d0": (1, 1), "cdrom /new.iso": (1, 3)}


def test_the_disc_is_taken_out(rig: Rig) -> None:
    """Nothing is opened, and no file is sent.  The drive stays."""
    rig.run()
    rig.vm.files = {"cdrom /old.iso": (1, 2)}
    rig.disc("")
    assert rig.openings.jobs == []
    assert (rig.vmm.take(), rig.vmm.fds) == ([ChangeDisc(vmid=rig.vm.vmid, path="")], [[]])
    rig.changes.on_disc_changed(DiscChanged(vmid=rig.vm.vmid), UNUSED)

    assert (rig.vm.config.cdrom, rig.vm.config.drive, rig.vm.files) == ("", True, {})


def test_a_disc_that_the_drive_does_not_take(rig: Rig) -> None:
    """The guest may have locked the drive.  The old disc stays."""
    rig.run()
    rig.disc("/new.iso")
    rig.openings.opened(files={"cdrom /new.iso": (1, 3)})
    rig.changes.on_disc_changed(DiscChanged(vmid=rig.vm.vmid, code=errno.EBUSY, text="locked"), UNUSED)

    assert rig.control.take() == [Failed(code=errno.EBUSY, text="vm a: locked")]
    assert (rig.vm.config.cdrom, rig.vm.files, rig.vm.changing) == ("/old.iso", {}, None)


def test_a_vm_that_runs_without_a_drive(rig: Rig) -> None:
    """No device is added to a running VM.  An empty drive takes a disc."""
    bare = CONFIG.replace(cdrom="")
    rig.run(bare)
    with pytest.raises(OperatorError, match="has no cdrom drive"):
        rig.disc("/new.iso")
    assert rig.vm.changing is None
    rig.run(bare.replace(drive=True))
    rig.disc("/new.iso")


# --- late or wrong answers ------------------------------------------------------------------------------------


def test_files_that_come_too_late_are_closed(rig: Rig) -> None:
    """The VM has ended meanwhile, and the client already has its answer."""
    rig.run()
    rig.disc("/new.iso")
    rig.vm.changing = None
    fd = os.open(os.devnull, os.O_RDONLY)
    rig.openings.opened(couriers=[fd])

    assert not is_open(fd)
    assert (rig.vmm.sent, rig.vm.config.cdrom) == ([], "/old.iso")


def test_a_failure_that_comes_too_late_fails_no_other_change(rig: Rig) -> None:
    """The client of the next change still waits."""
    rig.resize()
    rig.vm.changing = None
    rig.disc("/new.iso")
    rig.openings.failed(OperatorError(errno.EIO, "late"))

    assert rig.control.take() == []
    assert rig.vm.changing is not None


def test_answers_without_a_request(rig: Rig) -> None:
    """An answer to another change, or to none, changes nothing.  From a VM that does not run it is an error."""
    resized, changed = DiskResized(vmid=rig.vm.vmid), DiscChanged(vmid=rig.vm.vmid)
    for answer, serve in ((resized, rig.changes.on_disk_resized), (changed, rig.changes.on_disc_changed)):
        with pytest.raises(PeerError, match="which does not run"):
            cast("Any", serve)(answer, UNUSED)
    rig.run()
    rig.resize()
    rig.changes.on_disc_changed(changed, UNUSED)
    assert rig.control.take() == []
    rig.vm.changing = None
    rig.disc("/new.iso")
    rig.changes.on_disk_resized(resized, UNUSED)
    assert rig.control.take() == []
    assert rig.vm.config.cdrom == "/old.iso"


def test_changes_are_events(rig: Rig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Those who watch the VM are told, and the log has a line.  A change that fails is none."""
    events: list[tuple[str, dict[str, str]]] = []
    monkeypatch.setattr(rig.core.events, "add", lambda what, _vm, **more: events.append((what, more)))
    rig.resize()
    rig.openings.opened()
    rig.openings.opened()
    rig.disc("/new.iso")
    rig.openings.opened(notes=("odd length",))
    rig.disc("")
    rig.disc("/bad.iso")
    rig.openings.failed(OperatorError(errno.ENOENT, "/bad.iso: No such file or directory"))

    assert events == [
        ("resize", {"device": "disk1", "value": str(GIB)}),
        ("cdrom", {"device": "cdrom0", "text": "has another disc"}),
        ("cdrom", {"device": "cdrom0", "text": "has no disc"}),
    ]
    said = capfd.readouterr().err
    for line in (
        f"a: disk1 has {GIB} bytes now", "vm a: odd length", "a: its drive has disc /new.iso now",
        "a: its drive has no disc now",
    ):  # fmt: skip
        assert line in said


def test_a_disk_of_a_running_vm_that_has_another_configuration_waiting(rig: Rig) -> None:
    """The disks are those that it runs with."""
    rig.run(CONFIG.replace(disks=(DiskConfig(path="/received"),)))
    with pytest.raises(OperatorError, match=r"it has disk0 \(/received\)$"):
        rig.resize("disk1")
    rig.resize("disk0")
    assert rig.openings.job()[1].disks == (DiskConfig(path="/received"),)


def test_a_vm_without_disks(rig: Rig) -> None:
    """The sentence says so."""
    rig.vm.config = CONFIG.replace(disks=())
    with pytest.raises(OperatorError, match="vm a has no disk disk0: it has none"):
        rig.resize("disk0")
