"""Router advertisements for the guest of a `local interface` (RFC 4861, RFC 8106): bytes in, bytes out.

The host itself forwards packets and answers neighbour solicitations; only the advertisements are made here.  The guest
is the only other node on its link, so the delays of RFC 4861 that keep many nodes from sending at once are left out.
"""

from struct import Struct

from vmd.devices.vionet.ethernet import (
    DESTINATION,
    HEADER_BYTES,
    IP_ICMPV6,
    IPV6,
    SOURCE,
    TYPE,
    checksum,
    sum_is_right,
)
from vmd.devices.vionet.interface import MTU_USUAL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.devices.vionet.interface import Interface

IP = Struct(">IHBB16s16s")  # version, class and label; payload length, next header, hop limit, source, destination
SOLICITATION = Struct(">BBH4x")  # type, code, sum
ADVERTISEMENT = Struct(">BBHBBHII")  # ..., hop limit, flags, router lifetime, reachable time, retransmission timer
PREFIX = Struct(">BBBBII4x16s")  # type, length, prefix length, flags, valid and preferred lifetime, prefix
MTU = Struct(">BBHI")
RDNSS = Struct(">BBHI")
ROUTER_SOLICITATION, ROUTER_ADVERTISEMENT = 133, 134
SOURCE_LLADDR, PREFIX_INFORMATION, MTU_OPTION, RDNSS_OPTION = 1, 3, 5, 25
VERSION = 6 << 28
HOP_LIMIT = 255  # a packet with it was not forwarded, because each router subtracts 1
GUESTS_HOP_LIMIT = 64
ON_LINK, AUTONOMOUS = 0x80, 0x40

ALL_NODES = b"\xff\x02" + bytes(13) + b"\x01"
ALL_ROUTERS = b"\xff\x02" + bytes(13) + b"\x02"
UNSPECIFIED = bytes(16)
MULTICAST_LLADDR = b"\x33\x33"  # followed by the last four bytes of the IPv6 address

ROUTER_LIFETIME_S = 1800
PREFERRED_S, VALID_S = 604_800, 2_592_000
INTERVAL_S = 300  # between unsolicited advertisements, on average
INITIAL_INTERVAL_S, INITIAL_COUNT = 16, 3


def is_solicitation(frame: bytes, interface: "Interface", *, sum_missing: bool = False) -> bool:
    """Return whether a frame of the guest is a valid router solicitation (RFC 4861, 6.1.1)."""
    if len(frame) < HEADER_BYTES + IP.size + SOLICITATION.size or frame[TYPE] != IPV6:
        return False
    to_us = (MULTICAST_LLADDR + ALL_ROUTERS[12:], interface.host_lladdr)
    if frame[DESTINATION] not in to_us or frame[SOURCE] != interface.lladdr:
        return False
    first, length, following, hops, source, destination = IP.unpack_from(frame, HEADER_BYTES)
    message = frame[HEADER_BYTES + IP.size : HEADER_BYTES + IP.size + length]
    if first >> 28 != 6 or following != IP_ICMPV6 or hops != HOP_LIMIT or len(message) != length:
        return False
    if destination not in (ALL_ROUTERS, interface.router) or length < SOLICITATION.size:
        return False
    kind, code, _ = SOLICITATION.unpack_from(message)
    if kind != ROUTER_SOLICITATION or code:
        return False
    if not sum_missing and not sum_is_right(pseudo_header(source, destination, length) + message):
        return False
    options = option_types(message[SOLICITATION.size :])
    return options is not None and not (source == UNSPECIFIED and SOURCE_LLADDR in options)


def option_types(field: bytes) -> set[int] | None:
    """Return the types of a message's options; None if the options do not fill `field` exactly."""
    types: set[int] = set()
    at = 0
    while at < len(field):
        length = field[at + 1] * 8 if at + 1 < len(field) else 0
        if not length or at + length > len(field):
            return None
        types.add(field[at])
        at += length
    return types


def advertisement(interface: "Interface") -> bytes:
    """Return the frame of a router advertisement.

    It is addressed to all nodes even if it answers a solicitation, which 6.2.6 allows.  So no address has to be taken
    from a packet.
    """
    message = ADVERTISEMENT.pack(ROUTER_ADVERTISEMENT, 0, 0, GUESTS_HOP_LIMIT, 0, ROUTER_LIFETIME_S, 0, 0)
    message += bytes((SOURCE_LLADDR, 1)) + interface.host_lladdr
    message += MTU.pack(MTU_OPTION, 1, 0, interface.mtu or MTU_USUAL)
    prefix = interface.prefix6[:8]  # padded with zeroes
    message += PREFIX.pack(PREFIX_INFORMATION, 4, 64, ON_LINK | AUTONOMOUS, VALID_S, PREFERRED_S, prefix)
    if interface.dns6:
        message += RDNSS.pack(RDNSS_OPTION, 1 + 2 * len(interface.dns6), 0, ROUTER_LIFETIME_S)
        message += b"".join(interface.dns6)
    total = checksum(pseudo_header(interface.router, ALL_NODES, len(message)) + message)
    message = message[:2] + total.to_bytes(2, "big") + message[4:]
    packet = IP.pack(VERSION, len(message), IP_ICMPV6, HOP_LIMIT, interface.router, ALL_NODES) + message
    return MULTICAST_LLADDR + ALL_NODES[12:] + interface.host_lladdr + IPV6 + packet


def pseudo_header(source: bytes, destination: bytes, length: int) -> bytes:
    """Return the pseudo-header, which the checksum covers besides the message (RFC 8200, 8.1)."""
    return source + destination + length.to_bytes(4, "big") + bytes((0, 0, 0, IP_ICMPV6))
