"""The pty of a VM's console."""

import fcntl
import os
import sys
import termios
import tty
from collections.abc import Sequence

from vmd.closing import close
from vmd.errors import HostError


class Pty:
    """The pty of a VM's console in raw mode.  It is kept when the guest reboots.  Its master does not block.

    The slave stays open here.  Else a console without a viewer would hang up, and lose the raw mode: output would come
    back as input.
    """

    def __init__(self, sides: tuple[int, int] | None = None) -> None:
        """Open a pty, or take over the `sides` of an existing one.  Raises HostError."""
        try:
            self.master, self.slave = sides or os.openpty()
        except OSError as error:
            raise HostError("open a pty for the console", error) from error
        try:
            self.path = os.ttyname(self.slave)
        except OSError as error:
            self.close()
            raise HostError("take over the pty of a console", error) from error
        if sides is None:
            tty.setraw(self.slave)
            os.set_blocking(self.master, False)

    def give_to(self, uid: int, gid: int | None) -> None:
        """Set owner and mode.  Only the owner and the group of the VM, if it has one, may open the pty.

        Unlike vmd, group tty may not write to it (*cat. 4.3*): a user who may open a terminal may also change its
        settings.  Raises HostError.
        """
        group, mode = (-1, 0o600) if gid is None else (gid, 0o660)
        try:
            os.fchown(self.slave, uid, group)
            os.fchmod(self.slave, mode)
        except OSError as error:
            raise HostError(f"change the owner of {self.path}", error) from error

    def fds(self) -> dict[str, list[int]]:
        """Return copies of master and slave for a VM process.  The caller owns them.  Raises HostError."""
        master, slave = copy_all([self.master, self.slave], f"hand over {self.path}")
        return {"tty": [master], "tty_slave": [slave]}

    def write(self, data: bytes) -> int:
        """Write to the pty without waiting; return how many bytes it has taken."""
        try:
            return os.write(self.master, data)
        except OSError:  # full
            return 0

    def unread_bytes(self) -> int:
        """Return how many bytes of output no viewer has read yet.  A hang-up would lose them.

        Return 0 if that is unknown: a user who may open the pty may set a line discipline that does not tell.
        """
        try:
            return int.from_bytes(fcntl.ioctl(self.slave, termios.FIONREAD, bytes(4)), sys.byteorder)
        except OSError:
            return 0

    def close(self) -> None:
        """Close the pty.  A program that has it open sees a hang-up."""
        close(self.master)
        close(self.slave)


def copy_all(fds: Sequence[int], what: str) -> list[int]:
    """Return copies of descriptors, all or none.  Raises HostError; `what` names what was tried."""
    copies: list[int] = []
    try:
        for fd in fds:
            copies.append(os.dup(fd))
    except OSError as error:
        for fd in copies:
            close(fd)
        raise HostError(what, error) from error
    return copies
