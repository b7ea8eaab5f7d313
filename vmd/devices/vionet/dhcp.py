"""The DHCP and BOOTP server of a `local interface`: one guest, one address, no state (RFC 951, 2131, 3396, 6842).

Bytes in; an answer out, or the reason why there is none.  A packet is checked completely, from the link layer to the
last option, before any of it is used.  A packet that is not answered is passed on to the tap.

The answer depends on four things: the message type, ciaddr (an address that the client uses already), option 50 (an
address that the client asks for) and option 54 (the server that the client has chosen).  RFC 2131 has the rules in
table 4 and section 4.3.  Unlike the RFC, a request that names no address gets the guest's address: vmd (*cat. 7.3*)
does so too.

A request may be shorter than BOOTP's 300 bytes, because current clients do not pad.
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
from vmd.devices.vionet.interface import MTU_USUAL, given
from vmd.ipc.devmsg import HOST_NAME_BYTES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.devices.vionet.interface import Interface

FRAME_MAX = 1514
IP = Struct(">BBHHHBBH4s4s")  # version and length, tos, total length, id, fragment, ttl, protocol, sum, source, dest
UDP = Struct(">HHHH")  # source port, destination port, length, sum
BOOTP = Struct(">BBBBIHH4s4s4s4s16s64s128s")  # RFC 2131, 2: op to file
COOKIE = b"\x63\x82\x53\x63"
BOOTP_MIN = 300  # bytes of a reply; old clients refuse shorter ones
SERVER_PORT, CLIENT_PORT = 67, 68
BOOTREQUEST, BOOTREPLY = 1, 2
HTYPE_ETHERNET = 1
BROADCAST_FLAG = 0x8000
MORE_FRAGMENTS_OR_OFFSET = 0x3FFF
LOW_DELAY, TTL = 0x10, 16
EVERYWHERE = b"\xff" * 4

PAD, MASK, ROUTER, DNS, HOST_NAME, DOMAIN_NAME, INTERFACE_MTU = 0, 1, 3, 6, 12, 15, 26
REQUESTED_ADDRESS, LEASE_TIME, OVERLOAD, MESSAGE_TYPE, SERVER_ID = 50, 51, 52, 53, 54
MESSAGE, MAX_MESSAGE, CLIENT_ID, CLIENT_FQDN, END = 56, 57, 61, 81, 255
FQDN_HEAD, FQDN_ENCODED = 3, 4  # bytes before the name of CLIENT_FQDN; flag: it is encoded as in DNS (RFC 4702, 2)
OVERLOAD_FILE, OVERLOAD_SNAME = 1, 2  # bits of OVERLOAD: the field `file` or `sname` has options too
DISCOVER, OFFER, REQUEST, DECLINE, ACK, NAK, RELEASE, INFORM = range(1, 9)
BOOTP_TYPE = 0  # stands for the message type that BOOTP does not have
FOR_EVER = b"\xff" * 4
BOOT_FILE = b"auto_install"
HOST_NAME_MAX, LABEL_MAX = 255, 63
OPTION_MAX = 255  # bytes of one option; a longer value is split into several (RFC 3396)
DATAGRAM_MIN = 576  # bytes of an IP datagram that every client accepts (RFC 2131, 2)
NAK_TEXT = b"this network has another address for you"

# Reasons why a request is not answered.  They are names of `devmsg.COUNTER_NAMES`.
OTHER_SERVER = "dhcp_other_server"
OTHER_ADDRESS = "dhcp_other_address"
OTHER_CLIENT = "dhcp_other_client"
DECLINED = "dhcp_declines"
RELEASED = "dhcp_releases"
NO_ADDRESS = "dhcp_no_address"
UNKNOWN_TYPE = "dhcp_unknown_type"
MALFORMED = "dhcp_malformed"
RELAYED = "dhcp_relayed"
WANTS_FILE = "dhcp_wants_file"
TOO_LONG = "dhcp_too_long"
REASONS = (
    OTHER_SERVER, OTHER_ADDRESS, OTHER_CLIENT, DECLINED, RELEASED, NO_ADDRESS, UNKNOWN_TYPE, MALFORMED, RELAYED,
    WANTS_FILE, TOO_LONG,
)  # fmt: skip


class Unanswered(Exception):
    """A request that gets no answer; `reason` is one of REASONS."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Request:
    """The fields of a checked request that the answer depends on."""

    __slots__ = ("ciaddr", "client_id", "flags", "host_name", "kind", "limit", "requested", "server", "source", "xid")

    def __init__(self, xid: int, flags: int, ciaddr: bytes, source: bytes, options: dict[int, bytes]) -> None:
        """`source` is the sender's IP address.

        Raises:
            Unanswered: an option has an impossible length, or the message type is 0.
        """
        for code, lengths in ((MESSAGE_TYPE, (1,)), (REQUESTED_ADDRESS, (4,)), (SERVER_ID, (4,)), (MAX_MESSAGE, (2,))):
            if code in options and len(options[code]) not in lengths:
                raise Unanswered(MALFORMED)
        self.xid = xid
        self.flags = flags
        self.ciaddr = given(ciaddr)
        self.source = given(source)
        self.kind = options[MESSAGE_TYPE][0] if MESSAGE_TYPE in options else BOOTP_TYPE
        if MESSAGE_TYPE in options and self.kind == BOOTP_TYPE:
            raise Unanswered(UNKNOWN_TYPE)
        self.requested = given(options.get(REQUESTED_ADDRESS, b""))
        self.server = options.get(SERVER_ID, b"")
        self.client_id = options.get(CLIENT_ID, b"")
        self.host_name = name_in(options)
        self.limit = max(DATAGRAM_MIN, int.from_bytes(options.get(MAX_MESSAGE, b""), "big"))

    @property
    def wanted(self) -> bytes:
        """The address that the client asks for or uses; empty: any."""
        return self.requested or self.ciaddr


