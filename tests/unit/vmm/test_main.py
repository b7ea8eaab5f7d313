"""vmm between the parent and VM processes: how VMs begin and end, and which messages are passed on."""

import errno
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.descriptors import open_descriptors
from tests.support.vmprocesses import VmmRig, VmProcess, null, start_fds, start_of
from vmd.closing import close_all
from vmd.config.model import MAX_NICS, VmConfig
from vmd.errors import HostError
from vmd.ipc.fence import OUR_FAULT, STRIKES
from vmd.ipc.messages.children import SetVerbosity
from vmd.ipc.messages.shared import TEXT_BYTES_MAX, DiskImages, ImageLink
from vmd.ipc.messages.vm import (
    AskDevices,
    AskResolvers,
    ConsoleSnapshot,
    ConsoleSnapshotEnd,
    DevicesReported,
    EndSend,
    LendDisks,
    LetDisksGo,
    NicLink,
    Outcome,
    PauseDone,
    PauseVm,
    ReceiveVm,
    Resolvers,
    SendBreak,
    StartVm,
    StopMode,
    StopVm,
    VmEnding,
    VmFailed,
    VmRunning,
)
from vmd.ipc.messages.vmm import AskVms, EndTaken, Retire, VmExited, VmHeld, VmLog, VmsHeld, VmSlotOver
from vmd.log import log
from vmd.memfile import sealed_file
from vmd.record import Record
from vmd.version import VERSION
from vmd.vmm import children
from vmd.vmm import main as module
from vmd.vmm.children import KEPT, USUAL_DEVICES
from vmd.vmm.main import (
    EXIT_GRACE_S,
    FORCE_GRACE_S,
    GONE_S,
    ORPHANS_S,
    RESERVE_DELAY_S,
    RESERVE_LATEST_S,
    SLOTS_MAX,
    START_S,
    VM_QUEUE_LIMIT,
)

A, B = VmConfig(name="a"), VmConfig(name="b")


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[VmmRig]:
    """Yield a vmm."""
    rig = VmmRig(monkeypatch)
    yield rig
    rig.close()


def running(rig: VmmRig, vmid: int, config: VmConfig = A) -> VmProcess:
    """Return the process of a running VM."""
    vm = rig.start(vmid, config)
    vm.end.send(VmRunning(vmid=vmid))
    rig.settle()
    return vm


def ends(told: list[Record]) -> list[Record]:
    """Return the messages to the parent that are about ends."""
    return [message for message in told if isinstance(message, VmExited | VmSlotOver | VmFailed)]


# --- the reserve ----------------------------------------------------------------------------------------------


def test_a_vm_goes_to_the_process_in_reserve(rig: VmmRig) -> None:
    """It was started before any request, with the user id of its slot, and with processes for the usual devices."""
    rig.begin(1)
    (reserve,) = rig.vms
    assert (reserve.arguments, reserve.uid) == (["vm", log.form, "0", *USUAL_DEVICES], 1001)
    assert reserve.in_group
    assert rig.told() == []

    assert rig.start(7, A) is reserve
    assert reserve.end.take() == [start_of(7, A)]
    assert rig.told() == [VmLog(vmid=7)]
    assert rig.vms == [reserve]


def test_the_group_of_a_vm_is_closed(rig: VmmRig) -> None:
    """Its process has joined it.  Otherwise each VM would take a descriptor of vmm."""
    rig.begin(1)
    reserve = rig.process.reserve
    assert reserve is not None
    group_fd = reserve.slot.group_fd
    assert os.fstat(group_fd)
    rig.start(7, A)
    assert reserve.slot.group_fd == -1


def test_the_next_reserve_is_started_when_the_guest_runs(rig: VmmRig) -> None:
    """If the guest never runs, it is started after some time.  Its devices are those of the last VM."""
    disks = (DiskImages(images=(ImageLink(path="/d", format="qcow2"),)),)
    nic = NicLink(name="tap0", lladdr=b"", host_mac=b"", locked=False, local=False, mtu=1500, vhost=True)
    rig.begin(1, 2, 3)
    rig.parent.send(
        StartVm(vmid=7, config=A, boot_name="", verbosity=0, disks=disks, nics=(nic,)),
        fds={**start_fds(), "taps": [null()]},
    )
    rig.settle()
    rig.vms[0].end.send(VmRunning(vmid=7))
    rig.settle()
    assert len(rig.vms) == 1
    rig.pass_time(RESERVE_DELAY_S)
    assert [vm.arguments[3:] for vm in rig.vms] == [USUAL_DEVICES, ["vionet.kernel", "vioblk.main"]]

    rig.start(8, B)
    rig.pass_time(RESERVE_LATEST_S)
    assert [vm.uid for vm in rig.vms] == [1001, 1002, 1003]
    assert rig.vms[2].arguments[3:] == []


