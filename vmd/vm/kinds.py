"""The kinds of virtio devices.  A row of `KINDS` has all that the VM process knows of a kind.

To add a kind, add a row here, its package `vmd/devices/<process>` with a `main`, and the system calls of that process
in `vmd/privsep/confine.py`.  If it has a host resource, StartVm brings it (`ipc/messages/vm.py`).  A kind that the VM
process serves itself has no package: `vmd/vm/machine.py` makes it from a class in `vmd/vm`.
"""

import hashlib

from vmd.ipc import devmsg
from vmd.record import Record
from vmd.units import SECTOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from vmd.config.model import VmConfig
    from vmd.ipc.messages.shared import DiskImages, ImageLink
    from vmd.ipc.messages.vm import NicLink

MAIN = "main"  # the main module of a device process, in the package of its kind
RAW = "raw"  # ... of a disk that is a single raw image
KERNEL = "kernel"  # ... of an interface whose frames the kernel may move
SEED_NUMBER = 4  # index of a seed's process: after those of the disks
# Length of name and digest in a generated serial number, which has 20 bytes with two dashes and the disk's index.
SERIAL_NAME, SERIAL_DIGITS = 7, 10


class Given(Record):
    """Configuration and descriptors from which a VM's devices are made.

    `disk_fds` are the images of all disks: one chain after the other, in each the top image first.
    """

    config: "VmConfig"
    disks: "tuple[DiskImages, ...]" = ()
    disk_fds: tuple[int, ...] = ()
    cdrom_fd: int | None = None
    nics: "tuple[NicLink, ...]" = ()
    tap_fds: tuple[int, ...] = ()
    vhost_fds: tuple[int, ...] = ()  # two for each of the `nics` that has `vhost`
    seed_fd: int | None = None


class Kind(Record):
    """One kind.  Class codes and ids are those of PCI (virtio 1.2, 4.1.2 and 5)."""

    name: str  # its name in streams
    process: str  # the name of its package in vmd.devices; with a number the name of a device, such as vioblk0
    word: str  # its name for users; with a number the label of a device, such as disk0
    queues: tuple[int, ...]  # the size of each queue
    device_type: int
    legacy_id: int
    class_code: int
    count: "Callable[[VmConfig], int]"  # how many of these devices a configuration has
    resources: "Callable[[Given], Iterator[dict[str, Any]]]"  # for each device, its own fields of Slot
    inside: bool = False  # it has no process: the VM process serves it
    config_may_differ: bool = False  # its configuration may differ at a receiver: drivers expect that it changes
    settles: bool = False  # its data must be on stable storage before the VM goes on elsewhere
    widest: str = MAIN  # the module that can be any device of this kind, for a device whose details are unknown yet
    # A fixed PCI slot, so that other devices keep theirs whether or not there is this one.  A VM has at most one such.
    slot: int | None = None


# --- the resources of each kind ------------------------------------------------------------------------------------


def entropy(_given: Given) -> "Iterator[dict[str, Any]]":
    """Yield one device without resources."""
    yield {}


def interfaces(given: Given) -> "Iterator[dict[str, Any]]":
    """Yield each interface: with its tap, and with `vhost` the two descriptors that vhost-net needs."""
    vhost_fds = iter(given.vhost_fds)
    for index, (nic, fd) in enumerate(zip(given.nics, given.tap_fds, strict=True)):
        fds = (fd, next(vhost_fds), next(vhost_fds)) if nic.vhost else (fd,)
        yield {
            "fds": fds,
            "notes": (0,) * len(fds),
            "names": (*(nic.name for _ in fds), host_name(given.config, index) if nic.local or nic.pxe else ""),
            "flags": devmsg.START_NET,
            "module": KERNEL if nic.vhost else MAIN,
            "net": net_fields(nic),
        }


def disks(given: Given) -> "Iterator[dict[str, Any]]":
    """Yield each disk with its chain of images."""
    fds = list(given.disk_fds)
    for index, disk in enumerate(given.disks):
        count = len(disk.images)
        yield {
            "fds": tuple(fds[:count]),
            "notes": tuple(note(image) for image in disk.images),
            "names": tuple(image.path for image in disk.images),
            "flags": devmsg.START_READ_ONLY if disk.read_only else 0,
            "serial": disk_serial(given.config, index),
            "module": RAW if [image.format for image in disk.images] == ["raw"] else MAIN,
        }
        del fds[:count]


def cdrom(given: Given) -> "Iterator[dict[str, Any]]":
    """Yield the drive, if there is a disc, or if there was one before."""
    if given.cdrom_fd is not None:
        yield {"fds": (given.cdrom_fd,), "notes": (0,), "names": (given.config.cdrom,)}
    elif given.config.drive:
        yield {}


