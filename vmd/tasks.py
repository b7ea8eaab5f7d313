"""Threads and forked processes that a host has no room for: one sentence wherever one is started.

Python says so by a RuntimeError for a thread, and by an OSError for a process.
"""

import errno
import posix as os

from vmd.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def start_thread(name: str, start: "Callable[[], object]") -> None:
    """Start a thread by a call of `start`.  Raises HostError if there can be no more."""
    try:
        start()
    except RuntimeError as error:
        raise HostError(f"start thread {name}", errno.EAGAIN) from error


def fork(what: str) -> int:
    """Fork, to do what `what` says; returns as os.fork does.  Raises HostError."""
    try:
        return os.fork()
    except OSError as error:
        raise HostError(what, error) from error
