"""Locks on image files that QEMU and we respect in each other.

QEMU marks what it does to a file with read locks on single bytes: byte 100+n says "I use permission n",
byte 200+n says "nobody else may use permission n".  Everybody sets the own marks first and then looks for
contradicting ones of others, so that of two who come together at least one gives way.  The locks are those of the
open file (OFD), so they go along when a descriptor is passed on and end with its last copy.

A writer of ours also has a write lock on byte 150, which QEMU does not use.  Nobody else can have any lock on that byte
meanwhile, not even somebody who may only read the file.  So a writer that cannot take this lock again has lost it.
Storage that was cut off from its host can lose locks: the server, or the other half of a cluster, drops them.
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
    """Lock an image for one writer or any number of readers, for as long as the open file lives.

    Raises:
        InUse: somebody else uses it in a way that excludes ours.
        OperatorError: the file system has no locks.
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
    """Take the locks of a writer again, which changes nothing if it still has them.

    Raises OSError: EAGAIN or EACCES if somebody else has the file, else why the storage does not say.
    """
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, flock.pack(fcntl.F_WRLCK, SEEK_SET, ALONE, 1, 0))
    uses, denies = WRITER
    for byte in (*(USES + n for n in uses), *(DENIES + n for n in denies)):
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, flock.pack(fcntl.F_RDLCK, SEEK_SET, byte, 1, 0))


def _held_by_others(fd: int, byte: int) -> bool:
    """Return whether another open file has a mark on a byte; ours do not count."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, flock.pack(fcntl.F_WRLCK, SEEK_SET, byte, 1, 0))
    return bool(flock.unpack(answer)[0] != fcntl.F_UNLCK)


def unlock(fd: int) -> None:
    """Take our marks off; they also go when the open file does."""
    for first, count in ((USES, RESIZE + 1), (DENIES, RESIZE + 1), (ALONE, 1)):
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, flock.pack(fcntl.F_UNLCK, SEEK_SET, first, count, 0))
        except OSError:
            return  # never locked, where the file system knows no locks
