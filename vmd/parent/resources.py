"""Opens terminals for VMs."""

import fcntl
import os
import sys
import termios
import tty
from collections.abc import Sequence

from vmd.closing import close
from vmd.errors import HostError


class Pty:
    """The console of a VM: both sides of a pty in raw mode, kept over guest reboots.  Its master does not block.

    The slave stays open here, else a console nobody looks at would hang up and turn output into input.
    """

    def __init__(self, sides: tuple[int, int] | None = None) -> None:
        """Open one, or take the `sides` of one that is there, which are ours from now on.  Raises HostError."""
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
