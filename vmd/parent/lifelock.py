"""The lock that says whether a vmm of this daemon lives: guests that shut down outlive a daemon that was killed.

A vmm has it from the moment it is started, without knowing of it.  A new daemon waits for it before it does anything:
until then disks, interfaces and addresses are in use.  The file belongs to a control socket, by which daemons of one
host differ.
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
SAY_AGAIN_S = 5.0  # between two messages to the service manager, which else would give us up
EXTEND_US = 30_000_000


class LifeLock:
    """The file, which goes when nobody has the lock any more."""

    def __init__(self, socket_path: str) -> None:
        self.socket_path = socket_path
        digest = hashlib.sha256(os.fsencode(os.path.abspath(socket_path))).hexdigest()
        self.path = f"{service.RUN_DIRECTORY}/guests-{digest[:16]}"

    def wait(self, *, notify: "Callable[[str], object]" = service.notify) -> None:
        """Wait until no vmm of an earlier daemon is left.  Raises OperatorError if that daemon is there, too."""
        said_s = 0.0
        while True:
            fd = self._take(fcntl.LOCK_EX)
            if fd is not None:
                if fd >= 0:
                    close(fd)
                break
            service.is_free(self.socket_path)
            now_s = time.monotonic()
            if not said_s:
                log.warn("guests of an earlier vmd are still shutting down: waiting for their end")
            if now_s - said_s >= SAY_AGAIN_S:
                said_s = now_s
                notify(f"EXTEND_TIMEOUT_USEC={EXTEND_US}\nSTATUS=Waiting for the guests of an earlier vmd to shut down")
            time.sleep(POLL_S)
        if said_s:
            log.info("the guests of an earlier vmd have ended")
            notify("STATUS=")

    def share(self) -> int:
        """Return a descriptor whose holders have the lock together; -1 where there is none to be had."""
        fd = self._take(fcntl.LOCK_SH)
        return -1 if fd is None else fd

    def remove(self) -> None:
        """Remove the file if nobody has the lock."""
        fd = self._take(fcntl.LOCK_EX)
        if fd is not None and fd >= 0:
            try:
                os.unlink(self.path)
            except OSError as error:
                log.debug(f"{self.path}: {error.strerror}")
            close(fd)

    def _take(self, kind: int) -> int | None:
        """Return a new descriptor with the lock; None if somebody else keeps it from us, -1 if there is no file."""
        while True:
            try:
                fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except OSError as error:
                log.warn(f"{self.path}: {error.strerror}: a daemon that is killed is not known to the next one")
                return -1
            try:
                fcntl.flock(fd, kind | fcntl.LOCK_NB)
                if os.fstat(fd).st_nlink:
                    return fd
            except BlockingIOError:
                close(fd)
                return None
            except OSError as error:
                close(fd)
                log.warn(f"{self.path}: {error.strerror}: a daemon that is killed is not known to the next one")
                return -1
            close(fd)  # somebody has removed it at this moment
