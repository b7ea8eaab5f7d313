"""Descriptors that go and come over a socket; what comes is passed on to no process that we start.

Not by `socket.recv_fds`: it forgets its flags (Python 3.11 to 3.13), and so what it returns is inherited.  And not by
`array`, which loads `collections`.
"""

import struct

from vmd.ipc import sockets as socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

FD = struct.Struct("i")
SO_PASSRIGHTS = 83  # <asm-generic/socket.h>


def receive(sock: socket.socket, packet_max: int, files_max: int, flags: int = 0) -> tuple[bytes, list[int], int]:
    """Return a packet, the descriptors that came with it, which are the caller's, and msg_flags.  Raises OSError."""
    packet, rights, flags, _ = sock.recvmsg(
        packet_max, socket.CMSG_LEN(files_max * FD.size), flags | socket.MSG_CMSG_CLOEXEC
    )
    return packet, fds_of(rights), flags


def rights_of(fds: "Iterable[int]") -> list[tuple[int, int, bytes]]:
    """Return what `sendmsg` takes to pass these descriptors on."""
    raw = b"".join(map(FD.pack, fds))
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, raw)] if raw else []


def fds_of(rights: "Iterable[tuple[int, int, bytes]]") -> list[int]:
    """Return the descriptors in what `recvmsg` has returned, which are the caller's."""
    fds: list[int] = []
    for level, kind, raw in rights:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds += (fd for (fd,) in FD.iter_unpack(raw[: len(raw) - len(raw) % FD.size]))
    return fds


def refuse_files(sock: socket.socket) -> None:
    """Have the kernel refuse descriptors that come from the other end: who sends one gets EPERM.

    Linux knows that since 6.16.  With an older one they are closed here when they have come.
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
    except OSError:
        return
