"""AgentX packets (RFC 2741, 6), between a subagent and its master.

    version u8   type u8   flags u8   0 u8   session u32   transaction u32   packet u32   payload length u32

We write network byte order, and read both orders.  Every item of a payload is padded to four bytes.
"""

import struct

from vmd.errors import PeerError
from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    Value = int | bytes | tuple[int, ...] | None

Oid = tuple[int, ...]  # an object identifier

MASTER = "the SNMP agent"
VERSION = 1
HEADER = struct.Struct(">BBBBIIII")
LITTLE_HEADER = struct.Struct("<BBBBIIII")
PAYLOAD_MAX = 1 << 20  # bytes; requests of agents are far smaller
SUBIDS_MAX = 128

OPEN, CLOSE, REGISTER, UNREGISTER, GET, GET_NEXT, GET_BULK, TEST_SET = 1, 2, 3, 4, 5, 6, 7, 8
COMMIT_SET, UNDO_SET, CLEANUP_SET, NOTIFY, PING, RESPONSE = 9, 10, 11, 12, 13, 18
REQUESTS = (GET, GET_NEXT, GET_BULK, TEST_SET, COMMIT_SET, UNDO_SET, CLEANUP_SET)  # a master's

NON_DEFAULT_CONTEXT, NETWORK_BYTE_ORDER = 0x08, 0x10

INTEGER, OCTET_STRING, NULL, OBJECT_IDENTIFIER = 2, 4, 5, 6
IP_ADDRESS, COUNTER32, GAUGE32, TIME_TICKS, OPAQUE, COUNTER64 = 64, 65, 66, 67, 68, 70
NO_SUCH_OBJECT, NO_SUCH_INSTANCE, END_OF_MIB_VIEW = 128, 129, 130
NUMBERS = (INTEGER, COUNTER32, GAUGE32, TIME_TICKS)
STRINGS = (OCTET_STRING, IP_ADDRESS, OPAQUE)
EMPTY = (NULL, NO_SUCH_OBJECT, NO_SUCH_INSTANCE, END_OF_MIB_VIEW)

GEN_ERR, WRONG_TYPE, WRONG_VALUE, COMMIT_FAILED, NOT_WRITABLE = 5, 7, 10, 14, 17
NOT_OPEN, UNSUPPORTED_CONTEXT, PARSE_ERROR = 257, 262, 266
ERRORS = {  # of an answer about the session itself
    256: "open failed", 257: "not open", 262: "unsupported context", 263: "somebody else has registered that",
    264: "not registered", 266: "parse error", 267: "request denied", 268: "processing error",
}  # fmt: skip

SHUTDOWN = 5  # a reason for the end of a session
REASONS = {1: "other", 2: "parse error", 3: "protocol error", 4: "timeouts", 5: "shutdown", 6: "by its manager"}

INTERNET = (1, 3, 6, 1)  # the prefix byte of an object identifier stands for it


def error(number: int) -> str:
    """Return the name of an error."""
    return ERRORS.get(number, f"error {number}")


class Header(Record):
    """The header of every packet."""

    kind: int
    flags: int = 0
    session: int = 0
    transaction: int = 0
    packet: int = 0
    length: int = 0


class VarBind(Record):
    """A variable and its value: an int, bytes, an object identifier, or None for the kinds of EMPTY."""

    name: "Oid"
    kind: int
    value: "Value" = None


class SearchRange(Record):
    """For a Get `start`; else the first variable behind `start` (or at it, if `include`) and before `end`."""

    start: "Oid"
    include: bool = False
    end: "Oid" = ()  # (): no end


class Packet(Record):
    """A packet from the master: the fields that a subagent needs."""

    header: Header
    context: bytes = b""
    ranges: tuple[SearchRange, ...] = ()
    binds: tuple[VarBind, ...] = ()
    non_repeaters: int = 0
    repetitions: int = 0
    error: int = 0  # of an answer
    reason: int = 0  # of a close


# --- writing ---------------------------------------------------------------------------------------------


def packet(kind: int, payload: bytes = b"", *, session: int = 0, transaction: int = 0, number: int = 0,
           context: bytes = b"") -> bytes:  # fmt: skip
    """Return a packet.  A context other than the default one precedes the payload."""
    flags = NETWORK_BYTE_ORDER
    if context:
        flags |= NON_DEFAULT_CONTEXT
        payload = string(context) + payload
    return HEADER.pack(VERSION, kind, flags, 0, session, transaction, number, len(payload)) + payload


def string(value: bytes) -> bytes:
    """Return an octet string."""
    return struct.pack(">I", len(value)) + value + b"\0" * (-len(value) % 4)


def oid(value: "Oid", *, include: bool = False) -> bytes:
    """Return an object identifier, in the short form if it is below 1.3.6.1."""
    prefix = 0
    if len(value) > len(INTERNET) and value[: len(INTERNET)] == INTERNET and 0 < value[len(INTERNET)] < 256:
        prefix, value = value[len(INTERNET)], value[len(INTERNET) + 1 :]
    return struct.pack(f">BBBB{len(value)}I", len(value), prefix, include, 0, *value)


def bind(kind: int, name: "Oid", value: "Value" = None) -> bytes:
    """Return a variable and its value."""
    head = struct.pack(">HH", kind, 0) + oid(name)
    if isinstance(value, bytes):
        return head + string(value)
    if isinstance(value, tuple):
        return head + oid(value)
    if value is None:
        return head
    size = 8 if kind == COUNTER64 else 4  # larger numbers wrap around, as counters do
    return head + (value & (1 << 8 * size) - 1).to_bytes(size, "big")


