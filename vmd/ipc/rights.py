"""Sending and receiving descriptors over a socket.  Processes that we start do not inherit received descriptors.

`socket.recv_fds` is not used: it ignores its flags (Python 3.11 to 3.13), so the descriptors would be inherited.
`array` is not used, because it loads `collections`.
"""

import struct

from vmd.ipc import sockets as socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

FD = struct.Struct("i")
SO_PASSRIGHTS = 83  # <asm-generic/socket.h>


def receive(sock: socket.socket, packet_max: int, files_max: int, flags: int = 0) -> tuple[bytes, list[int], int]:
    """Return a packet, the descriptors that came with it, and msg_flags.  The caller owns the descriptors.

    Raises OSError.
    """
    packet, rights, flags, _ = sock.recvmsg(
        packet_max, socket.CMSG_LEN(files_max * FD.size), flags | socket.MSG_CMSG_CLOEXEC
    )
    return packet, fds_of(rights), flags


def rights_of(fds: "Iterable[int]") -> list[tuple[int, int, bytes]]:
    """Return the ancillary data with which `sendmsg` sends these descriptors."""
    raw = b"".join(map(FD.pack, fds))
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, raw)] if raw else []


def fds_of(rights: "Iterable[tuple[int, int, bytes]]") -> list[int]:
    """Return the descriptors in the ancillary data that `recvmsg` has returned.  The caller owns them."""
    fds: list[int] = []
    for level, kind, raw in rights:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds += (fd for (fd,) in FD.iter_unpack(raw[: len(raw) - len(raw) % FD.size]))
    return fds


def refuse_files(sock: socket.socket) -> None:
    """Make the kernel refuse descriptors from the other end: sending one fails there with EPERM.

    This needs Linux 6.16.  With an older kernel the receiver closes them when they arrive.
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
    except OSError:
        return
