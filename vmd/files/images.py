"""Opens disks and ISO images with the rights of this process, without reading any of their bytes (*cat. 4.3, 8*).

The type of a file is checked before the open, because opening a device can have an effect, such as arming a watchdog.
imgprobe reads the headers of images.  Of its answer, only the path of a backing file is used to open further files.
"""

import errno
import os
import stat

from vmd.closing import close
from vmd.config.model import MAX_CHAIN, DiskConfig
from vmd.errors import VMD_CDROM_INVALID, VMD_CDROM_MISSING, VMD_DISK_MISSING, HostError, InUse, OperatorError
from vmd.fileid import file_id
from vmd.files.denied import DENIALS, explained, file_system_of, on_fuse
from vmd.images.locks import lock
from vmd.ipc import foreign
from vmd.ipc.foreign import DISC_CONTENT, given_as, left_dirty, named_format, odd_length, quoted
from vmd.ipc.probemsg import (
    BELOW,
    CORRUPT,
    DIRTY,
    DISC,
    GOING_BACK,
    NO_CODE,
    NOT_QCOW2,
    Probe,
    how_to_record,
    recording,
    refusal,
    warnings,
)
from vmd.privsep import linux
from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.files.prober import Prober

DISC_BLOCK = 2048

# File systems of the kernel.  A backing file on one of these could be, for example, the memory of a process of root.
KERNEL_FILE_SYSTEMS = {
    0x9FA0: "proc", 0x62656572: "sysfs", 0x64626720: "debugfs", 0x74726163: "tracefs", 0x73636673: "securityfs",
    0x62656570: "configfs", 0x63677270: "cgroup2", 0x27E0EB: "cgroup", 0xCAFE4A11: "bpf", 0xDE5E81E4: "efivarfs",
}  # fmt: skip


class OpenImage(Record):
    """One image of a disk.  `guessed`: the format is known only from the first bytes of the image."""

    fd: int
    path: str
    format: str
    guessed: bool


class OpenDisk:
    """The images of a disk, open and locked: the top image first, then its backing files.

    The locks belong to the open file descriptions, and last until the last copy of a descriptor is closed.
    """

    read_only = False  # as upstream, there are no read-only disks: a disk that cannot be written is an error

    def __init__(self) -> None:
        self.links: list[OpenImage] = []
        self.notes: list[str] = []  # sentences for the operator
        self.boots: bool | None = None  # whether it may have boot code for a BIOS; None: not known

    def take_fds(self) -> list[int]:
        """Return the descriptors.  The caller owns them."""
        fds = [link.fd for link in self.links]
        self.links = []
        return fds

    def close(self) -> None:
        """Close the descriptors that were not taken."""
        for fd in self.take_fds():
            close(fd)


class Use(Record):
    """The purpose for which images are opened."""

    in_conf: bool = True  # advice in sentences is for vm.conf; False: for a command line
    mends: bool = False  # to repeat a `vmctl snapshot -r` that was interrupted
    boots: bool = False  # to find out whether there is boot code for a BIOS
    locked: bool = True  # as for a VM; False: for reading only, without locks


FOR_A_VM = Use()


def open_disk(
    config: DiskConfig, prober: "Prober", use: Use = FOR_A_VM, at: "Callable[[str], None]" = lambda _what: None
) -> OpenDisk:
    """Open and lock the image of a disk for writing, and the chain of its backing files for reading.

    `at` is called with the name of what is opened next.

    Raises:
        OperatorError: VMD_DISK_MISSING if a file cannot be opened, EBUSY if it is in use, EACCES if this user may not
            open it, EINVAL and others if something is wrong with it.
    """
    disk = OpenDisk()
    try:
        _follow(disk, config, use, prober, at)
    except BaseException:
        disk.close()
        raise
    return disk


