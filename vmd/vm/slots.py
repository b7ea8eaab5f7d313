"""The virtio devices of a VM, and the PCI slot of each (*cat. 5.4*).

    0 host bridge   1 entropy   then network interfaces, disks, the CD-ROM drive, vmmci   31 seed

The order is upstream's, so that a guest that was installed under upstream's vmd finds its devices in the same slots.
"""

from vmd.config.model import BootDevice
from vmd.record import Record
from vmd.vm.boot import fwcfg
from vmd.vm.kinds import CDROM, DISK, KINDS, MAIN, SEED, Given, Kind

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmd.config.model import VmConfig

SLOT_HOST_BRIDGE = 0

# Layouts of a function's BARs and capabilities.  Layout 1 has the structures of virtio 1.x in an i/o BAR.  Layout 2 has
# them in a memory BAR, too, and functions without legacy registers have a subsystem id of 40h or more (`vm/virtio.py`).
LAYOUT_FIRST, LAYOUT = 1, 2


class Slot(Record):
    """One device: its kind, its PCI slot, and the resources for its process."""

    kind: Kind
    index: int  # among the devices of its kind
    number: int  # PCI slot
    fds: tuple[int, ...] = ()  # host resources, in the order in which the process takes them
    notes: tuple[int, ...] = ()  # for each of `fds`: devmsg.RESOURCE_*
    names: tuple[str, ...] = ()  # for each of `fds`: its name in messages
    flags: int = 0  # devmsg.START_*
    module: str = MAIN  # the main module of the process, in the package of its kind
    net: bytes = b""  # devmsg.NET of a network interface; the last of its names is then the guest's host name
    # These two stay the same when the guest is sent to another host: see `vm/header.py`'s DeviceHead.
    layout: int = LAYOUT
    serial: bytes = b""

    @property
    def name(self) -> str:
        """The name of the device and of its process, such as vioblk0."""
        return f"{self.kind.process}{self.index}"

    @property
    def label(self) -> str:
        """The name of the device for users, such as disk0."""
        return f"{self.kind.word}{self.index}" if self.kind.slot is None else self.kind.word


def plan(given: Given) -> list[Slot]:
    """Return the devices of a VM, in the order of KINDS."""
    devices = [(kind, index, own) for kind in KINDS for index, own in enumerate(kind.resources(given))]
    return [
        Slot(kind=kind, number=number if kind.slot is None else kind.slot, **{"index": index} | own)
        for number, (kind, index, own) in enumerate(devices, SLOT_HOST_BRIDGE + 1)
    ]


def with_serials(config: "VmConfig", slots: "Sequence[Slot]") -> "VmConfig":
    """Return the configuration with the serial numbers of these disks, so that a receiver gets them with it."""
    serials = [slot.serial.decode("ascii") for slot in slots if slot.kind is DISK]
    disks = zip(config.disks, serials, strict=True)
    return config.replace(disks=tuple(disk.replace(serial=serial) for disk, serial in disks))


def vmmci_slot(slots: "Sequence[Slot]") -> int:
    """Return the slot of the VM control device: the one after the last device that has no fixed slot."""
    return max((slot.number for slot in slots if slot.kind.slot is None), default=SLOT_HOST_BRIDGE) + 1


def boot_paths(slots: "Sequence[Slot]", device: BootDevice) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return lines for SeaBIOS's `bootorder`: those of the drives to boot from, and those of all other drives.

    By default these are the disks, and then the disc; else the kind of drive that was asked for.  (SeaBIOS boots from
    the first of several disks.)  A VM never boots from a seed.
    """
    disks = tuple(fwcfg.boot_path(slot.number) for slot in slots if slot.kind is DISK)
    discs = tuple(fwcfg.scsi_boot_path(slot.number) for slot in slots if slot.kind is CDROM)
    seeds = tuple(fwcfg.boot_path(slot.number) for slot in slots if slot.kind is SEED)
    match device:
        case BootDevice.DISK:
            return disks, (*discs, *seeds)
        case BootDevice.CDROM:
            return discs, (*disks, *seeds)
        case _:  # NET concerns kernels that are booted directly: the firmware has no network boot
            return (*disks, *discs), seeds