def test_a_host_without_control_groups(rig: VmmRig) -> None:
    """The process is in no group, and no group is reported as free."""
    rig.slot(uid=1001)
    rig.begin()
    vm = running(rig, 7)
    rig.told()
    vm.exit(0)
    rig.ended(vm)

    assert (vm.uid, vm.in_group) == (1001, False)
    assert ends(rig.told()) == [VmExited(vmid=7, pid=vm.pid, outcome=Outcome.POWER_OFF, text="")]


def test_without_a_slot_there_is_no_process(rig: VmmRig) -> None:
    """The start fails with a message, and its descriptors are closed."""
    rig.begin()
    before = open_descriptors()
    rig.parent.send(start_of(7, A), fds=start_fds())

    text = "have a slot for another vm: Resource temporarily unavailable"
    assert rig.told() == [
        VmFailed(vmid=7, code=errno.EAGAIN, text=text), VmExited(vmid=7, pid=0, outcome=Outcome.FAILED, text=text),
    ]  # fmt: skip
    assert open_descriptors() == before


def test_a_process_that_cannot_be_started(rig: VmmRig, capfd: pytest.CaptureFixture[str]) -> None:
    """Its slot is used for the next process, and no descriptor is left open."""
    rig.cannot_start = HostError("start vm", errno.ENOMEM)
    before = open_descriptors()
    rig.begin(1)
    assert "start vm: Cannot allocate memory" in capfd.readouterr().err
    rig.parent.send(start_of(7, A), fds=start_fds())
    assert [type(message) for message in rig.told()] == [VmFailed, VmExited]
    assert len(open_descriptors()) == len(before) + 2  # /dev/kvm, and the slot's group

    rig.cannot_start = None
    assert rig.start(8, B).uid == 1001


