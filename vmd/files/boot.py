"""Opens what a VM boots: a kernel and its initrd, or firmware.  A client may have opened them instead.

The content of the files is not parsed here, but by a process without privileges.
"""

import errno
import fcntl
import os
import stat

from vmd.closing import close
from vmd.errors import VMD_BIOS_MISSING, OperatorError, sentence
from vmd.files.images import open_image
from vmd.memfile import CONSTANT, seal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PIECE = 1 << 20
# SeaBIOS as packaged by distributions: seabios of Debian and Arch, seabios-bin of Fedora, and QEMU's own.
FIRMWARE_PATHS = (
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/seabios/bios.bin",
    "/usr/share/qemu/bios-256k.bin",
    "/usr/local/share/qemu/bios-256k.bin",
)


class BootFiles:
    """The descriptors that a VM boots from.  `close` closes those that were not taken."""

    def __init__(self) -> None:
        self.boot: int | None = None
        self.boot_name = ""
        self.initrd: int | None = None

    def take_boot(self) -> int:
        """Return the kernel or firmware.  The caller owns the descriptor."""
        boot, self.boot = self.boot, None
        assert boot is not None
        return boot

    def take_initrd(self) -> list[int]:
        """Return the initrd if there is one, else [].  The caller owns the descriptor."""
        initrd, self.initrd = self.initrd, None
        return [initrd] if initrd is not None else []

    def close(self) -> None:
        """Close the descriptors that were not taken."""
        for fd in (self.boot, self.initrd):
            if fd is not None:
                close(fd)
        self.boot = self.initrd = None


def open_regular(path: str, what: str) -> int:
    """Open a regular file for reading.  With the rights of a user, `open_image` does it, which checks the file first.

    O_NONBLOCK, because opening a FIFO would block.  Raises OperatorError naming `what` and the path.
    """
    if os.geteuid():
        fd = open_image(path, f"{what} {path}", writable=False, missing=errno.ENOENT)
    else:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError as error:
            if os.path.isdir(path):  # the opener has no right to list directories, so the error may be another one
                raise OperatorError(errno.EINVAL, f"{what} {path}: not a regular file") from None
            number = error.errno or errno.EIO
            raise OperatorError(number, f"{what} {path}: {os.strerror(number)}") from None
    try:
        require_regular(fd, f"{what} {path}")
    except OperatorError:
        close(fd)
        raise
    return fd


def require_regular(fd: int, name: str) -> None:
    """Raise OperatorError unless the descriptor is a regular file, open for reading."""
    try:
        mode = os.fstat(fd).st_mode
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    except OSError as error:
        raise OperatorError(error.errno or errno.EIO, f"{name}: {sentence(error)}") from None
    if not stat.S_ISREG(mode):
        advice = " but a block device: give it as disk" if stat.S_ISBLK(mode) else ""
        raise OperatorError(errno.EINVAL, f"{name}: not a regular file{advice}")
    # A descriptor with O_PATH does not prove that its owner may read the file.
    if flags & os.O_PATH or flags & os.O_ACCMODE == os.O_WRONLY:
        raise OperatorError(errno.EACCES, f"{name}: not open for reading")


def require_readable(fd: int, name: str, groups: "Sequence[int]") -> None:
    """Raise OperatorError unless the mode bits of an open file let this user, with these groups, read it.

    The check is of the descriptor that will be used, so nobody can exchange the file in between.
    """
    user = os.geteuid()
    if user == 0:
        return
    try:
        status = os.fstat(fd)
    except OSError as error:
        raise OperatorError(error.errno or errno.EIO, f"{name}: {sentence(error)}") from None
    if status.st_uid == user:
        allowed = status.st_mode & stat.S_IRUSR
    elif status.st_gid in groups:
        allowed = status.st_mode & stat.S_IRGRP
    else:
        allowed = status.st_mode & stat.S_IROTH
    if not allowed:
        raise OperatorError(errno.EACCES, f"{name}: uid {user} may not read it")


def copy_to_memory(fd: int, memory: int, name: str, bytes_max: int, on_piece: "Callable[[], None]") -> None:
    """Copy a file to an empty memory file, and seal that against changes.

    `on_piece` is called after each piece.  Raises OperatorError.
    """
    done = 0
    try:
        while piece := os.pread(fd, PIECE, done):
            done += len(piece)
            if done > bytes_max:
                raise OperatorError(errno.EFBIG, f"{name}: larger than {bytes_max >> 20} MiB, the limit for a copy")
            os.write(memory, piece)
            on_piece()
        seal(memory, CONSTANT)
    except OSError as error:
        raise OperatorError(error.errno or errno.EIO, f"{name}: cannot be copied: {sentence(error)}") from None


def open_firmware() -> tuple[int, str]:
    """Open the BIOS image of the distribution.  Raises OperatorError, VMD_BIOS_MISSING if there is none."""
    for path in FIRMWARE_PATHS:
        try:
            return open_regular(path, "firmware"), path
        except OperatorError as error:
            if error.number not in (errno.ENOENT, errno.ENOTDIR):
                raise
    raise OperatorError(
        VMD_BIOS_MISSING,
        f"no BIOS image at {' or '.join(FIRMWARE_PATHS)}; install package seabios or boot a kernel",
    )


def open_boot_files(kernel: str, initrd: str) -> BootFiles:
    """Open a kernel, or the firmware of this host if `kernel` is "", and the initrd if there is one.

    Raises OperatorError.
    """
    files = BootFiles()
    try:
        if kernel:
            files.boot, files.boot_name = open_regular(kernel, "kernel"), kernel
        else:
            files.boot, files.boot_name = open_firmware()
        if initrd:
            files.initrd = open_regular(initrd, "initrd")
    except BaseException:
        files.close()
        raise
    return files
