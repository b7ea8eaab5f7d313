"""The clients of the control socket: who they are, what they may ask, how much."""

import errno
import socket
import struct

from vmd.ipc.channel import Channel
from vmd.ipc.messages import Caller

UCRED = struct.Struct("=iII")  # struct ucred: pid, uid, gid

MAX_CLIENTS = 256
MAX_CLIENTS_PER_USER = 64  # root is not counted: a user must not be able to lock the operator out
MAX_UNANSWERED = 16  # requests of one client that wait for an answer
MAX_QUEUE = 4096  # messages waiting for a client that reads slowly; `status` of a full host is one burst


class Client:
    """One connection to the control socket."""

    def __init__(self, number: int, caller: Caller) -> None:
        self.number = number
        self.caller = caller
        self.unanswered = 0
        self.channel: Channel | None = None


class Clients:
    """All connections, by the number under which the parent knows them."""

    def __init__(self) -> None:
        self._clients: dict[int, Client] = {}
        self._next = 1

    def refusal(self, caller: Caller) -> tuple[int, str] | None:
        """Return why a further connection cannot be had, as errno and sentence."""
        if caller.uid == 0:
            return None
        if len(self._clients) >= MAX_CLIENTS:
            return errno.EUSERS, f"too many connections to vmd ({MAX_CLIENTS})"
        theirs = sum(1 for client in self._clients.values() if client.caller.uid == caller.uid)
        if theirs >= MAX_CLIENTS_PER_USER:
            return errno.EUSERS, f"too many connections of uid {caller.uid} ({MAX_CLIENTS_PER_USER})"
        return None

    def add(self, caller: Caller) -> Client:
        """Number a new connection; a number comes again only after four billion others."""
        while self._next in self._clients or self._next == 0:
            self._next = (self._next + 1) % 0xFFFFFFF0
        client = self._clients[self._next] = Client(self._next, caller)
        self._next = (self._next + 1) % 0xFFFFFFF0
        return client

    def get(self, number: int) -> Client | None:
        """Return the client of a number, if it is still connected."""
        return self._clients.get(number)

    def remove(self, client: Client) -> None:
        """Forget a connection."""
        self._clients.pop(client.number, None)


def peer_credentials(sock: socket.socket) -> Caller:
    """Return who is on the other side, by the kernel's word."""
    pid, uid, gid = UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
    return Caller(uid=uid, gid=gid, pid=pid)
