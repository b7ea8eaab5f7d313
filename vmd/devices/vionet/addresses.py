"""The addresses of a guest on a switch, learned from what it tells its neighbours: bytes in, bytes out.

Nothing is sent to the guest to find them out.  The addresses come from its ARP packets (RFC 826) and neighbour
advertisements (RFC 4861).  After a move to another host they are announced there.  The latest addresses are kept.  They
are a guest's claims, so they are used for nothing else.
"""

from vmd.devices.vionet.announce import ARP, ETHERNET, ETHERTYPE_ARP, KIND_ETHERNET, KIND_IPV4
from vmd.devices.vionet.ethernet import HEADER_BYTES, IP_ICMPV6, IPV6, SOURCE, TYPE
from vmd.devices.vionet.ra import HOP_LIMIT, IP, UNSPECIFIED
from vmd.ipc import devmsg

ADVERTISEMENT = 136
ROUTER = 0x80  # flag, in the byte after the checksum
MULTICAST = 0xFF  # first byte of a multicast IPv6 address
ETHERTYPE = ETHERTYPE_ARP.to_bytes(2, "big")
ARP_BYTES = ETHERNET.size + ARP.size
ADVERTISEMENT_BYTES = HEADER_BYTES + IP.size + 24  # without options
PADDED_BYTES = 60  # length of the shortest frame, to which some drivers pad ARP packets
OPTION_BYTES = 8  # the option with the sender's link-layer address
LOOK_BYTES = ADVERTISEMENT_BYTES
# Only frames of these lengths are inspected: ARP packets and advertisements.
LENGTHS = (ARP_BYTES, PADDED_BYTES, ADVERTISEMENT_BYTES, ADVERTISEMENT_BYTES + OPTION_BYTES)


class Addresses:
    """The addresses of one interface.  The thread that moves frames learns; the main thread reads."""

    def __init__(self, lladdr: bytes) -> None:
        self.lladdr = lladdr
        self.known: tuple[bytes, ...] = ()  # each a devmsg.ANNOUNCED, the latest first

    def learn(self, start: bytes) -> None:
        """Learn from a frame of the guest; `start` is its first LOOK_BYTES, or the whole frame."""
        if start[SOURCE] != self.lladdr:
            return
        found = b""
        if start[TYPE] == ETHERTYPE and len(start) >= ARP_BYTES:
            found = self._of_arp(start)
        elif start[TYPE] == IPV6 and len(start) >= ADVERTISEMENT_BYTES:
            found = of_advertisement(start)
        if found and self.known[:1] != (found,):
            # Entries are compared by address only: the kind changes when a router stops being one.
            others = [entry for entry in self.known if entry[1:] != found[1:]]
            self.known = (found, *others)[: devmsg.ANNOUNCED_MAX]

    def _of_arp(self, start: bytes) -> bytes:
        kind, protocol, size, size4, _, source, source4, _, _ = ARP.unpack_from(start, ETHERNET.size)
        fits = (kind, protocol, size, size4, source) == (KIND_ETHERNET, KIND_IPV4, 6, 4, self.lladdr)
        return devmsg.ANNOUNCED.pack(devmsg.ANNOUNCED_4, source4) if fits and any(source4) else b""


def of_advertisement(start: bytes) -> bytes:
    """Return the address that a neighbour advertisement tells, as devmsg.ANNOUNCED; b"" if `start` is none."""
    first, _, following, hops, source, _ = IP.unpack_from(start, HEADER_BYTES)
    message = start[HEADER_BYTES + IP.size :]
    target = message[8:24]
    if (first >> 28, following, hops, message[0], message[1]) != (6, IP_ICMPV6, HOP_LIMIT, ADVERTISEMENT, 0):
        return b""
    if UNSPECIFIED in (source, target) or target[0] == MULTICAST:
        return b""
    kind = devmsg.ANNOUNCED_ROUTER if message[4] & ROUTER else devmsg.ANNOUNCED_6
    return devmsg.ANNOUNCED.pack(kind, target)
