"""The protocol of lockholder: descriptors, arguments, and one record.  Standard library only.

    lockholder DEVICE INODE [BYTE ...]
                    device and inode of the file, from stat(2); then the bytes of the locks to look for, by default all
                    bytes with which disks are locked.  All are decimal
    fd 3            the answer is written here: a `HOLDER`, or nothing if no process of this host has such a lock
    fd 4            the host's /proc
"""

import struct

from vmd.record import Record

FD_ANSWER, FD_PROC = 3, 4  # the writing end of a pipe; a directory
HOLDER = struct.Struct("=II16s")  # pid, uid, comm
QUOTES = b'"\\'


class Holder(Record):
    """A process that has a lock.  `program` is its own name for itself, in printable characters."""

    pid: int
    uid: int
    program: str


def pack(pid: int, uid: int, comm: bytes) -> bytes:
    """Return the answer; `comm` is the name of a thread, 15 bytes at most."""
    return HOLDER.pack(pid, uid, comm)


def unpack(answer: bytes) -> Holder | None:
    """Return the process that the answer names; None if the answer is empty or malformed."""
    if len(answer) != HOLDER.size:
        return None
    pid, uid, comm = HOLDER.unpack(answer)
    name = "".join(chr(byte) if 32 <= byte < 127 and byte not in QUOTES else "?" for byte in comm.rstrip(b"\0"))
    return Holder(pid=pid, uid=uid, program=name)
