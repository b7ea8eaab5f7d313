"""A VM is sent: the reports to vmm, requests to stop it meanwhile, and the state of its guest."""

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.descriptors import open_descriptors
from tests.support.vminside import PROGRESS_S, VMID, Device, Machine, VmRig
from vmd.config.model import VmConfig
from vmd.errors import PeerError
from vmd.ipc import courier, devmsg
from vmd.ipc.messages.shared import Live, TransferProgress
from vmd.ipc.messages.vm import (
    CancelTransfer,
    DisksLetGo,
    EndSend,
    HeaderSent,
    LendDisks,
    LetDisksGo,
    Outcome,
    PauseVm,
    SendDone,
    SendOn,
    SendUndone,
    SendVm,
    StopMode,
    StopVm,
    TakenBack,
    VmEnding,
    VmHalted,
)
from vmd.record import Record
from vmd.vm import pause as pauses
from vmd.vm import vmmci

A = VmConfig(name="a")
PAUSE, STOP = PauseVm(vmid=VMID, paused=True), StopVm(vmid=VMID, mode=StopMode.GRACEFUL)
SEND, COPY = SendVm(vmid=VMID, keep=False, one_shot=False), SendVm(vmid=VMID, keep=True, one_shot=False)
TWO_WAY = SendVm(vmid=VMID, keep=False, one_shot=False, two_way=True)
LIVE = Live(still_ms=1000, rounds=3)
LET_GO = LetDisksGo(vmid=VMID)
SENT, NOT_SENT = EndSend(vmid=VMID, sent=True), EndSend(vmid=VMID, sent=False)
INTERRUPTED = "sending was interrupted"


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[VmRig]:
    """Yield a VM process."""
    made = VmRig(monkeypatch)
    yield made
    made.close()


@pytest.fixture
def disks() -> list[Device]:
    """Return two disks."""
    return [Device(label="disk0"), Device(label="disk1")]


@pytest.fixture
def machine(rig: VmRig, disks: list[Device]) -> Machine:
    """Return a running machine whose guest can be asked to shut down."""
    machine = rig.start(A, *disks)
    machine.vmmci.driver_is_up = True
    return machine


def send(rig: VmRig, message: SendVm, stream: int | None = None) -> None:
    """Begin to send the VM, into a file."""
    fd = os.memfd_create("stream", os.MFD_CLOEXEC) if stream is None else stream
    rig.vmm.send(message, fds={"courier": [rig.courier(stream=fd)]})


def done(rig: VmRig, message: SendVm) -> SendDone:
    """Send, and return the report."""
    send(rig, message)
    return reported(rig.wait_for(SendDone))


def reported(told: list[Record]) -> SendDone:
    """Return the only report among messages."""
    (found,) = [each for each in told if isinstance(each, SendDone)]
    return found


def stuck(rig: VmRig, disks: list[Device]) -> None:
    """Begin to send, and wait for a disk that never settles.  The guest is paused then."""
    disks[0].answers["settle"] = devmsg.SETTLED_NOT_YET
    send(rig, SEND)
    rig.until(lambda: len(disks[0].log) > 3)


# --- one way ---------------------------------------------------------------------------------------------------


def test_a_vm_that_was_sent_ends(rig: VmRig, machine: Machine) -> None:
    """The report has the length of the stream, and the time when the guest was stopped."""
    before_ns = int(rig.real_s() * 1e9)
    file = os.memfd_create("stream", os.MFD_CLOEXEC)
    send(rig, SEND, os.dup(file))
    report = reported(rig.wait_for(SendDone))

    assert report.text == ""
    assert report.sent_bytes == os.fstat(file).st_size > 0
    assert before_ns <= report.stopped_ns <= rig.real_s() * 1e9
    assert (report.rounds, report.still_ms) == (0, 0)
    assert (machine.is_running(), rig.process.exit_status, rig.devices.log[-1]) == (False, Outcome.POWER_OFF, "end")
    os.close(file)


