"""Starting threads and forking, with a HostError if the host allows no more threads or processes.

Python raises RuntimeError for a thread, and OSError for a process.
"""

import errno
import posix as os

from vmd.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def start_thread(name: str, start: "Callable[[], object]") -> None:
    """Start a thread by calling `start`.  Raises HostError if the host allows no more threads."""
    try:
        start()
    except RuntimeError as error:
        raise HostError(f"start thread {name}", errno.EAGAIN) from error


def fork(what: str) -> int:
    """Fork; returns the same as os.fork.  `what` is the purpose, for the error.  Raises HostError."""
    try:
        return os.fork()
    except OSError as error:
        raise HostError(what, error) from error
