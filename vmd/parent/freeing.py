"""Guest memory of an ended VM is given back to the host.

The process that closes guest memory last frees it page by page.  That takes a second for about ten GiB.  If the VM's
processes were killed, the last one is the parent, which would serve nobody meanwhile.  So it starts a process that does
only that.
"""

import os

from vmd import signals as signal
from vmd.closing import close_all
from vmd.errors import HostError
from vmd.tasks import fork

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

LARGE_BYTES = 1 << 30  # freeing more than this takes longer than starting a process


def let_go(fd: int) -> None:
    """Close guest memory without waiting until it is freed."""
    ours = [fd]
    try:
        if os.fstat(fd).st_blocks * 512 >= LARGE_BYTES:
            gone, kept = os.pipe2(os.O_CLOEXEC)
            ours += gone, kept
            _have_closed(fd, gone)
    except (OSError, HostError):
        pass  # no other process can be started: closing it here may take long
    finally:
        close_all(ours)


def _have_closed(fd: int, gone: int) -> None:
    """Start a process that closes `fd` when the pipe `gone` has no writing end any more.  Raises HostError.

    The process is forked twice, so that init reaps it.
    """
    # The child must not run the parent's signal handlers.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = fork("free the memory of a guest")
        if not pid:
            _close_later(fd, gone)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    os.waitpid(pid, 0)


def _close_later(fd: int, gone: int) -> "NoReturn":
    """Run in the child: fork again, wait, and end."""
    try:
        if not fork("free the memory of a guest"):
            first, second = sorted((fd, gone))
            for low, high in ((0, first), (first + 1, second), (second + 1, os.sysconf("SC_OPEN_MAX"))):
                os.closerange(low, high)
            os.read(gone, 1)
    finally:
        os._exit(0)
