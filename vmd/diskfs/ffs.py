"""FFS1 and FFS2 of OpenBSD on amd64 and i386, read only: OpenBSD, sys/ufs/ffs/fs.h and ufs/dinode.h.

A file system that was not unmounted is read as any other: soft updates keep it consistent, and there is no journal.
"""

import struct

from vmd.diskfs.source import POINTERS_SPENT, DiskFsError, Source
from vmd.diskfs.walk import Node, kind_of, pieces_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    Run = tuple[int, int, int]  # first byte of the file, first byte on the disk, number of bytes

# Possible offsets of the superblock, in the order in which OpenBSD tries them.
SUPERBLOCK_AT = (65536, 8192, 0, 262144)
SUPERBLOCK_BYTES = 1376
MAGIC_AT = 1372
FFS1, FFS2 = (0x011954).to_bytes(4, "little"), (0x19540119).to_bytes(4, "little")
# Fields of the superblock that are used, by their names in `struct fs` without `fs_`.
FIRST = struct.Struct("<8xIIII")  # sblkno, cblkno, iblkno, dblkno; in fragments
CYLINDERS = struct.Struct("<II")  # from 24: cgoffset, cgmask
SIZES = struct.Struct("<IIIII")  # from 36: ffs1_size, ffs1_dsize, ncg, bsize, fsize
PER_GROUP = struct.Struct("<II")  # from 184: ipg, fpg
LOCATION_AT = 1000
FFS2_SIZE_AT = 1080
INODE_FORMAT_AT = 1324
INODE_FORMAT_44 = 2  # a directory entry has a length of one byte, and a type

BLOCK_MIN, BLOCK_MAX = 4096, 65536
FRAGMENT_MIN = 512
FRAGMENTS_MAX = 8  # in a block

DIRECT, LEVELS = 12, 3

DIRECTORY_BLOCK = 512  # an entry does not cross the boundary of these
ENTRY = struct.Struct("<IHBB")


class Layout:
    """The layout of inodes, which differs between the two versions."""

    def __init__(self, size: int, map_at: int, number: str, size_at: int) -> None:
        self.size = size  # of an inode
        self.map_at = map_at  # of the block map; a short symbolic link is there instead
        self.number = number  # format of a block number for struct
        self.number_bytes = struct.calcsize(number)
        self.map_bytes = (DIRECT + LEVELS) * self.number_bytes
        self.size_at = size_at


LAYOUTS = {"FFS1": Layout(128, 40, "I", 8), "FFS2": Layout(256, 112, "Q", 16)}


def recognise(source: Source) -> str:
    """Return "FFS1" or "FFS2", or "" if there is another file system or none.  Raises DiskFsError."""
    return _superblock(source)[0]


def _superblock(source: Source) -> tuple[str, bytes]:
    """Return the version and the superblock; ("", b"") if there is none.  Raises DiskFsError."""
    for at in SUPERBLOCK_AT:
        if at + SUPERBLOCK_BYTES > source.size:
            continue
        raw = source.read(at, SUPERBLOCK_BYTES)
        magic = raw[MAGIC_AT : MAGIC_AT + 4]
        # With blocks of 64 KiB, the first backup superblock of FFS1 is at the offset of FFS2's superblock.
        if magic == FFS1 and at != SUPERBLOCK_AT[0]:
            return "FFS1", raw
        if magic == FFS2 and int.from_bytes(raw[LOCATION_AT : LOCATION_AT + 8], "little") == at:
            return "FFS2", raw
    return "", b""


