"""What is said of a guest that goes on at another place: bytes out, nothing in.

To switches: which port its Ethernet address is behind now (RARP, RFC 903: it needs no address of IPv4 or IPv6, and is
what other hypervisors send).  To the guest of a `local interface`: the Ethernet address of its router (RFC 5227, 3).
"""

from struct import Struct

from vmd.devices.vionet.ethernet import BROADCAST

ETHERNET = Struct(">6s6sH")  # destination, source, type
# Kinds and sizes of the addresses, operation; Ethernet and IPv4 address of the sender, of the target.
ARP = Struct(">HHBBH6s4s6s4s")
ETHERTYPE_ARP, ETHERTYPE_RARP = 0x0806, 0x8035
KIND_ETHERNET, KIND_IPV4 = 1, 0x0800
REQUEST, REVERSE_REQUEST = 1, 3
FRAME_MIN = 60  # without its checksum

# Seconds after a guest goes on: more than once, for a bridge may not yet forward, and a frame may be lost.
ROUNDS_S = (0.0, 0.15, 0.5, 1.5, 4.0)


def reverse_request(lladdr: bytes) -> bytes:
    """Return a frame of a guest that says nothing but where its Ethernet address is."""
    return _frame(ETHERTYPE_RARP, REVERSE_REQUEST, lladdr, bytes(4), lladdr, bytes(4))


def router_address(lladdr: bytes, address: bytes) -> bytes:
    """Return a frame of the host that says which Ethernet address its IPv4 address has."""
    return _frame(ETHERTYPE_ARP, REQUEST, lladdr, address, bytes(6), address)


def _frame(kind: int, operation: int, source: bytes, source4: bytes, target: bytes, target4: bytes) -> bytes:
    arp = ARP.pack(KIND_ETHERNET, KIND_IPV4, 6, 4, operation, source, source4, target, target4)
    return (ETHERNET.pack(BROADCAST, source, kind) + arp).ljust(FRAME_MIN, b"\0")
