"""Which virtio devices a VM has, and in which PCI slot each sits (*cat. 5.4*).

    0 host bridge   1 entropy   then network interfaces, disks, the CD-ROM drive, vmmci

The order is upstream's, so that a guest that was installed there finds its devices where they were.
"""

import hashlib

from vmd.config.model import BootDevice
from vmd.ipc import devmsg
from vmd.record import Record
from vmd.virtio import spec
from vmd.vm.boot import fwcfg

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmd.config.model import VmConfig
    from vmd.ipc.messages import DiskImages, ImageLink, NicLink

SLOT_HOST_BRIDGE = 0
SLOT_RNG = 1
SERIAL_NAME, SERIAL_DIGITS = 7, 10  # of a serial number that is made: with two dashes and a digit, 20 bytes

# How a function's BARs and capabilities are laid out: 1 has the structures of virtio 1.x in an i/o BAR; 2 has them in a
# memory BAR, too, and a subsystem id of 40h and more where there are no legacy registers (`vm/virtio.py`).
LAYOUT_FIRST, LAYOUT = 1, 2

PROCESSES = {"rng": "viornd", "net": "vionet", "blk": "vioblk", "scsi": "vioscsi"}
WORDS = {"rng": "entropy", "net": "interface", "blk": "disk", "scsi": "cdrom"}  # what users call them
QUEUES = {  # their sizes
    "rng": (64,),
    "net": (256, 256),
    "blk": (256,),
    "scsi": (128, 128, 128),
}


class Slot(Record):
    """One device: what it is, where it sits, and what its process is given."""

    kind: str  # a key of PROCESSES and QUEUES
    index: int  # among those of its kind
    number: int  # PCI slot
    fds: tuple[int, ...] = ()  # its host resources, in the order in which its process takes them
    notes: tuple[int, ...] = ()  # devmsg.RESOURCE_* of each
    names: tuple[str, ...] = ()  # what to call each in sentences
    flags: int = 0  # devmsg.START_*
    net: bytes = b""  # devmsg.NET, of a network interface; the last of its names is then the guest's host name
    # What a guest that was sent keeps, wherever it goes: `vm/state.py`'s DeviceHead says more.
    layout: int = LAYOUT
    serial: bytes = b""

    @property
    def name(self) -> str:
        """The name of the device and of its process, such as vioblk0."""
        return f"{PROCESSES[self.kind]}{self.index}"

    @property
    def label(self) -> str:
        """What the device is called where users see it, such as disk0."""
        return f"{WORDS[self.kind]}{self.index}"


def plan(
    config: "VmConfig",
    disks: "Sequence[DiskImages]" = (),
    disk_fds: "Sequence[int]" = (),
    cdrom_fd: int | None = None,
    nics: "Sequence[NicLink]" = (),
    tap_fds: "Sequence[int]" = (),
) -> list[Slot]:
    """Return the devices of a VM; `disk_fds` are the images of all disks, one chain after the other, top first."""
    slots = [Slot(kind="rng", index=0, number=SLOT_RNG)]
    for index, (nic, fd) in enumerate(zip(nics, tap_fds, strict=True)):
        slots.append(
            Slot(
                kind="net",
                index=index,
                number=SLOT_RNG + 1 + index,
                fds=(fd,),
                notes=(0,),
                names=(nic.name, config.name if nic.pxe else ""),
                flags=devmsg.START_NET,
                net=net_fields(nic),
            )
        )
    number = SLOT_RNG + 1 + len(config.nics)
    fds = list(disk_fds)
    for index, disk in enumerate(disks):
        chain = tuple(fds[: len(disk.images)])
        del fds[: len(disk.images)]
        slots.append(
            Slot(
                kind="blk",
                index=index,
                number=number + index,
                fds=chain,
                notes=tuple(note(image) for image in disk.images),
                names=tuple(image.path for image in disk.images),
                flags=devmsg.START_READ_ONLY if disk.read_only else 0,
                serial=disk_serial(config, index),
            )
        )
    if cdrom_fd is not None:
        slots.append(
            Slot(
                kind="scsi",
                index=0,
                number=number + len(disks),
                fds=(cdrom_fd,),
                notes=(0,),
                names=(config.cdrom,),
            )
        )
    return slots


def disk_serial(config: "VmConfig", index: int) -> bytes:
    """Return the serial number that a disk tells its guest.

    Unless it is configured it is made from whose VM it is, so that it is the same after each start, and another one in
    every VM: a guest may mount by it, and whoever attaches a disk to another VM may see two at a time.
    """
    given = config.disks[index].serial
    if given:
        return given.encode("ascii")
    owner = hashlib.sha256(f"{config.owner.uid} {config.name}".encode()).hexdigest()
    return f"{config.name[:SERIAL_NAME]}-{owner[:SERIAL_DIGITS]}-{index}".encode("ascii")


def with_serials(config: "VmConfig", slots: "Sequence[Slot]") -> "VmConfig":
    """Return a configuration that has the serial numbers of these disks in it, so that they go where it goes."""
    serials = [slot.serial.decode("ascii") for slot in slots if slot.kind == "blk"]
    disks = zip(config.disks, serials, strict=True)
    return config.replace(disks=tuple(disk.replace(serial=serial) for disk, serial in disks))


def kinds(config: "VmConfig") -> list[str]:
    """Return what kinds of device `plan` makes of a configuration, in its order, without having opened anything."""
    return ["rng", *["net"] * len(config.nics), *["blk"] * len(config.disks), *["scsi"] * bool(config.cdrom)]


def vmmci_slot(slots: "Sequence[Slot]") -> int:
    """Return the slot of the VM control device: behind all others."""
    return max((slot.number for slot in slots), default=SLOT_HOST_BRIDGE) + 1


def net_fields(nic: "NicLink") -> bytes:
    """Return what the process of a network interface is told of it."""
    flags = devmsg.NET_LOCKED * nic.locked | devmsg.NET_PXE * nic.pxe
    flags |= (devmsg.NET_LOCAL | devmsg.NET_ASKS) * nic.local
    return devmsg.NET.pack(
        nic.lladdr,
        nic.host_mac,
        flags,
        nic.mtu,
        nic.guest4,
        nic.host4,
        nic.host_ll,
        nic.prefix6,
        b"".join(nic.dns4[: devmsg.DNS_MAX]),
        b"".join(nic.dns6[: devmsg.DNS_MAX]),
    )


def note(image: "ImageLink") -> int:
    """Return what a disk's process is told of one of its images."""
    qcow2 = devmsg.RESOURCE_QCOW2 if image.format == "qcow2" else 0
    sectors = min(image.discard_granularity // spec.SECTOR, devmsg.RESOURCE_DISCARD_MAX)
    return qcow2 | (devmsg.RESOURCE_GUESSED if image.guessed else 0) | sectors << devmsg.RESOURCE_DISCARD_SHIFT


def boot_paths(slots: "Sequence[Slot]", device: BootDevice) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the lines for SeaBIOS's `bootorder`: of what it starts from, and of the other drives.

    By default disks, then the disc; else only what was asked for.  (Of several disks it starts from the first.)
    """
    disks = tuple(fwcfg.boot_path(slot.number) for slot in slots if slot.kind == "blk")
    discs = tuple(fwcfg.scsi_boot_path(slot.number) for slot in slots if slot.kind == "scsi")
    match device:
        case BootDevice.DISK:
            return disks, discs
        case BootDevice.CDROM:
            return discs, disks
        case _:  # `net` is for kernels that are booted directly; firmware has nothing to boot by it
            return (*disks, *discs), ()
