"""Changes of a running machine: the devices that get them, and the answers to vmm."""

import errno
import os
from collections.abc import Iterator

import pytest

from tests.support.descriptors import open_descriptors
from tests.support.vminside import VMID, Device, VmRig
from vmd.config.model import DiskConfig, Forward, NicConfig, VmConfig
from vmd.ipc.messages.vm import ChangeDisc, DiscChanged, DiskResized, LimitVm, ResizeDisk
from vmd.vm.kinds import CDROM, DISK, INTERFACE

A = VmConfig(name="a", disks=(DiskConfig(path="/0"), DiskConfig(path="/1")), nics=(NicConfig(), NicConfig(local=True)))


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[VmRig]:
    """Yield a VM process."""
    made = VmRig(monkeypatch)
    yield made
    made.close()


@pytest.fixture
def devices(rig: VmRig) -> list[Device]:
    """Return two disks, two interfaces, and a drive with a disc."""
    made = [
        Device(INTERFACE, "interface0"), Device(INTERFACE, "interface1"), Device(DISK, "disk0"), Device(DISK, "disk1"),
        Device(CDROM, "cdrom"),
    ]  # fmt: skip
    rig.start(A.replace(cdrom="/old"), *made)
    for device in made:
        device.log.clear()
    return made


def test_the_disk_with_the_number_becomes_larger(rig: VmRig, devices: list[Device]) -> None:
    """No other device gets the message."""
    assert rig.tell(ResizeDisk(vmid=VMID, index=1, size_bytes=1 << 30)) == [DiskResized(vmid=VMID)]
    assert [device.log for device in devices] == [[], [], [], [("resize", 1 << 30)], []]


@pytest.mark.parametrize("index", [-1, 2])
def test_a_disk_that_does_not_exist(rig: VmRig, devices: list[Device], index: int) -> None:
    """The request fails, and the error names the disk."""
    assert rig.tell(ResizeDisk(vmid=VMID, index=index, size_bytes=1)) == [
        DiskResized(vmid=VMID, code=errno.ENODEV, text=f"has no disk{index}")
    ]
    assert all(device.log == [] for device in devices)


def test_the_error_of_a_disk_is_passed_on(rig: VmRig, devices: list[Device]) -> None:
    """vmm gets its errno and its text."""
    devices[2].answers["resize"] = (errno.ENOSPC, "no space left")
    assert rig.tell(ResizeDisk(vmid=VMID, index=0, size_bytes=1)) == [
        DiskResized(vmid=VMID, code=errno.ENOSPC, text="no space left")
    ]


def test_another_disc(rig: VmRig, devices: list[Device]) -> None:
    """The drive gets the file that the courier brings, and a machine that is sent has the new path."""
    before = open_descriptors()
    disc = os.memfd_create("disc")
    inode = os.fstat(disc).st_ino
    message = ChangeDisc(vmid=VMID, path="/new", force=True)
    told = rig.tell(message, fds={"courier": [rig.courier(cdrom=disc)]})

    assert told == [DiscChanged(vmid=VMID)]
    assert devices[4].log == [("disc", inode, "/new", True)]
    assert rig.machine.config.cdrom == "/new"
    rig.couriers.pop().close()
    assert open_descriptors() == before


def test_the_disc_is_removed(rig: VmRig, devices: list[Device]) -> None:
    """The drive stays, also when the machine is sent."""
    assert rig.tell(ChangeDisc(vmid=VMID)) == [DiscChanged(vmid=VMID)]
    assert devices[4].log == [("disc", None, "", False)]
    assert (rig.machine.config.cdrom, rig.machine.config.drive) == ("", True)


def test_a_disc_that_is_refused(rig: VmRig, devices: list[Device]) -> None:
    """The machine keeps the old disc."""
    devices[4].answers["disc"] = (errno.EBUSY, "the guest has locked the drive")
    assert rig.tell(ChangeDisc(vmid=VMID)) == [
        DiscChanged(vmid=VMID, code=errno.EBUSY, text="the guest has locked the drive")
    ]
    assert rig.machine.config.cdrom == "/old"


def test_a_disc_that_does_not_come(rig: VmRig, devices: list[Device]) -> None:
    """The drive keeps the old disc."""
    told = rig.tell(ChangeDisc(vmid=VMID, path="/new"), fds={"courier": [rig.lost_courier()]})
    assert told == [DiscChanged(vmid=VMID, code=errno.EPIPE, text="cdrom /new: the file did not come")]
    assert devices[4].log == []
    assert rig.machine.config.cdrom == "/old"


def test_a_machine_without_a_drive(rig: VmRig) -> None:
    """The request fails with an error, and the file is closed."""
    rig.start(A)
    before = open_descriptors()
    fds = {"courier": [rig.courier(cdrom=os.memfd_create("disc"))]}
    assert rig.tell(ChangeDisc(vmid=VMID, path="/new"), fds=fds) == [
        DiscChanged(vmid=VMID, code=errno.ENODEV, text="has no cdrom drive")
    ]
    rig.couriers.pop().close()
    assert open_descriptors() == before


def test_limits_go_to_their_devices(rig: VmRig, devices: list[Device]) -> None:
    """Each device gets its own limits.  The configuration gets only the limits and the forwards."""
    wanted = A.replace(
        memory_bytes=1,
        disks=(DiskConfig(path="/0", iops_limit=1, rate_limit=2), DiskConfig(path="/1", iops_limit=3)),
        nics=(NicConfig(rate_limit=4), NicConfig(local=True, rate_limit=5, forwards=(Forward(port=1, to=2),))),
    )
    rig.tell(LimitVm(vmid=VMID, config=wanted))

    limits = [("limit", 0, 4), ("limit", 0, 5), ("limit", 1, 2), ("limit", 3, 0)]
    assert [device.log for device in devices] == [*([limit] for limit in limits), []]
    config = rig.machine.config
    assert [disk.iops_limit for disk in config.disks] == [1, 3]
    assert [nic.forwards for nic in config.nics] == [nic.forwards for nic in wanted.nics]
    assert config.memory_bytes == A.memory_bytes
