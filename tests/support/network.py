"""Network namespaces with taps, and the host's side of the taps.  Nothing is made in the host's namespace."""

import array
import contextlib
import ctypes
import errno
import fcntl
import os
import select
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from tests.support.fakedriver import DEADLINE_S

CLONE_NEWNET = 0x40000000
TUNSETIFF, TUNSETSNDBUF = 0x400454CA, 0x400454D4
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
SIOCGIFHWADDR = 0x8927
SOL_PACKET, PACKET_VNET_HDR, PACKET_QDISC_BYPASS = 263, 15, 20
ETH_P_ALL = 3
PACKET_OUTGOING = 4
VNET_HDR_BYTES = 10  # the header of packet sockets
DEV_SENT = 9  # the column of sent packets in /proc/net/dev

libc = ctypes.CDLL(None, use_errno=True)


def enter(call: int) -> None:
    """Raise the error of a failed libc call."""
    if call:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Network:
    """A network namespace.  A context manager; the namespace ends when everything in it is closed."""

    def __init__(self) -> None:
        home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            enter(libc.unshare(CLONE_NEWNET))
            self.fd = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            enter(libc.setns(home, CLONE_NEWNET))
        finally:
            os.close(home)
        self.run("ip", "link", "set", "lo", "up")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.fd)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Run the block in the namespace, only in the calling thread."""
        home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        enter(libc.setns(self.fd, CLONE_NEWNET))
        try:
            yield
        finally:
            enter(libc.setns(home, CLONE_NEWNET))
            os.close(home)

    def run(self, *command: str) -> str:
        """Run a program in the namespace; return its output."""
        with self.inside():
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def write(self, path: str, text: str) -> None:
        """Write a file of /proc/sys/net from inside, because it shows the namespace of its opener."""
        with self.inside(), open(path, "w") as file:
            file.write(text)

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """Make a socket in the namespace."""
        with self.inside():
            return socket.socket(family, kind, protocol)


class Interface:
    """An interface in a namespace, by its name."""

    def __init__(self, network: Network, name: str) -> None:
        self.network = network
        self.name = name

    def set(self, *words: str) -> None:
        """Change the interface: `up`, `down`, `address ...`."""
        self.network.run("ip", "link", "set", self.name, *words)


class TapInterface(Interface):
    """A tap in a namespace; `fd` is the device process's end.  A context manager."""

    def __init__(self, network: Network, name: str = "tap0", *, ipv6: bool = False, mtu: int = 1500) -> None:
        """Without `ipv6` the kernel sends no frames by itself."""
        super().__init__(network, name)
        with network.inside():
            self.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        fcntl.ioctl(self.fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
        if not ipv6:
            network.write(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "1")
        if mtu != 1500:
            network.run("ip", "link", "set", name, "mtu", str(mtu))
        self.set("up")

    def be_a_card(self, lladdr: bytes) -> None:
        """Give the interface a guest's Ethernet address, and the IPv6 addresses derived from it without delay."""
        self.set("down")
        self.set("address", lladdr.hex(":"))
        self.network.write(f"/proc/sys/net/ipv6/conf/{self.name}/accept_dad", "0")
        self.set("up")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close our end.  The interface is deleted when the device process closes its end too."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def remove(self) -> None:
        """Delete the interface."""
        self.network.run("ip", "link", "delete", self.name)

    def taken(self) -> int:
        """Return how many frames of the host the device process has read."""
        with self.network.inside(), open("/proc/thread-self/net/dev") as file:
            rows = dict(line.split(":") for line in file if ":" in line)
        return int({name.strip(): row.split() for name, row in rows.items()}[self.name][DEV_SENT])

    def wait_taken(self, count: int) -> None:
        """Wait until the device process has read `count` frames."""
        deadline_s = time.monotonic() + DEADLINE_S
        while self.taken() < count:
            assert time.monotonic() < deadline_s, f"{self.taken()} of {count} frames are read"

    def set_send_buffer(self, size: int) -> None:
        """Limit the unread bytes that the tap holds."""
        fcntl.ioctl(self.fd, TUNSETSNDBUF, struct.pack("i", size))

    @property
    def lladdr(self) -> bytes:
        """The Ethernet address of the interface, on the host's side."""
        with self.network.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            raw = fcntl.ioctl(any_socket, SIOCGIFHWADDR, struct.pack("16s24x", self.name.encode()))
        return raw[18:24]


class Host:
    """A packet socket on an interface.  It sends frames to the guest and receives the guest's frames."""

    def __init__(self, tap: Interface, *, unfinished: bool = False, buffer_bytes: int = 8 << 20) -> None:
        """With `unfinished`, frames begin with a virtio header of 10 bytes."""
        self.socket = tap.network.socket(socket.AF_PACKET, socket.SOCK_RAW)
        self.socket.setsockopt(socket.SOL_SOCKET, 33, buffer_bytes)  # SO_RCVBUFFORCE
        self.socket.setsockopt(socket.SOL_SOCKET, 32, buffer_bytes)  # SO_SNDBUFFORCE
        # The kernel does not segment frames that bypass the queue discipline, so only one of the options is set.
        self.socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR if unfinished else PACKET_QDISC_BYPASS, 1)
        self.socket.bind((tap.name, ETH_P_ALL))
        self.socket.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, frame: bytes) -> None:
        """Send a frame to the guest; waits if the tap's queue is full."""
        while True:
            try:
                self.socket.send(frame)
                return
            except (BlockingIOError, InterruptedError):
                wait_for(self.socket.fileno(), select.POLLOUT)
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # with the bypass, this is the error of a full queue
                    raise
                os.sched_yield()

    def try_send(self, frame: bytes) -> bool:
        """Send a frame if the tap's queue has room."""
        try:
            self.socket.send(frame)
        except OSError:
            return False
        return True

    def receive(self) -> bytes:
        """Return the next frame that came from the guest."""
        while True:
            wait_for(self.socket.fileno(), select.POLLIN)
            frame = self.try_receive()
            if frame is not None:
                return frame

    def try_receive(self) -> bytes | None:
        """Return a frame that came from the guest, if there is one."""
        while True:
            try:
                frame, where = self.socket.recvfrom(1 << 17)
            except BlockingIOError:
                return None
            except OSError as error:
                if error.errno != errno.ENETDOWN:  # reported once
                    raise
                continue
            if where[2] != PACKET_OUTGOING:
                return frame

    def receive_all(self, count: int) -> list[bytes]:
        """Return the next `count` frames that came from the guest."""
        return [self.receive() for _ in range(count)]


def wait_for(fd: int, events: int) -> None:
    """Wait until a descriptor is ready."""
    poll = select.poll()
    poll.register(fd, events)
    assert poll.poll(DEADLINE_S * 1000), "nothing happened"


def checksum(data: bytes) -> int:
    """Return the internet checksum, the way RFC 1071 adds it up."""
    words = array.array("H", data + bytes(len(data) % 2))
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int.from_bytes((~total & 0xFFFF).to_bytes(2, "little"), "big")
