"""Opens files and terminals on behalf of VMs; root's half of a start (*cat. 4.3*).

Nothing here reads what a file says: kinds and headers are told apart by processes without privileges.
"""

import errno
import fcntl
import os
import stat
import sys
import termios
import tty
from collections.abc import Sequence

from vmd.closing import close
from vmd.config.model import Owner, VmConfig
from vmd.errors import HostError, OperatorError, sentence
from vmd.ipc.messages import VMD_BIOS_MISSING
from vmd.parent.disks import open_image

# Where distributions put SeaBIOS: Debian's package seabios, Fedora's seabios-bin, Arch's seabios, QEMU's own.
FIRMWARE_PATHS = (
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/seabios/bios.bin",
    "/usr/share/qemu/bios-256k.bin",
    "/usr/local/share/qemu/bios-256k.bin",
)


class Pty:
    """The console of a VM: both sides of a pty in raw mode, kept over guest reboots.  Its master does not block.

    The slave stays open here, else a console nobody looks at would hang up and turn output into input.
    """

    def __init__(self) -> None:
        try:
            self.master, self.slave = os.openpty()
        except OSError as error:
            raise HostError("open a pty for the console", error) from error
        tty.setraw(self.slave)
        os.set_blocking(self.master, False)
        self.path = os.ttyname(self.slave)

    def give_to(self, uid: int, gid: int | None) -> None:
        """Set owner and mode: nobody else opens it but the group of the VM, where it has one.

        Unlike vmd, group tty may not write to it (*cat. 4.3*): who may open a terminal may change how it works.
        """
        group, mode = (-1, 0o600) if gid is None else (gid, 0o660)
        try:
            os.fchown(self.slave, uid, group)
            os.fchmod(self.slave, mode)
        except OSError as error:
            raise HostError(f"change the owner of {self.path}", error) from error

    def fds(self) -> dict[str, list[int]]:
        """Return copies of master and slave for a VM process, which are the caller's.  Raises HostError."""
        master, slave = copy_all([self.master, self.slave], f"hand over {self.path}")
        return {"tty": [master], "tty_slave": [slave]}

    def write(self, data: bytes) -> int:
        """Return how much of `data` the pty takes."""
        try:
            return os.write(self.master, data)
        except OSError:  # full
            return 0

    def unread_bytes(self) -> int:
        """Return how much output a viewer has not read yet; a hang-up would lose it.

        0 where that cannot be known: whoever may open the pty may give it a line discipline that does not say.
        """
        try:
            return int.from_bytes(fcntl.ioctl(self.slave, termios.FIONREAD, bytes(4)), sys.byteorder)
        except OSError:
            return 0

    def close(self) -> None:
        """Let the pty go; whoever has it open sees a hang-up."""
        close(self.master)
        close(self.slave)


def copy_all(fds: Sequence[int], what: str) -> list[int]:
    """Return copies of descriptors, all or none.  Raises HostError saying what was tried."""
    copies: list[int] = []
    try:
        for fd in fds:
            copies.append(os.dup(fd))
    except OSError as error:
        for fd in copies:
            close(fd)
        raise HostError(what, error) from error
    return copies


class BootFiles:
    """Descriptors a VM boots from, until they are handed over; closes what was not."""

    def __init__(self) -> None:
        self.boot: int | None = None
        self.boot_name = ""
        self.initrd: int | None = None

    def take_boot(self) -> int:
        """Return the kernel or firmware, which is the caller's from now on."""
        boot, self.boot = self.boot, None
        assert boot is not None
        return boot

    def take_initrd(self) -> list[int]:
        """Return the initrd, if there is one; it is the caller's from now on."""
        initrd, self.initrd = self.initrd, None
        return [initrd] if initrd is not None else []

    def close(self) -> None:
        """Close what nobody took."""
        for fd in (self.boot, self.initrd):
            if fd is not None:
                close(fd)
        self.boot = self.initrd = None


def open_regular(path: str, what: str, user: Owner | None = None) -> int:
    """Open a regular file for reading, with the rights of a user if somebody but root has named it.

    Raises OperatorError naming `what` and the path.  O_NONBLOCK: a FIFO must not hold up the daemon.
    """
    if user is not None:
        fd = open_image(path, f"{what} {path}", user, writable=False, missing=errno.ENOENT)
    else:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError as error:
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
    # One that was opened as a mere place proves that somebody could name the file, not that he may read it.
    if flags & os.O_PATH or flags & os.O_ACCMODE == os.O_WRONLY:
        raise OperatorError(errno.EACCES, f"{name}: not open for reading")


def open_firmware() -> tuple[int, str]:
    """Open the BIOS image of the distribution; OperatorError(VMD_BIOS_MISSING) if there is none."""
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


def open_boot_files(config: VmConfig, given_boot: int | None, given_initrd: int | None) -> BootFiles:
    """Open kernel (or firmware) and initrd; descriptors that a client opened win over configured paths.

    Owns both given descriptors from the first line on.
    """
    files = BootFiles()
    files.boot, files.initrd = given_boot, given_initrd
    try:
        if given_boot is not None:
            files.boot_name = config.kernel or "boot image"
            require_regular(given_boot, files.boot_name)
        elif config.kernel:
            files.boot, files.boot_name = open_regular(config.kernel, "kernel", config.rights.boot), config.kernel
        else:
            files.boot, files.boot_name = open_firmware()
        if given_initrd is not None:
            require_regular(given_initrd, config.initrd or "initrd")
        elif config.initrd and given_boot is None:  # a kernel given for once does not go with the usual initrd
            files.initrd = open_regular(config.initrd, "initrd", config.rights.boot)
    except BaseException:
        files.close()
        raise
    return files