def test_a_copy_of_a_vm_is_sent(rig: VmRig, machine: Machine) -> None:
    """The VM itself goes on, and can be sent again."""
    for _ in range(2):
        assert done(rig, COPY).text == ""
        rig.turn()
        assert (machine.is_running(), rig.ended) == (True, None)


def test_a_paused_vm_of_which_a_copy_is_sent_stays_paused(rig: VmRig, machine: Machine) -> None:
    """It was already paused before it was sent."""
    rig.tell(PAUSE)
    assert done(rig, COPY).stopped_ns == 0
    rig.turn()
    assert not machine.is_running()


def test_a_vm_that_is_being_paused_stays_paused_after_it_was_sent(rig: VmRig, machine: Machine) -> None:
    """The user has asked for the pause."""
    machine.parks = False
    rig.tell(PAUSE)
    send(rig, COPY)
    rig.turn()
    machine.park()
    rig.wait_for(SendDone)
    rig.turn()
    assert not machine.is_running()


@pytest.mark.parametrize("live", [None, LIVE])
def test_a_vm_that_cannot_be_sent_goes_on(rig: VmRig, machine: Machine, live: Live | None) -> None:
    """The report says why."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    os.close(reading)
    send(rig, SEND.replace(live=live), writing)
    report = reported(rig.wait_for(SendDone))

    assert report.text == "the stream was closed by its reader"
    rig.turn()
    assert (machine.is_running(), rig.ended) == (True, None)


def test_a_stream_that_does_not_come(rig: VmRig, machine: Machine) -> None:
    """The guest is not paused."""
    machine.parks = False
    told = rig.tell(SEND, fds={"courier": [rig.lost_courier()]})
    report = reported(told)
    assert (report.text, report.sent_bytes, report.rounds) == ("the stream did not come", 0, 0)
    assert machine.is_running()


def test_a_stream_that_comes_too_late(rig: VmRig, machine: Machine) -> None:
    """The process that opens the stream takes too long."""
    fd, gives = rig.waiting_courier()
    assert rig.tell(SEND, fds={"courier": [fd]}) == []
    assert gives.recv(100) == courier.ASK
    assert reported(rig.pass_time(courier.PATIENCE_S)).text == "the stream did not come"
    assert machine.is_running()


def test_a_machine_that_does_not_pause_is_not_sent(rig: VmRig, machine: Machine) -> None:
    """The machine goes on, and the stream is closed."""
    before = open_descriptors()
    machine.parks = False
    send(rig, SEND)
    rig.turn()
    told = rig.pass_time(pauses.PARK_TIMEOUT_S)

    assert reported(told).text == "a vcpu did not stop within 15 s"
    assert machine.is_running()
    rig.couriers.pop().close()
    assert open_descriptors() == before


def test_a_device_that_fails_ends_the_vm(rig: VmRig, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message that the VM ends is the answer."""

    def fail(*_: object, **__: object) -> None:
        raise PeerError("vioblk0", "was killed")

    monkeypatch.setattr("vmd.vm.state.save", fail)
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    send(rig, SEND, writing)
    told = rig.wait_for(VmEnding)

    assert told == [VmEnding(text="vioblk0: was killed")]
    assert rig.process.exit_status == Outcome.FAILED
    assert os.read(reading, 1) == b""  # the stream is closed, and empty
    os.close(reading)


def test_interrupted(rig: VmRig, machine: Machine, disks: list[Device]) -> None:
    """The guest goes on after an interrupted transfer."""
    stuck(rig, disks)
    assert not machine.is_running()
    rig.vmm.send(CancelTransfer(vmid=VMID))
    assert reported(rig.wait_for(SendDone)).text == INTERRUPTED
    rig.turn()
    assert machine.is_running()


def test_interrupted_before_it_begins(rig: VmRig, machine: Machine) -> None:
    """The vCPUs may not have parked yet."""
    machine.parks = False
    send(rig, SEND)
    rig.turn()
    rig.tell(CancelTransfer(vmid=VMID))
    machine.park()
    assert reported(rig.said()).text == INTERRUPTED
    assert machine.is_running()


