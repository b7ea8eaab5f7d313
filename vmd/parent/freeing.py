"""The memory of a guest that is gone, given back to the host.

Whoever closes it last frees it, page after page: a second for some ten GiB, in which nobody is served.  That is the
parent where a VM's processes were killed, so it leaves that to a process that does nothing else.
"""

import os

from vmd import signals as signal
from vmd.closing import close_all
from vmd.errors import HostError
from vmd.tasks import fork

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

LARGE_BYTES = 1 << 30  # from here on it takes longer to free it than to start a process


def let_go(fd: int) -> None:
    """Close guest memory, and do not wait until it is free."""
    ours = [fd]
    try:
        if os.fstat(fd).st_blocks * 512 >= LARGE_BYTES:
            gone, kept = os.pipe2(os.O_CLOEXEC)
            ours += gone, kept
            _have_closed(fd, gone)
    except (OSError, HostError):
        pass  # no room for another process: it takes as long as it takes
    finally:
        close_all(ours)


def _have_closed(fd: int, gone: int) -> None:
    """Start a process that closes `fd` once `gone` is at its end, and is nobody's to wait for.  Raises HostError."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # the handlers are ours
    try:
        pid = fork("free the memory of a guest")
        if not pid:
            _close_later(fd, gone)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    os.waitpid(pid, 0)


def _close_later(fd: int, gone: int) -> "NoReturn":
    """Be that process."""
    try:
        if not fork("free the memory of a guest"):
            first, second = sorted((fd, gone))
            for low, high in ((0, first), (first + 1, second), (second + 1, os.sysconf("SC_OPEN_MAX"))):
                os.closerange(low, high)
            os.read(gone, 1)
    finally:
        os._exit(0)
