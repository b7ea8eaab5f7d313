"""The DHCP and BOOTP server of a `local interface`: one guest, one address, no state (*cat. 7.3*; RFC 951, 2131).

Bytes in, bytes or None out.  A packet is checked as a whole, link layer to last option, before any of it is believed;
what is not a client's request to us goes on to the tap.

Unlike vmd: a client that renews its lease, and so says which address it has, is answered too; the address that counts
then is the one it has.  What a client can only hear as a broadcast, because it asked for that or because its address
is refused, is one for IP.  Nothing that came through a relay is for us.  A request may be shorter than BOOTP's 300
bytes: clients of today do not pad.
"""

from struct import Struct

from vmd.devices.vionet.ethernet import (
    BROADCAST,
    DESTINATION,
    HEADER_BYTES,
    IP_UDP,
    IPV4,
    SOURCE,
    TYPE,
    checksum,
    sum_is_right,
)
from vmd.devices.vionet.interface import MTU_USUAL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.devices.vionet.interface import Interface

FRAME_MAX = 1514
IP = Struct(">BBHHHBBH4s4s")  # version and length, tos, total length, id, fragment, ttl, protocol, sum, source, dest
UDP = Struct(">HHHH")  # source port, destination port, length, sum
BOOTP = Struct(">BBBBIHH4s4s4s4s16s64s128s")  # RFC 2131, 2: op to file
COOKIE = b"\x63\x82\x53\x63"
BOOTP_MIN = 300  # bytes of a reply, which old clients insist on
SERVER_PORT, CLIENT_PORT = 67, 68
BOOTREQUEST, BOOTREPLY = 1, 2
HTYPE_ETHERNET = 1
BROADCAST_FLAG = 0x8000
MORE_FRAGMENTS_OR_OFFSET = 0x3FFF
LOW_DELAY, TTL = 0x10, 16
EVERYWHERE = b"\xff" * 4

PAD, MASK, ROUTER, DNS, HOST_NAME, INTERFACE_MTU = 0, 1, 3, 6, 12, 26
REQUESTED_ADDRESS, LEASE_TIME, MESSAGE_TYPE, SERVER_ID, END = 50, 51, 53, 54, 255
DISCOVER, OFFER, REQUEST, ACK, NAK = 1, 2, 3, 5, 6
NETMASK = bytes((255, 255, 255, 254))
FOR_EVER = b"\xff" * 4
BOOT_FILE = b"auto_install"
HOST_NAME_MAX, LABEL_MAX = 255, 63


class Reply:
    """An answer: `kind` is OFFER, ACK, NAK or 0 for BOOTP; `requested` the address the client wanted, or nothing."""

    __slots__ = ("frame", "kind", "requested")

    def __init__(self, kind: int, requested: bytes, frame: bytes) -> None:
        self.kind = kind
        self.requested = requested
        self.frame = frame


class Request:
    """What counts of a checked request."""

    __slots__ = ("ciaddr", "flags", "kind", "requested", "xid")

    def __init__(self, xid: int, flags: int, ciaddr: bytes, kind: int, requested: bytes) -> None:
        self.xid = xid
        self.flags = flags
        self.ciaddr = ciaddr
        self.kind = kind  # 0: BOOTP
        self.requested = requested


def answer(frame: bytes, interface: "Interface", *, sum_missing: bool = False) -> Reply | None:
    """Return the answer to an Ethernet frame of the guest, or None if it is not for us.

    `sum_missing`: the guest has left the UDP checksum to its device (VIRTIO_NET_HDR_F_NEEDS_CSUM).
    """
    request = parse(frame, interface, sum_missing=sum_missing)
    if request is None:
        return None
    kind, requested = decide(request, interface)
    return Reply(kind, requested, build(request, kind, interface))


# --- the request -------------------------------------------------------------------------------------------------


def parse(frame: bytes, interface: "Interface", *, sum_missing: bool) -> Request | None:
    """Check a frame from outside to inside; None if anything about it is wrong, or not a client's."""
    if not HEADER_BYTES <= len(frame) <= FRAME_MAX or frame[TYPE] != IPV4:
        return None
    if frame[DESTINATION] not in (BROADCAST, interface.host_lladdr) or frame[SOURCE] != interface.lladdr:
        return None
    body = unwrap(frame[HEADER_BYTES:], interface, sum_missing=sum_missing)
    if body is None or len(body) < BOOTP.size:
        return None
    op, htype, hlen, hops, xid, _, flags, ciaddr, _, _, giaddr, chaddr, _, file = BOOTP.unpack_from(body)
    if op != BOOTREQUEST or htype != HTYPE_ETHERNET or hlen != 6 or chaddr[:6] != interface.lladdr:
        return None
    if hops or any(giaddr) or file[0]:
        return None
    options = parse_options(body[BOOTP.size :])
    if options is None:
        return None
    message, requested = options.get(MESSAGE_TYPE, b""), options.get(REQUESTED_ADDRESS, b"")
    if len(message) > 1 or (MESSAGE_TYPE in options and not message) or len(requested) not in (0, 4):
        return None
    kind = message[0] if message else 0
    if any(ciaddr) and kind != REQUEST:
        return None  # it has its address, and wants something that is not ours to give
    return Request(xid, flags, ciaddr, kind, requested)