@pytest.mark.parametrize("what", ["socketpair", "logpair"])
def test_a_process_whose_sockets_cannot_be_made(rig: VmmRig, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The start fails with the reason.  Its slot is used again, and no descriptor is left open."""

    def full() -> None:
        raise OSError(errno.ENFILE, "full")

    rig.slot(uid=1001, group=1)
    rig.settle()
    rig.process.kvm_fd = null()
    before = open_descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(module, what, full)
        rig.parent.send(start_of(7, A), fds=start_fds())
        failed, exited = rig.told()
    assert (failed, exited) == (
        VmFailed(vmid=7, code=errno.ENFILE, text=failed.text),  # type: ignore[attr-defined]
        VmExited(vmid=7, pid=0, outcome=Outcome.FAILED, text=failed.text),  # type: ignore[attr-defined]
    )
    assert open_descriptors() == before
    assert rig.start(7, A).uid == 1001


@pytest.mark.parametrize("vms", [0, 1, 2])
def test_descriptors_for_another_vm_are_counted_first(rig: VmmRig, monkeypatch: pytest.MonkeyPatch, vms: int) -> None:
    """If they might not suffice for it and the VMs that run, the start fails early."""
    rig.begin(1, 2, 3)
    for vmid in range(1, vms + 1):
        rig.start(vmid, A)
    needed = vms * module.FILES_OF_A_VM + module.FILES_SPARE
    assert len(KEPT) + MAX_NICS < module.FILES_OF_A_VM
    rig.told()
    with monkeypatch.context() as patch:
        patch.setattr(resource, "getrlimit", lambda _which: (needed - 1, needed - 1))
        rig.parent.send(start_of(7, B), fds=start_fds())
        failed, exited = rig.told()
    assert isinstance(failed, VmFailed)
    assert failed.code == errno.EMFILE
    assert f"have another vm among the {needed - 1} files that vmm may have open" in failed.text
    assert isinstance(exited, VmExited)

    monkeypatch.setattr(resource, "getrlimit", lambda _which: (needed, needed))
    assert rig.start(7, B).uid == 1001 + vms


def test_the_slot_of_a_reserve_that_ends_is_used_again(rig: VmmRig, capfd: pytest.CaptureFixture[str]) -> None:
    """Its log is read, although it never was a VM."""
    rig.begin(1)
    rig.vms[0].exit(1)
    rig.ended(rig.vms[0])

    assert rig.told() == [VmLog(vmid=0)]
    assert "reserve: vm process exited with status 1" in capfd.readouterr().err
    assert rig.start(7, A).uid == 1001
    assert len(rig.vms) == 2


def test_a_reserve_that_sends_a_message_is_killed(rig: VmmRig, capfd: pytest.CaptureFixture[str]) -> None:
    """It is no VM yet.  The parent does not get the message."""
    rig.begin(1)
    rig.vms[0].end.send(VmRunning(vmid=7))
    rig.ended(rig.vms[0])

    assert rig.told() == [VmLog(vmid=0)]
    assert "speaks before it was given a VM" in capfd.readouterr().err


def test_a_reserve_that_storage_blocks_is_replaced(rig: VmmRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was killed, but does not end.  Its log is read.  Its slot is given back when it ends."""
    rig.begin(1, 2)
    stuck = rig.vms[0]
    with monkeypatch.context() as patch:
        patch.setattr("vmd.signals.pidfd_send_signal", lambda *_: None)  # as if blocked in a system call
        stuck.end.send(VmRunning(vmid=7))
        rig.settle()
        rig.pass_time(GONE_S - 1)
        assert [child.pid for child in rig.process.children()] == [stuck.pid]
        assert rig.told() == []
        rig.pass_time(1)
        assert rig.told() == [VmLog(vmid=0)]
    vm = rig.start(7, A)
    assert (vm is not stuck, vm.uid) == (True, 1002)
    assert rig.process.children() == [rig.process.running[7], *rig.process.stuck]

    rig.told()
    stuck.exit(0)
    rig.ended(stuck)
    assert ends(rig.told()) == [VmSlotOver(group=1)]
    assert [*rig.process.running] == [7]


def test_unused_slots_are_given_back(rig: VmmRig) -> None:
    """If there are more than failed starts can leave, the oldest are given back."""
    for group in range(1, SLOTS_MAX + 3):
        rig.slot(uid=1000 + group, group=group)

    assert rig.told() == [VmSlotOver(group=1), VmSlotOver(group=2)]


def test_a_retired_vmm_has_no_process_for_another_vm(rig: VmmRig) -> None:
    """All free slots are given back, and that of the reserve when it has ended.  Running VMs continue."""
    rig.begin(1, 2, 3)
    running(rig, 7)
    rig.pass_time(RESERVE_DELAY_S)
    rig.told()
    rig.parent.send(Retire())
    rig.ended(rig.vms[1])
    assert rig.told() == [VmSlotOver(group=3), VmSlotOver(group=2)]

    rig.pass_time(RESERVE_LATEST_S)
    assert len(rig.vms) == 2
    assert [*rig.process.running] == [7]


# --- messages -------------------------------------------------------------------------------------------------


def test_messages_of_a_vm_have_its_own_id(rig: VmmRig) -> None:
    """vmm overwrites the id in the message, and adds its own descriptors of the process and of the figures."""
    rig.begin(1)
    vm = rig.start(7, A)
    rig.told()
    vm.end.send(VmRunning(vmid=8))
    rig.settle()

    (envelope,) = [each for each in rig.parent.got if isinstance(each.message, VmRunning)]
    assert (envelope.message, envelope.peerid) == (VmRunning(vmid=7), 7)
    (pidfd,), (figures,) = envelope.fds["process"], envelope.fds["figures"]
    assert f"Pid:\t{vm.pid}\n" in Path(f"/proc/self/fdinfo/{pidfd}").read_text()
    given = rig.process.running[7].kept["figures"][0]
    assert os.path.sameopenfile(given, figures)
    rig.parent.take()


def test_long_texts_of_a_vm_are_shortened(rig: VmmRig) -> None:
    """They become parts of other messages."""
    rig.begin(1)
    vm = rig.start(7, A)
    rig.told()
    vm.end.send(VmFailed(vmid=7, code=1, text="x" * 10000))

    (failed,) = rig.told()
    assert isinstance(failed, VmFailed)
    assert failed.text.endswith("x ...")
    assert len(failed.text) < TEXT_BYTES_MAX + 10


def test_messages_go_to_the_vm_that_they_name(rig: VmmRig) -> None:
    """A message for a VM that has just ended is dropped, and its descriptors are closed."""
    rig.begin(1, 2)
    a, b = rig.start(7, A), rig.start(8, B)
    for vm in (a, b):
        vm.end.take()
    rig.parent.send(SendBreak(vmid=8))
    before = open_descriptors()
    rig.parent.send(ConsoleSnapshot(vmid=9), fds={"tty": [null()], "tty_slave": [null()]})
    rig.settle()

    assert (a.end.take(), b.end.take()) == ([], [SendBreak(vmid=8)])
    assert open_descriptors() == before


def test_a_vm_whose_figures_cannot_be_made(
    rig: VmmRig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It runs without them."""

    def refuse(_name: str, _size: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(module, "sealed_file", refuse)
    rig.begin(1)
    vm = rig.start(7, A)
    assert [envelope.fds["figures"] for envelope in vm.end.got] == [[]]
    assert "vm/a: what its devices do is not counted: Too many open files" in capfd.readouterr().err


def test_questions_that_a_vm_repeats_too_often_are_not_passed_on(rig: VmmRig) -> None:
    """The VM is not ended, because it may only be slow to read an answer."""
    rig.begin(1)
    vm = running(rig, 7)
    rig.told()
    for _ in range(30):
        vm.end.send(AskResolvers(vmid=7))

    assert rig.told() == [AskResolvers(vmid=7)] * children.BUDGETS[AskResolvers][0]
    rig.parent.send(Resolvers(vmid=7))
    rig.settle()
    assert Resolvers(vmid=7) in vm.end.take()


def test_all_processes_get_the_log_level(rig: VmmRig) -> None:
    """This includes vmm, each of its VMs, and those that start later."""
    rig.begin(1, 2)
    vm = rig.start(7, A)
    vm.end.take()
    rig.parent.send(SetVerbosity(verbosity=2))
    rig.settle()

    assert (log.verbosity, vm.end.take()) == (2, [SetVerbosity(verbosity=2)])
    rig.pass_time(RESERVE_LATEST_S)
    assert rig.vms[1].arguments[2] == "2"


def test_descriptors_that_a_vm_sends_are_closed(rig: VmmRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """vmm replaces them by its own.  Kernels since 6.16 refuse them already."""
    refused: list[object] = []
    monkeypatch.setattr(module, "refuse_files", refused.append)
    rig.begin(1)
    assert len(refused) == 1
    vm = rig.start(7, A)
    rig.told()
    before = open_descriptors()
    vm.end.send(VmRunning(vmid=7), fds={"process": [null()], "figures": [null()]})
    rig.settle()

    (envelope,) = [each for each in rig.parent.got if isinstance(each.message, VmRunning)]
    (pidfd,), (figures,) = envelope.fds["process"], envelope.fds["figures"]
    assert f"Pid:\t{vm.pid}\n" in Path(f"/proc/self/fdinfo/{pidfd}").read_text()
    assert os.path.sameopenfile(rig.process.running[7].kept["figures"][0], figures)
    rig.parent.take()
    assert open_descriptors() == before


# --- ends -----------------------------------------------------------------------------------------------------


def test_nothing_is_left_of_a_vm(rig: VmmRig) -> None:
    """Its descriptors are closed when its end is confirmed."""
    before = open_descriptors()
    rig.begin(1)
    vm = running(rig, 7)
    vm.exit(0)
    rig.ended(vm)
    rig.parent.send(EndTaken(vmid=7))
    rig.told()
    vm.end.take()

    assert len(open_descriptors()) == len(before) + 3  # /dev/kvm, and what the test has of the process
    assert (rig.process.running, rig.process.over, rig.process.by_channel) == ({}, {}, {})


@pytest.mark.parametrize(
    ("status", "outcome", "text"),
    [
        (0, Outcome.POWER_OFF, ""),
        (3, Outcome.ENDED, ""),
        (11, Outcome.REBOOT, ""),
        (1, Outcome.FAILED, "vm process exited with status 1"),
        (2, Outcome.FAILED, "vm process exited with status 2"),  # the number of KILLED, which no status may claim
    ],
)
def test_the_end_of_a_vm_is_reported_once(rig: VmmRig, status: int, outcome: Outcome, text: str) -> None:
    """First its slot is reported as free.  The VM's own text replaces the text about its status."""
    rig.begin(1, 2)
    a, b = running(rig, 7), rig.start(8, B)
    rig.told()
    a.exit(status)
    rig.ended(a)
    assert rig.told() == [VmSlotOver(group=1, vmid=7), VmExited(vmid=7, pid=a.pid, outcome=outcome, text=text)]

    b.end.send(VmEnding(text="the disk is gone"))
    b.exit(status)
    rig.ended(b)
    assert ends(rig.told()) == [
        VmSlotOver(group=2, vmid=8), VmExited(vmid=8, pid=b.pid, outcome=outcome, text="the disk is gone"),
    ]  # fmt: skip


def test_a_signal_that_ended_a_vm_is_named(rig: VmmRig) -> None:
    """SIGSYS comes from a system call that the filter does not allow."""
    rig.begin(1)
    vm = running(rig, 7)
    rig.told()
    os.kill(vm.pid, signal.SIGSYS)
    rig.ended(vm)

    text = "vm process was killed by SIGSYS"
    assert rig.told()[1:] == [VmExited(vmid=7, pid=vm.pid, outcome=Outcome.KILLED, text=text)]


def test_the_last_message_of_a_vm_precedes_its_end(rig: VmmRig) -> None:
    """The end may be noticed before the message is read."""
    rig.begin(1)
    vm = rig.start(7, A)
    rig.told()
    rig.process.running[7].channel.hold(held=True)
    vm.end.send(VmRunning(vmid=7))
    vm.exit(0)
    rig.process.running[7].channel.hold(held=False)
    rig.ended(vm)

    assert [type(message) for message in rig.told()] == [VmRunning, VmSlotOver, VmExited]


def test_stop_is_passed_on_and_force_has_a_limit(rig: VmmRig) -> None:
    """The process lets its devices finish.  If that takes too long, it is killed."""
    rig.begin(1)
    vm = running(rig, 7)
    vm.end.take()
    rig.told()
    rig.parent.send(StopVm(vmid=7, mode=StopMode.GRACEFUL))
    rig.parent.send(StopVm(vmid=8, mode=StopMode.KILL))  # a VM that has just ended
    rig.pass_time(FORCE_GRACE_S)
    assert vm.end.take() == [StopVm(vmid=7, mode=StopMode.GRACEFUL)]
    rig.parent.send(StopVm(vmid=7, mode=StopMode.KILL))
    rig.pass_time(FORCE_GRACE_S - 1)
    assert vm.end.take() == [StopVm(vmid=7, mode=StopMode.KILL)]
    assert rig.told() == []

    rig.pass_time(1)
    rig.ended(vm)
    text = "stopped by force; it had to be killed"
    assert ends(rig.told())[1:] == [VmExited(vmid=7, pid=vm.pid, outcome=Outcome.KILLED, text=text)]


@pytest.mark.parametrize("answer", [VmRunning(vmid=7), VmFailed(vmid=7, code=1, text="no"), None])
def test_a_vm_that_does_not_report_its_start_is_killed(rig: VmmRig, answer: Record | None) -> None:
    """It is killed after START_S.  A VM that reports a failure ends by itself."""
    rig.begin(1)
    vm = rig.start(7, A)
    if answer is not None:
        vm.end.send(answer)
    rig.told()
    rig.pass_time(START_S)
    if answer is not None:
        assert rig.told() == []
        return
    rig.ended(vm)
    text = "did not start within 120 s"
    assert ends(rig.told())[1:] == [VmExited(vmid=7, pid=vm.pid, outcome=Outcome.KILLED, text=text)]


def test_a_vm_that_breaks_the_protocol_is_killed(rig: VmmRig, capfd: pytest.CaptureFixture[str]) -> None:
    """It has sent an answer without a question.  Other VMs are not affected."""
    rig.begin(1, 2)
    a, b = running(rig, 7), running(rig, 8, B)
    rig.told()
    a.end.send(PauseDone(vmid=7, paused=True))
    rig.ended(a)

    text = "broke the protocol: answers with PauseDone, which was not requested"
    assert ends(rig.told())[1:] == [VmExited(vmid=7, pid=a.pid, outcome=Outcome.KILLED, text=text)]
    assert "vm/a: " in capfd.readouterr().err
    rig.parent.send(PauseVm(vmid=8, paused=True))
    rig.settle()
    b.end.send(PauseDone(vmid=8, paused=True))
    assert rig.told() == [PauseDone(vmid=8, paused=True)]


def test_a_vm_that_closes_its_channel_has_a_while_to_end(rig: VmmRig) -> None:
    """If it ends by itself, its status is reported.  Otherwise it is killed."""
    rig.begin(1, 2)
    a, b = running(rig, 7), running(rig, 8, B)
    rig.told()
    a.end.channel.close()
    b.end.channel.close()
    rig.pass_time(EXIT_GRACE_S - 1)
    a.exit(0)
    rig.ended(a)
    assert ends(rig.told())[1:] == [VmExited(vmid=7, pid=a.pid, outcome=Outcome.POWER_OFF, text="")]

    rig.pass_time(1)
    rig.ended(b)
    text = "vm process was killed by SIGKILL"
    assert ends(rig.told())[1:] == [VmExited(vmid=8, pid=b.pid, outcome=Outcome.KILLED, text=text)]
    rig.pass_time(GONE_S)
    assert rig.process.children() == []


def test_the_last_words_of_a_vm_that_has_to_be_killed(rig: VmmRig) -> None:
    """They say more than the signal."""
    rig.begin(1)
    vm = running(rig, 7)
    rig.told()
    vm.end.send(VmEnding(text="the disk is gone"))
    rig.settle()
    vm.end.channel.close()
    rig.pass_time(EXIT_GRACE_S)
    rig.ended(vm)
    assert ends(rig.told())[1:] == [
        VmExited(vmid=7, pid=vm.pid, outcome=Outcome.KILLED, text="the disk is gone")
    ]  # fmt: skip


def test_a_vm_that_does_not_read_is_killed(rig: VmmRig) -> None:
    """Its queue is bounded, so that one VM cannot fill the memory of vmm, on which all VMs depend."""
    rig.begin(1)
    vm = running(rig, 7)
    rig.told()
    vm.end.channel.hold(held=True)
    while not vm.is_reaped():
        for _ in range(VM_QUEUE_LIMIT):
            rig.parent.send(SendBreak(vmid=7))
        rig.turn()
        if 7 in rig.process.running:
            assert rig.process.running[7].channel.waiting <= VM_QUEUE_LIMIT
    (_, exited) = ends(rig.told())
    assert isinstance(exited, VmExited)
    assert exited.text.startswith("broke the protocol: does not read: ")


def test_a_vm_ends_though_storage_blocks_its_process(rig: VmmRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is reported as ended some time after SIGKILL.  Its slot is given back when the process ends."""
    rig.begin(1)
    vm = running(rig, 7)
    rig.slot(uid=1002, group=2)
    rig.pass_time(RESERVE_LATEST_S)
    reserve = rig.process.reserve
    assert reserve is not None
    rig.told()
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda *_: None)  # as if blocked in a system call
    monkeypatch.setattr("vmd.signals.pidfd_send_signal", lambda *_: None)
    vm.end.send(PauseDone(vmid=7, paused=True))
    rig.pass_time(0)
    assert rig.told() == []
    rig.pass_time(GONE_S)
    (exited,) = rig.told()
    assert isinstance(exited, VmExited)
    assert (exited.vmid, exited.outcome) == (7, Outcome.KILLED)
    assert exited.text.endswith("; its process waits for storage, and has not ended yet")
    assert [child.pid for child in rig.process.children()] == [reserve.pid, vm.pid]
    assert [child.channel.closed for child in rig.process.children()] == [False, True]

    vm.exit(0)
    rig.ended(vm)
    assert rig.told() == [VmSlotOver(group=1)]
    assert rig.process.children() == [reserve]


# --- a new parent ---------------------------------------------------------------------------------------------


def ask(rig: VmmRig) -> list[Record]:
    """Ask as a new parent.  Return the answers."""
    reading, writing = os.pipe()
    rig.parent.send(AskVms(), fds={"log": [writing]})
    os.close(reading)
    rig.until(lambda: any(isinstance(each.message, VmsHeld) for each in rig.parent.got))
    return rig.parent.take()


@pytest.fixture
def log_fd(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the log of this process be a file that may be replaced."""
    fd = null()
    monkeypatch.setattr(log, "fd", fd)
    yield
    os.close(fd)


@pytest.mark.usefixtures("log_fd")
def test_a_new_parent_is_told_of_every_vm(rig: VmmRig) -> None:
    """This includes VMs whose end was not confirmed, the groups, and the number of free slots."""
    rig.begin(1, 2, 3)
    a, b = running(rig, 7), rig.start(8, B)
    rig.parent.send(PauseVm(vmid=7, paused=True))
    rig.settle()
    a.end.send(PauseDone(vmid=7, paused=True))
    b.exit(11)
    rig.ended(b)
    rig.told()

    over = VmHeld(vmid=8, group=2, outcome=Outcome.REBOOT)
    held = VmsHeld(version=VERSION, spare=1, groups=(1, 3), vms=(7, 8))
    assert ask(rig) == [VmHeld(vmid=7, group=1, running=True, paused=True), over, held]
    rig.parent.send(EndTaken(vmid=8))
    assert ask(rig) == [VmHeld(vmid=7, group=1, running=True, paused=True), held.replace(vms=(7,))]


@pytest.mark.usefixtures("log_fd")
@pytest.mark.parametrize(
    ("message", "field"),
    [
        (StopVm(vmid=7, mode=StopMode.GRACEFUL), "stopping"),
        (LetDisksGo(vmid=7), "letting_go"),
        (EndSend(vmid=7, sent=False), "undoing"),
        (LendDisks(vmid=7), "lending"),
    ],
)
def test_a_new_parent_is_told_what_the_earlier_one_has_asked_a_vm_for(rig: VmmRig, message: Record, field: str) -> None:
    """Whether the VM has got that far, or not."""
    rig.begin(1)
    running(rig, 7)
    rig.parent.send(message, fds={"courier": [null()]} if isinstance(message, LendDisks) else {})
    rig.settle()
    rig.told()

    held, _ = ask(rig)
    assert held == VmHeld(vmid=7, group=1, running=True).replace(**{field: True})


@pytest.mark.usefixtures("log_fd")
def test_vmm_logs_to_the_new_parent(rig: VmmRig) -> None:
    """The log of the earlier one may have ended with it."""
    reading, writing = os.pipe()
    rig.parent.send(AskVms(), fds={"log": [writing]})
    rig.until(lambda: any(isinstance(each.message, VmsHeld) for each in rig.parent.got))
    rig.parent.take()
    log.warn("here")

    assert b"here" in os.read(reading, 100)
    os.close(reading)


def test_vms_are_reported_one_by_one(rig: VmmRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each after the message before was sent, so that few descriptors are copied at once.  The end comes last."""

    class Busy:
        """The channel to a parent that reads slowly."""

        def __init__(self) -> None:
            self.waiting = 0
            self.sent: list[Record] = []
            self.on_sent: object = None

        def send(self, message: Record, *, fds: dict[str, list[int]], refused: object = None) -> None:
            """Take a message, which waits."""
            self.sent.append(message)
            self.waiting += 1
            close_all(fd for each in fds.values() for fd in each)

    rig.begin(1, 2)
    running(rig, 7)
    running(rig, 8, B)
    rig.told()
    busy = Busy()
    with monkeypatch.context() as patch:
        patch.setattr(rig.process, "parent", busy)
        rig.process.to_report = [*rig.process.running.values()]
        busy.on_sent = rig.process.report
        counts = []
        for _ in range(5):
            rig.process.report()
            rig.process.report()
            counts.append(len(busy.sent))
            busy.waiting = 0
    assert counts == [1, 2, 3, 3, 3]
    assert [type(message) for message in busy.sent] == [VmHeld, VmHeld, VmsHeld]
    assert (vars(busy)["on_sent"], vars(rig.process)["to_report"]) == (None, None)


@pytest.mark.usefixtures("log_fd")
def test_a_new_parent_gets_the_descriptors_of_a_vm(rig: VmmRig) -> None:
    """A new descriptor replaces the earlier one.  Memory and figures of a VM that has ended are not kept."""
    rig.begin(1)
    memory, tty = sealed_file("memory", 4096), sealed_file("tty", 4096)
    kept = {name: os.stat(fd).st_ino for name, fd in (("memory", memory), ("tty", tty))}
    vm = rig.start(7, A, {**start_fds(), "memory": [memory], "tty": [null()]})
    rig.parent.send(ConsoleSnapshot(vmid=7), fds={"tty": [tty], "tty_slave": [null()]})
    rig.settle()
    rig.told()
    reading, writing = os.pipe()
    rig.parent.send(AskVms(), fds={"log": [writing]})
    os.close(reading)
    rig.until(lambda: any(isinstance(each.message, VmsHeld) for each in rig.parent.got))

    (fds,) = [envelope.fds for envelope in rig.parent.got if isinstance(envelope.message, VmHeld)]
    assert {name for name, each in fds.items() if each} == {
        "process", "memory", "tty", "tty_slave", "shown", "log", "figures",
    }  # fmt: skip
    assert {name: os.fstat(fds[name][0]).st_ino for name in kept} == kept
    rig.parent.take()
    vm.exit(0)
    rig.ended(vm)
    assert {*rig.process.over[7].kept} == {"tty", "tty_slave", "shown", "log"}
    assert {*rig.process.over[7].kept} < {*KEPT}


def test_a_vm_that_starts_again_is_no_longer_over(rig: VmmRig) -> None:
    """The parent starts it again when its guest has reset itself.  The descriptors from before are closed."""
    rig.begin(1, 2)
    vm = running(rig, 7)
    inode = os.fstat(rig.process.running[7].kept["log"][0]).st_ino
    vm.exit(11)
    rig.ended(vm)
    assert [*rig.process.over] == [7]
    rig.start(7, A)

    assert [*rig.process.over] == []
    rig.parent.take()
    assert inode not in {os.stat(f"/proc/self/fd/{fd}").st_ino for fd in open_descriptors()}


@pytest.mark.usefixtures("log_fd")
def test_answers_to_the_earlier_parent_are_not_passed_on(rig: VmmRig) -> None:
    """Only answers to questions of the new parent are passed on."""
    rig.begin(1)
    vm = running(rig, 7)
    rig.parent.send(AskDevices(vmid=7))
    rig.parent.send(ConsoleSnapshot(vmid=7))
    rig.settle()
    rig.told()
    ask(rig)
    vm.end.send(DevicesReported(vmid=7))
    vm.end.send(ConsoleSnapshotEnd(end=1))
    assert rig.told() == []

    rig.parent.send(ConsoleSnapshot(vmid=7))
    rig.settle()
    vm.end.send(ConsoleSnapshotEnd(end=2))
    assert rig.told() == [ConsoleSnapshotEnd(end=2)]


@pytest.mark.usefixtures("log_fd")
def test_descriptors_run_out_while_a_new_parent_is_told(rig: VmmRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The VM is reported later.  No descriptor of the first attempt is left open."""
    rig.begin(1)
    running(rig, 7)
    rig.told()
    real, left = os.dup, [2]

    def dup(fd: int) -> int:
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.EMFILE, "too many")
        return real(fd)

    before = open_descriptors()
    monkeypatch.setattr(os, "dup", dup)
    assert [type(message) for message in ask(rig)] == [VmsHeld]
    assert len(open_descriptors()) == len(before)
    rig.pass_time(module.REPORT_AGAIN_S)
    assert rig.told() == [VmHeld(vmid=7, group=1, running=True)]


# --- without the parent ---------------------------------------------------------------------------------------


def test_guests_without_a_daemon_shut_down(rig: VmmRig, capfd: pytest.CaptureFixture[str]) -> None:
    """Each guest is asked to shut down.  vmm ends with the last of them."""
    rig.begin(1, 2)
    a, b = running(rig, 7), running(rig, 8, B)
    for vm in (a, b):
        vm.end.take()
    rig.parent.channel.close()
    rig.until(lambda: bool(a.end.got and b.end.got))
    assert (a.end.take(), b.end.take()) == (
        [StopVm(vmid=7, mode=StopMode.GRACEFUL)], [StopVm(vmid=8, mode=StopMode.GRACEFUL)],
    )  # fmt: skip
    assert "the daemon is gone: 2 guests are to shut down, 135 s at most" in capfd.readouterr().err
    a.exit(0)
    rig.until(a.is_reaped)
    b.exit(0)
    rig.run_to_end()

    assert b.is_reaped()
    assert (rig.process.exit_status, rig.process.running) == (0, {})


def test_guests_that_do_not_shut_down_are_not_waited_for(rig: VmmRig) -> None:
    """When their time is over, vmm ends, and they end with it."""
    rig.begin(1)
    vm = running(rig, 7)
    rig.parent.channel.close()
    rig.until(lambda: rig.process.orphaned)
    rig.now_s += ORPHANS_S
    rig.run_to_end()
    assert not vm.is_reaped()

    children.end_all(rig.process.children(), 60)
    assert vm.is_reaped()


def test_without_a_parent_no_process_waits_for_another_vm(rig: VmmRig) -> None:
    """No VM will start any more."""
    rig.begin(1, 2)
    running(rig, 7)
    rig.parent.channel.close()
    rig.until(lambda: rig.process.orphaned)
    rig.now_s += RESERVE_LATEST_S
    rig.turn()

    assert len(rig.vms) == 1


@pytest.mark.parametrize(("how", "status"), [("quit", 0), ("gone", 0), ("garbage", 1)])
def test_vmm_ends_with_its_parent_if_it_has_no_guest(rig: VmmRig, how: str, status: int) -> None:
    """The reserve does not count as a guest."""
    rig.begin(1)
    assert rig.end_by_parent(how) == status


# --- exceptions in handlers -----------------------------------------------------------------------------------


def fail(*_: Any) -> None:  # noqa: ANN401 - any arguments
    """Stand in for a bug."""
    raise RuntimeError("a bug")


def test_a_start_that_a_bug_ends_fails(rig: VmmRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent gets the failure.  Other VMs are not affected."""
    rig.begin(1, 2)
    running(rig, 7)
    rig.told()
    with monkeypatch.context() as patch:
        patch.setattr(rig.process, "require_files", fail)
        rig.parent.send(start_of(8, B), fds=start_fds())
        told = rig.told()
    assert told == [
        VmFailed(vmid=8, code=errno.EIO, text=OUR_FAULT),
        VmExited(vmid=8, pid=0, outcome=Outcome.FAILED, text=OUR_FAULT),
    ]
    assert [*rig.process.running] == [7]
    assert [rig.unexpected.pop()] == ["StartVm of parent: RuntimeError('a bug')"]


def test_a_vm_that_a_bug_stops_in_the_middle_of_its_start_is_killed(
    rig: VmmRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process exists already, so its end is reported when the process has ended."""
    rig.begin(1, 2)
    monkeypatch.setattr(rig.process, "pass_on", fail)
    rig.parent.send(start_of(7, A), fds=start_fds())
    rig.ended(rig.vms[0])

    text = OUR_FAULT
    assert ends(rig.told()) == [
        VmSlotOver(group=1, vmid=7), VmExited(vmid=7, pid=rig.vms[0].pid, outcome=Outcome.KILLED, text=text),
    ]  # fmt: skip
    assert [rig.unexpected.pop()] == ["StartVm of parent: RuntimeError('a bug')"]


def test_a_vm_whose_message_leads_to_a_bug_is_ended(rig: VmmRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client may wait for the effect of the message."""
    rig.begin(1)
    vm = running(rig, 7)
    rig.told()
    monkeypatch.setattr(rig.process.running[7], "account", fail)
    vm.end.send(AskResolvers(vmid=7))
    rig.ended(vm)

    assert ends(rig.told())[1:] == [
        VmExited(vmid=7, pid=vm.pid, outcome=Outcome.KILLED, text=f"broke the protocol: {OUR_FAULT}")
    ]
    assert [rig.unexpected.pop()] == ["AskResolvers of vm/a: RuntimeError('a bug')"]


def test_a_vm_is_ended_after_several_bugs_with_messages_to_it(rig: VmmRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a single bug only the message to the VM is lost."""
    rig.begin(1)
    vm = running(rig, 7)
    rig.told()
    monkeypatch.setattr(rig.process.running[7], "expect", fail)
    rig.parent.send(SendBreak(vmid=7))
    rig.settle()
    for _ in range(STRIKES):
        rig.parent.send(SendBreak(vmid=7))
    rig.ended(vm)

    assert ends(rig.told())[1:] == [VmExited(vmid=7, pid=vm.pid, outcome=Outcome.KILLED, text=OUR_FAULT)]
    assert {*rig.unexpected} == {"SendBreak of parent: RuntimeError('a bug')"}
    rig.unexpected.clear()


def test_a_received_vm_begins_like_another(rig: VmmRig) -> None:
    """It gets figures and the process in reserve.  A new parent would learn that it is being received."""
    rig.begin(1)
    fds = {name: [null()] for name in ("courier", "memory", "tty", "tty_slave", "shown")}
    rig.parent.send(ReceiveVm(vmid=7, name="r", verbosity=0), fds=fds)
    rig.settle()

    (envelope,) = rig.vms[0].end.got
    assert len(envelope.fds["figures"]) == 1
    assert rig.process.running[7].held == VmHeld(vmid=7, group=1, arriving=True)
    assert rig.process.running[7].channel.label == "vm/r"
