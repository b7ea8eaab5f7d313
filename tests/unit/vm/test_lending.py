"""Disks are lent for a snapshot: the pause of the guest, the files for the borrower, and the return."""

import os
from collections.abc import Iterator

import pytest

from tests.support.descriptors import open_descriptors
from tests.support.vminside import VMID, Device, Machine, VmRig
from vmd.config.model import VmConfig
from vmd.errors import HostError, PeerError
from vmd.ipc import courier, devmsg
from vmd.ipc import sockets as socket
from vmd.ipc.messages.shared import TransferProgress
from vmd.ipc.messages.vm import (
    CancelTransfer,
    DisksBack,
    DisksLent,
    LendDisks,
    Outcome,
    PauseVm,
    SendVm,
    StopMode,
    StopVm,
    TakeDisksBack,
    VmEnding,
)
from vmd.record import Record
from vmd.vm import lending, vmmci
from vmd.vm import pause as pauses

PAUSE = PauseVm(vmid=VMID, paused=True)
LEND, LOOK, BACK = LendDisks(vmid=VMID), LendDisks(vmid=VMID, look=True), TakeDisksBack(vmid=VMID)


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[VmRig]:
    """Yield a VM process."""
    made = VmRig(monkeypatch)
    yield made
    made.close()


@pytest.fixture
def disks() -> Iterator[list[Device]]:
    """Yield two disks.  The second one has two images."""
    disks = [Device(label="disk0"), Device(label="disk1")]
    fds = [os.memfd_create(str(number), os.MFD_CLOEXEC) for number in range(3)]
    disks[0].lends, disks[1].lends = fds[:1], fds[1:]
    yield disks
    for fd in fds:
        os.close(fd)


@pytest.fixture
def machine(rig: VmRig, disks: list[Device]) -> Machine:
    """Return a running machine whose guest can be asked to shut down."""
    machine = rig.start(VmConfig(name="a"), *disks)
    machine.vmmci.driver_is_up = True
    return machine


class Borrower:
    """The process that has asked for the disks."""

    def __init__(self, rig: VmRig) -> None:
        self.fd, self.sock = rig.waiting_courier()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.close(self.fd)
        self.fd, self.sock = theirs.detach(), ours
        rig.couriers.append(ours)

    def ask(self) -> None:
        """Ask for the files."""
        courier.ask(self.sock)

    def files(self) -> list[int]:
        """Return the inodes of the received files."""
        fds = courier.take(self.sock)["disks"]
        inodes = [os.fstat(fd).st_ino for fd in fds]
        for fd in fds:
            os.close(fd)
        return inodes


def lend(rig: VmRig, message: LendDisks, stream: int | None = None) -> list[int]:
    """Lend the disks.  Return the inodes of the files that the borrower gets."""
    borrower = Borrower(rig)
    borrower.ask()
    rig.vmm.send(message, fds={"courier": [borrower.fd], "stream": [] if stream is None else [stream]})
    assert lent(rig.wait_for(DisksLent)) == DisksLent(vmid=VMID)
    return borrower.files()


def lent(told: list[Record]) -> DisksLent:
    """Return the only report among messages."""
    (found,) = [each for each in told if isinstance(each, DisksLent)]
    return found


def inodes(disks: list[Device]) -> list[int]:
    """Return the inodes of all images."""
    return [os.fstat(fd).st_ino for disk in disks for fd in disk.lends]


def test_disks_are_lent_while_the_guest_is_paused(rig: VmRig, machine: Machine, disks: list[Device]) -> None:
    """First all data is on stable storage.  Later the disks are read again before the guest goes on."""
    before = open_descriptors()
    assert lend(rig, LEND) == inodes(disks)
    assert [disk.log[-3:] for disk in disks] == [["pause", "settle", "lend"]] * 2
    assert not machine.is_running()

    assert rig.tell(BACK) == [DisksBack(vmid=VMID)]
    assert [disk.log[-2:] for disk in disks] == [["reload", "resume"]] * 2
    assert machine.is_running()
    rig.couriers.pop().close()
    rig.couriers.pop().close()
    rig.until(lambda: open_descriptors() == before)


def test_a_paused_vm_stays_paused(rig: VmRig, machine: Machine) -> None:
    """It was paused before its disks were lent."""
    rig.tell(PAUSE)
    lend(rig, LEND)
    assert rig.tell(BACK) == [DisksBack(vmid=VMID)]
    assert not machine.is_running()


