"""A copy of a file: shared storage where the file system can do that, else what is no hole."""

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
    """Make an open, empty file what another one, or a device, is.  Raises OSError.

    `progress` is called with the bytes done and the bytes there are.
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
    """Copy some bytes to the same place of another file; return how many.  Raises OSError."""
    try:
        done = os.copy_file_range(source, target, most, at, at)
        if done:
            return done
    except OSError as error:
        if error.errno not in CANNOT:
            raise
    data = os.pread(source, most, at)
    if not data:
        raise OSError(errno.EIO, "it has become shorter")
    return os.pwrite(target, data, at)