def unwrap(packet: bytes, interface: "Interface", *, sum_missing: bool) -> bytes | None:
    """Return what an IP packet carries from the client's to the server's port."""
    if len(packet) < IP.size:
        return None
    version, _, total, _, fragment, _, protocol, _, source, destination = IP.unpack_from(packet)
    header = (version & 15) * 4
    if version >> 4 != 4 or header < IP.size or not header + UDP.size <= total <= len(packet):
        return None
    if not sum_is_right(packet[:header]) or fragment & MORE_FRAGMENTS_OR_OFFSET or protocol != IP_UDP:
        return None
    if destination not in (EVERYWHERE, interface.host4):
        return None
    datagram = packet[header:total]
    from_port, to_port, length, udp_sum = UDP.unpack_from(datagram)
    if (from_port, to_port) != (CLIENT_PORT, SERVER_PORT) or not UDP.size <= length <= len(datagram):
        return None
    pseudo = source + destination + bytes((0, IP_UDP)) + length.to_bytes(2, "big")
    if udp_sum and not sum_missing and not sum_is_right(pseudo + datagram[:length]):
        return None
    return datagram[UDP.size : length]


def parse_options(field: bytes) -> dict[int, bytes] | None:
    """Return the options by their codes; None if one runs past the end, or is there twice.

    Without the magic cookie there are none.  Clients of old leave END out.
    """
    options: dict[int, bytes] = {}
    if field[: len(COOKIE)] != COOKIE:
        return options
    at = len(COOKIE)
    while at < len(field) and field[at] != END:
        if field[at] == PAD:
            at += 1
            continue
        if at + 2 > len(field):
            return None
        code, length = field[at], field[at + 1]
        at += 2
        if at + length > len(field) or code in options:
            return None
        options[code] = field[at : at + length]
        at += length
    return options


# --- the answer ----------------------------------------------------------------------------------------------------


def decide(request: Request, interface: "Interface") -> tuple[int, bytes]:
    """Return the type of the answer, 0 for BOOTP, and the address that was asked for."""
    wanted = request.requested or (request.ciaddr if any(request.ciaddr) else b"")
    if request.kind == 0:
        return 0, wanted
    if request.kind == DISCOVER:
        return OFFER, wanted
    has_other = any(request.ciaddr) and request.ciaddr != interface.guest4
    if request.kind == REQUEST and wanted in (b"", interface.guest4) and not has_other:
        return ACK, wanted
    return NAK, wanted


def build(request: Request, kind: int, interface: "Interface") -> bytes:
    """Return the answer's frame."""
    broadcast = kind == NAK or request.flags & BROADCAST_FLAG
    destination = EVERYWHERE if broadcast else interface.guest4
    boot_file = BOOT_FILE if interface.pxe else b""
    body = BOOTP.pack(
        BOOTREPLY,
        HTYPE_ETHERNET,
        6,
        0,
        request.xid,
        0,
        request.flags,
        request.ciaddr if kind == ACK else bytes(4),
        interface.guest4,
        interface.host4,
        bytes(4),
        interface.lladdr,
        b"",
        boot_file,
    )
    body = (body + COOKIE + build_options(kind, interface)).ljust(BOOTP_MIN, b"\0")
    udp = UDP.pack(SERVER_PORT, CLIENT_PORT, UDP.size + len(body), 0)
    pseudo = interface.host4 + destination + bytes((0, IP_UDP)) + (UDP.size + len(body)).to_bytes(2, "big")
    udp_sum = checksum(pseudo + udp + body) or 0xFFFF
    datagram = UDP.pack(SERVER_PORT, CLIENT_PORT, UDP.size + len(body), udp_sum) + body
    fields = [0x45, LOW_DELAY, IP.size + len(datagram), 0, 0, TTL, IP_UDP, 0, interface.host4, destination]
    fields[7] = checksum(IP.pack(*fields))
    source = interface.lladdr[:5] + bytes((interface.lladdr[5] + 1 & 0xFF,))
    return interface.lladdr + source + IPV4 + IP.pack(*fields) + datagram


def build_options(kind: int, interface: "Interface") -> bytes:
    """Return the options, in upstream's order."""
    options = b""
    if kind:
        options += option(MESSAGE_TYPE, bytes((kind,)))
        options += option(LEASE_TIME, FOR_EVER) + option(SERVER_ID, interface.host4)
    options += option(MASK, NETMASK) + option(ROUTER, interface.host4)
    options += option(DNS, b"".join(interface.dns4) or interface.host4)
    if interface.pxe and is_host_name(interface.host_name):
        options += option(HOST_NAME, interface.host_name.encode())
    if interface.mtu not in (0, MTU_USUAL):
        options += option(INTERFACE_MTU, interface.mtu.to_bytes(2, "big"))
    return options + bytes((END,))


def option(code: int, data: bytes) -> bytes:
    """Return one option."""
    return bytes((code, len(data))) + data


def is_host_name(name: str) -> bool:
    """Return whether a name is one for hosts (RFC 1123, 2.1)."""
    return 0 < len(name) <= HOST_NAME_MAX and all(
        0 < len(label) <= LABEL_MAX
        and label.isascii()
        and label.replace("-", "a").isalnum()
        and label[0] != "-" != label[-1]
        for label in name.split(".")
    )
