"""The VM process as seen by vmm: its answers, and its end."""

import errno
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.descriptors import open_descriptors
from tests.support.vminside import VMID, Device, Machine, VmRig, null, start_vm
from vmd.config.model import DiskConfig, SeedConfig, VmConfig
from vmd.errors import HostError, ImageError, PeerError
from vmd.ipc import devmsg
from vmd.ipc.messages.children import Quit, SetVerbosity
from vmd.ipc.messages.shared import DiskImages, ImageLink
from vmd.ipc.messages.vm import (
    AskDevices,
    AskResolvers,
    CancelTransfer,
    ChangeDisc,
    ConsoleSnapshot,
    ConsoleSnapshotEnd,
    DeviceEvent,
    DevicesReported,
    EndSend,
    LendDisks,
    LetDisksGo,
    LimitVm,
    NicLink,
    Outcome,
    PauseDone,
    PauseVm,
    ReceiveMemory,
    ReceiveVm,
    ResizeDisk,
    Resolvers,
    ResumeReceived,
    SendBreak,
    SendOn,
    SendVm,
    StopMode,
    StopVm,
    TakeDisksBack,
    VmEnding,
    VmFailed,
    VmHalted,
    VmRunning,
)
from vmd.log import log
from vmd.record import Record
from vmd.units import MIB
from vmd.vm import main as module
from vmd.vm import vmmci
from vmd.vm.kinds import INTERFACE
from vmd.vm.main import IOCTLS, RESOLVERS_TIMEOUT_S, SPARES_END_S

A = VmConfig(name="a", vcpus=2)
DISK = DiskImages(images=(ImageLink(path="/d", format="qcow2"), ImageLink(path="/base", format="raw")))
NIC = NicLink(name="tap0", lladdr=b"", host_mac=b"", locked=False, local=False, mtu=1500)
PAUSE, RESUME, FORCE = (
    PauseVm(vmid=VMID, paused=True), PauseVm(vmid=VMID, paused=False), PauseVm(vmid=VMID, paused=False, force=True),
)  # fmt: skip
STOP, KILL = StopVm(vmid=VMID, mode=StopMode.GRACEFUL), StopVm(vmid=VMID, mode=StopMode.KILL)
PAUSED, RUNS = PauseDone(vmid=VMID, paused=True), PauseDone(vmid=VMID, paused=False)


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[VmRig]:
    """Yield a VM process without a VM."""
    made = VmRig(monkeypatch)
    yield made
    made.close()


@pytest.fixture
def machine(rig: VmRig) -> Machine:
    """Return a running machine."""
    return rig.start(A)


# --- the start -------------------------------------------------------------------------------------------------


def test_a_vm_drops_rights_before_its_guest_runs(rig: VmRig) -> None:
    """Devices start, a filter is set, and the image is read.  The filter is narrowed before the guest runs."""
    rig.start(A)

    assert [step if isinstance(step, str) else step[0] for step in rig.steps] == [
        "confine", "build", "narrow_requests", "start", "limit_open_files", "limit_memory",
    ]  # fmt: skip
    assert rig.devices.log[0] == [("rng", "main")]
    assert rig.steps[2][1] == IOCTLS
    memory = rig.machine.memory
    most = memory.mapped_bytes + len(memory.marks) + 1024 * MIB + 2 * 16 * MIB
    assert rig.steps[-1] == ("limit_memory", most)


def test_a_vm_is_built_of_its_files(rig: VmRig) -> None:
    """It gets the files from the courier, and the descriptors of the message."""
    fds = rig.start_fds(boot=os.memfd_create("boot"), initrd=os.memfd_create("initrd"))
    rig.tell(start_vm(A.replace(initrd="/initrd"), boot_options="-s", verbosity=2), fds=fds)

    assert (log.title, log.verbosity) == ("vm/a", 2)
    _, images, config, slots, outside = rig.built
    assert (images.boot_name, images.initrd_name, images.options) == ("/bsd", "/initrd", "-s")
    found = [os.readlink(f"/proc/self/fd/{fd}") for fd in (images.boot_fd, images.initrd_fd, images.memory_fd)]
    assert found == ["/memfd:boot (deleted)", "/memfd:initrd (deleted)", os.devnull]
    assert config.name == "a"
    assert [slot.kind.name for slot in slots] == ["rng"]
    assert os.fstat(outside.figures_fd).st_size == devmsg.FIGURES_BYTES


