"""A driver of the real, confined network process.  It posts buffers and sends frames in any layout."""

import itertools
import struct
import time
from collections.abc import Sequence
from typing import NamedTuple

from tests.support.fakedriver import (
    DEADLINE_S,
    EVENT_IDX,
    INDIRECT,
    INDIRECT_DESC,
    KIB,
    MIB,
    MODERN,
    WRITE,
    Desc,
    Device,
    chained,
)
from tests.support.network import Host, TapInterface
from tests.support.packets import LLADDR, any_frame
from vmd.ipc import devmsg
from vmd.virtio import spec

RX, TX = 0, 1
SIZE = 256
MRG = 1 << spec.VIRTIO_NET_F_MRG_RXBUF
CSUM = 1 << spec.VIRTIO_NET_F_CSUM
STATUS = 1 << spec.VIRTIO_NET_F_STATUS
HOST_TSO = CSUM | 1 << spec.VIRTIO_NET_F_HOST_TSO4 | 1 << spec.VIRTIO_NET_F_HOST_TSO6
GUEST_TSO = 1 << spec.VIRTIO_NET_F_GUEST_CSUM | 1 << spec.VIRTIO_NET_F_GUEST_TSO4 | 1 << spec.VIRTIO_NET_F_GUEST_TSO6
OFFLOADS = HOST_TSO | GUEST_TSO
ALL = MODERN | MRG | OFFLOADS | INDIRECT_DESC | EVENT_IDX

NEEDS_CSUM, DATA_VALID = 1, 2
GSO_NONE, GSO_TCPV4, GSO_TCPV6 = 0, 1, 4
HEADER = struct.Struct("<BBHHHH")  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
NUM_BUFFERS = struct.Struct("<H")

TX_BASE, TX_STRIDE, TX_SLOTS = MIB, 96 * KIB, 32
RX_BASE = 5 * MIB
TABLES = 0x80000  # indirect tables, 512 bytes for each head of either queue
TABLE_BYTES = 512


class Received(NamedTuple):
    """A frame that the driver received."""

    header: bytes
    frame: bytes
    buffers: int


def net_start(
    *, lladdr: bytes = LLADDR, host_lladdr: bytes = bytes(6), flags: int = 0, mtu: int = 0,
    guest4: bytes = bytes(4), host4: bytes = bytes(4), host_ll: bytes = bytes(16), prefix6: bytes = bytes(16),
    dns4: Sequence[bytes] = (), dns6: Sequence[bytes] = (), length4: int = 31,
) -> bytes:  # fmt: skip
    """Return devmsg.NET."""
    servers = b"".join(dns4), b"".join(dns6)
    return devmsg.NET.pack(lladdr, host_lladdr, flags, mtu, guest4, host4, host_ll, prefix6, *servers, length4)


