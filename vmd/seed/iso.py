"""Writes a CD-ROM image with a few files for a seed: ISO 9660 with Joliet and Rock Ridge.

This is our own code because so little is needed: one directory, files of one extent each, and no reading.  The library
for it (pycdlib) has 14 000 lines, most of them to read and change discs, and every installation would need it.

ECMA-119 (ISO 9660), second edition; Joliet specification, 1995; SUSP and RRIP 1.10 (IEEE P1281, P1282).  Numbers in
brackets are sections of ECMA-119.  The same files give the same bytes, because all dates are constant.
"""

import encodings.utf_16_be  # noqa: F401 - the codec of Joliet's names; a confined process could not load it
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SECTOR = 2048
SYSTEM_SECTORS = 16  # before the first descriptor, for boot loaders
PRIMARY, JOLIET, TERMINATOR = 1, 2, 255  # [8.4, 8.5, 8.3]
DIRECTORY = 0x02  # [9.1.6]
YEAR, MONTH, DAY = 2000, 1, 1  # the date of every file and of the volume
RECORD_DATE = bytes((YEAR - 1900, MONTH, DAY, 0, 0, 0, 0))  # [9.1.5]
VOLUME_DATE = b"%04d%02d%02d" % (YEAR, MONTH, DAY) + b"0" * 8 + b"\0"  # [8.4.26.1]
NO_DATE = b"0" * 16 + b"\0"
UCS2_LEVEL_3 = b"%/E"
MODE_DIRECTORY, MODE_FILE = 0o040500, 0o100400  # for root only: user-data may have a password
ROOT, PARENT = b"\0", b"\1"  # names of the directory itself, and of the one above it [7.6.2]

NAME_MAX = 31  # [7.5.1]


def both(number: int) -> bytes:
    """Return 32 bits, little-endian and then big-endian [7.3.3]."""
    return struct.pack("<I", number) + struct.pack(">I", number)


def both16(number: int) -> bytes:
    """Return 16 bits, little-endian and then big-endian [7.2.3]."""
    return struct.pack("<H", number) + struct.pack(">H", number)


