"""Opens disks and ISO images, with the rights that this process has, and looks at no byte of them (*cat. 4.3, 8*).

What a file is gets checked before it is opened: opening a device can have an effect, such as arming a watchdog.
What an image says of itself, imgprobe reads; what is taken from it, at most, is the path of a backing file.
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

# File systems whose files are the kernel, or processes: a backing file there could be root's own memory.
KERNEL_FILE_SYSTEMS = {
    0x9FA0: "proc", 0x62656572: "sysfs", 0x64626720: "debugfs", 0x74726163: "tracefs", 0x73636673: "securityfs",
    0x62656570: "configfs", 0x63677270: "cgroup2", 0x27E0EB: "cgroup", 0xCAFE4A11: "bpf", 0xDE5E81E4: "efivarfs",
}  # fmt: skip


class OpenImage(Record):
    """One image of a disk; `guessed`: nobody but its first bytes said that it has this format."""

    fd: int
    path: str
    format: str
    guessed: bool


class OpenDisk:
    """The images of a disk, open and locked: the disk itself first, what it is based on after it.

    The locks belong to the open files: they last until the last copy of a descriptor is closed.
    """

    read_only = False  # upstream has no disk that is: what cannot be written is an error

    def __init__(self) -> None:
        self.links: list[OpenImage] = []
        self.notes: list[str] = []  # sentences that its operator should read
        self.boots: bool | None = None  # whether a BIOS may find something to start; None: nobody has looked

    def take_fds(self) -> list[int]:
        """Return the descriptors, which are the caller's from now on."""
        fds = [link.fd for link in self.links]
        self.links = []
        return fds

    def close(self) -> None:
        """Close what nobody took."""
        for fd in self.take_fds():
            close(fd)


class Use(Record):
    """How images are opened."""

    in_conf: bool = True  # whether advice is for who writes a vm.conf, else for who types a command
    mends: bool = False  # to complete what was cut off in the middle
    boots: bool = False  # to see whether a BIOS finds something to start
    locked: bool = True  # as for a VM; else for reading only, for who just wants to know


FOR_A_VM = Use()


def open_disk(
    config: DiskConfig, prober: "Prober", use: Use = FOR_A_VM, at: "Callable[[str], None]" = lambda _what: None
) -> OpenDisk:
    """Open and lock a disk, for writing, and the images it is based on, for reading: each is named by the one before.

    `at` is told what is opened next.

    Raises:
        OperatorError: VMD_DISK_MISSING if a file cannot be opened, EBUSY if somebody uses it, EACCES if this
            user may not, else what is wrong with it.
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
    # The name is the operator's, or of the user with whose rights all of this is opened; no guest can change it.
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
        # With a hint its answer cannot make the image something else: imgprobe has seen bytes from anybody.
        link = OpenImage(fd=fd, path=path, format=format_hint or probe.format, guessed=not format_hint)
        disk.links.append(link)
        if use.boots and disk.boots is None and not (BELOW in probe.notes and probe.backing):
            disk.boots = not {NO_CODE, BELOW} & set(probe.notes)
        notes = warnings(probe, raw) + (warnings_of_disk(probe, path) if first else [])
        disk.notes += [f"{name}: {note}" for note in notes]
        if link.format == "raw" or not probe.backing:
            return
        if link.guessed:
            # A guest writes the first bytes of its disk, so what they say must not open another file.
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
    """Return what imgprobe says; if it may not even ask the file for its size, say why.  Raises OperatorError."""
    try:
        return prober.probe(fd, name, hint, boots=boots)
    except OperatorError as error:
        number = next((number for number in DENIALS if error.what.endswith(os.strerror(number))), 0)
        if not number:
            raise
        words = error.what.removesuffix(os.strerror(number)) + explained(number, path, "the user of its VM")
        raise OperatorError(error.number, words) from None


def _examine(fd: int, path: str, name: str, format_hint: str, prober: "Prober", *, boots: bool = False) -> Probe:
    """Return what an image is.  What is raw by somebody's word is never taken for anything else.

    It is not even looked at, but for `boots`.  Raises OperatorError.
    """
    stated = format_hint == "raw"
    # FUSE asks at each call who makes it.  imgprobe reads nothing of what is raw, but is the user who will serve it.
    unasked = stated and not boots and not on_fuse(fd)
    probe = Probe(format="raw", size=0) if unasked else _ask(fd, path, name, format_hint, prober, boots=boots)
    if probe.format != "raw":
        return probe
    try:
        return probe.replace(size=os.lseek(fd, 0, os.SEEK_END))
    except OSError as error:
        raise OperatorError(error.errno or errno.EIO, f"{name}: {error.strerror}") from None


def unfit(probe: Probe, path: str, use: Use = FOR_A_VM) -> str:
    """Return why an image cannot be written to as a disk, or ""."""
    if CORRUPT in probe.notes:
        return f"is marked as corrupt; repair it with qemu-img check -r all {quoted(path)}"
    if GOING_BACK in probe.notes and not use.mends:
        return (
            "was going back to a snapshot with other disks when that was cut off, and they may not be of one time:"
            " do that again with vmctl snapshot -r"
        )
    return "has no bytes: a disk has one sector at least" if probe.format == "raw" and not probe.size else ""


def warnings_of_disk(probe: Probe, path: str) -> list[str]:
    """Return what is said of an image that is written to."""
    notes = (odd_length(probe.size), left_dirty(path) if DIRTY in probe.notes else "")
    return [note for note in notes if note]


def discard_granularity(fd: int) -> int:
    """Return in which pieces a block device gives room back, in bytes; 0 if it is none, or does not say.

    A device process sees neither sysfs nor may it make ioctls, so it is told.
    """
    status = os.fstat(fd)
    if not stat.S_ISBLK(status.st_mode):
        return 0
    device = f"/sys/dev/block/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    for queue in ("queue", "../queue"):  # of the device; of the device whose partition it is
        try:
            with open(f"{device}/{queue}/discard_granularity", "rb") as file:
                return int(file.read(32))
        except (OSError, ValueError):
            continue
    return 0


def open_cdrom(path: str, prober: "Prober", *, locked: bool = True) -> tuple[int, list[str]]:
    """Open and lock an ISO image, or a drive, for reading; also return sentences that its operator should read.

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
    """Return what should be said of a disc.  Raises OperatorError for an image of something else.

    A drive is not looked at: it may have no disc yet, or take its time.
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
    """Open a regular file or block device; a device that is to be written is claimed, but for `claim`.

    Raises OperatorError with code `missing` or `invalid`, or EACCES; `name` begins its sentence.
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
                flags |= os.O_EXCL  # not while it is mounted
            doing = "cannot be opened for writing: " if writable else ""
            # The file that was looked at, whatever the path leads to by now.
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
    """Return the mode of what can be an image.  Raises OperatorError with code `invalid` for anything else."""
    try:
        mode = os.fstat(fd).st_mode
        kind = KERNEL_FILE_SYSTEMS.get(file_system_of(fd))
    except OSError:
        raise  # which its caller explains
    except HostError as error:
        raise OperatorError(invalid, f"{name}: {os.strerror(error.number)}") from None
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise OperatorError(invalid, f"{name}: neither a regular file nor a block device")
    if kind is not None:
        raise OperatorError(invalid, f"{name}: a file of {kind} is no image")
    return mode