def test_a_request_to_stop_interrupts_sending(rig: VmRig, machine: Machine, disks: list[Device]) -> None:
    """The VM stays here, and its guest is asked to shut down."""
    stuck(rig, disks)
    rig.vmm.send(STOP)
    assert reported(rig.wait_for(SendDone)).text == INTERRUPTED
    rig.turn()
    assert (machine.is_running(), machine.asked) == (True, [vmmci.REBOOT])


def test_progress_is_reported(rig: VmRig, machine: Machine, disks: list[Device]) -> None:
    """There are reports until the transfer ends.  None has more bytes than the total."""
    machine.memory.load(0, bytes(range(256)) * 16 * 16)
    stuck(rig, disks)
    rig.said()
    for _ in range(3):
        told = [each for each in rig.pass_time(PROGRESS_S) if isinstance(each, TransferProgress)]
        assert len(told) == 1
        assert told[0].round == 0
        assert told[0].total_bytes >= told[0].done_bytes > 0
    rig.vmm.send(CancelTransfer(vmid=VMID))
    rig.wait_for(SendDone)
    assert rig.pass_time(PROGRESS_S) == []


def test_a_guest_whose_disk_is_in_use_elsewhere_does_not_go_on(
    rig: VmRig, machine: Machine, disks: list[Device]
) -> None:
    """It stays paused, and vmm is told why."""
    stuck(rig, disks)
    disks[1].lock_lost, disks[1].answers["take back"] = "its lock is lost", devmsg.TAKEN_IN_USE
    rig.vmm.send(CancelTransfer(vmid=VMID))
    (why,) = [each.text for each in rig.wait_for(VmHalted) if isinstance(each, VmHalted)]
    assert "it is in use by somebody else" in why
    assert not machine.is_running()


def test_a_lock_that_is_lost_interrupts_a_live_transfer(rig: VmRig, machine: Machine, disks: list[Device]) -> None:
    """The VM stays here, and its guest is halted at the next report."""
    disks[0].answers["settle"] = devmsg.SETTLED_NOT_YET
    send(rig, SEND.replace(live=LIVE))
    rig.until(lambda: disks[0].log.count("settle") > 3)
    assert machine.is_running()
    rig.process.on_lock_lost("disk0: its lock is lost")
    assert reported(rig.wait_for(SendDone)).text == INTERRUPTED
    rig.process.on_lock_lost("disk0: its lock is lost")
    assert rig.said() == [VmHalted(vmid=VMID, text="disk0: its lock is lost")]
    assert not machine.is_running()


# --- live ------------------------------------------------------------------------------------------------------


def test_a_vm_that_is_sent_live_runs_until_the_last_round(rig: VmRig, machine: Machine, disks: list[Device]) -> None:
    """The report has the number of rounds.  After a copy the machine goes on, and its changes are no longer logged."""
    report = done(rig, COPY.replace(live=LIVE))
    rig.turn()

    assert (report.text, report.rounds > 0, report.stopped_ns > 0) == ("", True, True)
    assert machine.is_running()
    assert not machine.kvm.logging
    assert not machine.memory.marking


def test_a_paused_vm_is_not_sent_live(rig: VmRig, machine: Machine) -> None:
    """Its memory does not change, so rounds are useless."""
    rig.tell(PAUSE)
    report = done(rig, COPY.replace(live=LIVE))
    assert (report.text, report.rounds, report.still_ms) == ("", 0, 0)


# --- two-way ---------------------------------------------------------------------------------------------------


def write_all(rig: VmRig) -> None:
    """Send two-way until the whole stream is written."""
    send(rig, TWO_WAY)
    rig.wait_for(HeaderSent)
    rig.vmm.send(SendOn(vmid=VMID))
    assert reported(rig.wait_for(SendDone)).text == ""
    assert rig.said() == []


