"""Traffic through a host: a guest on a tap, and an outside network at the other end of a cable."""

import os
import select
import struct

from tests.support.network import Network, checksum
from tests.support.privdriver import DEADLINE_S, Made

HOST4, GUEST4 = bytes((100, 64, 1, 2)), bytes((100, 64, 1, 3))
PREFIX6 = bytes.fromhex("fd42004200420004") + bytes(8)
HOST6, GUEST6 = PREFIX6[:8] + bytes(7) + b"\1", PREFIX6[:8] + bytes(7) + b"\x22"
VNET_HEADER = bytes(10)


class World:
    """The outside network: a namespace at the other end of a cable; a context manager."""

    def __init__(self, host: Network, uplink: str = "uplink") -> None:
        self.network = Network()
        host.run("ip", "link", "add", uplink, "type", "veth", "peer", "name", "world")
        with host.inside():
            os.system(f"ip link set world netns /proc/{os.getpid()}/fd/{self.network.fd}")
        for network, name, addresses_ in (
            (host, uplink, ("192.0.2.1/24", "2001:db8::1/64")),
            (self.network, "world", ("192.0.2.2/24", "2001:db8::2/64")),
        ):
            for address in addresses_:
                flags = ("nodad",) if ":" in address else ()
                network.run("ip", "addr", "add", address, "dev", name, *flags)
            network.run("ip", "link", "set", name, "up")

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *_: object) -> None:
        self.network.__exit__(None, None, None)


def udp4(source: bytes, target: bytes, payload: bytes, port: int = 5000) -> bytes:
    """Return an IPv4 packet to port 7000."""
    udp = struct.pack("!HHHH", port, 7000, 8 + len(payload), 0) + payload
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, source, target)
    return head[:10] + checksum(head).to_bytes(2, "big") + head[12:] + udp


def udp6(source: bytes, target: bytes, payload: bytes) -> bytes:
    """Return an IPv6 packet from port 5000 to port 7000."""
    length = 8 + len(payload)
    pseudo = source + target + struct.pack("!II", length, 17)
    udp = struct.pack("!HHHH", 5000, 7000, length, 0) + payload
    udp = udp[:6] + checksum(pseudo + udp).to_bytes(2, "big") + udp[8:]
    return struct.pack("!IHBB", 6 << 28, length, 17, 64) + source + target + udp


class Guest:
    """A guest on a tap that only sends and receives frames."""

    lladdr = bytes.fromhex("fee1bbd10001")

    def __init__(self, network: Network, made: Made) -> None:
        self.fd = made.fds[0]
        self.tap = made.nics[0]
        for address in ("100.64.1.3", "fd42:42:42:4::22"):
            with network.inside():
                os.system(f"ip neigh replace {address} lladdr {self.lladdr.hex(':')} dev {self.tap.name} 2>/dev/null")

    def send(self, kind: int, packet: bytes, to: bytes = b"") -> None:
        """Send a packet, to the host or another Ethernet address."""
        os.write(self.fd, VNET_HEADER + (to or self.tap.lladdr) + self.lladdr + kind.to_bytes(2, "big") + packet)

    def receive(self, wanted: bytes) -> bytes:
        """Return the next packet for this guest that contains these bytes."""
        while True:
            ready, _, _ = select.select([self.fd], [], [], DEADLINE_S)
            assert ready, "nothing came"
            frame = os.read(self.fd, 1 << 16)[len(VNET_HEADER) :]
            if wanted in frame:
                return frame