class NetDriver:
    """A network process with both rings."""

    def __init__(
        self, tap: TapInterface, net: bytes = b"", *, host_name: str = "", features: int = ALL, more: Sequence[int] = ()
    ) -> None:
        """`more` are descriptors after the tap's."""
        self.device = Device("vionet", [tap.fd, *more], queues=2, net=net or net_start(), host_name=host_name).start()
        self.memory = self.device.memory
        self.renew(features)

    def renew(self, features: int = ALL, *, size: int = SIZE) -> None:
        """Reset the device and start it with new, empty rings."""
        self.features = features
        self.rx, self.tx = self.device.activate_all((size, size), features)
        self.header_bytes = 12 if features & (MODERN | MRG) else 10
        self.posted: dict[int, list[Desc]] = {}
        self.arrived: list[tuple[int, int]] = []
        self.slot = 0
        self.sent: list[tuple[int, int]] = []

    def close(self) -> None:
        """End it."""
        self.device.__exit__(None, None, None)

    # --- receiving -------------------------------------------------------------------------------------------------

    def post(self, count: int, sizes: Sequence[int] = (), *, kick: bool = True) -> None:
        """Post receive buffers, each with parts of the given sizes; by default one part that fits any frame."""
        if not sizes:
            sizes = (2048,) if self.features & MRG or not self.features & GUEST_TSO else (65562,)
        place = RX_BASE
        indirect = self.features & INDIRECT_DESC and len(sizes) > 1
        for number in range(count):
            parts = []
            for size in sizes:
                parts.append(Desc(place, size, WRITE))
                place += size
            head = number if indirect else number * len(sizes)
            if indirect:
                table = TABLES + number * TABLE_BYTES
                raw = b"".join(struct.pack("<QIHH", *part) for part in chained(parts))
                self.memory.load(table, raw)
                self.rx.describe(head, [Desc(table, len(raw), INDIRECT)])
            else:
                self.rx.describe(head, chained(parts, head))
            self.posted[head] = parts
            self.rx.offer(head)
        if kick:
            self.device.kick(RX)

    def try_receive(self) -> Received | None:
        """Return a received frame and post its buffers again; None if there is none."""
        self.arrived += self.rx.reap()
        if not self.arrived:
            return None
        head, length = self.arrived[0]
        first = self._content(head, length)
        count = NUM_BUFFERS.unpack_from(first, 10)[0] if self.header_bytes == 12 else 1
        if len(self.arrived) < count:
            return None
        taken, self.arrived = self.arrived[:count], self.arrived[count:]
        raw = b"".join(self._content(head, length) for head, length in taken)
        for head, _ in taken:
            self.rx.offer(head)
        return Received(raw[: self.header_bytes], raw[self.header_bytes :], count)

    def _content(self, head: int, length: int) -> bytes:
        found = b""
        for part in self.posted[head]:
            here = min(part.length, length - len(found))
            if here:
                found += self.memory.read(part.gpa, here)
        assert len(found) == length
        return found

    def receive(self) -> Received:
        """Wait for a frame."""
        while True:
            found = self.try_receive()
            if found is not None:
                return found
            self.rx.set_used_event(self.rx.used_idx)
            self.device.kick(RX)
            if self.rx.used_idx == self.rx.device_idx:
                self.device.wait_interrupt(RX)

    def receive_all(self, count: int) -> list[Received]:
        """Wait for `count` frames."""
        return [self.receive() for _ in range(count)]

    # --- sending ---------------------------------------------------------------------------------------------------

    def lay_out(self, frame: bytes, header: bytes | None = None, cuts: Sequence[int] | None = None) -> list[Desc]:
        """Write a frame into its own buffer, cut into descriptors at `cuts`; by default after the header."""
        raw = (header or b"").ljust(self.header_bytes, b"\0") + frame
        base = TX_BASE + self.slot * TX_STRIDE
        self.slot = (self.slot + 1) % TX_SLOTS
        self.memory.load(base, raw)
        edges = [0, *(cuts if cuts is not None else (self.header_bytes,)), len(raw)]
        return [Desc(base + a, b - a) for a, b in itertools.pairwise(edges)]

    def submit(self, frame: bytes, header: bytes | None = None, cuts: Sequence[int] | None = None) -> int:
        """Make a frame available without a notification; return the head."""
        parts = self.lay_out(frame, header, cuts)
        if self.features & INDIRECT_DESC and len(parts) > 1:
            return self.tx.add_indirect(parts, TABLES + TABLE_BYTES * (SIZE + self.slot))
        return self.tx.add(parts)

    def send(self, frame: bytes, header: bytes | None = None, cuts: Sequence[int] | None = None) -> None:
        """Send a frame and wait until the device has used its buffer."""
        head = self.submit(frame, header, cuts)
        assert self.device.collect(self.tx, 1, TX) == [(head, 0)]

    def give(self, parts: Sequence[Desc]) -> None:
        """Send descriptors from `lay_out`, and wait until the device has used them."""
        head = self.tx.add(parts)
        assert self.device.collect(self.tx, 1, TX) == [(head, 0)]

    # --- the rest ----------------------------------------------------------------------------------------------------

    def counters(self) -> dict[str, int]:
        """Return the counters of the process, after its main thread has answered a question."""
        self.device.ask(devmsg.TYPE.pack(devmsg.ADDRESSES))
        return self.device.figures()

    def counter(self, name: str, least: int) -> int:
        """Wait until a counter is at least `least`.  Asking for it gives the threads time."""
        deadline_s = time.monotonic() + DEADLINE_S
        while (value := self.counters()[name]) < least:
            assert time.monotonic() < deadline_s, f"{name} stays {value}"
        return value

    def settle(self) -> None:
        """Wait until the process has handled every message sent to it, and every job that its threads have posted.

        In each round it handles all its channels, in any order.  It may answer a first question before earlier messages
        of the same round, but not a second question.
        """
        for _ in range(2):
            self.counters()

    def link(self) -> bool:
        """Wait for the next configuration change; return whether the link is then up."""
        self.device.wait_for(self.device.informs.fileno())
        packet = self.device.informs.recv(devmsg.PACKET_MAX)
        kind, _, length = devmsg.READY_HEAD.unpack_from(packet)
        assert kind == devmsg.CONFIG_CHANGED
        self.device.config = packet[devmsg.READY_HEAD.size :]
        assert length == len(self.device.config)
        return bool(self.device.config[6] & 1)


class Nic:
    """A network process, its tap, and the host at the other side of the tap."""

    def __init__(self, tap: TapInterface, driver: NetDriver) -> None:
        self.tap = tap
        self.driver = driver
        self.device = driver.device
        self.memory = driver.memory
        self.host = Host(tap)

    def close(self) -> None:
        """End it."""
        self.driver.close()
        self.host.socket.close()
        self.tap.close()

    def sends(self, frame: bytes, cuts: Sequence[int] | None = None, header: bytes | None = None) -> None:
        """Send a frame; check that it arrives at the host."""
        self.driver.send(frame, header, cuts)
        assert self.host.receive() == frame

    def gets(self, frame: bytes) -> Received:
        """Have the host send a frame; check that it arrives and return it."""
        self.host.send(frame)
        received = self.driver.receive()
        assert received.frame == frame
        return received

    def forget(self) -> None:
        """Discard frames that came from the guest."""
        while self.host.try_receive() is not None:
            pass

    def works(self) -> bool:
        """Reset the device; return whether the same process still moves frames in both directions."""
        self.driver.renew()
        self.forget()
        self.driver.post(4)
        for number in range(8):
            self.sends(any_frame(60 + 100 * number, number))
            self.gets(any_frame(60 + 150 * number, number, destination=LLADDR))
        return True

    def no_frame(self) -> bool:
        """Return whether no frame has come from the guest.  A sent frame has arrived once its buffer is used."""
        return self.host.try_receive() is None