def _follow(disk: OpenDisk, config: DiskConfig, use: Use, prober: "Prober", at: "Callable[[str], None]") -> None:
    path = config.path
    # The name is from the operator or from the user whose rights open the files.  A guest cannot change it.
    format_hint = config.format or named_format(path)
    raw = given_as("raw", path, in_conf=use.in_conf)
    name = top = f"disk {path}"
    seen: set[tuple[int, int]] = set()
    recorded = ""
    while True:
        if len(disk.links) == MAX_CHAIN:
            raise OperatorError(errno.EINVAL, f"{top}: backing chain is longer than {MAX_CHAIN} images")
        first = not disk.links
        at(name)
        fd = open_image(path, name, writable=first and use.locked)
        try:
            found = file_id(os.fstat(fd)).key
            if found in seen:
                raise OperatorError(errno.ELOOP, f"{top}: backing chain comes back to {path}")
            seen.add(found)
            if use.locked:
                lock(fd, name, writable=first)
            probe = _examine(fd, path, name, format_hint, prober, boots=use.boots and disk.boots is None)
            wrong = refusal(probe, format_hint, path, raw) or (first and unfit(probe, path, use)) or ""
            if wrong:
                raise OperatorError(errno.EINVAL, f"{name}: {wrong}")
        except OperatorError as error:
            close(fd)
            if first and not config.format and error.what.endswith(NOT_QCOW2):
                raise OperatorError(error.number, f"{error.what}, as its name says; if it is raw, say {raw}") from None
            raise
        except BaseException:
            close(fd)
            raise
        # A hint takes precedence over the answer, because imgprobe has parsed untrusted bytes.
        link = OpenImage(fd=fd, path=path, format=format_hint or probe.format, guessed=not format_hint)
        disk.links.append(link)
        if use.boots and disk.boots is None and not (BELOW in probe.notes and probe.backing):
            disk.boots = not {NO_CODE, BELOW} & set(probe.notes)
        notes = warnings(probe, raw) + (warnings_of_disk(probe, path) if first else [])
        disk.notes += [f"{name}: {note}" for note in notes]
        if link.format == "raw" or not probe.backing:
            return
        if link.guessed:
            # A guest can write the first bytes of its disk, so they must not decide which other file is opened.
            if first:
                given = given_as(link.format, path, in_conf=use.in_conf)
                advice = f"configure it with {given}" if use.in_conf else f"give it as {given}"
                why = f"only its first bytes say that it is {link.format}; {advice}"
            else:
                why = how_to_record(disk.links[-2].path, recorded, link.format)
            raise OperatorError(errno.EINVAL, f"{name}: has backing file {probe.backing}, but {why}")
        above, recorded = path, probe.backing
        path, format_hint = os.path.join(os.path.dirname(path), recorded), probe.backing_format
        name = f"{top}: backing file {path}"
        raw = f"`{recording(above, recorded, 'raw')}`"


def _ask(fd: int, path: str, name: str, hint: str, prober: "Prober", *, boots: bool = False) -> Probe:
    """Return the answer of imgprobe.  If it has no access to the file, explain why.  Raises OperatorError."""
    try:
        return prober.probe(fd, name, hint, boots=boots)
    except OperatorError as error:
        number = next((number for number in DENIALS if error.what.endswith(os.strerror(number))), 0)
        if not number:
            raise
        words = error.what.removesuffix(os.strerror(number)) + explained(number, path, "the user of its VM")
        raise OperatorError(error.number, words) from None


def _examine(fd: int, path: str, name: str, format_hint: str, prober: "Prober", *, boots: bool = False) -> Probe:
    """Return the format, size and so on of an image.  Raises OperatorError.

    An image that is stated to be raw is always raw.  It is not probed then, except for `boots` and on FUSE.
    """
    stated = format_hint == "raw"
    # FUSE checks the user at each call.  imgprobe reads no bytes of a raw image, but runs as the user of the VM's
    # device process, so its access shows whether that will have access.
    unasked = stated and not boots and not on_fuse(fd)
    probe = Probe(format="raw", size=0) if unasked else _ask(fd, path, name, format_hint, prober, boots=boots)
    if probe.format != "raw":
        return probe
    try:
        return probe.replace(size=os.lseek(fd, 0, os.SEEK_END))
    except OSError as error:
        raise OperatorError(error.errno or errno.EIO, f"{name}: {error.strerror}") from None


def unfit(probe: Probe, path: str, use: Use = FOR_A_VM) -> str:
    """Return why an image cannot be used as a writable disk, or ""."""
    if CORRUPT in probe.notes:
        return f"is marked as corrupt; repair it with qemu-img check -r all {quoted(path)}"
    if GOING_BACK in probe.notes and not use.mends:
        return (
            "going back to a snapshot with other disks was interrupted, and the disks may not match:"
            " repeat it with vmctl snapshot -r"
        )
    return "has no bytes: a disk needs at least one sector" if probe.format == "raw" and not probe.size else ""


def warnings_of_disk(probe: Probe, path: str) -> list[str]:
    """Return warnings about an image that is opened for writing."""
    notes = (odd_length(probe.size), left_dirty(path) if DIRTY in probe.notes else "")
    return [note for note in notes if note]