def test_a_vm_that_is_being_paused_stays_paused(rig: VmRig, machine: Machine) -> None:
    """The user has asked for the pause."""
    machine.parks = False
    rig.tell(PAUSE)
    borrower = Borrower(rig)
    borrower.ask()
    rig.tell(LEND, fds={"courier": [borrower.fd]})
    machine.park()
    rig.wait_for(DisksLent)
    rig.tell(BACK)
    assert not machine.is_running()


def test_disks_that_are_only_read(rig: VmRig, machine: Machine, disks: list[Device]) -> None:
    """The guest runs on, and nothing has to be given back."""
    assert lend(rig, LOOK) == inodes(disks)
    assert machine.is_running()
    assert "settle" not in disks[0].log
    assert rig.tell(BACK) == []


def test_the_machine_is_written_after_its_disks(rig: VmRig, machine: Machine) -> None:
    """The report has the length of its stream."""
    file = os.memfd_create("stream", os.MFD_CLOEXEC)
    borrower = Borrower(rig)
    borrower.ask()
    rig.vmm.send(LEND, fds={"courier": [borrower.fd], "stream": [os.dup(file)]})
    told = rig.wait_for(DisksLent)
    assert lent(told) == DisksLent(vmid=VMID, sent_bytes=os.fstat(file).st_size)
    assert os.fstat(file).st_size > 0
    assert not machine.is_running()
    os.close(file)


def test_a_borrower_that_has_ended(rig: VmRig, machine: Machine) -> None:
    """The report has the reason, and the stream is closed.  The guest goes on after vmm's answer."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    borrower = Borrower(rig)
    borrower.sock.close()
    rig.vmm.send(LEND, fds={"courier": [borrower.fd], "stream": [writing]})
    assert lent(rig.wait_for(DisksLent)).text == "the process that was to take its disks has ended"
    assert os.read(reading, 1) == b""
    os.close(reading)
    assert rig.tell(BACK) == [DisksBack(vmid=VMID)]
    assert machine.is_running()


def test_a_borrower_that_never_asks(rig: VmRig, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest does not stay paused for ever."""
    monkeypatch.setattr(lending, "ASKED_S", 0.01)
    rig.vmm.send(LEND, fds={"courier": [Borrower(rig).fd]})
    assert lent(rig.wait_for(DisksLent)).text == "timed out"


@pytest.mark.parametrize("error", [PeerError("vioblk1", "was killed"), HostError("copy a file", 24)])
def test_a_disk_that_cannot_be_lent(rig: VmRig, machine: Machine, disks: list[Device], error: Exception) -> None:
    """The report has the reason, and no file stays open."""
    before = open_descriptors()
    disks[1].answers["lend"] = error
    borrower = Borrower(rig)
    borrower.ask()
    rig.vmm.send(LEND, fds={"courier": [borrower.fd]})
    assert lent(rig.wait_for(DisksLent)).text == str(error)
    rig.couriers.pop().close()
    rig.couriers.pop().close()
    rig.until(lambda: open_descriptors() == before)


def test_a_machine_that_does_not_pause(rig: VmRig, machine: Machine) -> None:
    """No disk is lent, and nothing stays open."""
    before = open_descriptors()
    machine.parks = False
    borrower = Borrower(rig)
    rig.tell(LEND, fds={"courier": [borrower.fd], "stream": [os.memfd_create("stream")]})
    told = rig.pass_time(pauses.PARK_TIMEOUT_S)
    assert lent(told).text == "a vcpu did not stop within 15 s"
    rig.couriers.pop().close()
    rig.couriers.pop().close()
    assert open_descriptors() == before
    assert rig.tell(BACK) == [DisksBack(vmid=VMID)]
    assert machine.is_running()


def test_interrupted_while_a_disk_is_slow(rig: VmRig, machine: Machine, disks: list[Device]) -> None:
    """Storage may never answer."""
    disks[0].answers["settle"] = devmsg.SETTLED_NOT_YET
    borrower = Borrower(rig)
    rig.vmm.send(LEND, fds={"courier": [borrower.fd]})
    rig.until(lambda: disks[0].log.count("settle") > 2)
    rig.vmm.send(CancelTransfer(vmid=VMID))
    assert lent(rig.wait_for(DisksLent)).text == "it was interrupted"