@pytest.mark.parametrize("live", [None, LIVE])
def test_memory_is_sent_after_the_header_was_accepted(
    rig: VmRig, machine: Machine, disks: list[Device], live: Live | None
) -> None:
    """A guest that is sent live runs until then.  At the end the machine stays paused on both hosts."""
    file = os.memfd_create("stream", os.MFD_CLOEXEC)
    send(rig, TWO_WAY.replace(live=live), os.dup(file))
    rig.wait_for(HeaderSent)
    header_bytes = os.fstat(file).st_size
    assert machine.is_running() is (live is not None)
    assert [disk.log for disk in disks] == ([[], []] if live else [["pause", "settle"]] * 2)
    assert rig.pass_time(1) != [SendDone(vmid=VMID, sent_bytes=header_bytes)]
    assert os.fstat(file).st_size == header_bytes

    rig.vmm.send(SendOn(vmid=VMID))
    rig.wait_for(SendDone)
    assert os.fstat(file).st_size > header_bytes
    assert (machine.is_running(), rig.ended) == (False, None)
    os.close(file)


def test_a_header_that_is_refused(rig: VmRig, machine: Machine) -> None:
    """The guest goes on after the receiver has refused the header."""
    send(rig, TWO_WAY)
    rig.wait_for(HeaderSent)
    rig.vmm.send(CancelTransfer(vmid=VMID))
    assert reported(rig.wait_for(SendDone)).text == INTERRUPTED
    rig.turn()
    assert machine.is_running()


def test_a_vm_that_runs_elsewhere_ends(rig: VmRig, machine: Machine, disks: list[Device]) -> None:
    """The locks of its disks were released before."""
    write_all(rig)
    assert rig.tell(LET_GO) == [DisksLetGo(vmid=VMID)]
    assert [disk.log[-1] for disk in disks] == ["let go", "let go"]
    assert rig.tell(SENT) == [VmEnding(text="sent")]
    assert (machine.is_running(), rig.process.exit_status) == (False, Outcome.POWER_OFF)


def test_a_vm_that_does_not_run_elsewhere_goes_on(rig: VmRig, machine: Machine, disks: list[Device]) -> None:
    """It takes its disks back, and can be sent again."""
    for _ in range(2):
        write_all(rig)
        rig.tell(LET_GO)
        assert rig.tell(NOT_SENT) == [SendUndone(vmid=VMID, outcome=TakenBack.DONE)]
        assert [disk.log[-2:] for disk in disks] == [["take back", "resume"]] * 2
        assert machine.is_running()


@pytest.mark.parametrize(("status", "outcome", "text"), [
    (devmsg.TAKEN_IN_USE, TakenBack.IN_USE, "disk1 is in use by somebody else"),
    (devmsg.TAKEN_CHANGED, TakenBack.CHANGED,
     "disk1 has been written to since it was let go: its guest has run elsewhere"),
    (devmsg.TAKEN_FAILED, TakenBack.FAILED, "disk1 cannot be locked; the log says why"),
    (99, TakenBack.FAILED, "disk1 cannot be locked; the log says why"),
])  # fmt: skip
def test_a_disk_that_cannot_be_taken_back(
    rig: VmRig, machine: Machine, disks: list[Device], status: int, outcome: TakenBack, text: str
) -> None:
    """The machine stays paused without any lock.  A later request may succeed."""
    write_all(rig)
    rig.tell(LET_GO)
    disks[1].answers["take back"] = status
    assert rig.tell(NOT_SENT) == [SendUndone(vmid=VMID, outcome=outcome, text=text)]
    assert not machine.is_running()
    assert disks[0].log[-2:] == ["take back", "let go"]

    disks[1].answers["take back"] = devmsg.TAKEN
    assert rig.tell(NOT_SENT) == [SendUndone(vmid=VMID, outcome=TakenBack.DONE)]
    assert machine.is_running()


def test_a_disk_that_cannot_be_let_go(rig: VmRig, machine: Machine, disks: list[Device]) -> None:
    """All locks are taken again, so that no other VM can use one of the disks."""
    write_all(rig)
    disks[1].answers["let go"] = False
    assert rig.tell(LET_GO) == [DisksLetGo(vmid=VMID, text="disk1: cannot be handed over; the log says why")]
    assert disks[0].log[-2:] == ["let go", "take back"]
    assert rig.tell(NOT_SENT) == [SendUndone(vmid=VMID, outcome=TakenBack.DONE)]
    assert machine.is_running()


