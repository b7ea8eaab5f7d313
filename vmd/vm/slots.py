"""Which virtio devices a VM has, and in which PCI slot each sits (*cat. 5.4*).

    0 host bridge   1 entropy   then network interfaces, disks, the CD-ROM drive, vmmci   31 seed

The order is upstream's, so that a guest that was installed there finds its devices where they were.
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

# How a function's BARs and capabilities are laid out: 1 has the structures of virtio 1.x in an i/o BAR; 2 has them in a
# memory BAR, too, and a subsystem id of 40h and more where there are no legacy registers (`vm/virtio.py`).
LAYOUT_FIRST, LAYOUT = 1, 2


class Slot(Record):
    """One device: what it is, where it sits, and what its process is given."""

    kind: Kind
    index: int  # among those of its kind
    number: int  # PCI slot
    fds: tuple[int, ...] = ()  # its host resources, in the order in which its process takes them
    notes: tuple[int, ...] = ()  # devmsg.RESOURCE_* of each
    names: tuple[str, ...] = ()  # what to call each in sentences
    flags: int = 0  # devmsg.START_*
    module: str = MAIN  # of its package: what its process begins with
    net: bytes = b""  # devmsg.NET, of a network interface; the last of its names is then the guest's host name
    # What a guest that was sent keeps, wherever it goes: `vm/state.py`'s DeviceHead says more.
    layout: int = LAYOUT
    serial: bytes = b""

    @property
    def name(self) -> str:
        """The name of the device and of its process, such as vioblk0."""
        return f"{self.kind.process}{self.index}"

    @property
    def label(self) -> str:
        """What the device is called where users see it, such as disk0."""
        return f"{self.kind.word}{self.index}" if self.kind.slot is None else self.kind.word


def plan(given: Given) -> list[Slot]:
    """Return the devices of a VM."""
    devices = [(kind, index, own) for kind in KINDS for index, own in enumerate(kind.resources(given))]
    return [
        Slot(kind=kind, number=number if kind.slot is None else kind.slot, **{"index": index} | own)
        for number, (kind, index, own) in enumerate(devices, SLOT_HOST_BRIDGE + 1)
    ]


def with_serials(config: "VmConfig", slots: "Sequence[Slot]") -> "VmConfig":
    """Return a configuration that has the serial numbers of these disks in it, so that they go where it goes."""
    serials = [slot.serial.decode("ascii") for slot in slots if slot.kind is DISK]
    disks = zip(config.disks, serials, strict=True)
    return config.replace(disks=tuple(disk.replace(serial=serial) for disk, serial in disks))


def vmmci_slot(slots: "Sequence[Slot]") -> int:
    """Return the slot of the VM control device: behind all others but those that have a fixed one."""
    return max((slot.number for slot in slots if slot.kind.slot is None), default=SLOT_HOST_BRIDGE) + 1


def boot_paths(slots: "Sequence[Slot]", device: BootDevice) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the lines for SeaBIOS's `bootorder`: of what it starts from, and of the other drives.

    By default disks, then the disc; else only what was asked for.  (Of several disks it starts from the first.)
    Nothing starts from a seed.
    """
    disks = tuple(fwcfg.boot_path(slot.number) for slot in slots if slot.kind is DISK)
    discs = tuple(fwcfg.scsi_boot_path(slot.number) for slot in slots if slot.kind is CDROM)
    seeds = tuple(fwcfg.boot_path(slot.number) for slot in slots if slot.kind is SEED)
    match device:
        case BootDevice.DISK:
            return disks, (*discs, *seeds)
        case BootDevice.CDROM:
            return discs, (*disks, *seeds)
        case _:  # `net` is for kernels that are booted directly; firmware has nothing to boot by it
            return (*disks, *discs), seeds