def sectors(size: int) -> int:
    """Return the number of sectors for so many bytes."""
    return -(-size // SECTOR)


def padded(data: bytes) -> bytes:
    """Return the bytes, padded to whole sectors."""
    return data.ljust(sectors(len(data)) * SECTOR, b"\0")


def record(name: bytes, extent: int, size: int, flags: int = 0, extension: bytes = b"") -> bytes:
    """Return a directory record [9.1]."""
    fields = both(extent) + both(size) + RECORD_DATE + bytes((flags, 0, 0)) + both16(1) + bytes((len(name),)) + name
    fields += b"\0" * (len(name) % 2 == 0) + extension
    fields += b"\0" * (len(fields) % 2)
    return bytes((2 + len(fields), 0)) + fields


# --- Rock Ridge: names as they are, and modes ---------------------------------------------------------------------


def susp(signature: bytes, data: bytes) -> bytes:
    """Return one entry of a system use area (SUSP 4.1)."""
    return signature + bytes((4 + len(data), 1)) + data


def posix(mode: int, links: int) -> bytes:
    """Return the mode and owner (root) of a file (RRIP 1.10, 4.1.1), and its dates (4.1.6)."""
    entry = susp(b"PX", both(mode) + both(links) + both(0) + both(0))
    return entry + susp(b"TF", bytes((0x0E,)) + 3 * RECORD_DATE)  # changed, read, status changed


# The first record of a disc says that it has such entries (SUSP 5.3), and of which kind (5.5).
USED = susp(b"SP", b"\xbe\xef\0") + susp(b"ER", bytes((10, 0, 0, 1)) + b"RRIP_1991A")


def plain(name: str) -> bytes:
    """Return the name for systems that know neither extension: in capitals, with a version [7.5.1]."""
    return b"%s.;1" % name.upper().replace("-", "_").encode("ascii")


# --- the disc --------------------------------------------------------------------------------------------------


def image(label: str, files: "Mapping[str, bytes]") -> bytes:
    """Return the image of a disc with these files in its only directory.

    A name has up to 27 lower-case letters, digits and hyphens.
    """
    names = sorted(files)
    paths = SYSTEM_SECTORS + 3  # four path tables of one sector each; two directories follow
    roots = paths + 4, paths + 5
    places: dict[str, int] = {}
    end = roots[1] + 1
    for name in names:
        assert len(plain(name)) <= NAME_MAX
        places[name] = end
        end += sectors(len(files[name]))
    listed = [(name, places[name] if files[name] else 0, len(files[name])) for name in names]
    parts = [
        bytes(SYSTEM_SECTORS * SECTOR),
        descriptor(PRIMARY, label, end, paths, roots[0]),
        descriptor(JOLIET, label, end, paths + 2, roots[1]),
        padded(bytes((TERMINATOR,)) + b"CD001\1"),
        *(path_table(order, root) for root in roots for order in "<>"),
        directory_of_rock_ridge(roots[0], listed),
        directory_of_joliet(roots[1], listed),
        *(padded(files[name]) for name in names),
    ]
    made = b"".join(parts)
    assert len(made) == end * SECTOR
    return made


def path_table(order: str, root: int) -> bytes:
    """Return the path table, which has one directory [9.4]."""
    return padded(path_entry(order, root))


def path_entry(order: str, root: int) -> bytes:
    """Return the path table's entry for the only directory."""
    return struct.pack(f"{order}BBIH", 1, 0, root, 1) + ROOT + b"\0"


def directory_of_rock_ridge(root: int, listed: "Sequence[tuple[str, int, int]]") -> bytes:
    """Return the directory of the primary volume, with plain names and those of Rock Ridge."""
    owner = posix(MODE_DIRECTORY, 2)
    made = record(ROOT, root, SECTOR, DIRECTORY, USED + owner) + record(PARENT, root, SECTOR, DIRECTORY, owner)
    for name, extent, size in listed:
        extension = posix(MODE_FILE, 1) + susp(b"NM", b"\0" + name.encode("ascii"))
        made += record(plain(name), extent, size, extension=extension)
    return one_sector(made)


def directory_of_joliet(root: int, listed: "Sequence[tuple[str, int, int]]") -> bytes:
    """Return the directory of the Joliet volume."""
    made = record(ROOT, root, SECTOR, DIRECTORY) + record(PARENT, root, SECTOR, DIRECTORY)
    for name, extent, size in listed:
        made += record(name.encode("utf-16-be"), extent, size)
    return one_sector(made)


def one_sector(data: bytes) -> bytes:
    """Return a directory, padded to the one sector that it takes."""
    assert len(data) <= SECTOR
    return padded(data)


def descriptor(kind: int, label: str, end: int, paths: int, root: int) -> bytes:
    """Return a volume descriptor [8.4, 8.5]."""
    joliet = kind == JOLIET

    def text(value: str, size: int) -> bytes:
        if joliet:
            return (value.encode("utf-16-be") + b"\0 " * size)[: size & ~1].ljust(size, b"\0")
        return value.encode("ascii").ljust(size)

    fields = (
        bytes((kind,)), b"CD001", b"\1\0",
        text("", 32), text(label, 32), bytes(8), both(end),
        (UCS2_LEVEL_3 if joliet else b"").ljust(32, b"\0"),
        both16(1), both16(1), both16(SECTOR), both(len(path_entry("<", root))),
        struct.pack("<II", paths, 0), struct.pack(">II", paths + 1, 0),
        record(ROOT, root, SECTOR, DIRECTORY),
        text("", 128), text("", 128), text("", 128), text("", 128),  # volume set, publisher, preparer, application
        text("", 37), text("", 37), text("", 37),  # files with a copyright, an abstract, a bibliography
        VOLUME_DATE, VOLUME_DATE, NO_DATE, NO_DATE,  # made, changed, not after, not before
        b"\1",
    )  # fmt: skip
    return padded(b"".join(fields))
