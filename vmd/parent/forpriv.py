"""Files that priv needs and only root may open.  The parent opens them, because priv cannot override file modes."""

import contextlib
import errno
import os

from vmd.closing import close_all
from vmd.errors import OperatorError, sentence

TUN = "/dev/net/tun"
TABLES = {"tables4": "/proc/net/ip_tables_names", "tables6": "/proc/net/ip6_tables_names"}


def open_tuns(count: int) -> list[int]:
    """Open /dev/net/tun once for each of `count` taps.  The caller owns the descriptors.  Raises OperatorError."""
    fds: list[int] = []
    try:
        for _ in range(count):
            fds.append(os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        close_all(fds)
        reason = sentence(error)
        advice = "" if error.errno in (errno.EMFILE, errno.ENFILE) else ": load the kernel module tun"
        raise OperatorError(error.errno or errno.EIO, f"{TUN}: {reason}{advice}") from None
    return fds


def open_tables() -> dict[str, list[int]]:
    """Open the lists of the loaded tables of the old iptables; without those that this kernel does not have."""
    found = {}
    for name, path in TABLES.items():
        with contextlib.suppress(OSError):
            found[name] = [os.open(path, os.O_RDONLY | os.O_CLOEXEC)]
    return found
