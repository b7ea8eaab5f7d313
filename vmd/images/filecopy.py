"""Copies a file: as a reflink if the file system supports that, else its data without holes."""

import errno
import fcntl
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

FICLONE = 0x40049409
CANNOT = (
    errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM, errno.EBADF, errno.ETXTBSY
)  # fmt: skip
STEP_BYTES = 8 << 20


def copy_file(source: int, target: int, progress: "Callable[[int, int], None]") -> None:
    """Copy a file or device to an open, empty file.  Raises OSError.

    `progress` is called with the bytes that are copied and the size.
    """
    size = os.lseek(source, 0, os.SEEK_END)
    if stat.S_ISREG(os.fstat(source).st_mode):
        try:
            fcntl.ioctl(target, FICLONE, source)
        except OSError as error:
            if error.errno not in CANNOT:
                raise
        else:
            return
    os.ftruncate(target, size)
    at = 0
    while at < size:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
            end = min(size, os.lseek(source, at, os.SEEK_HOLE))
        except OSError as error:
            if error.errno == errno.ENXIO:
                break  # a hole up to the end
            end = size
        while at < end:
            at += copy_some(source, target, at, min(STEP_BYTES, end - at))
            progress(at, size)


def copy_some(source: int, target: int, at: int, most: int) -> int:
    """Copy at most `most` bytes to the same offset of another file; return their number.  Raises OSError."""
    try:
        done = os.copy_file_range(source, target, most, at, at)
        if done:
            return done
    except OSError as error:
        if error.errno not in CANNOT:
            raise
    data = os.pread(source, most, at)
    if not data:
        raise OSError(errno.EIO, "the file has become shorter")
    return os.pwrite(target, data, at)
