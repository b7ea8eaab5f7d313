"""Taps: a network interface whose other end is a descriptor (linux/if_tun.h)."""

import errno
import fcntl
import os
from struct import Struct

from vmd.errors import HostError, OperatorError, sentence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

TUN = "/dev/net/tun"
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
IFF_TUN_EXCL = 0x8000  # never attach to one that is there already
IFREQ = Struct("=16sH22x")
NUMBERS = 4096  # tap0 ... : more than any host has VMs for


def make(name: str, reserved: "Collection[str]" = ()) -> tuple[int, str]:
    """Make a tap of this name or, without one, of the first that is neither taken nor reserved.

    Returns its descriptor, non-blocking, whose end is the interface's end too, and its name.

    Raises:
        OperatorError: the name is taken, or this host has no taps.
    """
    fd = open_tun()
    try:
        if name:
            return fd, claim(fd, name)
        for number in range(NUMBERS):
            if f"tap{number}" in reserved:
                continue
            try:
                return fd, claim(fd, f"tap{number}")
            except OperatorError as error:
                if error.code != errno.EBUSY:
                    raise
        raise OperatorError(errno.ENOSPC, f"tap0 to tap{NUMBERS - 1} are all taken")
    except BaseException:
        os.close(fd)
        raise


def attach(name: str) -> int:
    """Return a descriptor, non-blocking, of a tap that somebody else has made; it stays when that is closed.

    Raises:
        OperatorError: another program uses it, or it is no such tap.
    """
    fd = open_tun()
    try:
        fcntl.ioctl(fd, TUNSETIFF, IFREQ.pack(name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    except OSError as error:
        os.close(fd)
        if error.errno == errno.EBUSY:
            raise OperatorError(errno.EBUSY, f"interface {name} exists already, and another program uses it") from None
        if error.errno == errno.EINVAL:
            reason = f"interface {name} exists already, and is not a tap of one queue: ip tuntap add {name} mode tap"
            raise OperatorError(errno.EINVAL, reason) from None
        failed = HostError(f"attach to interface {name}", error)
        raise OperatorError(failed.errno, str(failed)) from None
    return fd


def open_tun() -> int:
    """Open what taps are made from.  Raises OperatorError."""
    try:
        return os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        reason = sentence(error)
        raise OperatorError(error.errno or errno.EIO, f"{TUN}: {reason}: load the kernel module tun") from None


def claim(fd: int, name: str) -> str:
    """Make the tap behind a descriptor.  Raises OperatorError, EBUSY if the name is taken."""
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_TUN_EXCL
    try:
        fcntl.ioctl(fd, TUNSETIFF, IFREQ.pack(name.encode(), flags))
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.EEXIST, errno.EINVAL):  # EINVAL: there is one, and it is no tap
            raise OperatorError(errno.EBUSY, f"interface {name} exists already") from None
        failed = HostError(f"make interface {name}", error)
        raise OperatorError(failed.errno, str(failed)) from None
    return name
