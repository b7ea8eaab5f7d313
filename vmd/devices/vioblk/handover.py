"""The lock of a disk: whether we still have it; let go, and perhaps taken back, when the guest may go on elsewhere.

Whoever opens the image next gets everything that was acknowledged, and from then on nothing is written here any more:
neither by the end of this process.  The lock is taken back only if the image is as it was left.  Where the guest goes
on the image is written to before it runs, so that this tells whether it has.

Storage of a network can lose the lock while the VM runs.  From then on nothing is finished here: somebody else may have
the image.  When the lock is taken again, the image's mark tells whether somebody has written to it: it is compared with
that of the last time when the lock was ours, and with that of the time since when the VM stands still.
"""

import _thread
import errno
import posix as os
import stat

from vmd.errors import OperatorError, VmdError
from vmd.images.locks import lock, refresh, unlock
from vmd.ipc import devmsg
from vmd.log import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.images.image import Image


NO_MARK = (0, 0)  # a device has none


class HandOver:
    """The lock of one disk, which stands still; but `check` is for one that does not."""

    def __init__(self, image: "Image") -> None:
        self.image = image
        self.left: tuple[int, int] | None = None  # length and time of change of the image, since it was let go
        self.lost = ""  # why the lock is not known to be ours any more
        self.standing = False  # no request of the guest is under way, and none will be
        self._ours = look(image.fd)  # the mark when the lock was last known to be ours
        self._stood: tuple[int, int] | None = None  # the first one since the lock was lost and the VM stands still
        self._changing = _thread.allocate_lock()  # so that nothing is locked again just after it was let go

    def check(self) -> str:
        """Return why the lock is not known to be ours any more, or "".  May wait for storage; on any thread."""
        with self._changing:
            if self.image.writable and self.left is None and not self.lost:
                try:
                    refresh(self.image.fd)
                    self._ours = look(self.image.fd)
                except OSError as error:
                    self.lost = (
                        "its lock is lost: somebody else has locked the image, and may have changed it"
                        if error.errno in (errno.EAGAIN, errno.EACCES)
                        else f"its lock may be lost: {error.strerror or error}"
                    )
            elif self.lost and self.standing and self._stood is None:
                self._stood = look(self.image.fd)  # None: it is looked at again
            return self.lost

    @property
    def settled(self) -> bool:
        """Whether there is nothing to find out soon."""
        return not self.lost or self._stood is not None

    def let_go(self) -> int:
        """Finish the image and let go of its lock; returns 0, or 1: it cannot be finished, and is as before."""
        image = self.image
        if not image.writable or self.left is not None:
            return 0
        if self.lost:
            log.error(f"{image.path}: cannot be handed over: {self.lost}")
            return 1
        try:
            image.flush()
            image.finish()
            left = mark(image.fd)
        except OSError as error:
            log.error(f"{image.path}: cannot be handed over: {error.strerror or error}")
            return 1
        with self._changing:
            self.left = left
            unlock(image.fd)
        return 0

    def take_back(self) -> int:
        """Take the lock again, one that was let go or lost; returns one of devmsg.TAKEN_*."""
        with self._changing:
            return self._take_back()

    def _take_back(self) -> int:
        image = self.image
        if self.left is None and not self.lost:
            return devmsg.TAKEN
        try:
            lock(image.fd, image.path, writable=True)
            if self.left is not None and mark(image.fd) != self.left:
                unlock(image.fd)
                return devmsg.TAKEN_CHANGED
            status = self._compare() if self.lost else devmsg.TAKEN
        except OperatorError as error:
            return devmsg.TAKEN_IN_USE if error.number == errno.EBUSY else self._failed(error)
        except (OSError, VmdError) as error:
            unlock(image.fd)
            return self._failed(error)
        self.left, self.lost, self._stood = None, "", None
        return status

    def _compare(self) -> int:
        """Return whether somebody has written to the image since the lock was lost.  Raises OSError."""
        now = mark(self.image.fd)
        if now != NO_MARK and now in (self._ours, self._stood):
            return devmsg.TAKEN
        return devmsg.TAKEN_UNSURE if now == NO_MARK or self._stood is None else devmsg.TAKEN_WRITTEN

    def sign(self) -> int:
        """Have whoever has let go of it know that its guest has run here; returns 0, or 1: it cannot be written."""
        image = self.image
        try:
            if image.writable and mark(image.fd) != NO_MARK:
                os.pwrite(image.fd, os.pread(image.fd, 1, 0), 0)
                image.flush()
        except OSError as error:
            log.error(f"{image.path}: cannot be written: {error.strerror or error}")
            return 1
        return 0

    def _failed(self, error: Exception) -> int:
        log.error(f"{self.image.path}: cannot be taken back: {error}")
        return devmsg.TAKEN_FAILED


def look(fd: int) -> tuple[int, int] | None:
    """Return the mark of a file, or None if the storage does not answer."""
    try:
        return mark(fd)
    except OSError:
        return None


def mark(fd: int) -> tuple[int, int]:
    """Return what tells whether a file was written to; a device does not say.  Raises OSError."""
    status = os.fstat(fd)
    return NO_MARK if stat.S_ISBLK(status.st_mode) else (status.st_size, status.st_mtime_ns)
