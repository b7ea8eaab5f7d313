"""Partition tables: MBR with extended partitions, GPT, and OpenBSD's disklabel, alone or inside a partition of these.

Partitions have their usual names: `p1` is the first one of Linux, `a` the first one of OpenBSD.  An invalid partition
is in the result, too, with its `problem`, so that an error can name it.
"""

import struct
import zlib

from vmd.diskfs.source import READ_MAX, DiskFsError, Source
from vmd.record import Record
from vmd.units import SECTOR

SIGNATURE_AT, SIGNATURE = 510, b"\x55\xaa"
ENTRIES_AT, ENTRIES = 446, 4
ENTRY = struct.Struct("<B3xB3xII")  # status, type, first sector, sectors
ACTIVE = 0x80
EXTENDED, OPENBSD, PROTECTIVE = (0x05, 0x0F, 0x85), 0xA6, 0xEE
LOGICAL_FIRST = 5
LOGICAL_MAX = 128

GPT_HEADER = struct.Struct("<8sIII4xQQQQ16sQIII")
GPT_MAGIC = b"EFI PART"
GPT_CRC_AT = 16
GPT_ENTRY = struct.Struct("<16s16sQQ")
GPT_ENTRIES_MAX = 1024
GPT_ENTRY_BYTES = (128, 256, 512, 1024, 2048, 4096)
GUID_OPENBSD = bytes.fromhex("a0c74c82a836e311890a952519ad3f61")  # 824cc7a0-36a8-11e3-890a-952519ad3f61

LABEL_AT = SECTOR  # in the partition
LABEL = struct.Struct("<I36xI")  # magic, bytes of a sector
LABEL_MAGIC = 0x82564557
LABEL_MAGIC2_AT = 132
LABEL_COUNT_AT = 138
LABEL_ENTRIES_AT = 148
LABEL_ENTRY = struct.Struct("<IIHHB3x")  # size, offset, the high halves of offset and size, type
LABEL_ENTRIES_MAX = 52
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
UNUSED = 0


class Partition(Record):
    """A part of a disk.  `start` and `size` are in bytes.

    `problem`: why it cannot be read.  `holds`: the partitions that it contains, if it contains only partitions.
    """

    name: str  # "p1", "a"; "" is the whole disk
    start: int
    size: int
    problem: str = ""
    holds: str = ""

    @property
    def title(self) -> str:
        """Its name in a sentence."""
        return f"partition {self.name}" if self.name else "the whole disk"


class Table(Record):
    """The partition table of a disk.  `kind` is its name for sentences, `problem` says what is damaged."""

    kind: str = ""  # "MBR", "GPT and OpenBSD disklabel"; "": there is no table
    partitions: tuple[Partition, ...] = ()
    problem: str = ""


def read_table(disk: Source) -> Table:
    """Return the partition table of a disk.  Raises DiskFsError if the disk cannot be read."""
    if disk.size < 2 * SECTOR:
        return Table()
    sector = disk.read(0, SECTOR)
    entries = _entries(sector)
    kinds, found, problem = [], list[Partition](), ""
    label_at = 0  # start of the partition with a disklabel, in bytes; 0: the whole disk
    if any(kind == PROTECTIVE for _, kind, _, _ in entries):
        kinds.append("GPT")
        try:
            found, label_at = _gpt(disk)
        except DiskFsError as error:
            return Table(kind="GPT", problem=str(error))
    elif any(kind and first * SECTOR < disk.size for _, kind, first, _ in entries):
        kinds.append("MBR")
        found, label_at = _mbr(disk, entries)
    if label_at or kinds != ["GPT"]:
        try:
            labelled = _disklabel(disk, label_at)
        except DiskFsError as error:
            labelled, problem = None, str(error)
        if labelled is not None:
            kinds.append("OpenBSD disklabel")
            letters = ", ".join(partition.name for partition in labelled) or "none"
            found = [
                partition.replace(holds=f"the partitions of a disklabel: {letters}")
                if label_at and partition.start == label_at
                else partition
                for partition in found
            ]
            found += labelled
    return Table(kind=" and ".join(kinds), partitions=tuple(found), problem=problem)


def _partition(disk: Source, name: str, first: int, sectors: int, holds: str = "") -> Partition:
    """Return a partition; `problem` is set if it is empty or not inside the disk."""
    start, size = first * SECTOR, sectors * SECTOR
    problem = ""
    if not sectors:
        problem = "is empty"
    elif start >= disk.size:
        problem = f"begins at {start}, after the end of the disk at {disk.size}"
    elif start + size > disk.size:
        problem = f"ends at {start + size}, after the end of the disk at {disk.size}"
    return Partition(name=name, start=start, size=size, problem=problem, holds=holds)


def _entries(sector: bytes) -> list[tuple[int, int, int, int]]:
    """Return the entries of an MBR: status, type, first sector, sectors; [] if it is not an MBR."""
    if sector[SIGNATURE_AT : SIGNATURE_AT + 2] != SIGNATURE:
        return []
    entries = [ENTRY.unpack_from(sector, ENTRIES_AT + number * ENTRY.size) for number in range(ENTRIES)]
    return entries if all(status & ~ACTIVE == 0 for status, *_ in entries) else []


