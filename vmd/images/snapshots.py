"""The snapshot table of a qcow2 image: untrusted bytes, checked and turned into records.  Also writes the table.

A snapshot has an L1 table of its own.  It maps the disk as it was and, after the end of the disk, the state of the
machine if there is one.  QEMU's docs/interop/qcow2.txt is the specification.
"""

import posix as os
import struct
from io import SEEK_END

from vmd.errors import ImageError
from vmd.images.header import MAX_SIZE, MAX_SNAPSHOTS, MAX_TABLE_BYTES, Header
from vmd.images.hostfile import read_bytes
from vmd.record import Record

ENTRY = struct.Struct(">QIHHIIQII")
EXTRA = struct.Struct(">QQQ")  # bytes of state, bytes of the disk, number of executed instructions
LEAST_EXTRA = 16  # without the last field
MAX_EXTRA = 1024  # QEMU's limit
MAX_BYTES = 64 << 20  # of the whole table: QEMU's limit
NOT_COUNTED = (1 << 64) - 1  # number of instructions is not known


class Snapshot(Record):
    """One entry of the table."""

    id: str  # usually a decimal number
    name: str
    l1_offset: int
    l1_entries: int
    size: int  # bytes of the disk
    date_s: int  # seconds since 1970
    date_ns: int
    clock_ns: int  # running time of the machine
    state_bytes: int
    raw: bytes = b""  # the entry as read from the table; empty for a new snapshot


def find(snapshots: "list[Snapshot]", tag: str) -> "Snapshot | None":
    """Return the snapshot with the name `tag`; if there is none, the one with that id."""
    named = (one for one in snapshots if one.name == tag)
    return next(named, None) or next((one for one in snapshots if one.id == tag), None)


def read_snapshots(fd: int, header: Header, path: str) -> "list[Snapshot]":
    """Return the snapshots of an image; `path` is for errors.

    Raises:
        ImageError: the table is invalid.
        OSError: the table cannot be read.
    """
    found: list[Snapshot] = []
    file_bytes = os.lseek(fd, 0, SEEK_END)
    at = header.snapshots_offset
    for number in range(header.snapshots):
        head = read_bytes(fd, ENTRY.size, at)
        if len(head) < ENTRY.size:
            raise ImageError(path, f"snapshot table is cut short after {number} of {header.snapshots} snapshots")
        l1_offset, l1_entries, id_bytes, name_bytes, date_s, date_ns, clock_ns, state, extra_bytes = ENTRY.unpack(head)
        if extra_bytes > MAX_EXTRA:
            raise ImageError(path, f"snapshot {number} has {extra_bytes} bytes of extra data, more than {MAX_EXTRA}")
        rest = extra_bytes + id_bytes + name_bytes
        raw = read_bytes(fd, rest, at + ENTRY.size)
        if len(raw) < rest:
            raise ImageError(path, f"snapshot table is cut short in snapshot {number}")
        at += ENTRY.size + rest + (-rest % 8)
        if at - header.snapshots_offset > MAX_BYTES:
            raise ImageError(path, f"snapshot table is larger than {MAX_BYTES} bytes")
        extra, words = raw[:extra_bytes], raw[extra_bytes:]
        size = header.size
        if extra_bytes >= 8:
            state = int.from_bytes(extra[:8], "big")
        if extra_bytes >= LEAST_EXTRA:
            size = int.from_bytes(extra[8:16], "big")
        one = Snapshot(
            id=words[:id_bytes].decode("utf-8", "backslashreplace"),
            name=words[id_bytes:].decode("utf-8", "backslashreplace"),
            l1_offset=l1_offset,
            l1_entries=l1_entries,
            size=size,
            date_s=date_s,
            date_ns=date_ns,
            clock_ns=clock_ns,
            state_bytes=state,
            raw=head + raw + bytes(-rest % 8),
        )
        _check(one, header, path, file_bytes)
        found.append(one)
    return found


def _check(one: Snapshot, header: Header, path: str, file_bytes: int) -> None:
    """Check the numbers of a snapshot.  Raises ImageError."""
    what = f"snapshot {one.name or one.id}"
    if one.l1_entries * 8 > MAX_TABLE_BYTES:
        raise ImageError(path, f"{what}: L1 table of {one.l1_entries * 8} bytes is larger than {MAX_TABLE_BYTES}")
    if one.l1_entries and (one.l1_offset % header.cluster_size or one.l1_offset < header.cluster_size):
        raise ImageError(path, f"{what}: L1 table at {one.l1_offset} is not at the start of a cluster")
    if one.l1_offset + one.l1_entries * 8 > file_bytes:
        raise ImageError(path, f"{what}: L1 table at {one.l1_offset} is not inside the file of {file_bytes} bytes")
    if one.size + one.state_bytes > MAX_SIZE:
        raise ImageError(path, f"{what}: {one.size} bytes of disk and {one.state_bytes} of state are too many")
    if one.l1_entries < tables(one.size, header):
        raise ImageError(path, f"{what}: L1 table of {one.l1_entries} entries is too small for {one.size} bytes")
    if one.state_bytes and one.l1_entries < tables(one.size, header) + tables(one.state_bytes, header):
        raise ImageError(path, f"{what}: L1 table of {one.l1_entries} entries has no room for its state")


def tables(length: int, header: Header) -> int:
    """Return how many L2 tables `length` bytes need."""
    return -(-length // (header.cluster_size * (header.cluster_size // 8)))


def state_offset(one: Snapshot, header: Header) -> int:
    """Return the offset on the disk of a snapshot at which the state of the machine begins."""
    return tables(one.size, header) * header.cluster_size * (header.cluster_size // 8)


def new_id(snapshots: "list[Snapshot]") -> str:
    """Return an unused id."""
    return str(1 + max((int(one.id) for one in snapshots if one.id.isascii() and one.id.isdigit()), default=0))


def pack_snapshots(snapshots: "list[Snapshot]") -> bytes:
    """Return the table as bytes.  Raises ValueError if it would be too large."""
    if len(snapshots) > MAX_SNAPSHOTS:
        raise ValueError(f"{len(snapshots)} snapshots are more than {MAX_SNAPSHOTS}")
    packed = b"".join(map(_pack, snapshots))
    if len(packed) > MAX_BYTES:
        raise ValueError(f"snapshot table of {len(packed)} bytes is larger than {MAX_BYTES}")
    return packed


def _pack(one: Snapshot) -> bytes:
    """Return one entry as bytes."""
    if one.raw:
        return one.raw
    name, number = one.name.encode(), one.id.encode()
    words = EXTRA.pack(one.state_bytes, one.size, NOT_COUNTED) + number + name
    short_state = min(one.state_bytes, (1 << 32) - 1)
    head = ENTRY.pack(
        one.l1_offset, one.l1_entries, len(number), len(name), one.date_s, one.date_ns, one.clock_ns, short_state,
        EXTRA.size,
    )  # fmt: skip
    return head + words + bytes(-len(words) % 8)
