"""imsg framing: a 16-byte header and a msgpack body, one message per packet, descriptors beside it.

    type u32   len u16   flags u16   peerid u32   pid u32      little-endian, as imsg(3)'s (*cat. 1.7*)

`flags` is the number of descriptors.  The sockets are SOCK_SEQPACKET: a message and its descriptors arrive together or
not at all, and a peer cannot send a part of a header.  The body is a list, in one of these forms:

    [[count, ...], field, ...]                     in order of declaration: between processes of one version
    [{descriptor: count}, {field: value, ...}]     by name: where versions may differ (control socket, `routes.NAMED`)

Decoding trusts nothing: each field is checked against its declared type before a record is built.

Records that outlive this process, or leave this host, have no header, and their fields are packed by name (`pack`).
"""

import struct

from vmd.enums import Enum
from vmd.errors import PeerError
from vmd.ipc import first
from vmd.ipc.packing import packb, unpackb
from vmd.ipc.routes import BY_CLASS, BY_CODE, MessageInfo
from vmd.record import Record, RecordType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from types import GenericAlias, MappingProxyType, UnionType
    from typing import Any, TypeVar

    R = TypeVar("R", bound=Record)
    ReadRecord = Callable[[RecordType, Any, str], Record]
else:  # not from `types`, which defines many others too, and so costs memory
    GenericAlias, MappingProxyType, UnionType = type(list[int]), type(vars(object)), type(int | None)

NO_FDS: "Mapping[str, Sequence[int]]" = MappingProxyType({})
HEADER = struct.Struct("<IHHII")
MAX_MESSAGE = 16384
MAX_FDS = 64
PLAIN = (int, str, bytes, bool, float)


class Form(Enum):
    """The form in which the fields of a message travel."""

    INSIDE = 0  # in order of declaration
    NAMED = 1  # by name
    FIRST = 2  # in order of declaration, and only the fields of protocol 1


class UnknownMessage(PeerError):
    """A packet whose message type this program does not know.  Another version may know it."""

    def __init__(self, peer: str, code: int, raw: bytes) -> None:
        super().__init__(peer, f"unknown message type {code:#x}", raw)
        self.code = code


class Envelope:
    """A received message, with fields of its header, and with the descriptors that nobody has taken yet."""

    __slots__ = ("fds", "message", "peerid", "pid")

    def __init__(self, message: Record, peerid: int, pid: int, fds: "dict[str, list[int]]") -> None:
        self.message = message
        self.peerid = peerid
        self.pid = pid
        self.fds = fds

    def take_fd(self, name: str) -> int | None:
        """Return the descriptor of this name; None if it did not come.  The caller owns it from now on."""
        found = self.fds.get(name)
        return found.pop(0) if found else None

    def take_fds(self, name: str) -> list[int]:
        """Return all descriptors of this name.  The caller owns them from now on."""
        return self.fds.pop(name, [])

    def untaken(self) -> list[int]:
        """Return the descriptors that nobody has taken, for closing."""
        return [fd for fds in self.fds.values() for fd in fds]


def encode(
    message: Record,
    *,
    peerid: int = 0,
    pid: int = 0,
    fds: "Mapping[str, Sequence[int]]" = NO_FDS,
    form: Form = Form.INSIDE,
) -> "tuple[bytes, list[int]]":
    """Return the packet of a message, and its descriptors in the order in which they must be sent.

    Raises ValueError if the message is too long for one packet.  The caller knows which part is too long, and says so.
    """
    info = BY_CLASS[type(message)]
    counts = [len(fds.get(name.rstrip("?*"), ())) for name in info.fds]
    for name, count in zip(info.fds, counts, strict=True):
        if not _count_fits(name, count):
            raise AssertionError(f"{type(message).__name__} with {count} descriptors {name!r}")
    unknown = set(fds) - {name.rstrip("?*") for name in info.fds}
    if unknown:
        raise AssertionError(f"{type(message).__name__} carries no descriptors {unknown}")
    order = [fd for name in info.fds for fd in fds.get(name.rstrip("?*"), ())]
    if form is Form.NAMED:
        names = (name.rstrip("?*") for name in info.fds)
        values = [dict(zip(names, counts, strict=True)), _by_name(message)]
    else:
        if form is Form.FIRST:
            counts = counts[: first.FDS.get(type(message).__name__)]
        values = [counts, *_plain(message, first.fields if form is Form.FIRST else _all_fields)]
    body: bytes = packb(values, unicode_errors="surrogateescape")
    length = HEADER.size + len(body)
    if length > MAX_MESSAGE:
        raise ValueError(f"{type(message).__name__} of {length} bytes exceeds {MAX_MESSAGE}")
    return HEADER.pack(info.code, length, len(order), peerid, pid) + body, order


