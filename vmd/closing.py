"""Closing descriptors that others chose.

close(2) asks a FUSE or NFS server whether all that was written is safe, and fails with whatever errno that answers.
The descriptor is gone all the same.  So in the processes that all guests hang on nothing else closes a descriptor.
"""

import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


def close(fd: int) -> None:
    """Close a descriptor, whatever its file says about it.  Raises OSError(EBADF) for one that is not open: our bug."""
    try:
        os.close(fd)
    except OSError as error:
        if error.errno == errno.EBADF:
            raise


def close_all(fds: "Iterable[int]") -> None:
    """Close descriptors."""
    for fd in fds:
        close(fd)