@pytest.mark.parametrize(("asked", "message"), [("let go", LET_GO), ("take back", NOT_SENT)])
def test_a_disk_whose_process_fails(
    rig: VmRig, machine: Machine, disks: list[Device], asked: str, message: Record
) -> None:
    """The VM ends, which frees all locks."""
    write_all(rig)
    disks[1].answers[asked] = PeerError("vioblk1", "was killed")
    assert rig.tell(message) == [VmEnding(text="vioblk1: was killed")]
    assert rig.process.exit_status == Outcome.FAILED


@pytest.mark.parametrize("message", [LET_GO, NOT_SENT, SENT])
def test_steps_that_come_too_early(
    rig: VmRig, machine: Machine, message: Record, capfd: pytest.CaptureFixture[str]
) -> None:
    """The messages are dropped, because the stream is not complete yet."""
    send(rig, TWO_WAY)
    rig.wait_for(HeaderSent)
    assert [each for each in rig.tell(message) if not isinstance(each, TransferProgress)] == []
    assert f"unexpected {type(message).__name__}" in capfd.readouterr().err
    rig.vmm.send(CancelTransfer(vmid=VMID))
    rig.wait_for(SendDone)
    assert rig.ended is None


@pytest.mark.parametrize("message", [LET_GO, NOT_SENT, SENT])
def test_a_vm_that_has_ended_answers_no_step(rig: VmRig, machine: Machine, message: Record) -> None:
    """The message that the VM ends is the answer."""
    write_all(rig)
    rig.process.end(Outcome.POWER_OFF, "powered off")
    rig.said()
    rig.vmm.send(message)
    assert rig.said() == []


def test_a_request_to_stop_ends_a_vm_that_may_run_elsewhere(rig: VmRig, machine: Machine) -> None:
    """Its guest must not run here to shut down."""
    write_all(rig)
    rig.tell(LET_GO)
    assert rig.tell(STOP) == [VmEnding(text="stopped; it may run elsewhere")]
    assert machine.asked == []


def test_a_request_to_stop_reaches_a_guest_that_has_its_disks(rig: VmRig, machine: Machine) -> None:
    """The guest cannot run elsewhere, so it is asked to shut down here."""
    write_all(rig)
    rig.tell(STOP)
    assert (machine.is_running(), machine.asked) == (True, [vmmci.REBOOT])


def test_a_vm_that_ends_while_it_is_sent_sends_no_report(rig: VmRig, machine: Machine, disks: list[Any]) -> None:
    """The message that it ends has the reason."""
    stuck(rig, disks)
    rig.tell(StopVm(vmid=VMID, mode=StopMode.KILL))
    rig.process.departure.cancel()  # type: ignore[union-attr]
    disks[0].answers["settle"] = devmsg.SETTLED
    rig.until(lambda: rig.process.departure._sender.over)  # type: ignore[union-attr]
    assert [each for each in rig.said() if isinstance(each, SendDone)] == []


def test_a_vm_that_is_being_sent_is_not_sent_again(rig: VmRig, machine: Machine, disks: list[Device]) -> None:
    """Nor are its disks lent."""
    stuck(rig, disks)
    rig.said()
    before = open_descriptors()
    for message in (SEND, LendDisks(vmid=VMID)):
        assert rig.tell(message, fds={"courier": [rig.courier(stream=os.memfd_create("stream"))]}) == []
        rig.couriers.pop().close()
    assert open_descriptors() == before


def test_the_figures_of_a_transfer(rig: VmRig, machine: Machine) -> None:
    """The time of the pause is in milliseconds."""
    departure: Any = SimpleNamespace(
        sent_bytes=1, stopped_ns=2, round=3, still_s=4.5678, written=False, keep=False,
    )  # fmt: skip
    rig.process.on_sent(departure, "")
    assert rig.said()[0] == SendDone(vmid=VMID, sent_bytes=1, stopped_ns=2, rounds=3, still_ms=4568)
