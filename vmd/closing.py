"""Closing descriptors of files that users chose.

close(2) asks a FUSE or NFS server whether all written data is safe, and fails with any errno that the server answers.
The descriptor is closed anyway.  So the processes that all guests depend on close descriptors only by these functions,
which ignore such errors.
"""

import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


def close(fd: int) -> None:
    """Close a descriptor, and ignore errors of its file.  Raises OSError(EBADF) if it is not open, which is our bug."""
    try:
        os.close(fd)
    except OSError as error:
        if error.errno == errno.EBADF:
            raise


def close_all(fds: "Iterable[int]") -> None:
    """Close descriptors."""
    for fd in fds:
        close(fd)