def test_a_process_is_one_vm_only(rig: VmRig, machine: Machine, capfd: pytest.CaptureFixture[str]) -> None:
    """A second VM is refused; the first one goes on."""
    fds = {**rig.console_fds(), "memory": [null()], "couriers": [rig.lost_courier()]}
    assert rig.tell(start_vm(A), fds=fds) == []
    fds = {**rig.console_fds(), "memory": [null()], "courier": [rig.lost_courier()]}
    assert rig.tell(ReceiveVm(vmid=VMID, name="b", verbosity=0), fds=fds) == []

    errors = capfd.readouterr().err
    assert "unexpected StartVm" in errors
    assert "unexpected ReceiveVm" in errors
    assert (machine.is_running(), rig.ended) == (True, None)


@pytest.mark.parametrize(("message", "extra", "text"), [
    (start_vm(A), {"cdrom": 0}, "no boot image came"),
    (start_vm(A, disks=(DISK,)), {"boot": 1, "disks": 1}, "1 images and 0 taps do not match the message"),
    (start_vm(A, nics=(NIC,)), {"boot": 1}, "0 images and 0 taps do not match the message"),
    (start_vm(A), {"boot": 1, "taps": 1}, "0 images and 1 taps do not match the message"),
    (start_vm(A), {"boot": 1, "vhosts": 2}, "2 descriptors for vhost-net do not match the message"),
    (start_vm(A, nics=(NIC.replace(vhost=True),)), {"boot": 1, "taps": 1, "vhosts": 1},
     "1 descriptors for vhost-net do not match the message"),
    (start_vm(A), {"boot": 1, "seed": 1}, "the seed does not match the message"),
    (start_vm(A.replace(seed=SeedConfig())), {"boot": 1}, "the seed does not match the message"),
])  # fmt: skip
def test_descriptors_that_do_not_match(rig: VmRig, message: Record, extra: dict[str, int], text: str) -> None:
    """The start fails with an error, so that no device gets a file of another one."""
    fds = {**rig.console_fds(), "memory": [null()], "couriers": []}
    fds |= {name: [null() for _ in range(count)] for name, count in extra.items() if name in ("taps", "vhosts", "seed")}
    files = {name: null() for name, count in extra.items() if name in ("boot", "disks", "cdrom")}
    fds["couriers"] = [rig.courier(**files)]

    failed, _ = rig.tell(message, fds=fds)

    assert isinstance(failed, VmFailed)
    assert text in failed.text
    assert rig.steps == []  # nothing was built
    assert rig.process.exit_status == Outcome.FAILED


def test_files_that_do_not_come(rig: VmRig) -> None:
    """The start fails with an error."""
    fds = {**rig.console_fds(), "memory": [null()], "couriers": [rig.lost_courier()]}

    failed, ending = rig.tell(start_vm(A), fds=fds)

    assert isinstance(failed, VmFailed)
    assert failed.text == "opener: its files did not come"
    assert ending == VmEnding(text=failed.text)


@pytest.mark.parametrize("error", [
    ImageError("/bsd", "is not a kernel"), HostError("map memory", errno.ENOMEM), PeerError("vioblk0", "was killed"),
    OSError(errno.EIO, "KVM_SET_REGS"),
])  # fmt: skip
def test_a_vm_that_cannot_be_built(rig: VmRig, error: Exception) -> None:
    """The errno and the text of the error are reported, and the process ends."""
    rig.cannot_build = error
    failed, ending = rig.tell(start_vm(A), fds=rig.start_fds())

    number = getattr(error, "errno", None) or getattr(error, "number", errno.EINVAL)
    assert isinstance(failed, VmFailed)
    assert (failed.vmid, failed.code, ending) == (VMID, number, VmEnding(text=failed.text))
    assert rig.process.exit_status == Outcome.FAILED
    assert rig.devices.log[-1] == "end"