class Reply:
    """An answer.

    `kind` is OFFER, ACK, NAK or BOOTP_TYPE.  `requested` is the address that the client wanted, or b"".  `lease` says
    whether this answer gives the guest its address.
    """

    __slots__ = ("frame", "kind", "lease", "request", "requested")

    def __init__(self, request: Request, kind: int, interface: "Interface") -> None:
        """Raises Unanswered if the answer would be longer than the client accepts."""
        self.kind = kind
        self.request = request
        self.lease = kind in (ACK, BOOTP_TYPE) and request.kind != INFORM
        self.requested = request.wanted
        self.frame = build(request, kind, interface)


def answer(frame: bytes, interface: "Interface", *, sum_missing: bool = False) -> Reply | None:
    """Return the answer to an Ethernet frame of the guest, or None if the frame is not DHCP or BOOTP.

    `sum_missing`: the guest has left the UDP checksum to its device (VIRTIO_NET_HDR_F_NEEDS_CSUM).

    Raises:
        Unanswered: the frame is DHCP or BOOTP, and gets no answer.
    """
    request = parse(frame, interface, sum_missing=sum_missing)
    return None if request is None else Reply(request, decide(request, interface), interface)


# --- the request -------------------------------------------------------------------------------------------------


def parse(frame: bytes, interface: "Interface", *, sum_missing: bool) -> Request | None:
    """Check a frame, outermost header first; return None if it is not from the client's port to the server's port.

    Raises Unanswered.
    """
    if not HEADER_BYTES <= len(frame) <= FRAME_MAX or frame[TYPE] != IPV4:
        return None
    if frame[DESTINATION] not in (BROADCAST, interface.host_lladdr):
        return None
    unwrapped = unwrap(frame[HEADER_BYTES:], interface, sum_missing=sum_missing)
    if unwrapped is None:
        return None
    source, body = unwrapped
    if frame[SOURCE] != interface.lladdr:
        raise Unanswered(OTHER_CLIENT)
    if len(body) < BOOTP.size:
        raise Unanswered(MALFORMED)
    op, htype, hlen, hops, xid, _, flags, ciaddr, _, _, giaddr, chaddr, sname, file = BOOTP.unpack_from(body)
    if op != BOOTREQUEST or htype != HTYPE_ETHERNET or hlen != 6:
        raise Unanswered(MALFORMED)
    if hops or any(giaddr):
        raise Unanswered(RELAYED)
    if chaddr[:6] != interface.lladdr:
        raise Unanswered(OTHER_CLIENT)
    request = Request(xid, flags, ciaddr, source, parse_options(body[BOOTP.size :], file, sname))
    if request.kind == BOOTP_TYPE and file[0]:
        raise Unanswered(WANTS_FILE)  # RFC 951: a server without the file does not answer
    return request