def decode(packet: bytes, fds: "list[int]", peer: str) -> Envelope:
    """Turn a packet and the descriptors that came with it into a checked message.

    Raises:
        PeerError: the packet is malformed.  The caller still owns the descriptors, and has to close them.
        UnknownMessage: this program does not know the message type.  As above.
    """
    if len(packet) < HEADER.size:
        raise PeerError(peer, f"packet of {len(packet)} bytes has no header", packet)
    code, length, flags, peerid, pid = HEADER.unpack_from(packet)
    if length != len(packet):
        raise PeerError(peer, f"header says {length} bytes, packet has {len(packet)}", packet)
    info = BY_CODE.get(code)
    if info is None:
        raise UnknownMessage(peer, code, packet)
    name = info.cls.__name__
    if flags != len(fds):
        raise PeerError(peer, f"{name} announces {flags} descriptors, {len(fds)} came", packet)
    try:
        # The packet's size bounds depth and counts.  An extension type is refused here, or by the check of its field;
        # a map in a wrong place is refused by the check of its field.
        body = unpackb(packet[HEADER.size :], unicode_errors="surrogateescape", use_list=True)
    except (ValueError, RecursionError) as error:  # msgpack's own exceptions are ValueErrors
        raise PeerError(peer, f"{name}: body is not msgpack: {error}", packet) from error
    if not isinstance(body, list) or not body or not isinstance(body[0], list | dict):
        raise PeerError(peer, f"{name}: body is not a list of fields", packet)
    try:
        if isinstance(body[0], dict):
            named = _name_fds(info, [body[0].get(each.rstrip("?*"), 0) for each in info.fds], fds)
            message = _named_record(info.cls, body[1] if len(body) == 2 else None, name)
        else:
            counts = [*body[0], *[0] * (len(info.fds) - len(body[0]))]  # 0 for kinds that the sender does not know
            named = _name_fds(info, counts, fds)
            message = _record(info.cls, body[1:], name)
    except (ValueError, TypeError, RecursionError) as error:
        raise PeerError(peer, str(error), packet) from error
    return Envelope(message, peerid, pid, named)


def pack(record: Record) -> bytes:
    """Return a record as bytes that may outlive this process: its fields are packed by name."""
    packed: bytes = packb(_by_name(record), unicode_errors="surrogateescape")
    return packed


def unpack(cls: "type[R]", raw: bytes, reshape: "Callable[[Any], Any]" = lambda values: values) -> "R":
    """Return the record that `pack` has packed, in this or another version of this program.  Each field is checked.

    Unknown fields are ignored, and missing fields take their default.  `reshape` converts the values of an older form
    into fields by name, and may raise ValueError.

    Raises ValueError with a sentence.
    """
    name = cls.__name__
    try:
        values = unpackb(raw, unicode_errors="surrogateescape", use_list=True, max_ext_len=0)
    except (ValueError, TypeError, RecursionError) as error:  # msgpack's own are ValueErrors, some without a text
        raise ValueError(f"{name}: not msgpack: {type(error).__name__} {error}") from error
    try:
        record = _named_record(cls, reshape(values), name)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"{name}: {error}") from error
    assert isinstance(record, cls)
    return record


def _count_fits(name: str, count: int) -> bool:
    return count <= MAX_FDS if name.endswith("*") else count <= 1 if name.endswith("?") else count == 1


