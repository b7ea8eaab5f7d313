"""Ethernet frames: offsets, types and checksums that several protocols use."""

HEADER_BYTES = 14  # destination, source, type
DESTINATION = slice(0, 6)
SOURCE = slice(6, 12)
TYPE = slice(12, 14)
IPV4, IPV6 = b"\x08\x00", b"\x86\xdd"
BROADCAST = b"\xff" * 6
GROUP = 1  # in the first byte of an address: multicast or broadcast

IP_UDP = 17
IP_ICMPV6 = 58


def checksum(data: bytes) -> int:
    """Return the internet checksum (RFC 1071) of `data`.  A checksum field within `data` must be zero.

    The one's complement sum of 16-bit words equals the data, read as one number, modulo 65535.
    """
    if len(data) % 2:
        data += b"\0"
    return -int.from_bytes(data, "big") % 0xFFFF


def sum_is_right(data: bytes) -> bool:
    """Return whether the checksum that `data` contains is right."""
    if len(data) % 2:
        data += b"\0"
    return int.from_bytes(data, "big") % 0xFFFF == 0


def link_local(lladdr: bytes) -> bytes:
    """Return the IPv6 address that Linux gives an interface for its link-layer address (RFC 4291, appendix A)."""
    return b"\xfe\x80" + bytes(6) + bytes((lladdr[0] ^ 2,)) + lladdr[1:3] + b"\xff\xfe" + lladdr[3:]
