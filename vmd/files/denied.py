"""Why a file may not be used although its mode allows it: some file systems serve some users only."""

import errno
import os

from vmd.closing import close
from vmd.errors import HostError
from vmd.privsep import linux

FUSE, NFS = 0x65735546, 0x6969  # <linux/magic.h>
DENIALS = (errno.EACCES, errno.EPERM, errno.EOVERFLOW)

REASONS = {
    FUSE: "it is on a FUSE file system, which serves only who has mounted it; mount it with -o allow_other, as a user"
    " of this host",
    NFS: "it is on NFS, whose server may take root for nobody (root_squash); export it with no_root_squash, or let"
    " everybody read and write the file",
}


def explained(number: int, path: str, who: str) -> str:
    """Return the words for an errno, and what is behind it if that is known; `who` wanted to use the file."""
    words = os.strerror(number)
    if number not in DENIALS:
        return words
    reason = REASONS.get(file_system(path))
    if reason is not None:
        return f"{words}: {who} may not use it: {reason}"
    return f"{words}: its owner is not known in this user namespace" if number == errno.EOVERFLOW else words


def file_system(path: str) -> int:
    """Return the magic number of the file system that a file is on, or would be; 0 if that cannot be known."""
    while True:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except (OSError, ValueError):
            # Not let into it, we see where it is mounted: that belongs to it already.
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
    """Return the magic number of the file system that an open file is on.  Raises HostError."""
    try:
        return linux.file_system_type(fd) & 0xFFFFFFFF
    except HostError as error:
        if error.number != errno.ENOSYS:  # which only a FUSE server answers that has not thought of it
            raise
        return FUSE


def on_fuse(fd: int) -> bool:
    """Return whether an open file is on a FUSE file system."""
    try:
        return file_system_of(fd) == FUSE
    except HostError:
        return False
