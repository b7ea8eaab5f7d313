"""Explains why a file cannot be used although its mode allows it: some file systems serve only some users."""

import errno
import os

from vmd.closing import close
from vmd.errors import HostError
from vmd.privsep import linux

FUSE, NFS = 0x65735546, 0x6969  # <linux/magic.h>
DENIALS = (errno.EACCES, errno.EPERM, errno.EOVERFLOW)

REASONS = {
    FUSE: "it is on a FUSE file system, which serves only the user who mounted it; mount it with -o allow_other,"
    " outside of any user namespace",
    NFS: "it is on NFS, whose server may treat root as nobody (root_squash); export it with no_root_squash, or let"
    " everybody read and write the file",
}


def explained(number: int, path: str, who: str) -> str:
    """Return the text for an errno, with the reason if it is known.  `who` is the user who was refused."""
    words = os.strerror(number)
    if number not in DENIALS:
        return words
    reason = REASONS.get(file_system(path))
    if reason is not None:
        return f"{words}: {who} may not use it: {reason}"
    return f"{words}: its owner is not known in this user namespace" if number == errno.EOVERFLOW else words


def file_system(path: str) -> int:
    """Return the magic number of the file system of a path, which need not exist; 0 if it is not known."""
    while True:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except (OSError, ValueError):
            # Without access to the path itself, its mount point can still be opened: that is on the same file system.
            above = os.path.dirname(path)
            if above in ("", path):
                return 0
            path = above
            continue
        try:
            return file_system_of(fd)
        except HostError:
            return 0
        finally:
            close(fd)


def file_system_of(fd: int) -> int:
    """Return the magic number of the file system of an open file.  Raises HostError."""
    try:
        return linux.file_system_type(fd) & 0xFFFFFFFF
    except HostError as error:
        if error.number != errno.ENOSYS:  # ENOSYS is the answer of a FUSE server without statfs
            raise
        return FUSE


def on_fuse(fd: int) -> bool:
    """Return whether an open file is on a FUSE file system."""
    try:
        return file_system_of(fd) == FUSE
    except HostError:
        return False