def seed(given: Given) -> "Iterator[dict[str, Any]]":
    """Yield the seed, if there is one: a read-only disk with an index that no other disk has."""
    if given.seed_fd is not None:
        yield {
            "fds": (given.seed_fd,),
            "notes": (0,),
            "names": ("seed",),
            "flags": devmsg.START_READ_ONLY,
            "serial": b"seed",
            "module": RAW,
            "index": SEED_NUMBER,
        }


def net_fields(nic: "NicLink") -> bytes:
    """Return devmsg.NET, which describes an interface to its process."""
    flags = devmsg.NET_LOCKED * nic.locked | devmsg.NET_PXE * nic.pxe
    flags |= devmsg.NET_VHOST * nic.vhost | devmsg.NET_LOCAL * nic.local | devmsg.NET_ASKS * (nic.local and nic.asks)
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
        nic.length4,
    )


def host_name(config: "VmConfig", index: int) -> str:
    """Return the host name that interface `index` tells its guest by DHCP."""
    of_seed = config.seed.hostname if config.seed is not None else ""
    return config.nics[index].host_name or of_seed or config.name


def note(image: "ImageLink") -> int:
    """Return the note (devmsg.RESOURCE_*) that describes an image to its disk's process."""
    qcow2 = devmsg.RESOURCE_QCOW2 if image.format == "qcow2" else 0
    sectors = min(image.discard_granularity // SECTOR, devmsg.RESOURCE_DISCARD_MAX)
    return qcow2 | (devmsg.RESOURCE_GUESSED if image.guessed else 0) | sectors << devmsg.RESOURCE_DISCARD_SHIFT


def disk_serial(config: "VmConfig", index: int) -> bytes:
    """Return the serial number that a disk reports to its guest.

    If none is configured, it is generated from the VM's owner and name.  So it is the same after each start, because a
    guest may mount by it, and different in each VM, because a disk may be attached to another VM besides its own disks.
    """
    given = config.disks[index].serial
    if given:
        return given.encode("ascii")
    owner = hashlib.sha256(f"{config.owner.uid} {config.name}".encode()).hexdigest()
    return f"{config.name[:SERIAL_NAME]}-{owner[:SERIAL_DIGITS]}-{index}".encode("ascii")


# --- the table -----------------------------------------------------------------------------------------------------

ENTROPY = Kind(
    name="rng",
    process="viornd",
    word="entropy",
    queues=(64,),
    device_type=4,
    legacy_id=0x1005,
    class_code=0x00FF00,
    count=lambda _config: 1,
    resources=entropy,
    inside=True,
)
INTERFACE = Kind(
    name="net",
    process="vionet",
    word="interface",
    queues=(256, 256),
    device_type=1,
    legacy_id=0x1000,
    class_code=0x020000,
    count=lambda config: len(config.nics),
    resources=interfaces,
    config_may_differ=True,  # for example, whether the link is up
    widest=KERNEL,
)
DISK = Kind(
    name="blk",
    process="vioblk",
    word="disk",
    queues=(256,),
    device_type=2,
    legacy_id=0x1001,
    class_code=0x010000,
    count=lambda config: len(config.disks),
    resources=disks,
    settles=True,
)
CDROM = Kind(
    name="scsi",
    process="vioscsi",
    word="cdrom",
    queues=(128, 128, 128),
    device_type=8,
    legacy_id=0x1004,
    class_code=0x010000,
    count=lambda config: int(bool(config.cdrom) or config.drive),
    resources=cdrom,
)

# The seed for cloud-init (`vmd.seed`).  For the guest it is a disk, but it is not resized, limited or in snapshots.
SEED = DISK.replace(
    name="cidata",
    word="seed",
    count=lambda config: int(config.seed is not None),
    resources=seed,
    settles=False,
    slot=31,
)

KINDS = (ENTROPY, INTERFACE, DISK, CDROM, SEED)  # in the order of their slots, which is upstream's (*cat. 5.4*)


def kinds(config: "VmConfig") -> list[Kind]:
    """Return the kind of each device of a configuration, in the order of their slots."""
    return [kind for kind in KINDS for _ in range(kind.count(config))]


def spares(words: "Sequence[str]") -> "list[tuple[Kind, str]]":
    """Return kind and module of the processes that a VM is likely to need, from vmm's words, such as `vioblk.raw`."""
    found: list[tuple[Kind, str]] = []
    for word in words:
        process, _, module = word.partition(".")
        found += [(kind, module) for kind in (INTERFACE, DISK) if kind.process == process]
    return found
