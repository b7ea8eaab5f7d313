"""Raw images: the file is the disk.

A disk consists of whole sectors.  If a file ends inside a sector, the rest of that sector reads as zeroes, as with
QEMU.  A write to that sector extends the file; a device cannot be extended.
"""

import _stat as stat
import errno
import posix as os
from io import SEEK_END

from vmd.errors import ImageError
from vmd.images.guard import Guard
from vmd.images.hostfile import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    Cursor,
    StableStorage,
    clear,
    data_span,
    fallocate,
    is_device,
    padding,
    read_views,
    require_larger,
    storage_granularity,
    total,
    write_views,
    write_zeroes,
)
from vmd.ipc.foreign import odd_length

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCK = 4096  # largest block that the page cache of a device reads and writes at once
UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)


class RawImage:
    """A file or block device that has the bytes of the disk.

    `guessed`: the format is not configured, and the bytes are not the signature of another format.  Then a guest must
    not write such a signature: the next time the disk is opened, the file would be taken for that format (`Guard`).
    """

    def __init__(
        self, fd: int, path: str, *, writable: bool, guessed: bool = False, discard_granularity: int = 0
    ) -> None:
        """Open the image behind `fd`; `close` closes the descriptor.  `discard_granularity` is that of a block device.

        Raises ImageError.
        """
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
            raise ImageError(path, "neither a regular file nor a block device")
        self.fd = fd
        self.path = path
        self.writable = writable
        self.file_bytes = os.lseek(fd, 0, SEEK_END)
        self.size = self.file_bytes + padding(self.file_bytes)
        self.guard = Guard(fd, path) if guessed and writable else None
        self.stable = StableStorage(fd, path)
        self.granularity = BLOCK if stat.S_ISBLK(status.st_mode) else 1  # of fallocate
        self.discard_granularity = storage_granularity(status, discard_granularity)
        self.remark = odd_length(self.file_bytes)

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
        """See Image.  Reading after the new end of a file that was cut short is an error."""
        length = total(views)
        if offset < 0 or offset + length > self.size:
            self.check(offset, length)
        got = read_views(self.fd, views, offset, length)
        if got == length:
            return
        if offset + got < self.file_bytes:
            raise OSError(errno.EIO, f"{self.path}: the file has become shorter than {self.file_bytes} bytes")
        cursor = Cursor(views)
        cursor.take(got)
        clear(cursor.take(length - got))

    def pwritev(self, offset: int, views: "Sequence[memoryview]") -> None:
        """See Image."""
        length = total(views)
        self.check_write(offset, length)
        if self.guard is not None and self.guard.concerns(offset, length):
            self.guard.write(offset, views, length)
        else:
            write_views(self.fd, views, offset, length)

    def flush(self) -> None:
        """See Image."""
        if self.writable:
            self.stable.sync()

    def discard(self, offset: int, length: int) -> None:
        """See Image.  A file system without support for it is not an error."""
        self.check_write(offset, length)
        start, end = self._whole_blocks(offset, offset + length)
        if start < end:
            self._fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start, end - start)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """See Image."""
        self.check_write(offset, length)
        start, end = self._whole_blocks(offset, offset + length)
        how = FALLOC_FL_PUNCH_HOLE if unmap else FALLOC_FL_ZERO_RANGE
        if start < end and self._fallocate(how | FALLOC_FL_KEEP_SIZE, start, end - start):
            write_zeroes(self.fd, offset, start - offset)
            write_zeroes(self.fd, end, offset + length - end)
        else:
            write_zeroes(self.fd, offset, length)

    def _whole_blocks(self, start: int, end: int) -> tuple[int, int]:
        """Return start and end of the part of a range that fallocate may handle.  The end may be before the start.

        On a device, fallocate does not exclude concurrent writes to other sectors of the same block.  Such a write
        reads the block, changes its sector and writes the old data of the others back, after the kernel has discarded
        them.
        """
        start += -start % self.granularity
        return start, end - end % self.granularity if end < self.size else end

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        """Call fallocate; return whether the file system supports the mode.  Raises OSError."""
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

    def finish(self) -> None:
        """See Image."""

    def settle(self) -> None:
        """See Image.  There are no changes in memory."""

    def reload(self) -> None:
        """See Image."""

    def grow(self, size: int) -> None:
        """See Image.  A device, such as a logical volume, must have been enlarged before; its size is read again."""
        self.check_write(0, 0)
        found = os.lseek(self.fd, 0, SEEK_END)
        if found < self.file_bytes:
            raise OSError(errno.EIO, f"{self.path}: the file has become shorter than {self.file_bytes} bytes")
        if is_device(self.fd):
            if found + padding(found) != size:
                what = f"is a device of {found} bytes, and the disk has the size of its device"
                raise OSError(errno.EINVAL, f"{self.path}: {what}")
        else:
            require_larger(self.path, found, size)
            os.ftruncate(self.fd, size)
        self.stable.sync()
        self.file_bytes, self.size = os.lseek(self.fd, 0, SEEK_END), size
        self.remark = odd_length(self.file_bytes)

    def close(self) -> None:
        """See Image."""
        os.close(self.fd)
