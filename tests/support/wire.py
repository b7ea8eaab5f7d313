"""A guest made of a Linux network stack: a namespace whose only interface is connected to a tap of the host."""

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
    """A context manager with a thread that ends when `ending` is readable."""

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
        """The thread's work."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the thread's descriptors."""
        raise NotImplementedError


class KernelGuest(Runner):
    """The network stack at the other end of a tap.  The thread carries the frames."""

    def __init__(self, fd: int, lladdr: bytes, address: str, router: str) -> None:
        """`fd` is the device's end of the host's tap.  `address` includes the prefix length."""
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
        """Close the interface and the network."""
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
                with contextlib.suppress(BlockingIOError, OSError):  # an interface that is down accepts no frames
                    os.write(other[fd], os.read(fd, FRAME_MAX))

    def listen(self, port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> "Server":
        """Serve a port: each client is sent its own address."""
        return Server(self.network, port, kind)


class Server(Runner):
    """Sends each client the address from which it connects."""

    def __init__(self, network: Network, port: int, kind: socket.SocketKind) -> None:
        self.socket = network.socket(socket.AF_INET, kind)
        self.socket.bind(("0.0.0.0", port))
        self.kind = kind
        if kind == socket.SOCK_STREAM:
            self.socket.listen()
        super().__init__(f"port {port}")

    def close(self) -> None:
        """Close the port."""
        self.socket.close()

    def run(self) -> None:
        """Answer clients."""
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
    """Ask a `Server` from a network; return the address that it sees.  Raises OSError if no server answers."""
    with network.socket(socket.AF_INET, kind) as client:
        client.settimeout(DEADLINE_S)
        client.connect((address, port))
        client.send(b"who am I?")
        return client.recv(100).decode()