def discard_granularity(fd: int) -> int:
    """Return the discard granularity of a block device in bytes; 0 if it is not a device, or if it is not known.

    A device process has no access to sysfs and may not call ioctl, so it gets this value.
    """
    status = os.fstat(fd)
    if not stat.S_ISBLK(status.st_mode):
        return 0
    device = f"/sys/dev/block/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    for queue in ("queue", "../queue"):  # of the device itself; of the disk if the device is a partition
        try:
            with open(f"{device}/{queue}/discard_granularity", "rb") as file:
                return int(file.read(32))
        except (OSError, ValueError):
            continue
    return 0


def open_cdrom(path: str, prober: "Prober", *, locked: bool = True) -> tuple[int, list[str]]:
    """Open and lock an ISO image or a drive for reading.  Also return sentences for the operator.

    Raises OperatorError: VMD_CDROM_MISSING if it cannot be opened, VMD_CDROM_INVALID if it is neither a regular
    file nor a block device; else like `open_disk`.
    """
    name = f"cdrom {path}"
    fd = open_image(path, name, writable=False, missing=VMD_CDROM_MISSING, invalid=VMD_CDROM_INVALID)
    try:
        if locked:
            lock(fd, name, writable=False)
        return fd, examine_disc(fd, path, name, prober)
    except BaseException:
        close(fd)
        raise


def examine_disc(fd: int, path: str, name: str, prober: "Prober") -> list[str]:
    """Return sentences about a disc.  Raises OperatorError if the file is not an image of a disc.

    A drive is not probed, because it may be empty or slow.
    """
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        return []
    probe = _ask(fd, path, name, DISC, prober)
    if probe.looks and probe.looks not in DISC_CONTENT:
        raise OperatorError(errno.EINVAL, f"{name}: {foreign.refusal(probe.looks, path, '', disc=True)}")
    looks = foreign.warning(probe.looks, "") if probe.looks else ""
    return [f"{name}: {note}" for note in (looks, odd_length(probe.size, DISC_BLOCK, "block")) if note]


def open_image(
    path: str,
    name: str,
    *,
    writable: bool,
    claim: bool = True,
    missing: int = VMD_DISK_MISSING,
    invalid: int = errno.EINVAL,
) -> int:
    """Open a regular file or block device.  A device for writing is opened with O_EXCL if `claim`.

    Raises OperatorError with code `missing` or `invalid`, or EACCES.  `name` is the beginning of its sentence.
    """
    raw = os.fsencode(path)
    if not raw or b"\0" in raw:
        raise OperatorError(missing, f"{name}: not a path")
    doing = ""
    try:
        place = linux.open_place(raw)
        try:
            mode = require_image(place, name, invalid)
            flags = os.O_RDWR if writable else os.O_RDONLY
            if writable and claim and stat.S_ISBLK(mode):
                flags |= os.O_EXCL  # fails with EBUSY while the device is mounted
            doing = "cannot be opened for writing: " if writable else ""
            # This opens the file that was checked, even if the path leads to another one now.
            return os.open(f"/proc/self/fd/{place}", flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise InUse(name, file_id(os.fstat(place)), by="another process, or mounted") from None
            raise
        finally:
            close(place)
    except (OSError, HostError) as error:
        number = (error.number if isinstance(error, HostError) else error.errno) or errno.EIO
        user = os.geteuid()
        if number in (errno.EACCES, errno.EPERM) and user:
            why = explained(number, path, f"uid {user}").partition(": ")[2]
            why = f": {why}" if why else ""
            raise OperatorError(number, f"{name}: {doing}uid {user} has no permission{why}") from None
        raise OperatorError(missing, f"{name}: {doing}{explained(number, path, 'root')}") from None


def require_image(fd: int, name: str, invalid: int) -> int:
    """Return the mode of a file that can be an image.  Raises OperatorError with code `invalid`; OSError."""
    try:
        mode = os.fstat(fd).st_mode
        kind = KERNEL_FILE_SYSTEMS.get(file_system_of(fd))
    except OSError:
        raise  # the caller makes the sentence
    except HostError as error:
        raise OperatorError(invalid, f"{name}: {os.strerror(error.number)}") from None
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise OperatorError(invalid, f"{name}: neither a regular file nor a block device")
    if kind is not None:
        raise OperatorError(invalid, f"{name}: a file of {kind} is not an image")
    return mode
