"""What lockholder is asked and answers: descriptors, arguments, and one record.  Standard library only.

    lockholder DEVICE INODE [BYTE ...]
                    the file as stat(2) says, and the bytes on which a lock matters, in decimal digits; by default all
                    that disks are locked with.  The host's /proc is fd 4
    fd 3            a `HOLDER`, or nothing: no process of this host has such a lock
"""

import struct

from vmd.record import Record

FD_ANSWER, FD_PROC = 3, 4  # a pipe's writing end; a directory
HOLDER = struct.Struct("=II16s")  # pid, uid, comm
QUOTES = b'"\\'


class Holder(Record):
    """A process that has a lock.  `program` is what it calls itself, in printable characters."""

    pid: int
    uid: int
    program: str


def pack(pid: int, uid: int, comm: bytes) -> bytes:
    """Return the answer; `comm` is the name of a thread, 15 bytes at most."""
    return HOLDER.pack(pid, uid, comm)


def unpack(answer: bytes) -> Holder | None:
    """Return what the answer says: nobody, too, where there is none."""
    if len(answer) != HOLDER.size:
        return None
    pid, uid, comm = HOLDER.unpack(answer)
    name = "".join(chr(byte) if 32 <= byte < 127 and byte not in QUOTES else "?" for byte in comm.rstrip(b"\0"))
    return Holder(pid=pid, uid=uid, program=name)