def test_interrupted_while_the_machine_is_written(rig: VmRig, machine: Machine) -> None:
    """The reader of its stream reads nothing."""
    machine.memory.load(0, os.urandom(16 * 4096))
    reading, writing = os.pipe2(os.O_CLOEXEC)
    borrower = Borrower(rig)
    borrower.ask()
    rig.vmm.send(LEND, fds={"courier": [borrower.fd], "stream": [writing]})
    rig.until(lambda: any(isinstance(each.message, TransferProgress) for each in rig.vmm.got))
    rig.vmm.send(CancelTransfer(vmid=VMID))
    assert lent(rig.wait_for(DisksLent)).text == "sending was interrupted"
    os.close(reading)


def test_interrupted_before_the_machine_is_written(rig: VmRig, machine: Machine, disks: list[Device]) -> None:
    """The borrower still gets the disks that it has asked for, but no machine."""
    file = os.memfd_create("stream", os.MFD_CLOEXEC)
    borrower = Borrower(rig)
    rig.vmm.send(LEND, fds={"courier": [borrower.fd], "stream": [file]})
    rig.until(lambda: all("lend" in disk.log for disk in disks))
    rig.tell(CancelTransfer(vmid=VMID))
    borrower.ask()
    assert lent(rig.wait_for(DisksLent)).text == "sending was interrupted"


def test_a_request_to_stop_while_disks_are_lent(rig: VmRig, machine: Machine) -> None:
    """The guest is asked to shut down when the disks are back."""
    lend(rig, LEND)
    assert rig.tell(StopVm(vmid=VMID, mode=StopMode.GRACEFUL)) == []
    assert machine.asked == []
    assert rig.tell(BACK) == [DisksBack(vmid=VMID)]
    assert (machine.is_running(), machine.asked) == (True, [vmmci.REBOOT])


def test_disks_that_cannot_be_read_again(rig: VmRig, machine: Machine, disks: list[Device]) -> None:
    """The answer names them.  The guest goes on without them."""
    lend(rig, LEND)
    for disk in disks:
        disk.answers["reload"] = False
    assert rig.tell(BACK) == [DisksBack(vmid=VMID, text="disk0 and disk1: cannot be used any more; the log says why")]
    assert machine.is_running()


def test_a_disk_whose_process_fails_when_it_is_back(rig: VmRig, machine: Machine, disks: list[Device]) -> None:
    """The VM ends."""
    lend(rig, LEND)
    disks[1].answers["reload"] = PeerError("vioblk1", "was killed")
    assert rig.tell(BACK) == [VmEnding(text="vioblk1: was killed")]
    assert rig.process.exit_status == Outcome.FAILED


def test_a_lock_that_was_lost_while_disks_were_lent(rig: VmRig, machine: Machine, disks: list[Device]) -> None:
    """The machine stays paused, and vmm is told why."""
    lend(rig, LEND)
    disks[1].lock_lost, disks[1].answers["take back"] = "its lock is lost", devmsg.TAKEN_IN_USE
    (back,) = rig.tell(BACK)
    assert isinstance(back, DisksBack)
    assert "it is in use by somebody else" in back.text
    assert not machine.is_running()


def test_a_vm_whose_disks_are_lent_is_not_sent(rig: VmRig, machine: Machine) -> None:
    """Nor are they lent again.  What came with such a request is closed."""
    lend(rig, LEND)
    before = open_descriptors()
    borrower = Borrower(rig)
    assert rig.tell(LEND, fds={"courier": [borrower.fd], "stream": [os.memfd_create("stream")]}) == []
    send = SendVm(vmid=VMID, keep=False, one_shot=False)
    assert rig.tell(send, fds={"courier": [rig.courier(stream=os.memfd_create("stream"))]}) == []
    for _ in range(3):
        rig.couriers.pop().close()
    assert open_descriptors() == before
    assert rig.tell(BACK) == [DisksBack(vmid=VMID)]
    assert machine.is_running()


def test_who_stops_a_vm_that_is_about_to_lend_its_disks(rig: VmRig, machine: Machine, disks: list[Device]) -> None:
    """Lending is interrupted, and the guest is asked when the disks are back."""
    disks[0].answers["settle"] = devmsg.SETTLED_NOT_YET
    rig.vmm.send(LEND, fds={"courier": [Borrower(rig).fd]})
    rig.until(lambda: disks[0].log.count("settle") > 2)
    rig.vmm.send(StopVm(vmid=VMID, mode=StopMode.GRACEFUL))
    assert lent(rig.wait_for(DisksLent)).text == "it was interrupted"
    assert rig.tell(BACK) == [DisksBack(vmid=VMID)]
    assert machine.asked == [vmmci.REBOOT]
