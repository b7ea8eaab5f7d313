"""Locks on image files, compatible with those of QEMU.

QEMU declares its use of a file by read locks on single bytes, here called marks.  Byte 100+n means "I use permission
n", byte 200+n means "nobody else may use permission n".  A process sets its own marks first.  Then it looks for
conflicting marks of others, so that of two processes that start together at least one gives way.  The locks belong to
the open file description (OFD locks): they stay with a descriptor that is sent to another process, and end when its
last copy is closed.

A writer of ours also has a write lock on byte 150, which QEMU does not use.  While it has this lock, nobody else can
lock that byte, not even for reading.  So a writer that cannot take this lock again has lost it.  Locks can be lost when
network storage is cut off from the host: the server drops them.
"""

import errno
import fcntl
import posix as os
import struct
from io import SEEK_SET

from vmd.errors import InUse, OperatorError
from vmd.fileid import file_id

CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE = range(4)  # QEMU's BLK_PERM_* as bit numbers
USES, DENIES = 100, 200
ALONE = 150

READER = ((CONSISTENT_READ,), (WRITE, RESIZE))
WRITER = ((CONSISTENT_READ, WRITE, RESIZE), (WRITE, RESIZE))

flock = struct.Struct("hh4xqqi4x")  # l_type, l_whence, l_start, l_len, l_pid


def lock(fd: int, path: str, *, writable: bool) -> None:
    """Lock an image for one writer or any number of readers, until the last copy of `fd` is closed.

    Raises:
        InUse: another process uses it in a conflicting way.
        OperatorError: the file system does not support locks.
    """
    uses, denies = WRITER if writable else READER
    marks = [USES + n for n in uses] + [DENIES + n for n in denies]
    contradicting = [DENIES + n for n in uses] + [USES + n for n in denies]
    try:
        for byte in marks:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, flock.pack(fcntl.F_RDLCK, SEEK_SET, byte, 1, 0))
        taken = [byte for byte in contradicting if _held_by_others(fd, byte)]
        if writable and not taken:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, flock.pack(fcntl.F_WRLCK, SEEK_SET, ALONE, 1, 0))
    except OSError as error:
        unlock(fd)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise InUse(path, file_id(os.fstat(fd))) from None
        raise OperatorError(error.errno or errno.EIO, f"{path}: cannot be locked: {error.strerror}") from None
    if taken:
        unlock(fd)
        doing = ", which writes to it" if USES + WRITE in taken else ""
        raise InUse(path, file_id(os.fstat(fd)), doing=doing, marks=tuple(taken))


def refresh(fd: int) -> None:
    """Take the locks of a writer again.  This has no effect if it still has them.

    Raises OSError: EAGAIN or EACCES if another process has locked the file, other errors if the storage fails.
    """
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, flock.pack(fcntl.F_WRLCK, SEEK_SET, ALONE, 1, 0))
    uses, denies = WRITER
    for byte in (*(USES + n for n in uses), *(DENIES + n for n in denies)):
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, flock.pack(fcntl.F_RDLCK, SEEK_SET, byte, 1, 0))


def _held_by_others(fd: int, byte: int) -> bool:
    """Return whether another open file description has a lock on a byte.  Raises OSError."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, flock.pack(fcntl.F_WRLCK, SEEK_SET, byte, 1, 0))
    return bool(flock.unpack(answer)[0] != fcntl.F_UNLCK)


def unlock(fd: int) -> None:
    """Release all our locks on the file."""
    for first, count in ((USES, RESIZE + 1), (DENIES, RESIZE + 1), (ALONE, 1)):
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, flock.pack(fcntl.F_UNLCK, SEEK_SET, first, count, 0))
        except OSError:
            return  # the file system does not support locks
