"""Takes the lock of a disk away from a running VM, like storage that has lost the connection to its host."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.descriptors import open_files
from vmd.images.locks import lock, unlock

SYS_PIDFD_GETFD = 438


@contextmanager
def stolen(process: int, path: Path) -> Iterator[None]:
    """Lock a disk of a running VM in this process, after its vioblk, `process`, has lost the lock."""
    number = next(fd for fd, name in open_files(process).items() if name == str(path))
    pidfd = os.pidfd_open(process)
    theirs = ctypes.CDLL(None, use_errno=True).syscall(SYS_PIDFD_GETFD, pidfd, number, 0)
    assert theirs >= 0, os.strerror(ctypes.get_errno())
    unlock(theirs)
    os.close(theirs)
    os.close(pidfd)
    ours = os.open(path, os.O_RDWR)
    try:
        lock(ours, str(path), writable=True)
        yield
    finally:
        os.close(ours)
