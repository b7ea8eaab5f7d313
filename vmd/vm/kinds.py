"""The kinds of virtio devices: a row of `KINDS` is all that the VM process knows of one.

To add a kind, add a row here, its package `vmd/devices/<process>` with a `main`, and that process's system calls in
`vmd/privsep/confine.py`.  If it has a host resource, `ipc/messages/vm.py` says how StartVm brings it.  One that the VM
process serves itself has a class in `vmd/vm` instead, and `vmd/vm/machine.py` makes it.
"""

import hashlib

from vmd.ipc import devmsg
from vmd.record import Record
from vmd.virtio import spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from vmd.config.model import VmConfig
    from vmd.ipc.messages.shared import DiskImages, ImageLink
    from vmd.ipc.messages.vm import NicLink

MAIN = "main"  # the module of a device's package that its process begins with
RAW = "raw"  # ... that of a disk with one image, which is raw
KERNEL = "kernel"  # ... that of an interface whose frames the kernel may move
SEED_NUMBER = 4  # of the process of a seed, behind those of disks
SERIAL_NAME, SERIAL_DIGITS = 7, 10  # of a serial number that is made: with two dashes and a digit, 20 bytes


class Given(Record):
    """What a VM's devices are made of; `disk_fds` are the images of all disks, chain after chain, top first."""

    config: "VmConfig"
    disks: "tuple[DiskImages, ...]" = ()
    disk_fds: tuple[int, ...] = ()
    cdrom_fd: int | None = None
    nics: "tuple[NicLink, ...]" = ()
    tap_fds: tuple[int, ...] = ()
    vhost_fds: tuple[int, ...] = ()  # two for each of `nics` with `vhost`
    seed_fd: int | None = None


class Kind(Record):
    """One kind.  Class codes and ids are those of PCI (virtio 1.2, 4.1.2 and 5)."""

    name: str  # in streams
    process: str  # with a number its name, such as vioblk0, and that of its process, whose package is in vmd.devices
    word: str  # what users call it
    queues: tuple[int, ...]  # their sizes
    device_type: int
    legacy_id: int
    class_code: int
    count: "Callable[[VmConfig], int]"  # how many a configuration has
    resources: "Callable[[Given], Iterator[dict[str, Any]]]"  # for each, the fields of its Slot that are its own
    inside: bool = False  # has no process: the VM process serves it
    config_may_differ: bool = False  # between hosts: drivers expect that to change
    settles: bool = False  # is brought to stable storage before its VM goes on elsewhere
    widest: str = MAIN  # the module for a device of which nothing else is known yet
    slot: int | None = None  # where it is always, so that no other device moves; a VM has one such at most


# --- what each is given --------------------------------------------------------------------------------------------


def entropy(_given: Given) -> "Iterator[dict[str, Any]]":
    """It needs nothing."""
    yield {}


def interfaces(given: Given) -> "Iterator[dict[str, Any]]":
    """Each has a tap, and may have what the kernel needs to move its frames."""
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
    """Each has its chain of images."""
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
    """The drive is there if a disc is, or was."""
    if given.cdrom_fd is not None:
        yield {"fds": (given.cdrom_fd,), "notes": (0,), "names": (given.config.cdrom,)}
    elif given.config.drive:
        yield {}


def seed(given: Given) -> "Iterator[dict[str, Any]]":
    """It is a disk that nobody writes to; its number is one that no other disk has."""
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
    """Return what the process of a network interface is told of it."""
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
    """Return the host name that the guest is told by interface `index`."""
    of_seed = config.seed.hostname if config.seed is not None else ""
    return config.nics[index].host_name or of_seed or config.name


def note(image: "ImageLink") -> int:
    """Return what a disk's process is told of one of its images."""
    qcow2 = devmsg.RESOURCE_QCOW2 if image.format == "qcow2" else 0
    sectors = min(image.discard_granularity // spec.SECTOR, devmsg.RESOURCE_DISCARD_MAX)
    return qcow2 | (devmsg.RESOURCE_GUESSED if image.guessed else 0) | sectors << devmsg.RESOURCE_DISCARD_SHIFT


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
    config_may_differ=True,  # whether there is a link, for one
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

# Of cloud-init (`vmd.seed`): a disk, and not one of the disks: it is neither resized, limited nor snapshot.
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
    """Return kinds and modules of processes that a VM is likely to need, as vmm calls them: `vioblk.raw`, for one."""
    found: list[tuple[Kind, str]] = []
    for word in words:
        process, _, module = word.partition(".")
        found += [(kind, module) for kind in (INTERFACE, DISK) if kind.process == process]
    return found
