"""ACPI machine language: encodes the terms that our DSDT uses (ACPI 5.0, 20.2).

Each function returns the bytes of a term.  Calls nest as terms do, so a table here reads like its ASL source.
"""

ZERO_OP = 0x00
ONE_OP = 0x01
NAME_OP = 0x08
BYTE_PREFIX = 0x0A
WORD_PREFIX = 0x0B
DWORD_PREFIX = 0x0C
STRING_PREFIX = 0x0D
QWORD_PREFIX = 0x0E
SCOPE_OP = 0x10
BUFFER_OP = 0x11
PACKAGE_OP = 0x12
DUAL_NAME_PREFIX = 0x2E
MULTI_NAME_PREFIX = 0x2F
DEVICE_OP = b"\x5b\x82"


def integer(value: int) -> bytes:
    """Encode an integer of up to 64 bits in the shortest form."""
    if value in (0, 1):
        return bytes((ZERO_OP, ONE_OP)[value : value + 1])
    for prefix, size in ((BYTE_PREFIX, 1), (WORD_PREFIX, 2), (DWORD_PREFIX, 4), (QWORD_PREFIX, 8)):
        if 0 <= value < 1 << 8 * size:
            return bytes((prefix,)) + value.to_bytes(size, "little")
    raise ValueError(f"{value} is not an aml integer")


def string(text: str) -> bytes:
    """Encode a string of ASCII without NUL."""
    return bytes((STRING_PREFIX,)) + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """Encode a plug-and-play id such as `PNP0A03`: three letters of five bits each, four digits."""
    letters = [ord(letter) - ord("@") for letter in text[:3]]
    packed = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(text[3:], 16)
    return integer(int.from_bytes(packed.to_bytes(4, "big"), "little"))


def path(text: str) -> bytes:
    r"""Encode a name such as `\_SB` or `PCI0.COM1`.  Segments are padded with underscores."""
    root = b"\\" if text.startswith("\\") else b""
    segments = [segment.ljust(4, "_").encode("ascii") for segment in text.lstrip("\\").split(".")]
    if any(len(segment) != 4 for segment in segments):
        raise ValueError(f'"{text}" has a segment of more than 4 characters')
    if len(segments) == 1:
        return root + segments[0]
    if len(segments) == 2:
        return root + bytes((DUAL_NAME_PREFIX,)) + b"".join(segments)
    return root + bytes((MULTI_NAME_PREFIX, len(segments))) + b"".join(segments)


def with_length(content: bytes) -> bytes:
    """Return `content` with its PkgLength in front.  The PkgLength counts its own bytes, too."""
    if len(content) + 1 < 1 << 6:
        return bytes((len(content) + 1,)) + content
    for extra in (1, 2, 3):
        total = len(content) + 1 + extra
        if total < 1 << 4 + 8 * extra:
            return bytes((extra << 6 | total & 15,)) + (total >> 4).to_bytes(extra, "little") + content
    raise ValueError(f"{len(content)} bytes are too many for an aml package length")


def name(where: str, value: bytes) -> bytes:
    """Name (where, value)."""
    return bytes((NAME_OP,)) + path(where) + value


def scope(where: str, *terms: bytes) -> bytes:
    """Scope (where) { terms }."""
    return bytes((SCOPE_OP,)) + with_length(path(where) + b"".join(terms))


def device(where: str, *terms: bytes) -> bytes:
    """Device (where) { terms }."""
    return DEVICE_OP + with_length(path(where) + b"".join(terms))


def package(*items: bytes) -> bytes:
    """Package () { items }, at most 255."""
    return bytes((PACKAGE_OP,)) + with_length(bytes((len(items),)) + b"".join(items))


def buffer(content: bytes) -> bytes:
    """Buffer () { content }."""
    return bytes((BUFFER_OP,)) + with_length(integer(len(content)) + content)


# Resource descriptors (ACPI 5.0, 6.4)

FIXED_RANGE = 0x0C  # minimum and maximum are fixed; the range is for child devices, positively decoded
MEMORY_RANGE, IO_RANGE, BUS_RANGE = 0, 1, 2
READ_WRITE = 0x01  # memory: writable, not cacheable
ENTIRE_RANGE = 0x03  # I/O: ISA and other addresses alike


def resources(*descriptors: bytes) -> bytes:
    """ResourceTemplate () { descriptors }.  The zero in the end tag means "no checksum"."""
    return buffer(b"".join(descriptors) + b"\x79\0")


def io(first: int, count: int) -> bytes:
    """IO (Decode16, ...): `count` ports, up to 255, from `first` on."""
    return bytes((0x47, 1)) + first.to_bytes(2, "little") * 2 + bytes((1, count))


def irq(line: int) -> bytes:
    """IRQNoFlags () { line }: edge triggered, active high, not shared."""
    return b"\x22" + (1 << line).to_bytes(2, "little")


def word_bus(first: int, last: int) -> bytes:
    """WordBusNumber: the bus numbers behind a host bridge."""
    return b"\x88" + _range(BUS_RANGE, 0, 2, first, last)


def word_io(first: int, last: int) -> bytes:
    """WordIO: a window of ports that a host bridge passes on."""
    return b"\x88" + _range(IO_RANGE, ENTIRE_RANGE, 2, first, last)


def dword_memory(first: int, last: int) -> bytes:
    """DWordMemory: a window of addresses below 4 GiB that a host bridge passes on."""
    return b"\x87" + _range(MEMORY_RANGE, READ_WRITE, 4, first, last)


def _range(kind: int, flags: int, size: int, first: int, last: int) -> bytes:
    fields = (0, first, last, 0, last - first + 1)  # granularity, minimum, maximum, translation, length
    body = bytes((kind, FIXED_RANGE, flags)) + b"".join(field.to_bytes(size, "little") for field in fields)
    return len(body).to_bytes(2, "little") + body