def test_limits_that_come_before_the_machine(rig: VmRig) -> None:
    """The limits hold from its start."""
    slow = A.replace(disks=(DiskConfig(path="/d", iops_limit=100, rate_limit=5),))
    disk = Device()
    rig.devices.running.append(disk)
    rig.tell(LimitVm(vmid=VMID, config=slow))
    rig.tell(start_vm(A.replace(disks=(DiskConfig(path="/d"),))), fds=rig.start_fds())

    assert disk.log == [("limit", 100, 5)]


def test_reserved_processes_that_were_not_needed_end_later(rig: VmRig) -> None:
    """They are told to end soon after the guest has begun to run, and again until all have ended."""
    rig.process.prepare(["vioblk.main", "vionet.main"])
    assert [each.label for each in rig.devices.reserve] == ["main", "main"]
    rig.devices.slow = 1
    rig.start(A)
    assert "drop" not in rig.devices.log

    for count in (1, 2, 2):
        rig.pass_time(SPARES_END_S)
        assert rig.devices.log.count("drop") == count


def test_a_refusal_of_kvm_in_reserve_is_tried_again(rig: VmRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """If KVM refuses again at the start of a VM, the error is reported."""

    def refuse() -> None:
        raise OSError(errno.ENOMEM, "KVM_CREATE_VM")

    monkeypatch.setattr("vmd.vm.main.EmptyVm", refuse)
    rig.process.prepare([])
    failed, _ = rig.tell(start_vm(A), fds=rig.start_fds())

    assert isinstance(failed, VmFailed)
    assert failed.code == errno.ENOMEM


def test_a_jump_of_the_hosts_clock_reaches_the_guest(rig: VmRig, machine: Machine) -> None:
    """The guest is asked to set its own clock."""
    rig.clock_jumps()
    assert machine.asked == [vmmci.SYNCRTC]


def test_the_process_is_ready_before_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals and switches of threads first, then what every VM needs, which is kept out of later collections."""
    steps: list[object] = []

    def note(step: str) -> Callable[..., None]:
        return lambda *arguments: steps.append((step, *arguments))

    fields = {"ignore_terminal_signals": note("ignore"), "prepare": note("prepare"), "exit_status": 7}
    made = SimpleNamespace(
        loop=SimpleNamespace(run=note("run")), devices=SimpleNamespace(end=note("end devices")), **fields
    )
    monkeypatch.setattr(module, "VmProcess", lambda: made)
    monkeypatch.setattr(module, "install_kick_handler", note("kick"))
    monkeypatch.setattr(module, "keep_signals_inside", note("keep inside"))
    monkeypatch.setattr(module, "gc", SimpleNamespace(collect=note("collect"), freeze=note("freeze")))
    sys = SimpleNamespace(argv=["vmd", "vm", "3", "x", "vioblk.raw", "vionet.main"], setswitchinterval=note("switch"))
    monkeypatch.setattr(module, "sys", sys)
    assert module.main() == 7
    assert steps == [
        ("ignore",), ("kick",), ("switch", module.SWITCH_INTERVAL_S), ("keep inside",),
        ("prepare", ["vioblk.raw", "vionet.main"]), ("collect",), ("freeze",), ("run",), ("end devices",),
    ]  # fmt: skip


# --- pausing ---------------------------------------------------------------------------------------------------


def test_pause_and_resume(rig: VmRig, machine: Machine) -> None:
    """The answer tells whether the machine is paused or runs."""
    assert rig.tell(PAUSE) == [PAUSED]
    assert not machine.is_running()
    assert rig.tell(PAUSE) == [PAUSED]
    assert rig.tell(RESUME) == [RUNS]
    assert machine.is_running()
    assert rig.tell(RESUME) == [RUNS]


def test_answers_come_in_order(rig: VmRig, machine: Machine) -> None:
    """A request to resume waits for the pause that is under way."""
    machine.parks = False
    assert [rig.tell(PAUSE), rig.tell(RESUME)] == [[], []]
    machine.park()

    assert rig.said() == [PAUSED, RUNS]
    assert machine.is_running()


def test_a_machine_that_does_not_stop_is_reported(rig: VmRig, machine: Machine) -> None:
    """The machine goes on."""
    machine.parks = False
    rig.tell(PAUSE)

    assert rig.pass_time(60) == [RUNS.replace(text="a vcpu did not stop within 15 s")]


@pytest.mark.parametrize("error", [PeerError("vioblk0", "was killed"), OSError(errno.EIO, "KVM_SET_CLOCK")])
def test_a_machine_that_cannot_go_on_ends(rig: VmRig, machine: Machine, error: Exception) -> None:
    """The answer has the reason."""
    rig.tell(PAUSE)
    machine.cannot_go_on = error
    told = rig.tell(RESUME)

    assert VmEnding(text=told[0].text) in told  # type: ignore[attr-defined]
    assert rig.process.exit_status == Outcome.FAILED


@pytest.mark.parametrize("ended", [False, True])
def test_without_a_machine_nothing_is_answered(rig: VmRig, ended: bool) -> None:
    """The message that the VM has ended is the answer.  Descriptors of the requests are closed."""
    if ended:
        disk = Device()
        rig.start(A.replace(disks=(DiskConfig(path="/d"),)), disk)
        rig.tell(KILL)
        disk.log.clear()
    before = open_descriptors()
    for message in (PAUSE, RESUME, SendOn(vmid=VMID), CancelTransfer(vmid=VMID), LimitVm(vmid=VMID, config=A),
                    ResizeDisk(vmid=VMID, index=0, size_bytes=1), ChangeDisc(vmid=VMID)):  # fmt: skip
        assert rig.tell(message) == []
    send, lend = SendVm(vmid=VMID, keep=False, one_shot=False), LendDisks(vmid=VMID)
    with_files: list[tuple[Record, list[str]]] = [
        (send, ["courier"]), (lend, ["courier", "stream"]), (ChangeDisc(vmid=VMID), ["courier"]),
    ]  # fmt: skip
    for request, names in with_files:
        assert rig.tell(request, fds={name: [null()] for name in names}) == []
    rig.process.on_lock_lost("disk0: its lock is lost")
    assert rig.said() == []
    if ended:
        assert disk.log == []
        return
    assert rig.tell(SendBreak(vmid=VMID)) == []
    assert rig.tell(TakeDisksBack(vmid=VMID)) == []
    assert rig.tell(ConsoleSnapshot(vmid=VMID), fds={"tty": [null()], "tty_slave": [null()]}) == []
    assert rig.tell(AskDevices(vmid=VMID)) == [DevicesReported(vmid=0)]
    assert open_descriptors() == before


# --- lost locks ------------------------------------------------------------------------------------------------


def test_a_lost_lock_halts_the_machine(rig: VmRig) -> None:
    """The guest must not write.  It goes on when the lock is back, and the user gets a note once."""
    disk = Device()
    machine = rig.start(A, disk)
    disk.lock_lost = "its lock is lost"
    for _ in range(3):
        rig.process.on_lock_lost("disk0: its lock is lost")
    assert rig.said() == [VmHalted(vmid=VMID, text="disk0: its lock is lost")]
    assert not machine.is_running()

    disk.answers["take back"] = devmsg.TAKEN_IN_USE
    (answer,) = rig.tell(RESUME)
    assert "disk0: its lock is lost; it is in use by somebody else" in answer.text  # type: ignore[attr-defined]
    assert not machine.is_running()

    disk.answers["take back"] = devmsg.TAKEN_UNSURE
    (answer,) = rig.tell(RESUME)
    assert len(answer.notes) == 1  # type: ignore[attr-defined]
    assert machine.is_running()
    disk.lock_lost = ""
    rig.tell(PAUSE)
    assert rig.tell(RESUME) == [RUNS]


def test_a_disk_that_was_written_to_elsewhere_needs_force(rig: VmRig) -> None:
    """Without force the machine stays paused."""
    disk = Device()
    machine = rig.start(A, disk)
    disk.lock_lost, disk.answers["take back"] = "its lock is lost", devmsg.TAKEN_WRITTEN
    rig.tell(PAUSE)
    (answer,) = rig.tell(RESUME)
    assert answer.paused  # type: ignore[attr-defined]
    assert not machine.is_running()

    (answer,) = rig.tell(FORCE)
    assert not answer.paused  # type: ignore[attr-defined]
    assert machine.is_running()


def test_a_lock_that_is_lost_while_the_guest_shuts_down_ends_it(rig: VmRig, machine: Machine) -> None:
    """Otherwise the guest would write to the disk."""
    machine.vmmci.driver_is_up = True
    rig.tell(STOP)
    rig.process.on_lock_lost("disk0: its lock is lost")

    assert rig.ended == (Outcome.ENDED, "stopped by force: disk0: its lock is lost")


def test_a_lock_that_is_lost_during_a_pause_changes_nothing(rig: VmRig, machine: Machine) -> None:
    """The machine is paused already, as requested by the user."""
    rig.process.on_lock_lost("early")
    rig.said()
    rig.tell(RESUME)
    rig.tell(PAUSE)
    rig.process.on_lock_lost("disk0: its lock is lost")

    assert rig.said() == []
    assert not machine.is_running()


# --- stopping --------------------------------------------------------------------------------------------------


def test_stopped_by_force(rig: VmRig, machine: Machine) -> None:
    """The VM and its device processes end at once, in any state of the guest."""
    assert rig.tell(KILL) == [VmEnding(text="stopped by force")]
    assert rig.process.exit_status == Outcome.ENDED
    assert machine.log == ["stop"]
    assert rig.devices.log[-1] == "end"


def test_a_vm_ends_once(rig: VmRig, machine: Machine) -> None:
    """The first reason counts."""
    machine.vmmci.driver_is_up = True
    rig.tell(STOP)
    rig.process.end(Outcome.POWER_OFF, "powered off by the guest")
    rig.process.end(Outcome.FAILED, "later")
    rig.tell(KILL)

    assert [each.message for each in rig.vmm.got] == []
    assert rig.process.exit_status == Outcome.POWER_OFF


def test_a_vcpu_that_stays_in_the_kernel_does_not_hold_up_the_end(
    rig: VmRig, machine: Machine, capfd: pytest.CaptureFixture[str]
) -> None:
    """The log reports it."""
    machine.stops = False
    assert rig.tell(KILL) == [VmEnding(text="stopped by force")]
    assert "a vcpu thread does not return from the kernel" in capfd.readouterr().err


def test_a_guest_is_asked_once(rig: VmRig, machine: Machine) -> None:
    """A second request to stop changes nothing."""
    machine.vmmci.driver_is_up = True
    rig.tell(STOP)
    rig.tell(STOP)
    assert machine.asked == [vmmci.REBOOT]


def test_a_paused_guest_goes_on_to_shut_down(rig: VmRig, machine: Machine) -> None:
    """Only a running guest can shut down."""
    machine.vmmci.driver_is_up = True
    rig.tell(PAUSE)
    rig.tell(STOP)
    assert (machine.is_running(), machine.asked) == (True, [vmmci.REBOOT])


def test_a_guest_that_is_being_paused_is_asked_after_that(rig: VmRig, machine: Machine) -> None:
    """The pause is answered first."""
    machine.vmmci.driver_is_up, machine.parks = True, False
    rig.tell(PAUSE)
    rig.tell(STOP)
    assert machine.asked == []
    machine.park()

    assert rig.said() == [PAUSED]
    assert (machine.is_running(), machine.asked) == (True, [vmmci.REBOOT])


def test_a_guest_whose_disk_is_in_use_elsewhere_is_not_asked(rig: VmRig) -> None:
    """The guest must not run, so the VM ends by force."""
    disk = Device()
    rig.start(A, disk)
    rig.tell(PAUSE)
    disk.lock_lost, disk.answers["take back"] = "its lock is lost", devmsg.TAKEN_IN_USE
    (ending,) = rig.tell(STOP)

    assert ending == VmEnding(text="stopped by force: disk0: its lock is lost; it is in use by somebody else")


def test_a_vm_that_is_being_received_ends_at_once(rig: VmRig) -> None:
    """There is no guest that could shut down."""
    stream, _ = rig.waiting_courier()
    fds = {**rig.console_fds(), "memory": [null()], "courier": [stream]}
    rig.tell(ReceiveVm(vmid=VMID, name="a", verbosity=0), fds=fds)

    assert rig.tell(STOP) == [VmEnding(text="stopped while it was being received")]


def test_quit_ends_without_a_reason(rig: VmRig, machine: Machine) -> None:
    """The whole daemon ends."""
    assert rig.tell(Quit()) == [VmEnding(text="")]
    assert (rig.process.exit_status, machine.is_running()) == (Outcome.POWER_OFF, False)


# --- receiving -------------------------------------------------------------------------------------------------


def test_a_stream_that_does_not_come(rig: VmRig) -> None:
    """The VM fails with an error."""
    fds = {**rig.console_fds(), "memory": [null()], "courier": [rig.lost_courier()]}
    failed, _ = rig.tell(ReceiveVm(vmid=VMID, name="a", verbosity=0), fds=fds)

    assert failed == VmFailed(vmid=VMID, code=errno.EINVAL, text="the stream did not come")


@pytest.mark.parametrize("message", [ReceiveMemory(vmid=VMID), LetDisksGo(vmid=VMID), EndSend(vmid=VMID, sent=True)])
def test_steps_of_a_transfer_that_is_not_under_way(
    rig: VmRig, machine: Machine, message: Record, capfd: pytest.CaptureFixture[str]
) -> None:
    """The messages are dropped, and the VM goes on."""
    assert rig.tell(message) == []
    assert f"unexpected {type(message).__name__}" in capfd.readouterr().err
    assert (machine.is_running(), rig.ended) == (True, None)


def test_a_machine_that_was_not_received_cannot_be_resumed(rig: VmRig, capfd: pytest.CaptureFixture[str]) -> None:
    """The message is dropped."""
    message = ResumeReceived(vmid=VMID, config=A, paused=False)
    assert rig.tell(message, fds={"couriers": [rig.lost_courier()]}) == []
    assert "unexpected ResumeReceived" in capfd.readouterr().err


class Arrived:
    """A replacement for `Arrival` that has received everything, with this seed."""

    def __init__(self, seed: bytes) -> None:
        self.saved, self.seed = self, seed

    def source(self) -> "Arrived":
        """Return the source."""
        return self


def seed_file() -> int:
    """Return an empty file for a seed, as the parent passes it."""
    return os.memfd_create("seed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def resume(rig: VmRig, seed: bytes = b"", **changes: Any) -> list[Record]:  # noqa: ANN401
    """Resume a received machine with this seed."""
    rig.arriving = True
    stream, _ = rig.waiting_courier()
    fds = {**rig.console_fds(), "memory": [null()], "courier": [stream], "seed": [seed_file()]}
    rig.tell(ReceiveVm(vmid=VMID, name="a", verbosity=0), fds=fds)
    rig.process.arrival = Arrived(seed)  # type: ignore[assignment]
    config = A.replace(seed=SeedConfig()) if seed else A
    message = ResumeReceived(vmid=VMID, config=config, paused=False).replace(**changes)
    return rig.tell(message, fds={"couriers": [rig.courier()]})


@pytest.mark.parametrize("paused", [False, True])
def test_a_received_machine_runs_or_stays_paused(rig: VmRig, paused: bool) -> None:
    """The message decides.  A machine that runs is announced to the network."""
    assert resume(rig, paused=paused) == [VmRunning(vmid=VMID, paused=paused)]
    assert rig.machine.is_running() is not paused
    assert rig.machine.log == ([] if paused else ["sign", "announce"])
    assert [step[0] for step in rig.steps[-2:]] == ["limit_open_files", "limit_memory"]


def test_a_received_machine_that_cannot_go_on(rig: VmRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The VM ends, and does not report that it runs."""

    def fail(_machine: Machine) -> None:
        raise PeerError("vioblk0", "was killed")

    monkeypatch.setattr(Machine, "sign_disks", fail)
    assert resume(rig) == [VmEnding(text="vioblk0: was killed")]
    assert rig.process.exit_status == Outcome.FAILED


def test_the_seed_of_a_received_machine(rig: VmRig) -> None:
    """It goes into the parent's file, which the device gets."""
    resume(rig, b"cidata")
    (fd,) = rig.built[3][-1].fds
    assert os.pread(fd, 100, 0) == b"cidata"


def test_a_received_machine_without_a_seed(rig: VmRig) -> None:
    """It has no device for one."""
    resume(rig)
    assert [slot.kind.name for slot in rig.built[3]] == ["rng"]


# --- devices, the console and the rest -------------------------------------------------------------------------


def test_verbosity_is_passed_to_the_devices(rig: VmRig, machine: Machine) -> None:
    """It is set in the VM process too."""
    rig.tell(SetVerbosity(verbosity=2))
    assert log.verbosity == 2
    assert ("verbosity", 2) in rig.devices.log


def test_a_new_viewer_gets_the_output_from_the_backlog(rig: VmRig, machine: Machine) -> None:
    """The answer has the position after the backlog.  No output waits in the pty."""
    console = rig.process.console
    assert console is not None
    console.send(b"login: ")
    assert rig.tell(ConsoleSnapshot(vmid=VMID), peerid=3) == [ConsoleSnapshotEnd(end=7)]


def test_a_console_moves_to_another_pty(rig: VmRig, machine: Machine) -> None:
    """Later output goes to the new pty.  The answer has the peerid of the request."""
    console = rig.process.console
    assert console is not None
    rig.pty.close()
    rig.pty = type(rig.pty)()
    rig.vmm.send(ConsoleSnapshot(vmid=VMID), peerid=3, fds=rig.pty.fds())
    rig.turn()
    assert [envelope.peerid for envelope in rig.vmm.got] == [3]
    console.send(b"login: ")
    rig.until(lambda: console._backlog.waiting == 0)
    os.set_blocking(rig.pty.slave, False)
    assert os.read(rig.pty.slave, 100) == b"login: "


def test_a_break_reaches_the_uart(rig: VmRig, machine: Machine) -> None:
    """It is a signal, not a character."""
    rig.tell(SendBreak(vmid=VMID))
    assert machine.log == ["break"]


def test_the_host_is_asked_once_for_its_name_servers(rig: VmRig, machine: Machine) -> None:
    """While requests of the guest wait, vmm is asked once.  After its answer it is asked again."""
    rig.process.ask_resolvers()
    rig.process.ask_resolvers()
    assert rig.said() == [AskResolvers(vmid=VMID)]
    rig.tell(Resolvers(vmid=VMID, dns4=(b"\x01\x02\x03\x04",), dns6=(bytes(16),)))
    assert machine.log == [("resolvers", ((b"\x01\x02\x03\x04",), (bytes(16),)))]

    rig.pass_time(RESOLVERS_TIMEOUT_S)
    assert len(machine.log) == 1  # the answer has stopped the deadline of the first request
    rig.process.ask_resolvers()
    assert rig.said() == [AskResolvers(vmid=VMID)]


def test_a_guest_is_answered_without_the_host(rig: VmRig, machine: Machine) -> None:
    """After a timeout the guest gets the name servers that are known."""
    rig.process.ask_resolvers()
    rig.pass_time(RESOLVERS_TIMEOUT_S)
    assert machine.log == [("resolvers", None)]


def test_events_of_devices_are_rare(rig: VmRig, machine: Machine) -> None:
    """A guest can cause events, so their rate is limited."""
    for number in range(20):
        rig.process.report_event("trouble", "disk0", str(number))
    assert rig.said() == [
        DeviceEvent(vmid=VMID, what="trouble", device="disk0", text=str(number)) for number in range(8)
    ]
    rig.ahead_s += 1.5
    rig.process.report_event("mended", "disk0", "")
    assert rig.said() == [DeviceEvent(vmid=VMID, what="mended", device="disk0")]


def test_name_servers_for_a_vm_without_a_machine_are_ignored(rig: VmRig) -> None:
    """There is no interface to tell."""
    rig.devices.running.append(Device(INTERFACE, "interface0"))
    assert rig.tell(Resolvers(vmid=VMID)) == []
