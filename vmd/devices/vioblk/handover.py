"""The lock of a disk's image: is it still ours; letting it go for another host, and taking it back.

When the guest may go on at another host, this process lets go of the lock.  By then every acknowledged write is on
stable storage.  Afterwards this process never writes to the image, not even when it ends.  It takes the lock back only
if the image is unchanged.  The other host writes to the image before the guest runs there (`sign`), so an unchanged
image means that the guest has not run there.

Network storage can lose the lock while the VM runs.  From then on this process finishes no image: another host may have
it.  When the lock is taken again, the image's mark tells whether somebody else has written to the image.  The mark is
compared with the one from when the lock was last known to be ours, and with the first one that was read after the loss
while the VM stood still.
"""

import _stat as stat
import _thread
import errno
import posix as os

from vmd.errors import OperatorError, VmdError
from vmd.images.locks import lock, refresh, unlock
from vmd.ipc import devmsg
from vmd.log import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.images.image import Image


NO_MARK = (0, 0)  # the mark of a block device, which does not tell whether it was written to


class HandOver:
    """The lock of one disk.  `check` may run at any time; all other methods need a disk that stands still."""

    def __init__(self, image: "Image") -> None:
        self.image = image
        self.left: tuple[int, int] | None = None  # the image's mark when the lock was let go; None: it was not
        self.lost = ""  # why the lock is not known to be ours any more
        self.paused = False  # the machine is paused, and no request is in flight
        self._ours = look(image.fd)  # the mark when the lock was last known to be ours
        self._paused_mark: tuple[int, int] | None = None  # the first mark read in a pause after the loss of the lock
        self._changing = _thread.allocate_lock()  # so that `check` does not lock an image that was just let go

    def check(self) -> str:
        """Refresh the lock; return why it is not known to be ours any more, or "".

        May wait for storage.  Called on any thread.
        """
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
            elif self.lost and self.paused and self._paused_mark is None:
                self._paused_mark = look(self.image.fd)  # None: the next check tries again
            return self.lost

    @property
    def settled(self) -> bool:
        """Whether the next check is not urgent: the lock is ours, or the mark after its loss is known."""
        return not self.lost or self._paused_mark is not None

    def let_go(self) -> int:
        """Finish the image and let go of its lock.  Returns 0, or 1 if that fails and the lock is kept."""
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
        """Take the lock again after it was let go or lost.  Returns one of devmsg.TAKEN_*."""
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
        self.left, self.lost, self._paused_mark = None, "", None
        return status

    def _compare(self) -> int:
        """Return TAKEN, TAKEN_WRITTEN or TAKEN_UNSURE: was the image written to since the lock was lost?

        Raises:
            OSError: of the storage.
        """
        now = mark(self.image.fd)
        if now != NO_MARK and now in (self._ours, self._paused_mark):
            return devmsg.TAKEN
        return devmsg.TAKEN_UNSURE if now == NO_MARK or self._paused_mark is None else devmsg.TAKEN_WRITTEN

    def sign(self) -> int:
        """Change the image's mark, so that the host which let go of the image knows that the guest has run here.

        Returns 0, or 1 if the image cannot be written.
        """
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
    """Return length and time of change, which tell whether a file was written to; NO_MARK for a block device.

    Raises:
        OSError: of the storage.
    """
    status = os.fstat(fd)
    return NO_MARK if stat.S_ISBLK(status.st_mode) else (status.st_size, status.st_mtime_ns)
