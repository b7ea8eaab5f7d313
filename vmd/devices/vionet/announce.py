"""Announcements for a guest that goes on at another host: bytes out, nothing in.

They tell switches at which port the guest's Ethernet address is now.  That is RARP (RFC 903), which needs no IPv4 or
IPv6 address, and which other hypervisors send too.  They tell neighbours the addresses that the guest has told them
before, by ARP announcements (RFC 5227, 3) and unsolicited neighbour advertisements (RFC 4861, 7.2.6).  They tell the
guest of a `local interface` the Ethernet address of its router.
"""

from struct import Struct

from vmd.devices.vionet.ethernet import BROADCAST, IP_ICMPV6, IPV6, checksum
from vmd.devices.vionet.ra import ALL_NODES, HOP_LIMIT, IP, MULTICAST_LLADDR, VERSION, pseudo_header
from vmd.ipc import devmsg

ETHERNET = Struct(">6s6sH")  # destination, source, type
# Kinds and sizes of the addresses, operation; Ethernet and IPv4 address of the sender, of the target.
ARP = Struct(">HHBBH6s4s6s4s")
ETHERTYPE_ARP, ETHERTYPE_RARP = 0x0806, 0x8035
KIND_ETHERNET, KIND_IPV4 = 1, 0x0800
REQUEST, REVERSE_REQUEST = 1, 3
FRAME_MIN = 60  # without its checksum
# Type, code, checksum, flags, target; then an option: its type and length, and the target's link-layer address.
ADVERTISEMENT = Struct(">BBHI16sBB6s")
ADVERTISEMENT_TYPE, TARGET_LLADDR = 136, 2
ROUTER, OVERRIDE = 1 << 31, 1 << 29

# Seconds after a guest goes on.  More than once, because a bridge may not forward yet, and a frame may be lost.
ROUNDS_S = (0.0, 0.15, 0.5, 1.5, 4.0)


def reverse_request(lladdr: bytes) -> bytes:
    """Return a frame of a guest from which switches learn where its Ethernet address is.  It tells nothing else."""
    return _frame(ETHERTYPE_RARP, REVERSE_REQUEST, lladdr, bytes(4), lladdr, bytes(4))


def router_address(lladdr: bytes, address4: bytes) -> bytes:
    """Return a frame that tells the Ethernet address of an IPv4 address, which is the host's or a guest's own."""
    return _frame(ETHERTYPE_ARP, REQUEST, lladdr, address4, bytes(6), address4)


def address(lladdr: bytes, entry: bytes) -> bytes:
    """Return a frame of a guest that tells one of its addresses; `entry` is a devmsg.ANNOUNCED."""
    kind, raw = devmsg.ANNOUNCED.unpack(entry)
    if kind == devmsg.ANNOUNCED_4:
        return router_address(lladdr, raw[:4])
    flags = OVERRIDE | (ROUTER if kind == devmsg.ANNOUNCED_ROUTER else 0)
    message = ADVERTISEMENT.pack(ADVERTISEMENT_TYPE, 0, 0, flags, raw, TARGET_LLADDR, 1, lladdr)
    total = checksum(pseudo_header(raw, ALL_NODES, len(message)) + message)
    message = message[:2] + total.to_bytes(2, "big") + message[4:]
    packet = IP.pack(VERSION, len(message), IP_ICMPV6, HOP_LIMIT, raw, ALL_NODES) + message
    return MULTICAST_LLADDR + ALL_NODES[12:] + lladdr + IPV6 + packet


def _frame(kind: int, operation: int, source: bytes, source4: bytes, target: bytes, target4: bytes) -> bytes:
    arp = ARP.pack(KIND_ETHERNET, KIND_IPV4, 6, 4, operation, source, source4, target, target4)
    return (ETHERNET.pack(BROADCAST, source, kind) + arp).ljust(FRAME_MIN, b"\0")