def _mbr(disk: Source, entries: list[tuple[int, int, int, int]]) -> tuple[list[Partition], int]:
    """Return the partitions of an MBR, and the start of the one with a disklabel, or 0.  Raises DiskFsError."""
    found, logical = [], list[Partition]()
    label_at = 0
    for number, (_, kind, first, sectors) in enumerate(entries, 1):
        if not kind:
            continue
        name = f"p{number}"
        if kind in EXTENDED:
            if not logical:
                logical = _extended(disk, first)
            names = ", ".join(partition.name for partition in logical) or "none"
            found.append(_partition(disk, name, first, sectors, f"logical partitions: {names}"))
            continue
        found.append(_partition(disk, name, first, sectors))
        if kind == OPENBSD and not label_at:
            label_at = first * SECTOR
    return found + logical, label_at


def _extended(disk: Source, base: int) -> list[Partition]:
    """Return the logical partitions of the extended partition that begins at sector `base`.

    Each has a boot record with an entry for the partition and one for the next record.  A damaged record is the last.
    """
    found: list[Partition] = []
    passed: set[int] = set()
    at = base
    while len(found) < LOGICAL_MAX:
        name = f"p{LOGICAL_FIRST + len(found)}"
        entries = _entries(disk.read(at * SECTOR, SECTOR)) if (at + 1) * SECTOR <= disk.size else []
        if not entries or at in passed:
            what = "is in the chain twice" if at in passed else "is damaged"
            found.append(Partition(name=name, start=0, size=0, problem=f"its boot record at sector {at} {what}"))
            break
        passed.add(at)
        following = 0
        for _, kind, first, sectors in entries:
            if kind in EXTENDED:
                following = following or base + first
            elif kind and sectors and len(found) < LOGICAL_MAX:
                found.append(_partition(disk, f"p{LOGICAL_FIRST + len(found)}", at + first, sectors))
        if not following or len(passed) > LOGICAL_MAX:
            break
        at = following
    return found


def _gpt(disk: Source) -> tuple[list[Partition], int]:
    """Return the partitions of a GPT, and the start of the one with a disklabel, or 0.

    Raises DiskFsError if both the GPT and its backup are damaged.
    """
    try:
        table, size = _gpt_table(disk, 1)
    except DiskFsError as error:
        try:
            table, size = _gpt_table(disk, disk.size // SECTOR - 1)
        except DiskFsError as backup:
            raise DiskFsError(f"its GPT {error}, and the backup {backup}") from error
    found, label_at = [], 0
    for number in range(len(table) // size):
        kind, _, first, last = GPT_ENTRY.unpack_from(table, number * size)
        if kind == bytes(16):
            continue
        found.append(_partition(disk, f"p{number + 1}", first, max(0, last + 1 - first)))
        if kind == GUID_OPENBSD and not label_at:
            label_at = first * SECTOR
    return found, label_at


def _gpt_table(disk: Source, at: int) -> tuple[bytes, int]:
    """Return the entries of the GPT with its header in sector `at`, and the size of an entry.  Raises DiskFsError."""
    raw = disk.read(at * SECTOR, SECTOR)
    magic, _, header_bytes, crc, here, _, _, _, _, first, count, size, table_crc = GPT_HEADER.unpack_from(raw)
    if magic != GPT_MAGIC:
        raise DiskFsError(f"has no header in sector {at}")
    if not GPT_HEADER.size <= header_bytes <= SECTOR:
        raise DiskFsError(f"has a header of {header_bytes} bytes")
    if zlib.crc32(raw[:GPT_CRC_AT] + bytes(4) + raw[GPT_CRC_AT + 4 : header_bytes]) != crc or here != at:
        raise DiskFsError("has a header with a wrong checksum" if here == at else f"has the header of sector {here}")
    if count > GPT_ENTRIES_MAX or size not in GPT_ENTRY_BYTES or count * size > READ_MAX:
        raise DiskFsError(f"has {count} entries of {size} bytes")
    table = disk.read(first * SECTOR, count * size)
    if zlib.crc32(table) != table_crc:
        raise DiskFsError("has entries with a wrong checksum")
    return table, size


def _disklabel(disk: Source, begin: int) -> list[Partition] | None:
    """Return the partitions of the disklabel in the partition that begins at `begin`; None if there is no label.

    Their offsets are relative to the beginning of the disk, not of that partition.  Raises DiskFsError.
    """
    at = begin + LABEL_AT
    if at + 2 * SECTOR > disk.size:
        return None
    raw = disk.read(at, 2 * SECTOR)
    magic, sector = LABEL.unpack_from(raw)
    if magic != LABEL_MAGIC or int.from_bytes(raw[LABEL_MAGIC2_AT : LABEL_MAGIC2_AT + 4], "little") != LABEL_MAGIC:
        return None
    count = int.from_bytes(raw[LABEL_COUNT_AT : LABEL_COUNT_AT + 2], "little")
    if count > LABEL_ENTRIES_MAX:
        raise DiskFsError(f"its disklabel has {count} partitions")
    words = struct.unpack_from(f"<{(LABEL_ENTRIES_AT + count * LABEL_ENTRY.size) // 2}H", raw)
    check = 0
    for word in words:
        check ^= word
    if check:
        raise DiskFsError("its disklabel has a wrong checksum")
    if sector != SECTOR:
        raise DiskFsError(f"its disklabel is for sectors of {sector} bytes")
    found = []
    for letter, place in zip(LETTERS, range(count), strict=False):
        size, offset, offset_high, size_high, kind = LABEL_ENTRY.unpack_from(
            raw, LABEL_ENTRIES_AT + place * LABEL_ENTRY.size
        )
        if kind != UNUSED and size | size_high:
            found.append(_partition(disk, letter, offset | offset_high << 32, size | size_high << 32))
    return found