def unwrap(packet: bytes, interface: "Interface", *, sum_missing: bool) -> tuple[bytes, bytes] | None:
    """Return the sender of an IP packet, and the contents of its UDP datagram from the client's to the server's port.

    Returns None if the packet contains something else, or is a fragment.  Raises Unanswered.
    """
    if len(packet) < IP.size:
        return None
    version, _, total, _, fragment, _, protocol, _, source, destination = IP.unpack_from(packet)
    header = (version & 15) * 4
    if version >> 4 != 4 or header < IP.size or len(packet) < header + UDP.size:
        return None
    if protocol != IP_UDP or fragment & MORE_FRAGMENTS_OR_OFFSET:
        return None
    from_port, to_port, length, udp_sum = UDP.unpack_from(packet, header)
    if (from_port, to_port) != (CLIENT_PORT, SERVER_PORT):
        return None
    if not header + UDP.size <= total <= len(packet) or not sum_is_right(packet[:header]):
        raise Unanswered(MALFORMED)
    datagram = packet[header:total]
    if not UDP.size <= length <= len(datagram):
        raise Unanswered(MALFORMED)
    pseudo = source + destination + bytes((0, IP_UDP)) + length.to_bytes(2, "big")
    if udp_sum and not sum_missing and not sum_is_right(pseudo + datagram[:length]):
        raise Unanswered(MALFORMED)
    if destination not in (EVERYWHERE, interface.host4):
        raise Unanswered(OTHER_SERVER)
    return source, datagram[UDP.size : length]


def parse_options(field: bytes, file: bytes, sname: bytes) -> dict[int, bytes]:
    """Return the options by their codes.  The parts of a split option are joined, from all fields (RFC 3396).

    Without the magic cookie there are no options.  Raises Unanswered if an option runs past the end of its field.
    """
    options: dict[int, bytes] = {}
    if field[: len(COOKIE)] != COOKIE:
        return options
    collect_options(field[len(COOKIE) :], options)
    overload = options.get(OVERLOAD, b"\0")
    if len(overload) != 1:
        raise Unanswered(MALFORMED)
    if overload[0] & OVERLOAD_FILE:
        collect_options(file, options)
    if overload[0] & OVERLOAD_SNAME:
        collect_options(sname, options)
    return options


def collect_options(field: bytes, options: dict[int, bytes]) -> None:
    """Add the options of one field.  Old clients do not end a field with END.  Raises Unanswered."""
    at = 0
    while at < len(field) and field[at] != END:
        if field[at] == PAD:
            at += 1
            continue
        if at + 2 > len(field):
            raise Unanswered(MALFORMED)
        code, length = field[at], field[at + 1]
        at += 2
        if at + length > len(field):
            raise Unanswered(MALFORMED)
        options[code] = options.get(code, b"") + field[at : at + length]
        at += length


def name_in(options: "dict[int, bytes]") -> bytes:
    """Return the host name that a client gives; b"" if there is none, or if it is not a valid host name."""
    fqdn = options.get(CLIENT_FQDN, b"")
    name = options.get(HOST_NAME, b"")
    if not name and len(fqdn) > FQDN_HEAD:
        name = fqdn[FQDN_HEAD:]
        if fqdn[0] & FQDN_ENCODED:
            labels = []
            while name and 0 < name[0] < len(name):
                labels.append(name[1 : 1 + name[0]])
                name = name[1 + name[0] :]
            name = b".".join(labels)
    name = name.rstrip(b"\0").removesuffix(b".")
    return name if len(name) <= HOST_NAME_BYTES and is_host_name(name.decode("latin-1")) else b""


# --- the answer ----------------------------------------------------------------------------------------------------


def decide(request: Request, interface: "Interface") -> int:
    """Return the type of the answer.  Raises Unanswered."""
    kind, ours = request.kind, interface.guest4
    if kind == BOOTP_TYPE:
        if request.ciaddr not in (b"", ours):
            raise Unanswered(OTHER_ADDRESS)
        return BOOTP_TYPE
    if kind == DISCOVER:
        return OFFER
    if kind == INFORM:
        if not (request.ciaddr or request.source):
            raise Unanswered(NO_ADDRESS)
        return ACK
    if kind not in (REQUEST, DECLINE, RELEASE):
        raise Unanswered(UNKNOWN_TYPE)
    if request.server not in (b"", interface.host4):
        raise Unanswered(OTHER_SERVER)  # RFC 2131, 4.3.2: the client has chosen another server's offer
    right = request.requested in (b"", ours) and request.ciaddr in (b"", ours)
    if kind == REQUEST:
        return ACK if right else NAK
    if not right:
        raise Unanswered(OTHER_ADDRESS)
    raise Unanswered(DECLINED if kind == DECLINE else RELEASED)


