"""Connections to the control socket, for messages that vmctl never sends."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path

from tests.support.daemon import DEADLINE_S
from vmd.ipc.imsg import MAX_MESSAGE, decode
from vmd.record import Record


def connect(path: Path) -> socket.socket:
    """Return a connection of this process's user."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client.connect(str(path))  # with a timeout, connect fails at once while the backlog is full
    client.settimeout(DEADLINE_S)
    return client


def connect_as(path: Path, uid: int, gid: int, groups: Sequence[int] = ()) -> socket.socket:
    """Return a connection with a user's peer credentials: a child process with that uid makes it."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            pid = os.fork()
            if pid == 0:
                try:
                    os.setgroups(list(groups))
                    os.setresgid(gid, gid, gid)
                    os.setresuid(uid, uid, uid)
                    with connect(path) as client:
                        socket.send_fds(theirs, [b"x"], [client.fileno()])
                finally:
                    os._exit(0)
            os.waitpid(pid, 0)
        ours.settimeout(DEADLINE_S)
        client = socket.socket(fileno=socket.recv_fds(ours, 1, 1)[1][0])
    client.settimeout(DEADLINE_S)
    return client


def receive(client: socket.socket) -> Record | None:
    """Return the next answer, or None at the end of the connection."""
    try:
        packet = client.recv(MAX_MESSAGE)
    except ConnectionResetError:
        return None
    return decode(packet, [], "vmd").message if packet else None
