"""lockholder: finds out which process has a lock on a file that a VM cannot have.

Runs as  an id of its own, in the cell, with CAP_SYS_PTRACE: else no user's process shows its locks to another user.
         Landlock would keep it from that, capability or not, so its filter is all that it is confined by
Peers    parent (starts it, reads one record of `ipc/holdermsg.py`, kills it if that takes too long)
Holds    the host's /proc, and a pipe's writing end

The kernel tells whose a lock of an open file is nowhere else: F_OFD_GETLK and /proc/locks say -1.
"""

import contextlib
import os
import sys

from vmd.images.locks import DENIES, RESIZE, USES
from vmd.ipc.holdermsg import FD_ANSWER, FD_PROC, pack
from vmd.privsep.confine import LOCKHOLDER, confine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

READ_MAX = 1 << 16
OURS = range(USES, DENIES + RESIZE + 1)  # disks are locked with some of these bytes


def main() -> int:
    """Answer and be gone."""
    device, inode, *marks = (int(argument) for argument in sys.argv[1:])
    confine(LOCKHOLDER)  # what the kernel lacks, others have said
    answer = find(FD_PROC, device, inode, marks or OURS)
    if answer:
        with contextlib.suppress(BrokenPipeError):  # who has asked waits no longer
            os.write(FD_ANSWER, answer)
    return 0


def find(proc: int, device: int, inode: int, marks: "Sequence[int]") -> bytes:
    """Return the first process that has a lock on one of these bytes of a file, packed; b"" if there is none.

    flock(2) excludes no disk but on file systems of a network, so such a lock counts only where there is no other.
    """
    file = b"%02x:%02x:%d" % (os.major(device), os.minor(device), inode)
    flocked = b""
    for pid in processes(proc):
        kinds = locks_of(proc, pid, file, marks)
        if kinds:
            found = describe(proc, pid)
            if kinds != {b"FLOCK"} and found:
                return found
            flocked = flocked or found
    return flocked


def processes(proc: int) -> list[int]:
    """Return all pids."""
    return sorted(int(name) for name in os.listdir(proc) if name.isdigit())


def locks_of(proc: int, pid: int, file: bytes, marks: "Sequence[int]") -> set[bytes]:
    """Return what kinds of locks a process has on these bytes of a file."""
    kinds: set[bytes] = set()
    for info in descriptions(proc, pid):
        if b"\nlock:" in info and file in info:
            kinds.update(kind for line in info.splitlines() if (kind := kind_of(line, file, marks)))
    return kinds


def descriptions(proc: int, pid: int) -> "Iterator[bytes]":
    """Give what the kernel says of each descriptor of a process; nothing of one that ends meanwhile."""
    with contextlib.suppress(OSError):
        folder = os.open(f"{pid}/fdinfo", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=proc)
        try:
            for name in os.listdir(folder):
                with contextlib.suppress(OSError):
                    yield read(name, folder)
        finally:
            os.close(folder)


def kind_of(line: bytes, file: bytes, marks: "Sequence[int]") -> bytes:
    """Return the kind of a lock that touches one of these bytes; b"" for another line.

    `lock:\\t1: OFDLCK ADVISORY  READ -1 fd:01:1234 201 201`; the last may be EOF.
    """
    words = line.split()
    if len(words) < 8 or words[0] != b"lock:" or words[-3] != file:
        return b""
    first, last = int(words[-2]), words[-1]
    end = int(last) if last != b"EOF" else max(marks)
    return words[2] if any(first <= mark <= end for mark in marks) else b""


def describe(proc: int, pid: int) -> bytes:
    """Return who a process is, packed; b"" if it has ended."""
    with contextlib.suppress(OSError, StopIteration):
        comm = read(f"{pid}/comm", proc).rstrip(b"\n")
        uid = next(line.split()[2] for line in read(f"{pid}/status", proc).splitlines() if line.startswith(b"Uid:"))
        return pack(pid, int(uid), comm)
    return b""


def read(path: str, folder: int) -> bytes:
    """Return what a small file has.  Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        return os.read(fd, READ_MAX)
    finally:
        os.close(fd)