def _name_fds(info: MessageInfo, counts: "list[Any]", fds: "list[int]") -> "dict[str, list[int]]":
    if len(counts) != len(info.fds) or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"{info.cls.__name__}: bad descriptor counts")  # the peer's values are never formatted
    named: dict[str, list[int]] = {}
    start = 0
    for name, count in zip(info.fds, counts, strict=True):
        if not _count_fits(name, count):
            raise ValueError(f"{info.cls.__name__} with {count} descriptors {name!r}")
        named[name.rstrip("?*")] = fds[start : start + count]
        start += count
    if start != len(fds):
        raise ValueError(f"{info.cls.__name__}: counts name {start} descriptors, {len(fds)} came")
    return named


def _all_fields(cls: RecordType) -> "Iterable[str]":
    return cls.fields


def _plain(value: "Any", fields: "Callable[[RecordType], Iterable[str]]" = _all_fields) -> "Any":
    """Return a value in types that msgpack can pack; a record becomes a list of its `fields`."""
    if isinstance(value, Record):
        return [_plain(getattr(value, field), fields) for field in fields(type(value))]
    if isinstance(value, tuple):
        return [_plain(item, fields) for item in value]
    if isinstance(value, Enum):
        return value.value
    return value


def _by_name(value: "Any") -> "Any":
    if isinstance(value, Record):
        return {field: _by_name(getattr(value, field)) for field in type(value).fields}
    if isinstance(value, tuple):
        return [_by_name(item) for item in value]
    return _plain(value)


def _record(cls: RecordType, values: "Any", where: str) -> Record:
    """Return a record from its fields in order of declaration."""
    # The sender may be older and have fewer fields: new fields are appended, and have defaults (docs/formats.md 1).
    if not isinstance(values, list) or not cls.least <= len(values) <= len(cls.fields):
        raise ValueError(f"{where}: wrong number of fields")
    checked = {
        field: _checked(declared, value, f"{where}.{field}", _record)
        for (field, declared), value in zip(cls.fields.items(), values, strict=False)
    }
    built: Record = cls(**checked)
    return built


def _named_record(cls: RecordType, values: "Any", where: str) -> Record:
    """Return a record from its fields by name."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {type(values).__name__} has no fields")
    missing = [field for field in cls.fields if field not in values and field not in cls.defaults]
    if missing:
        raise ValueError(f"{where}: no {missing[0]}")
    checked = {
        field: _checked(declared, values[field], f"{where}.{field}", _named_record)
        for field, declared in cls.fields.items()
        if field in values
    }
    built: Record = cls(**checked)
    return built


def _checked(declared: "Any", value: "Any", where: str, record: "ReadRecord") -> "Any":
    """Return `value` as the declared type.  `record` reads the records within it.  Raises ValueError."""
    decoder = _decoders.get(declared)
    if decoder is None:
        decoder = _decoders[declared] = _decoder(declared)
    return decoder(value, where, record)


_decoders: "dict[Any, Callable[[Any, str, ReadRecord], Any]]" = {}


def _decoder(declared: "Any") -> "Callable[[Any, str, ReadRecord], Any]":
    if isinstance(declared, UnionType):
        (inner,) = (arg for arg in declared.__args__ if arg is not type(None))
        return lambda value, where, record: None if value is None else _checked(inner, value, where, record)
    if isinstance(declared, GenericAlias) and declared.__origin__ is tuple:
        item = declared.__args__[0]

        def decode_tuple(value: "Any", where: str, record: "ReadRecord") -> "Any":
            if not isinstance(value, list):
                raise ValueError(f"{where}: {type(value).__name__} is not a list")
            return tuple(_checked(item, each, where, record) for each in value)

        return decode_tuple
    if isinstance(declared, RecordType):
        return lambda value, where, record: record(declared, value, where)
    if isinstance(declared, type) and issubclass(declared, Enum):

        def decode_enum(value: "Any", where: str, _record: "ReadRecord") -> "Any":
            if type(value) is not int:
                raise ValueError(f"{where}: {type(value).__name__} is not a number")
            return declared(value)

        return decode_enum
    if declared in PLAIN:

        def decode_plain(value: "Any", where: str, _record: "ReadRecord") -> "Any":
            if type(value) is not declared:
                raise ValueError(f"{where}: {type(value).__name__} is not {declared.__name__}")
            return value

        return decode_plain
    raise AssertionError(f"no field may have type {declared!r}")
