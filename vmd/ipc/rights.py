"""Descriptors that come over a socket, and are passed on to no process that we start.

Not by `socket.recv_fds`: it forgets its flags (Python 3.11 to 3.13), and so what it returns is inherited.
"""

import array

from vmd.ipc import sockets as socket

SO_PASSRIGHTS = 83  # <asm-generic/socket.h>


def receive(sock: socket.socket, packet_max: int, files_max: int, flags: int = 0) -> tuple[bytes, list[int], int]:
    """Return a packet, the descriptors that came with it, which are the caller's, and msg_flags.  Raises OSError."""
    fds = array.array("i")
    packet, rights, flags, _ = sock.recvmsg(
        packet_max, socket.CMSG_LEN(files_max * fds.itemsize), flags | socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, raw in rights:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
    return packet, list(fds), flags


def refuse_files(sock: socket.socket) -> None:
    """Have the kernel refuse descriptors that come from the other end: who sends one gets EPERM.

    Linux knows that since 6.16.  With an older one they are closed here when they have come.
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
    except OSError:
        return
