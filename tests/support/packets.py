"""Packets of guests and networks, made byte by byte, valid or invalid."""

import struct

from tests.support.network import checksum

LLADDR = bytes.fromhex("fee1bad10203")
HOST_LLADDR = bytes.fromhex("0a1b2c3d4e5f")
BROADCAST = b"\xff" * 6
GUEST4, HOST4 = bytes((100, 64, 3, 5)), bytes((100, 64, 3, 4))
ANY4, ALL4 = bytes(4), b"\xff" * 4
COOKIE = b"\x63\x82\x53\x63"
DISCOVER, OFFER, REQUEST, DECLINE, ACK, NAK, RELEASE, INFORM = range(1, 9)
ALL_ROUTERS = bytes.fromhex("ff02" + "00" * 13 + "02")
ALL_NODES = bytes.fromhex("ff02" + "00" * 13 + "01")
GUEST_LL = bytes.fromhex("fe80000000000000fce1bafffed10203")


def ethernet(payload: bytes, kind: int, source: bytes = LLADDR, destination: bytes = BROADCAST) -> bytes:
    """Return a frame."""
    return destination + source + struct.pack(">H", kind) + payload


def any_frame(length: int, seed: int = 0, *, source: bytes = LLADDR, destination: bytes = BROADCAST) -> bytes:
    """Return a frame of no known protocol.  Frames of different seeds differ."""
    body = struct.pack(">I", seed) + (seed.to_bytes(4, "big") + bytes(range(251))) * (length // 250 + 1)
    return ethernet(body[: length - 14], 0x88B5, source, destination)


def ipv4(
    payload: bytes, protocol: int, source: bytes, destination: bytes, *,
    first: int = 0x45, fragment: int = 0, options: bytes = b"", total: int | None = None, right_sum: bool = True,
) -> bytes:  # fmt: skip
    """Return an IPv4 packet; arguments replace its correct fields."""
    length = 20 + len(options) + len(payload) if total is None else total
    head = struct.pack(">BBHHHBBH4s4s", first, 0, length, 1, fragment, 64, protocol, 0, source, destination) + options
    total_sum = checksum(head) if right_sum else checksum(head) ^ 0x5555
    return head[:10] + total_sum.to_bytes(2, "big") + head[12:] + payload


def udp(
    payload: bytes, source: bytes, destination: bytes, ports: tuple[int, int] = (68, 67), *,
    length: int | None = None, kind: str = "right",
) -> bytes:  # fmt: skip
    """Return a UDP datagram.  Its checksum is `right`, `wrong`, `none`, or only the `pseudo` header's, for offloads."""
    size = 8 + len(payload) if length is None else length
    head = struct.pack(">HHHH", *ports, size, 0)
    pseudo = source + destination + struct.pack(">HH", 17, size)
    found = {
        "right": checksum(pseudo + head + payload) or 0xFFFF,
        "wrong": checksum(pseudo + head + payload) ^ 0x0F0F or 0xFFFF,
        "none": 0,
        "pseudo": ~checksum(pseudo) & 0xFFFF,
    }[kind]
    return head[:6] + found.to_bytes(2, "big") + payload


def option(code: int, data: bytes) -> bytes:
    """Return a DHCP option."""
    return bytes((code, len(data))) + data


def bootp(
    options: bytes, *, op: int = 1, htype: int = 1, hlen: int = 6, hops: int = 0, xid: int = 0x12345678,
    flags: int = 0, ciaddr: bytes = ANY4, giaddr: bytes = ANY4, chaddr: bytes = LLADDR, file: bytes = b"",
    cookie: bytes = COOKIE, size: int = 300,
) -> bytes:  # fmt: skip
    """Return a BOOTP request, padded to the size that old servers require."""
    head = struct.pack(
        ">BBBBIHH4s4s4s4s16s64s128s",
        op, htype, hlen, hops, xid, 3, flags, ciaddr, ANY4, ANY4, giaddr, chaddr, b"", file,
    )  # fmt: skip
    return (head + cookie + options).ljust(size, b"\0")


def request(body: bytes, *, source: bytes = ANY4, destination: bytes = ALL4) -> bytes:
    """Return a frame with a BOOTP body and valid headers."""
    return ethernet(ipv4(udp(body, source, destination), 17, source, destination), 0x0800)


def dhcp(
    kind: int, *, requested: bytes = b"", more: bytes = b"", ciaddr: bytes = ANY4, flags: int = 0, size: int = 300
) -> bytes:
    """Return a DHCP request's frame."""
    options = option(53, bytes((kind,))) + (option(50, requested) if requested else b"") + more + b"\xff"
    return request(bootp(options, ciaddr=ciaddr, flags=flags, size=size))


class Answer:
    """A DHCP answer, parsed and checked."""

    def __init__(self, frame: bytes) -> None:
        self.frame = frame
        self.destination, self.source = frame[:6], frame[6:12]
        packet = frame[14:]
        assert frame[12:14] == b"\x08\x00"
        assert packet[0] == 0x45
        assert checksum(packet[:20]) == 0
        self.tos, self.total, self.id, self.fragment, self.ttl, self.protocol = struct.unpack_from(">xBHHHBB", packet)
        self.ip_source, self.ip_destination = packet[12:16], packet[16:20]
        datagram = packet[20 : self.total]
        assert len(packet) == self.total
        *self.ports, length, total_sum = struct.unpack_from(">HHHH", datagram)
        assert length == len(datagram)
        assert total_sum
        assert checksum(packet[12:20] + struct.pack(">HH", 17, length) + datagram) == 0
        self.body = datagram[8:]
        fields = struct.unpack_from(">BBBBIHH4s4s4s4s16s64s128s", self.body)
        self.op, self.htype, self.hlen, self.hops, self.xid, self.secs, self.flags = fields[:7]
        self.ciaddr, self.yiaddr, self.siaddr, self.giaddr, self.chaddr, self.sname, self.file = fields[7:]
        assert self.body[236:240] == COOKIE
        self.options: dict[int, bytes] = {}
        at = 240
        while self.body[at] != 255:
            self.options[self.body[at]] = self.body[at + 2 : at + 2 + self.body[at + 1]]
            at += 2 + self.body[at + 1]
        assert not any(self.body[at + 1 :])

    @property
    def kind(self) -> int:
        """The message type; 0 for BOOTP."""
        return self.options.get(53, b"\0")[0]


def ipv6(payload: bytes, following: int, source: bytes, destination: bytes, hops: int = 255) -> bytes:
    """Return an IPv6 packet."""
    return struct.pack(">IHBB16s16s", 6 << 28, len(payload), following, hops, source, destination) + payload


def icmpv6(kind: int, body: bytes, source: bytes, destination: bytes, code: int = 0) -> bytes:
    """Return an ICMPv6 message with its checksum."""
    message = struct.pack(">BBH", kind, code, 0) + body
    pseudo = source + destination + struct.pack(">II", len(message), 58)
    return message[:2] + checksum(pseudo + message).to_bytes(2, "big") + message[4:]


def solicitation(
    source: bytes = GUEST_LL, destination: bytes = ALL_ROUTERS, options: bytes = b"\1\1" + LLADDR, *,
    kind: int = 133, code: int = 0, hops: int = 255, lladdr: bytes = b"\x33\x33\0\0\0\2", sender: bytes = LLADDR,
) -> bytes:  # fmt: skip
    """Return a router solicitation's frame."""
    message = icmpv6(kind, bytes(4) + options, source, destination, code)
    return ethernet(ipv6(message, 58, source, destination, hops), 0x86DD, sender, lladdr)


def tcp4(payload: bytes, *, sums: bool = False, source: bytes = LLADDR, destination: bytes = HOST_LLADDR) -> bytes:
    """Return a TCP frame.  Without `sums` its checksum is only the pseudo header's, for offloads."""
    return _tcp(payload, 4, sums, source, destination)


def tcp6(payload: bytes, *, sums: bool = False, source: bytes = LLADDR, destination: bytes = HOST_LLADDR) -> bytes:
    """Return the same for IPv6."""
    return _tcp(payload, 6, sums, source, destination)


def _tcp(payload: bytes, version: int, sums: bool, source: bytes, destination: bytes) -> bytes:
    here, there = (GUEST4, HOST4) if version == 4 else (GUEST_LL, ALL_NODES[:8] + GUEST_LL[8:])
    segment = struct.pack(">HHIIBBHHH", 4000, 80, 1000, 0, 0x50, 0x10, 1000, 0, 0)
    length = len(segment) + len(payload)
    pseudo = here + there + (struct.pack(">HH", 6, length) if version == 4 else struct.pack(">II", length, 6))
    total = checksum(pseudo + segment + payload) if sums else ~checksum(pseudo) & 0xFFFF
    segment = segment[:16] + total.to_bytes(2, "big") + segment[18:] + payload
    if version == 4:
        return ethernet(ipv4(segment, 6, here, there), 0x0800, source, destination)
    return ethernet(ipv6(segment, 6, here, there, 64), 0x86DD, source, destination)
