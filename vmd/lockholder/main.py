"""lockholder: finds the process whose lock keeps a VM from a file.

Runs as  an id of its own, in the cell, with CAP_SYS_PTRACE, which it needs to read the locks of other users' processes.
         Landlock would forbid that even with the capability, so only the seccomp filter confines this process
Peers    parent (starts it, reads one record of `ipc/holdermsg.py`, kills it if that takes too long)
Holds    the host's /proc, and a pipe's writing end

Only /proc/PID/fdinfo names the owner of an open file description's lock: F_OFD_GETLK and /proc/locks give -1 as pid.
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
    """Write the answer, and end."""
    device, inode, *marks = (int(argument) for argument in sys.argv[1:])
    confine(LOCKHOLDER)  # the parent has logged what this kernel lacks
    answer = find(FD_PROC, device, inode, marks or OURS)
    if answer:
        with contextlib.suppress(BrokenPipeError):  # the parent no longer waits
            os.write(FD_ANSWER, answer)
    return 0


def find(proc: int, device: int, inode: int, marks: "Sequence[int]") -> bytes:
    """Return the first process that has a lock on one of these bytes of a file, packed; b"" if there is none.

    A lock by flock(2) conflicts with ours only on network file systems, so it counts only if there is no other lock.
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
    """Return the kinds of locks that a process has on these bytes of a file."""
    kinds: set[bytes] = set()
    for info in descriptions(proc, pid):
        if b"\nlock:" in info and file in info:
            kinds.update(kind for line in info.splitlines() if (kind := kind_of(line, file, marks)))
    return kinds


def descriptions(proc: int, pid: int) -> "Iterator[bytes]":
    """Yield the fdinfo of each descriptor of a process.  A process that ends meanwhile yields no more."""
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
    """Return the contents of a small file.  Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        return os.read(fd, READ_MAX)
    finally:
        os.close(fd)