def open_session(timeout_s: int, description: bytes) -> bytes:
    """Return the payload that opens a session."""
    return struct.pack(">BBBB", timeout_s, 0, 0, 0) + oid(()) + string(description)


def register(subtree: "Oid", priority: int = 127) -> bytes:
    """Return the payload that registers a subtree."""
    return struct.pack(">BBBB", 0, priority, 0, 0) + oid(subtree)


def response(error: int = 0, index: int = 0, binds: "Iterable[bytes]" = ()) -> bytes:
    """Return the payload of an answer.  `index`, from 1 on, is the variable that had the error."""
    return struct.pack(">IHH", 0, error, index) + b"".join(binds)


# --- reading ---------------------------------------------------------------------------------------------


def parse_header(raw: bytes) -> Header:
    """Parse the first HEADER.size bytes of a packet.  Raises PeerError."""
    form = HEADER if raw[2] & NETWORK_BYTE_ORDER else LITTLE_HEADER
    version, kind, flags, _, session, transaction, number, length = form.unpack(raw)
    if version != VERSION:
        raise PeerError(MASTER, f"speaks version {version} of AgentX, and not {VERSION}")
    if length > PAYLOAD_MAX or length % 4:
        raise PeerError(MASTER, f"sends a packet of {length} bytes")
    return Header(kind=kind, flags=flags, session=session, transaction=transaction, packet=number, length=length)


def parse(header: Header, payload: bytes) -> Packet:
    """Parse and check a whole packet.  Raises PeerError."""
    reader = Reader(payload, big=bool(header.flags & NETWORK_BYTE_ORDER))
    try:
        return reader.packet(header)
    except struct.error:
        raise PeerError(MASTER, f"sends a packet of type {header.kind} that ends too early") from None


class Reader:
    """Reads the items of a payload in order.  Its methods raise struct.error if the payload ends too early."""

    def __init__(self, raw: bytes, *, big: bool) -> None:
        self.raw = raw
        self.at = 0
        self.order = ">" if big else "<"

    @property
    def left(self) -> bool:
        """Whether the payload has more items."""
        return self.at < len(self.raw)

    def take(self, form: str) -> tuple[int, ...]:
        """Return some numbers."""
        form = self.order + form
        values: tuple[int, ...] = struct.unpack_from(form, self.raw, self.at)
        self.at += struct.calcsize(form)
        return values

    def packet(self, header: Header) -> Packet:
        """Return the packet of this header.  Payloads that a master does not send are left unread."""
        kind, context = header.kind, b""
        if header.flags & NON_DEFAULT_CONTEXT and kind not in (COMMIT_SET, UNDO_SET, CLEANUP_SET, CLOSE, RESPONSE):
            context = self.string()
        if kind in (GET, GET_NEXT):
            return Packet(header=header, context=context, ranges=self.ranges())
        if kind == GET_BULK:
            non_repeaters, repetitions = self.take("HH")
            ranges = self.ranges()
            return Packet(
                header=header, context=context, ranges=ranges, non_repeaters=non_repeaters, repetitions=repetitions
            )
        if kind == TEST_SET:
            return Packet(header=header, context=context, binds=self.binds())
        if kind == RESPONSE:
            _, error, _ = self.take("IHH")
            return Packet(header=header, error=error, binds=self.binds())
        if kind == CLOSE:
            return Packet(header=header, reason=self.take("BBBB")[0])
        return Packet(header=header, context=context)

    def string(self) -> bytes:
        """Return an octet string."""
        (length,) = self.take("I")
        raw = self.raw[self.at : self.at + length]
        self.at += length + -length % 4
        if len(raw) != length or self.at > len(self.raw):
            raise struct.error
        return raw

    def oid(self) -> "tuple[Oid, bool]":
        """Return an object identifier, and whether it is to be included."""
        count, prefix, include, _ = self.take("BBBB")
        if count > SUBIDS_MAX:
            raise PeerError(MASTER, f"sends an object identifier of {count} numbers")
        value = self.take(f"{count}I")
        return ((*INTERNET, prefix, *value) if prefix else value), bool(include)

    def ranges(self) -> tuple[SearchRange, ...]:
        """Return search ranges up to the end."""
        found = []
        while self.left:
            start, include = self.oid()
            end, _ = self.oid()
            found.append(SearchRange(start=start, include=include, end=end))
        return tuple(found)

    def binds(self) -> tuple[VarBind, ...]:
        """Return variables up to the end."""
        found = []
        while self.left:
            kind, _ = self.take("HH")
            name, _ = self.oid()
            found.append(VarBind(name=name, kind=kind, value=self.value(kind)))
        return tuple(found)

    def value(self, kind: int) -> "Value":
        """Return a value of this kind."""
        if kind in NUMBERS:
            return self.take("i" if kind == INTEGER else "I")[0]
        if kind == COUNTER64:
            return self.take("Q")[0]
        if kind in STRINGS:
            return self.string()
        if kind == OBJECT_IDENTIFIER:
            return self.oid()[0]
        if kind in EMPTY:
            return None
        raise PeerError(MASTER, f"sends a value of an unknown type, {kind}")
