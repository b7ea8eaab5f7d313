"""The lock that shows whether a vmm of this daemon lives.

If a daemon is killed, its guests shut down and outlive it for that time.  Their vmm holds the lock: it inherits a
descriptor when it is started, and does nothing with it.  A new daemon waits for the lock before anything else, because
the guests still use disks, interfaces and addresses.  Daemons of one host have different control sockets, and each
control socket has its own file.
"""

import fcntl
import hashlib
import os
import time

from vmd.closing import close
from vmd.log import log
from vmd.parent import service

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

POLL_S = 0.1
SAY_AGAIN_S = 5.0  # between two messages to the service manager, which would else stop waiting for the start
EXTEND_US = 30_000_000
UNKNOWN = "if this vmd is killed, the next one will not wait for its guests"


class LifeLock:
    """The file of the lock.  It is removed when no process has the lock any more."""

    def __init__(self, socket_path: str) -> None:
        self.socket_path = socket_path
        digest = hashlib.sha256(os.fsencode(os.path.abspath(socket_path))).hexdigest()
        self.path = f"{service.RUN_DIRECTORY}/guests-{digest[:16]}"

    def wait(self, *, notify: "Callable[[str], object]" = service.notify) -> None:
        """Wait until every vmm of an earlier daemon has ended.  Raises OperatorError if that daemon still runs."""
        said_s: float | None = None
        while True:
            fd = self._take(fcntl.LOCK_EX)
            if fd is not None:
                if fd >= 0:
                    close(fd)
                break
            service.is_free(self.socket_path)
            now_s = time.monotonic()
            if said_s is None:
                log.warn("guests of an earlier vmd are still shutting down: waiting for their end")
            if said_s is None or now_s - said_s >= SAY_AGAIN_S:
                said_s = now_s
                notify(f"EXTEND_TIMEOUT_USEC={EXTEND_US}\nSTATUS=Waiting for the guests of an earlier vmd to shut down")
            time.sleep(POLL_S)
        if said_s is not None:
            log.info("the guests of an earlier vmd have ended")
            notify("STATUS=")

    def share(self) -> int:
        """Return a descriptor with a shared lock, which the caller owns; -1 if it is not available."""
        fd = self._take(fcntl.LOCK_SH)
        return -1 if fd is None else fd

    def remove(self) -> None:
        """Remove the file if no process has the lock."""
        fd = self._take(fcntl.LOCK_EX)
        if fd is not None and fd >= 0:
            try:
                os.unlink(self.path)
            except OSError as error:
                log.debug(f"{self.path}: {error.strerror}")
            close(fd)

    def _take(self, kind: int) -> int | None:
        """Return a new descriptor with the lock; None if another process has it, -1 if there can be no file."""
        try:
            return self._locked(kind)
        except BlockingIOError:
            return None
        except OSError as error:
            log.warn(f"{self.path}: {error.strerror}: {UNKNOWN}")
            return -1

    def _locked(self, kind: int) -> int:
        """Return a new descriptor of the present file, with the lock.  Raises OSError."""
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, kind | fcntl.LOCK_NB)
                if os.fstat(fd).st_nlink:
                    return fd
            except OSError:
                close(fd)
                raise
            close(fd)  # another daemon has just removed the file
