"""Which devices there are, where they sit, and in what order the firmware looks at them."""

import pytest

from vmd.config.model import BootDevice, DiskConfig, NicConfig, VmConfig
from vmd.ipc import devmsg
from vmd.ipc.messages import DiskImages, ImageLink, NicLink
from vmd.vm.slots import Slot, boot_paths, kinds, plan

DISK1, DISK2, DISC = "/pci@i0cf8/*@3", "/pci@i0cf8/*@4", "/pci@i0cf8/*@5/*@0/*@0,0"


CONFIG = VmConfig(
    name="a", nics=(NicConfig(),), disks=(DiskConfig(path="/a"), DiskConfig(path="/c")), cdrom="/disc.iso"
)


def slots() -> list[Slot]:
    """Return the devices of a VM with an interface, two disks, the first with a backing file, and a disc."""
    images = (
        DiskImages(images=(ImageLink(path="/a", format="qcow2"), ImageLink(path="/b", format="raw", guessed=True))),
        DiskImages(images=(ImageLink(path="/c", format="raw", discard_granularity=65536),), read_only=True),
    )
    nic = NicLink(name="tap0", lladdr=b"\xfe" + bytes(5), host_mac=bytes(6), locked=False, local=False, mtu=1500)
    return plan(CONFIG, images, [10, 11, 12], 13, [nic], [14])


def test_each_device_has_upstreams_slot_and_its_own_files() -> None:
    """Entropy 1, interfaces, disks, disc; each chain goes to its disk, the top first."""
    by_name = {slot.name: slot for slot in slots()}
    assert {name: slot.number for name, slot in by_name.items()} == {
        "viornd0": 1, "vionet0": 2, "vioblk0": 3, "vioblk1": 4, "vioscsi0": 5,
    }  # fmt: skip
    assert (by_name["vionet0"].fds, by_name["vionet0"].names) == ((14,), ("tap0", ""))
    assert by_name["vioblk0"].fds == (10, 11)
    assert by_name["vioblk0"].notes == (devmsg.RESOURCE_QCOW2, devmsg.RESOURCE_GUESSED)
    assert (by_name["vioblk1"].fds, by_name["vioblk1"].flags) == ((12,), devmsg.START_READ_ONLY)
    assert by_name["vioblk1"].notes == (128 << devmsg.RESOURCE_DISCARD_SHIFT,)  # in sectors
    assert (by_name["vioscsi0"].fds, by_name["vioscsi0"].names) == ((13,), ("/disc.iso",))


def test_devices_can_be_told_from_the_configuration_alone() -> None:
    """As whoever receives a VM has to, before its disks can be opened."""
    assert kinds(CONFIG) == [slot.kind for slot in slots()]


@pytest.mark.parametrize(
    ("device", "to_boot", "others"),
    [
        (BootDevice.AUTO, (DISK1, DISK2, DISC), ()),
        (BootDevice.DISK, (DISK1, DISK2), (DISC,)),
        (BootDevice.CDROM, (DISC,), (DISK1, DISK2)),
        (BootDevice.NET, (DISK1, DISK2, DISC), ()),
    ],
)
def test_the_boot_device_is_all_that_is_tried_and_the_rest_is_there(
    device: BootDevice, to_boot: tuple[str, ...], others: tuple[str, ...]
) -> None:
    """Every drive is in one of the two lists: firmware hides those without a line."""
    assert boot_paths(slots(), device) == (to_boot, others)
