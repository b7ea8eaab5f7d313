"""Finds the file that a VM boots on its disk: by its path, or the kernel that OpenBSD itself would boot."""

from vmd.diskfs.source import DiskFsError
from vmd.imgboot import bootconf
from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.config.model import DiskFile
    from vmd.diskfs.disk import Disk
    from vmd.diskfs.walk import File

BOOT_CONF = "/etc/boot.conf"
EMPTY_BYTES = 128 << 10
# Paths under which systems keep links to their newest kernel and its initrd.
KERNELS = (("/vmlinuz", "/initrd.img"), ("/boot/vmlinuz", "/boot/initrd.img"), ("/bsd", ""))


class Found(Record):
    """A file.  `name` is its place in the words of DiskFile; `options` are those of boot(8)."""

    file: "File"
    name: str
    options: str = ""


def search(disk: "Disk", wanted: "DiskFile") -> Found:
    """Return the file that is wanted.  Raises DiskFsError."""
    if not wanted.path:
        return kernel_of_openbsd(disk, wanted)
    file = disk.find(wanted.path, wanted.partition)
    return Found(file=file, name=place_of(file, wanted))


def kernel_of_openbsd(disk: "Disk", wanted: "DiskFile") -> Found:
    """Return the kernel that /etc/boot.conf names, else /bsd.  Raises DiskFsError."""
    text, partition = b"", wanted.partition
    try:
        file = disk.find(BOOT_CONF, wanted.partition)
    except DiskFsError:  # boot /bsd; if that fails too, its error is the answer
        pass
    else:
        text, partition = file.content(bootconf.BYTES_MAX), name_of(file)
    try:
        said = bootconf.parse(text)
    except ValueError as error:
        raise DiskFsError(f"{BOOT_CONF}: {error}") from None
    if not wanted.partition and said.partition in [each.name for each in disk.table.partitions]:
        partition = said.partition
    kernel = disk.find(said.image, partition)
    return Found(file=kernel, name=place_of(kernel, wanted), options=said.options)


def name_of(file: "File") -> str:
    """Return the name of the partition that a file is on; "" is the whole disk."""
    return file.partition.removeprefix("partition ") if file.partition.startswith("partition ") else ""


def place_of(file: "File", wanted: "DiskFile") -> str:
    """Return the place of a file in the words of DiskFile."""
    return str(wanted.replace(partition=name_of(file), path=file.path))


def describe(disk: "Disk", number: int) -> str:
    """Describe a disk that has no boot sector, and what may be booted from it."""
    if is_empty(disk):
        return "it is empty: start its VM once from a CD (-r) or a kernel (-b) that installs a system"
    found = disk.describe()
    for kernel, initrd in KERNELS:
        if (partition := partition_with(disk, kernel, "")) is None:
            continue
        advice = f'boot "disk{number}{partition}:{kernel}"'
        if initrd and partition_with(disk, initrd, partition) == partition:
            advice += f' initrd "disk{number}{partition}:{initrd}"'
        return f"{found}; {advice} may help"
    return found


def partition_with(disk: "Disk", path: str, partition: str) -> str | None:
    """Return the name of the partition that has a file; None if no partition, or not the one named, has it."""
    try:
        return name_of(disk.find(path, partition))
    except DiskFsError:
        return None


def is_empty(disk: "Disk") -> bool:
    """Return whether the bytes where partition tables and file systems begin are all zero.  Raises DiskFsError."""
    return not any(disk.source.read(0, min(EMPTY_BYTES, disk.source.size)))