class Ffs:
    """A file system of a source that `recognise` has recognised."""

    def __init__(self, source: Source, name: str) -> None:
        """Raises DiskFsError if the file system is damaged or too old."""
        self.source = source
        self.name = name
        self.layout = LAYOUTS[name]
        _, raw = _superblock(source)
        _, _, self.inode_block, _ = FIRST.unpack_from(raw)
        self.group_offset, group_mask = CYLINDERS.unpack_from(raw, 24)
        fragments, _, self.groups, self.block_bytes, self.fragment_bytes = SIZES.unpack_from(raw, 36)
        self.inodes_per_group, self.fragments_per_group = PER_GROUP.unpack_from(raw, 184)
        if name == "FFS2":
            fragments, self.group_offset = int.from_bytes(raw[FFS2_SIZE_AT : FFS2_SIZE_AT + 8], "little"), 0
        elif int.from_bytes(raw[INODE_FORMAT_AT : INODE_FORMAT_AT + 4], "little") != INODE_FORMAT_44:
            raise DiskFsError("has the inode format of before 4.4BSD, which is not supported")
        self.group_bits = ~group_mask & 0xFFFFFFFF
        self.fragments = fragments
        for what, size, least, most in (
            ("blocks", self.block_bytes, BLOCK_MIN, BLOCK_MAX),
            ("fragments", self.fragment_bytes, max(FRAGMENT_MIN, self.block_bytes // FRAGMENTS_MAX), self.block_bytes),
        ):
            if not least <= size <= most or size & (size - 1):
                raise DiskFsError(f"its superblock has {what} of {size} bytes")
        if not self.groups or not self.inodes_per_group or not self.fragments_per_group:
            raise DiskFsError(
                f"its superblock has {self.groups} groups of {self.inodes_per_group} inodes"
                f" and {self.fragments_per_group} fragments"
            )

    # inodes

    def node(self, number: int) -> Node:
        """Return an inode.  Raises DiskFsError."""
        group, index = divmod(number, self.inodes_per_group)
        if not number or group >= self.groups:
            raise DiskFsError(f"points to inode {number}, of {self.groups * self.inodes_per_group}")
        layout = self.layout
        start = self.fragments_per_group * group + self.group_offset * (group & self.group_bits)
        at = (start + self.inode_block) * self.fragment_bytes + index * layout.size
        self._inside(at, layout.size)
        raw = self.source.read(at, layout.size)
        size = int.from_bytes(raw[layout.size_at : layout.size_at + 8], "little")
        return Node(number=number, kind=kind_of(int.from_bytes(raw[:2], "little")), size=size, raw=raw)

    # contents

    def entry(self, directory: Node, name: bytes) -> int:
        """Return the number of the inode for a name; 0 if there is no such name.  Raises DiskFsError."""
        for _, place, length in self._runs(directory):
            block = self.source.read(place, length)
            if name in block and (found := self._entry_in(block, name)):
                return found
        return 0

    def _entry_in(self, block: bytes, name: bytes) -> int:
        """Return the number of the inode for a name in a part of a directory, or 0.  Raises DiskFsError."""
        for begin in range(0, len(block), DIRECTORY_BLOCK):
            piece = block[begin : begin + DIRECTORY_BLOCK]
            if name not in piece:
                continue
            at = passed = 0
            while at + ENTRY.size <= len(piece):
                inode, length, _, name_length = ENTRY.unpack_from(piece, at)
                if length < ENTRY.size + name_length or at + length > len(piece):
                    raise DiskFsError("a directory on the way to it is damaged")
                if inode and piece[at + ENTRY.size : at + ENTRY.size + name_length] == name:
                    return int(inode)
                at += length
                passed += 1
            self.source.spend(passed)
        return 0

    def target(self, link: Node) -> bytes:
        """Return the target of a symbolic link.  Raises DiskFsError."""
        layout = self.layout
        if link.size < layout.map_bytes:
            return link.raw[layout.map_at : layout.map_at + link.size]
        target = bytearray(link.size)
        for offset, piece in self.pieces(link):
            target[offset : offset + len(piece)] = piece
        return bytes(target)

    def pieces(self, file: Node) -> "Iterator[tuple[int, bytes]]":
        """Yield (offset in the file, bytes) in ascending order, without holes.  Raises DiskFsError."""
        return pieces_of(self.source, self._runs(file), file.size)

    # block maps

    def _inside(self, at: int, length: int) -> None:
        if at + length > self.fragments * self.fragment_bytes:
            raise DiskFsError(f"points to fragment {at // self.fragment_bytes}, of {self.fragments}")

    def _runs(self, node: Node) -> "Iterator[Run]":
        """Yield the blocks of an inode in ascending order, without holes, all inside the disk.  Raises DiskFsError."""
        layout, size = self.layout, self.block_bytes
        blocks = (node.size + size - 1) // size
        raw = node.raw[layout.map_at : layout.map_at + layout.map_bytes]
        numbers = struct.unpack(f"<{DIRECT + LEVELS}{layout.number}", raw)
        for first, place in enumerate(numbers[:DIRECT]):
            if place and first < blocks:
                yield self._run(node, first, place)
        first, covers = DIRECT, size // layout.number_bytes
        for level, place in enumerate(numbers[DIRECT:]):
            if first >= blocks:
                return
            if place:
                for block, found in self._indirect(place, level, first, blocks):
                    yield self._run(node, block, found)
            first += covers
            covers *= size // layout.number_bytes

    def _run(self, node: Node, block: int, place: int) -> "Run":
        """Return the run of one block of a file.  The last block may have fewer fragments.  Raises DiskFsError."""
        offset, at = block * self.block_bytes, place * self.fragment_bytes
        length = min(self.block_bytes, node.size - offset)
        self._inside(at, length)
        return offset, at, length

    def _indirect(self, place: int, level: int, first: int, blocks: int) -> "Iterator[tuple[int, int]]":
        """Yield the blocks of an indirect block: number in the file, first fragment.  Raises DiskFsError."""
        number = self.layout.number
        count = self.block_bytes // self.layout.number_bytes
        at = place * self.fragment_bytes
        self._inside(at, self.block_bytes)
        raw = self.source.read(at, self.block_bytes)
        self.source.spend(self.block_bytes // POINTERS_SPENT)
        each = count**level
        for found in struct.unpack(f"<{count}{number}", raw):
            if first >= blocks:
                return
            if found and level:
                yield from self._indirect(found, level - 1, first, blocks)
            elif found:
                yield first, found
            first += each
