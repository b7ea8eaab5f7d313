"""Taps: network interfaces whose other end is a descriptor (linux/if_tun.h)."""

import errno
import fcntl
from struct import Struct

from vmd.errors import HostError, OperatorError
from vmd.privsep.confine import TUNSETIFF

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
IFF_TUN_EXCL = 0x8000  # never attach to an existing interface
IFREQ = Struct("=16sH22x")
NUMBERS = 4096  # tap0 ... : more than any host has VMs for


def make(fd: int, name: str, reserved: "Collection[str]" = ()) -> str:
    """Make a tap and return its name: `name`; if that is empty, the first tap<n> that is neither taken nor reserved.

    `fd` is /dev/net/tun, opened for this tap alone.  When its last duplicate is closed, the interface is gone.

    Raises:
        OperatorError: the name is taken, or this host has no taps.
    """
    if name:
        return claim(fd, name)
    for number in range(NUMBERS):
        if f"tap{number}" in reserved:
            continue
        try:
            return claim(fd, f"tap{number}")
        except OperatorError as error:
            if error.number != errno.EBUSY:
                raise
    raise OperatorError(errno.ENOSPC, f"tap0 to tap{NUMBERS - 1} are all taken")


def attach(fd: int, name: str) -> None:
    """Attach a descriptor to a persistent tap that another program has made.  The tap remains when it is closed.

    Raises:
        OperatorError: another program uses the interface, or it is not a tap of one queue.
    """
    try:
        fcntl.ioctl(fd, TUNSETIFF, IFREQ.pack(name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise OperatorError(errno.EBUSY, f"interface {name} exists already, and another program uses it") from None
        if error.errno == errno.EINVAL:
            reason = f"interface {name} exists already, and is not a tap of one queue: ip tuntap add {name} mode tap"
            raise OperatorError(errno.EINVAL, reason) from None
        failed = HostError(f"attach to interface {name}", error)
        raise OperatorError(failed.number, str(failed)) from None


def claim(fd: int, name: str) -> str:
    """Make the tap behind a descriptor.  Raises OperatorError, EBUSY if the name is taken."""
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_TUN_EXCL
    try:
        fcntl.ioctl(fd, TUNSETIFF, IFREQ.pack(name.encode(), flags))
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.EEXIST, errno.EINVAL):  # EINVAL: the interface exists and is no tap
            raise OperatorError(errno.EBUSY, f"interface {name} exists already") from None
        failed = HostError(f"make interface {name}", error)
        raise OperatorError(failed.number, str(failed)) from None
    return name
