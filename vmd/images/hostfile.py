"""Positional I/O on a host file: all bytes or an OSError.  Also the modes of fallocate(2), which `os` lacks.

A host file is a regular file or a block device.  A write after the end of a regular file extends it with zeroes.  A
device cannot be extended, and its unwritten parts hold arbitrary bytes.
"""

import _stat as stat
import _thread
import errno
import posix as os
from io import SEEK_END

from vmd import native
from vmd.units import IOV_MAX, SECTOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

FILE_MAX = (1 << 63) - 1 & -SECTOR
STORAGE_GRANULARITY = 4096  # of storage whose granularity is not known
GRANULARITY_MAX = 1 << 30  # a larger one is implausible
ZEROES = memoryview(bytes(1 << 16))

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

_fallocate = native.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (native.c_int, native.c_int, native.c_int64, native.c_int64)
_fallocate.restype = native.c_int


def padding(length: int) -> int:
    """Return the number of zero bytes that complete the last sector of a disk of `length` bytes."""
    return -length % SECTOR


def is_device(fd: int) -> bool:
    """Return whether an open file is a block device.  Raises OSError."""
    return stat.S_ISBLK(os.fstat(fd).st_mode)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2).  Raises OSError."""
    while _fallocate(fd, mode, offset, length):
        error = native.get_errno()
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error))


def require_larger(path: str, size: int, new: int) -> None:
    """Raise OSError if a disk of `size` bytes cannot get `new` bytes.  Shrinking could lose data of the guest."""
    if new > FILE_MAX:
        raise OSError(errno.EFBIG, f"{path}: {new} bytes are more than a file can have")
    if new < size:
        raise OSError(errno.EINVAL, f"{path}: has {size} bytes, and a disk is never made smaller")


class FlushFailed(OSError):
    """Acknowledged writes are not on stable storage yet.  They are kept in memory: a later flush may succeed."""


class DataLost(FlushFailed):
    """Acknowledged writes are lost; no later flush succeeds."""


class StableStorage:
    """fdatasync(2) of one file, for all threads.

    After a failed fdatasync the kernel marks the pages as clean, and reports the failure only once.  A later fdatasync
    would succeed although data is lost, so after a failure every `sync` fails.  Only one thread at a time calls
    fdatasync: otherwise one call could succeed while another one gets the failure.
    """

    def __init__(self, fd: int, path: str) -> None:
        self.fd = fd
        self.path = path
        self.lost = ""  # why data was lost
        self.syncing = _thread.allocate_lock()

    def check(self) -> None:
        """Raise DataLost if an earlier sync failed."""
        if self.lost:
            raise DataLost(errno.EIO, f"{self.path}: an earlier flush failed, data was lost: {self.lost}")

    def sync(self) -> None:
        """Wait until everything written before is on stable storage.  Raises DataLost."""
        with self.syncing:
            self.check()
            try:
                os.fdatasync(self.fd)
            except OSError as error:
                self.lost = error.strerror or str(error)
                raise DataLost(error.errno, f"{self.path}: data was lost: {self.lost}") from error


def total(views: "Sequence[memoryview]") -> int:
    """Return the number of bytes in all views."""
    return len(views[0]) if len(views) == 1 else sum(map(len, views))


def storage_granularity(status: os.stat_result, device: int) -> int:
    """Return the size in bytes of the pieces in which storage can be given back; a multiple of a sector.

    `device` is the discard granularity of a block device, 0 if it is not known.  For a file it is the block size.
    """
    found = status.st_blksize if stat.S_ISREG(status.st_mode) else device
    return found if 0 < found <= GRANULARITY_MAX and not found % SECTOR else STORAGE_GRANULARITY


class Cursor:
    """Hands out the bytes of a list of views from front to back, without copying them."""

    __slots__ = ("index", "start", "views")

    def __init__(self, views: "Sequence[memoryview]") -> None:
        self.views = views
        self.index = 0
        self.start = 0

    def take(self, length: int) -> list[memoryview]:
        """Return views of the next `length` bytes."""
        taken: list[memoryview] = []
        while length:
            view = self.views[self.index]
            left = len(view) - self.start
            if left > length:
                taken.append(view[self.start : self.start + length])
                self.start += length
                return taken
            taken.append(view[self.start :] if self.start else view)
            length -= left
            self.index += 1
            self.start = 0
        return taken


def clear(views: "Sequence[memoryview]") -> None:
    """Fill views with zeroes."""
    for view in views:
        for start in range(0, len(view), len(ZEROES)):
            part = view[start : start + len(ZEROES)]
            part[:] = ZEROES[: len(part)]


def read_views(fd: int, views: "Sequence[memoryview]", offset: int, length: int) -> int:
    """Fill views, `length` bytes in all.  Return the bytes read: fewer only at the end of the file.  Raises OSError."""
    got = os.preadv(fd, views if len(views) <= IOV_MAX else views[:IOV_MAX], offset)
    if got == length:
        return got
    step, done = got, got
    while step and done < length:
        cursor = Cursor(views)
        cursor.take(done)
        step = os.preadv(fd, cursor.take(length - done)[:IOV_MAX], offset + done)
        done += step
    return done


def write_views(fd: int, views: "Sequence[memoryview]", offset: int, length: int) -> None:
    """Write views, `length` bytes in all.  Raises OSError."""
    done = os.pwritev(fd, views if len(views) <= IOV_MAX else views[:IOV_MAX], offset)
    while done < length:
        cursor = Cursor(views)
        cursor.take(done)
        step = os.pwritev(fd, cursor.take(length - done)[:IOV_MAX], offset + done)
        if not step:
            raise OSError(errno.EIO, "nothing could be written")
        done += step


def read_bytes(fd: int, length: int, offset: int) -> bytes:
    """Return `length` bytes; fewer only at the end of the file.  Raises OSError."""
    parts = []
    while length:
        part = os.pread(fd, length, offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def write_bytes(fd: int, data: "bytes | bytearray | memoryview", offset: int) -> None:
    """Write all of `data`.  Raises OSError."""
    view = memoryview(data)
    write_views(fd, (view,), offset, len(view))


def write_zeroes(fd: int, offset: int, length: int) -> None:
    """Write zeroes as data, without fallocate(2).  Raises OSError."""
    while length:
        step = min(length, len(ZEROES) * IOV_MAX)
        full, rest = divmod(step, len(ZEROES))
        views = [ZEROES] * full + ([ZEROES[:rest]] if rest else [])
        write_views(fd, views, offset, step)
        offset += step
        length -= step


def data_span(fd: int, offset: int, end: int) -> tuple[bool, int]:
    """Return whether a file has data at `offset` < `end`, and for how many bytes this is true.  Raises OSError.

    Without support for holes, a file has data everywhere.  A range after the end of a file that was cut short also
    counts as data, so that a read is tried and fails.
    """
    try:
        data = min(os.lseek(fd, offset, os.SEEK_DATA), end)
        if data > offset:
            return False, data - offset
        return True, min(os.lseek(fd, offset, os.SEEK_HOLE), end) - offset
    except OSError as error:
        # ENXIO: only a hole up to the end of the file.
        file_end = os.lseek(fd, 0, SEEK_END)
        if error.errno != errno.ENXIO or offset >= file_end:
            return True, end - offset
        return False, min(end, file_end) - offset