def destination_of(request: Request, kind: int, interface: "Interface") -> bytes:
    """Return the IP address to which an answer is sent (RFC 2131, 4.1 and 4.3.5)."""
    if request.kind == INFORM:
        return request.ciaddr or request.source
    if kind == NAK:
        return EVERYWHERE
    if request.ciaddr:
        return request.ciaddr
    return EVERYWHERE if request.flags & BROADCAST_FLAG else interface.guest4


def build(request: Request, kind: int, interface: "Interface") -> bytes:
    """Return the answer's frame (RFC 2131, table 3).  Raises Unanswered if it is longer than the client accepts."""
    destination = destination_of(request, kind, interface)
    gives = kind != NAK
    body = BOOTP.pack(
        BOOTREPLY,
        HTYPE_ETHERNET,
        6,
        0,
        request.xid,
        0,
        request.flags,
        request.ciaddr if kind in (ACK, BOOTP_TYPE) else b"",
        interface.guest4 if gives and request.kind != INFORM else b"",
        interface.host4 if gives else b"",
        b"",
        interface.lladdr,
        b"",
        BOOT_FILE if gives and interface.pxe else b"",
    )
    room = min(request.limit, FRAME_MAX - HEADER_BYTES) - IP.size - UDP.size - len(body) - len(COOKIE)
    options = build_options(request, kind, interface)
    if len(options) > room:  # leave out the host name: the guest needs the address more
        options = build_options(request, kind, interface.replace(host_name=""))
    if len(options) > room:
        raise Unanswered(TOO_LONG)
    body = (body + COOKIE + options).ljust(BOOTP_MIN, b"\0")
    udp = UDP.pack(SERVER_PORT, CLIENT_PORT, UDP.size + len(body), 0)
    pseudo = interface.host4 + destination + bytes((0, IP_UDP)) + (UDP.size + len(body)).to_bytes(2, "big")
    udp_sum = checksum(pseudo + udp + body) or 0xFFFF
    datagram = UDP.pack(SERVER_PORT, CLIENT_PORT, UDP.size + len(body), udp_sum) + body
    fields = [0x45, LOW_DELAY, IP.size + len(datagram), 0, 0, TTL, IP_UDP, 0, interface.host4, destination]
    fields[7] = checksum(IP.pack(*fields))
    source = interface.lladdr[:5] + bytes((interface.lladdr[5] + 1 & 0xFF,))
    return interface.lladdr + source + IPV4 + IP.pack(*fields) + datagram


def build_options(request: Request, kind: int, interface: "Interface") -> bytes:
    """Return the options in upstream's order, then the client's identifier unchanged (RFC 6842)."""
    options = b""
    if kind != BOOTP_TYPE:
        options += option(MESSAGE_TYPE, bytes((kind,)))
        if kind != NAK and request.kind != INFORM:
            options += option(LEASE_TIME, FOR_EVER)
        options += option(SERVER_ID, interface.host4)
    if kind == NAK:
        options += option(MESSAGE, NAK_TEXT)
    else:
        options += option(MASK, interface.netmask) + option(ROUTER, interface.host4)
        options += option(DNS, b"".join(interface.dns4) or interface.host4)
        if is_host_name(interface.host_name):
            host, _, domain = interface.host_name.partition(".")
            options += option(HOST_NAME, host.encode())
            options += option(DOMAIN_NAME, domain.encode()) if domain else b""
        if interface.mtu not in (0, MTU_USUAL):
            options += option(INTERFACE_MTU, interface.mtu.to_bytes(2, "big"))
    if request.client_id:
        options += option(CLIENT_ID, request.client_id)
    return options + bytes((END,))


def option(code: int, data: bytes) -> bytes:
    """Return an option, split into as many parts as needed (RFC 3396)."""
    parts = [data[at : at + OPTION_MAX] for at in range(0, len(data), OPTION_MAX)]
    return b"".join(bytes((code, len(part))) + part for part in parts)


def is_host_name(name: str) -> bool:
    """Return whether a name is a valid host name, by the same rule as in `vmd.config.rules` (RFC 1123, 2.1)."""
    return 0 < len(name) <= HOST_NAME_MAX and all(
        0 < len(label) <= LABEL_MAX
        and label.isascii()
        and label.replace("-", "a").isalnum()
        and label[0] != "-" != label[-1]
        for label in name.split(".")
    )
