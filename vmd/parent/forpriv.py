"""What only root may open, and priv needs: it gets descriptors, and passes by no file's mode itself."""

import contextlib
import errno
import os

from vmd.closing import close_all
from vmd.errors import OperatorError, sentence

TUN = "/dev/net/tun"
TABLES = {"tables4": "/proc/net/ip_tables_names", "tables6": "/proc/net/ip6_tables_names"}


def open_tuns(count: int) -> list[int]:
    """Open what taps are made from, once for each.  Raises OperatorError."""
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
    """Open what says which tables of the old iptables are loaded; nothing where this kernel has none."""
    found = {}
    for name, path in TABLES.items():
        with contextlib.suppress(OSError):
            found[name] = [os.open(path, os.O_RDONLY | os.O_CLOEXEC)]
    return found
