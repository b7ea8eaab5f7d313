"""Raw images: the file is the disk."""

import errno
import os
import stat

from vmd.errors import ImageError
from vmd.images.guard import Guard
from vmd.images.hostfile import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    data_span,
    fallocate,
    read_views,
    total,
    write_views,
    write_zeroes,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)


class RawImage:
    """A file or block device whose bytes are the disk's.

    `guessed`: nobody said that it is raw, its bytes only were no signature.  A guest that could write one would
    have the file read as what it says when the disk is opened next, so it may not.
    """

    def __init__(self, fd: int, path: str, *, writable: bool, guessed: bool = False) -> None:
        """Take the descriptor, which is closed by `close`.  Raises ImageError."""
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise ImageError(path, "neither a regular file nor a block device")
        self.fd = fd
        self.path = path
        self.writable = writable
        self.size = os.lseek(fd, 0, os.SEEK_END)
        self.guard = Guard(fd, path) if guessed and writable else None
        self.failed = 0  # errno of a flush that lost data

    def check(self, offset: int, length: int) -> None:
        """Raise OSError unless a range is inside the disk."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OSError(errno.EINVAL, f"{self.path}: {length} bytes at {offset} are outside the disk")

    def check_write(self, offset: int, length: int) -> None:
        """Raise OSError unless a range may be written."""
        self.check(offset, length)
        if not self.writable:
            raise OSError(errno.EROFS, f"{self.path}: opened for reading only")

    def preadv(self, offset: int, views: "Sequence[memoryview]") -> None:
        """See Image; a file that has been cut short is an error, never zeroes."""
        length = total(views)
        if offset < 0 or offset + length > self.size:
            self.check(offset, length)
        if read_views(self.fd, views, offset, length) != length:
            raise OSError(errno.EIO, f"{self.path}: the file has become shorter than {self.size} bytes")

    def pwritev(self, offset: int, views: "Sequence[memoryview]") -> None:
        """See Image."""
        length = total(views)
        self.check_write(offset, length)
        if self.guard is not None and self.guard.concerns(offset, length):
            self.guard.write(offset, views, length)
        else:
            write_views(self.fd, views, offset, length)

    def flush(self) -> None:
        """See Image; the kernel reports lost data once, we do ever after."""
        if self.failed:
            raise OSError(self.failed, f"{self.path}: an earlier flush failed, data was lost")
        if not self.writable:
            return
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            self.failed = error.errno or errno.EIO
            raise

    def discard(self, offset: int, length: int) -> None:
        """See Image; a file system that cannot is no error."""
        self.check_write(offset, length)
        if length:
            self._fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """See Image."""
        self.check_write(offset, length)
        if not length:
            return
        how = FALLOC_FL_PUNCH_HOLE if unmap else FALLOC_FL_ZERO_RANGE
        if not self._fallocate(how | FALLOC_FL_KEEP_SIZE, offset, length):
            write_zeroes(self.fd, offset, length)

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        """Return whether the file system could do it."""
        try:
            fallocate(self.fd, mode, offset, length)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            return False
        return True

    def span(self, offset: int) -> tuple[bool, int]:
        """See Image."""
        return data_span(self.fd, offset, self.size)

    def close(self) -> None:
        """See Image."""
        os.close(self.fd)
