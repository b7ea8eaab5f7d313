"""A guest that is a Linux network stack: a namespace whose only interface is wired to a tap of the host."""

import contextlib
import os
import select
import socket
import threading
from types import TracebackType
from typing import Self

from tests.support.fakedriver import DEADLINE_S
from tests.support.network import Network, TapInterface

FRAME_MAX = 1 << 17


class Runner:
    """A context manager with a thread, which ends when `ending` can be read."""

    def __init__(self, name: str) -> None:
        self.ending = os.eventfd(0, os.EFD_CLOEXEC)
        self.thread = threading.Thread(target=self.run, name=name)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.eventfd_write(self.ending, 1)
        self.thread.join()
        os.close(self.ending)
        self.close()

    def run(self) -> None:
        """Be the thread."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of what the thread had."""
        raise NotImplementedError


class KernelGuest(Runner):
    """The stack at the other end of a tap; the thread carries the frames."""

    def __init__(self, fd: int, lladdr: bytes, address: str, router: str) -> None:
        """`fd` is the device's end of the host's tap, and `address` has the length of its network."""
        self.network = Network()
        self.card = TapInterface(self.network, "eth0")
        self.card.set("down")
        self.card.set("address", lladdr.hex(":"))
        self.card.set("up")
        self.network.run("ip", "address", "add", address, "dev", "eth0")
        self.network.run("ip", "route", "add", "default", "via", router)
        self.fds = (fd, self.card.fd)
        super().__init__("wire")

    def close(self) -> None:
        """Unplug the card, and have the network go."""
        self.card.close()
        self.network.__exit__(None, None, None)

    def run(self) -> None:
        """Carry frames both ways."""
        other = dict(zip(self.fds, reversed(self.fds), strict=True))
        poll = select.poll()
        for fd in (*self.fds, self.ending):
            poll.register(fd, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll()]
            if self.ending in ready:
                return
            for fd in ready:
                with contextlib.suppress(BlockingIOError, OSError):  # an interface that is down takes nothing
                    os.write(other[fd], os.read(fd, FRAME_MAX))

    def listen(self, port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> "Server":
        """Serve a port: whoever asks is told who they are."""
        return Server(self.network, port, kind)


class Server(Runner):
    """Tells everybody which address they come from."""

    def __init__(self, network: Network, port: int, kind: socket.SocketKind) -> None:
        self.socket = network.socket(socket.AF_INET, kind)
        self.socket.bind(("0.0.0.0", port))
        self.kind = kind
        if kind == socket.SOCK_STREAM:
            self.socket.listen()
        super().__init__(f"port {port}")

    def close(self) -> None:
        """Give the port back."""
        self.socket.close()

    def run(self) -> None:
        """Answer."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        poll.register(self.ending, select.POLLIN)
        while self.ending not in [fd for fd, _ in poll.poll()]:
            if self.kind == socket.SOCK_STREAM:
                connection, who = self.socket.accept()
                with connection:
                    connection.sendall(who[0].encode())
            else:
                _, who = self.socket.recvfrom(100)
                self.socket.sendto(who[0].encode(), who)


def ask(network: Network, address: str, port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> str:
    """Return who a `Server` says that we are, asked from a network; raises OSError if nobody is there."""
    with network.socket(socket.AF_INET, kind) as client:
        client.settimeout(DEADLINE_S)
        client.connect((address, port))
        client.send(b"who am I?")
        return client.recv(100).decode()
