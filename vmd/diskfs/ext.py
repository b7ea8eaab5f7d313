"""ext2, ext3 and ext4, read only: Linux, Documentation/filesystems/ext4.

Checksums of metadata are not verified.  If the journal was not replayed, files are read as if it had been
(`journal.py`).  Directories are searched linearly: to a linear reader the blocks of a hash index look like empty ones.
"""

import struct

from vmd.diskfs.journal import RUNS_MAX, Journal, restored
from vmd.diskfs.source import POINTERS_SPENT, DiskFsError, Source
from vmd.diskfs.walk import DIRECTORY, FILE, Node, kind_of, pieces_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    Run = tuple[int, int, int]  # first block of the file, first block on the disk, number of blocks

SUPERBLOCK_AT, SUPERBLOCK_BYTES = 1024, 1024
MAGIC_AT, MAGIC = 56, b"\x53\xef"
# Fields of the superblock that are used, by their names in the kernel without `s_`.
COUNTS = struct.Struct("<11I")  # from 0: inodes_count to inodes_per_group
REVISION_AT, REVISION = 76, struct.Struct("<I4xIHHIII")  # rev_level, first_ino, inode_size, block_group_nr, features
JOURNAL_AT = 224  # journal_inum, journal_dev
DESC_SIZE_AT = 254
FIRST_META_BG_AT = 260
BLOCKS_HI_AT = 336
BACKUP_GROUPS_AT = 588

SPARSE_SUPER2 = 0x200  # a compatible feature
SPARSE_SUPER = 0x1  # a read-only compatible feature
RECOVER, META_BG, EXTENTS, HAS_64BIT, LARGEDIR = 0x4, 0x10, 0x40, 0x80, 0x4000
INLINE_DATA = 0x8000
# The numbers: file types in directories, multiple mount protection, flexible groups, attributes in inodes, a seed of
# checksums, encryption and case folding of single directories.
KNOWN = (
    RECOVER | META_BG | EXTENTS | HAS_64BIT | LARGEDIR | INLINE_DATA
    | 0x2 | 0x100 | 0x200 | 0x400 | 0x2000 | 0x10000 | 0x20000
)  # fmt: skip
UNREAD = {0x1: "uses compression", 0x8: "is the journal of another file system", 0x1000: "has data in directories"}
HAS_JOURNAL = 0x4  # a compatible feature

INODE_BYTES = 128  # the minimum, and the size in revision 0
MAP_AT, MAP_BYTES = 40, 60
SIZE_HI_AT = 108
EXTRA_AT = 128
COMPRESSED, ENCRYPTED, USES_EXTENTS, INLINE = 0x4, 0x800, 0x80000, 0x10000000

EXTENT_HEADER = struct.Struct("<HHHH4x")
EXTENT_MAGIC = 0xF30A
EXTENT = struct.Struct("<IHHI")
EXTENT_INDEX = struct.Struct("<IIH2x")
EXTENT_DEPTH_MAX = 5
WRITTEN_MAX = 0x8000  # an extent with a larger length is unwritten, and reads as zeroes
DIRECT = 12

ATTRIBUTES_MAGIC = struct.pack("<I", 0xEA020000)
ATTRIBUTE = struct.Struct("<BBHII4x")
SYSTEM = 7  # the index of names that begin with `system.`

ENTRY = struct.Struct("<IHB")
ENTRY_BYTES = 8


def recognise(source: Source) -> str:
    """Return "ext2", "ext3" or "ext4", or "" if there is another file system or none.  Raises DiskFsError."""
    if source.size < SUPERBLOCK_AT + SUPERBLOCK_BYTES:
        return ""
    raw = source.read(SUPERBLOCK_AT, SUPERBLOCK_BYTES)
    if raw[MAGIC_AT : MAGIC_AT + len(MAGIC)] != MAGIC:
        return ""
    _, _, _, _, compatible, incompatible, _ = REVISION.unpack_from(raw, REVISION_AT)
    if incompatible & ~(0x2 | RECOVER | META_BG):
        return "ext4"
    return "ext3" if compatible & HAS_JOURNAL else "ext2"


class Ext:
    """A file system of a source that `recognise` has recognised."""

    def __init__(self, source: Source, name: str) -> None:
        """Raises DiskFsError if the file system is damaged or has an unsupported feature."""
        self.source = source
        self.name = name
        self.replayed: dict[int, tuple[int, bool]] = {}  # see Journal.changed
        raw = source.read(SUPERBLOCK_AT, SUPERBLOCK_BYTES)
        counts: tuple[int, ...] = COUNTS.unpack_from(raw)
        self.inodes, blocks, _, _, _, self.first_data_block, log_block, _, self.blocks_per_group, _, _ = counts
        self.inodes_per_group = counts[-1]
        revision, _, inode_bytes, _, compatible, incompatible, read_only = REVISION.unpack_from(raw, REVISION_AT)
        if not revision:
            inode_bytes, compatible, incompatible, read_only = INODE_BYTES, 0, 0, 0
        self.features = incompatible
        self._refuse_features(incompatible)
        if log_block > 6:
            raise DiskFsError(f"its superblock has blocks of 2^{10 + log_block} bytes")
        self.block_bytes = 1024 << log_block
        self.inode_bytes = inode_bytes
        if inode_bytes < INODE_BYTES or inode_bytes > self.block_bytes or inode_bytes & (inode_bytes - 1):
            raise DiskFsError(f"its superblock has inodes of {inode_bytes} bytes")
        if incompatible & HAS_64BIT:
            blocks |= int.from_bytes(raw[BLOCKS_HI_AT : BLOCKS_HI_AT + 4], "little") << 32
            self.descriptor_bytes = int.from_bytes(raw[DESC_SIZE_AT : DESC_SIZE_AT + 2], "little")
        else:
            self.descriptor_bytes = 32
        size = self.descriptor_bytes
        if size < 32 or size > 1024 or size & (size - 1):
            raise DiskFsError(f"its superblock has group descriptors of {size} bytes")
        self.blocks = blocks
        if not 0 < self.blocks_per_group <= 8 * self.block_bytes * 65536 or not 0 < self.inodes_per_group <= 1 << 24:
            raise DiskFsError(
                f"its superblock has groups of {self.blocks_per_group} blocks and {self.inodes_per_group} inodes"
            )
        if not self.first_data_block < blocks or self.first_data_block > 1:
            raise DiskFsError(f"its superblock has {blocks} blocks, the first one {self.first_data_block}")
        self.sparse = bool(read_only & SPARSE_SUPER)
        self.backup_groups = struct.unpack_from("<II", raw, BACKUP_GROUPS_AT) if compatible & SPARSE_SUPER2 else None
        self.first_meta_bg = int.from_bytes(raw[FIRST_META_BG_AT : FIRST_META_BG_AT + 4], "little")
        if incompatible & RECOVER:
            self._replay(compatible, *struct.unpack_from("<II", raw, JOURNAL_AT))

    @staticmethod
    def _refuse_features(incompatible: int) -> None:
        """Raise DiskFsError if there is an incompatible feature that is not supported."""
        for bit, what in UNREAD.items():
            if incompatible & bit:
                raise DiskFsError(f"{what}, which is not supported")
        if unknown := incompatible & ~KNOWN:
            raise DiskFsError(f"has unknown features: {unknown:#x}")

    def _replay(self, compatible: int, inode: int, device: int) -> None:
        """Replay the journal in memory: `block` and `pieces` use it from now on.  Raises DiskFsError."""
        if not compatible & HAS_JOURNAL or not inode:
            where = " is on another device" if device else " is missing"
            raise DiskFsError(f"was not unmounted, and its journal{where}: mount it once, or run e2fsck")
        node = self.node(inode)
        runs: list[Run] = []
        for run in self._runs(node):
            if len(runs) >= RUNS_MAX:
                raise DiskFsError("its journal is in too many pieces")
            runs.append(run)
        self.replayed = Journal(self.block, self.source.spend, runs, self.block_bytes).changed()

    # blocks

    def block(self, number: int) -> bytes:
        """Return a block of metadata.  Raises DiskFsError."""
        self._inside(number)
        place, escaped = self.replayed.get(number, (number, False))
        raw = self.source.read(place * self.block_bytes, self.block_bytes)
        return restored(raw) if escaped else raw

    def _inside(self, first: int, count: int = 1) -> None:
        if first < self.first_data_block or first + count > self.blocks:
            raise DiskFsError(f"points to block {first + count - 1}, of {self.blocks}")

    # inodes

    def node(self, number: int) -> Node:
        """Return an inode.  Raises DiskFsError."""
        if not 0 < number <= self.inodes:
            raise DiskFsError(f"points to inode {number}, of {self.inodes}")
        group, index = divmod(number - 1, self.inodes_per_group)
        block, within = divmod(index * self.inode_bytes, self.block_bytes)
        raw = self.block(self._inode_table(group) + block)[within : within + self.inode_bytes]
        mode, size = int.from_bytes(raw[:2], "little"), int.from_bytes(raw[4:8], "little")
        kind = kind_of(mode)
        if kind != DIRECTORY or self.features & LARGEDIR:  # in others the field is i_dir_acl
            size |= int.from_bytes(raw[SIZE_HI_AT : SIZE_HI_AT + 4], "little") << 32
        node = Node(number=number, kind=kind, size=size, raw=raw)
        self._refuse_flags(node)
        return node

    def _inode_table(self, group: int) -> int:
        """Return the first block of the inode table of a group.  Raises DiskFsError."""
        per_block = self.block_bytes // self.descriptor_bytes
        number, index = divmod(group, per_block)
        at = index * self.descriptor_bytes
        raw = self.block(self._descriptor_block(number, per_block))[at : at + self.descriptor_bytes]
        table: int = int.from_bytes(raw[8:12], "little")
        if len(raw) >= 64:
            table |= int.from_bytes(raw[40:44], "little") << 32
        return table

    def _descriptor_block(self, number: int, per_block: int) -> int:
        """Return the place of a block of group descriptors.  With `meta_bg` it is in the first of its groups."""
        if not self.features & META_BG or number < self.first_meta_bg:
            return SUPERBLOCK_AT // self.block_bytes + number + 1
        group = number * per_block
        own = int(self._has_superblock(group))
        if self.block_bytes == SUPERBLOCK_AT and not group and not self.first_data_block:
            own += 1
        return self.first_data_block + group * self.blocks_per_group + own

    def _has_superblock(self, group: int) -> bool:
        if self.backup_groups is not None:
            return not group or group in self.backup_groups
        if group <= 1 or not self.sparse:
            return True
        return any(_is_power(group, base) for base in (3, 5, 7))

    @staticmethod
    def _flags(node: Node) -> int:
        return int.from_bytes(node.raw[32:36], "little")

    def _refuse_flags(self, node: Node) -> None:
        """Raise DiskFsError if the content of an inode is encrypted or compressed."""
        flags, what = self._flags(node), ""
        if flags & ENCRYPTED:
            what = "is encrypted"
        elif flags & COMPRESSED:
            what = "is compressed"
        if what:
            raise DiskFsError(what if node.kind == FILE else f"{node.kind} on the way to it {what}")

    # contents

    def entry(self, directory: Node, name: bytes) -> int:
        """Return the number of the inode for a name; 0 if there is no such name.  Raises DiskFsError."""
        if self._flags(directory) & INLINE:
            content = self._inline(directory)
            return self._entry_in(content[4:MAP_BYTES], name) or self._entry_in(content[MAP_BYTES:], name)
        for _, place, count in self._runs(directory):
            for number in range(count):
                if found := self._entry_in(self.block(place + number), name):
                    return found
        return 0

    def _entry_in(self, block: bytes, name: bytes) -> int:
        """Return the number of the inode for a name in one block of a directory, or 0.  Raises DiskFsError."""
        if name not in block:
            return 0
        at, passed = 0, 0
        while at + ENTRY_BYTES <= len(block):
            inode, length, name_length = ENTRY.unpack_from(block, at)
            if length in (0, 65535) and self.block_bytes == 65536:
                length = 65536
            if length < ENTRY_BYTES + name_length or at + length > len(block):
                raise DiskFsError("a directory on the way to it is damaged")
            if inode and block[at + ENTRY_BYTES : at + ENTRY_BYTES + name_length] == name:
                self.source.spend(passed)
                return int(inode)
            at += length
            passed += 1
        self.source.spend(passed)
        return 0

    def target(self, link: Node) -> bytes:
        """Return the target of a symbolic link.  Raises DiskFsError."""
        flags = self._flags(link)
        if not flags & (INLINE | USES_EXTENTS) and link.size < MAP_BYTES:
            return link.raw[MAP_AT : MAP_AT + link.size]
        target = bytearray(link.size)
        for offset, piece in self.pieces(link):
            target[offset : offset + len(piece)] = piece
        return bytes(target)

    def pieces(self, file: Node) -> "Iterator[tuple[int, bytes]]":
        """Yield (offset in the file, bytes) in ascending order, without holes.  Raises DiskFsError."""
        if self._flags(file) & INLINE:
            content = self._inline(file)
            if file.size > len(content):
                raise DiskFsError(f"has {file.size} bytes, but its inode has only {len(content)} of them")
            yield 0, content[: file.size]
            return
        size = self.block_bytes
        if not self.replayed:
            runs = ((first * size, place * size, count * size) for first, place, count in self._runs(file))
            yield from pieces_of(self.source, runs, file.size)
            return
        # The current content of some blocks is in the journal.
        for first, place, count in self._runs(file):
            number = 0
            while number < count:
                offset, other, many = (first + number) * size, self.replayed.get(place + number), 1
                if other is None:
                    while number + many < count and place + number + many not in self.replayed:
                        many += 1
                    other = place + number, False
                begin, escaped = other
                for at, piece in pieces_of(self.source, iter(((offset, begin * size, many * size),)), file.size):
                    yield at, restored(piece) if escaped else piece
                number += many

    def _inline(self, node: Node) -> bytes:
        """Return the content inside an inode: from the place of the block map, then from the attribute system.data.

        Raises DiskFsError.
        """
        raw = node.raw
        content = raw[MAP_AT : MAP_AT + MAP_BYTES]
        extra = int.from_bytes(raw[EXTRA_AT : EXTRA_AT + 2], "little")
        first = EXTRA_AT + extra + len(ATTRIBUTES_MAGIC)
        if raw[first - len(ATTRIBUTES_MAGIC) : first] != ATTRIBUTES_MAGIC:
            return content
        at = first
        while at + ATTRIBUTE.size <= len(raw) and raw[at : at + 4] != bytes(4):
            length, index, value_at, value_inode, value_bytes = ATTRIBUTE.unpack_from(raw, at)
            name = raw[at + ATTRIBUTE.size : at + ATTRIBUTE.size + length]
            if index == SYSTEM and name == b"data":
                value = raw[first + value_at : first + value_at + value_bytes]
                if value_inode or len(value) != value_bytes:
                    raise DiskFsError("its inode is damaged: system.data is not inside it")
                return content + value
            at += (ATTRIBUTE.size + length + 3) & ~3
        return content

    # block maps and extents

    def _runs(self, node: Node) -> "Iterator[Run]":
        """Yield the blocks of an inode in ascending order, without holes, all inside the disk.  Raises DiskFsError."""
        blocks = (node.size + self.block_bytes - 1) // self.block_bytes
        block_map = node.raw[MAP_AT : MAP_AT + MAP_BYTES]
        found = self._extents(block_map) if self._flags(node) & USES_EXTENTS else self._mapped(block_map, blocks)
        least = 0
        for first, place, count in found:
            if first < least:
                raise DiskFsError(f"its extents are not in order at block {first}")
            if first >= blocks:
                return
            count = min(count, blocks - first)
            self._inside(place, count)
            yield first, place, count
            least = first + count

    def _extents(self, raw: bytes, depth: int | None = None) -> "Iterator[Run]":
        """Yield the extents of a node of an extent tree and of all nodes below it.  Raises DiskFsError."""
        magic, entries, _, own_depth = EXTENT_HEADER.unpack_from(raw)
        if magic != EXTENT_MAGIC or own_depth > EXTENT_DEPTH_MAX or (depth is not None and own_depth != depth):
            raise DiskFsError("its tree of extents is damaged")
        if EXTENT_HEADER.size + entries * EXTENT.size > len(raw):
            raise DiskFsError(f"its tree of extents is damaged: {entries} entries in {len(raw)} bytes")
        self.source.spend(entries)
        for at in range(EXTENT_HEADER.size, EXTENT_HEADER.size + entries * EXTENT.size, EXTENT.size):
            if own_depth:
                _, low, high = EXTENT_INDEX.unpack_from(raw, at)
                yield from self._extents(self.block(low | high << 32), own_depth - 1)
            else:
                first, count, high, low = EXTENT.unpack_from(raw, at)
                if count <= WRITTEN_MAX:
                    yield first, low | high << 32, count

    def _mapped(self, raw: bytes, blocks: int) -> "Iterator[Run]":
        """Yield the blocks of a block map: twelve direct ones, then those of indirect blocks of one to three levels.

        Raises DiskFsError.
        """
        numbers = struct.unpack("<15I", raw)
        for first, place in enumerate(numbers[:DIRECT]):
            if place:
                yield first, place, 1
        first, covers = DIRECT, self.block_bytes // 4
        for level, place in enumerate(numbers[DIRECT:]):
            if first >= blocks:
                return
            if place:
                yield from self._indirect(place, level, first, blocks)
            first += covers
            covers *= self.block_bytes // 4

    def _indirect(self, block: int, level: int, first: int, blocks: int) -> "Iterator[Run]":
        """Yield the blocks of an indirect block; consecutive ones as one run.  Raises DiskFsError."""
        self.source.spend(self.block_bytes // POINTERS_SPENT)
        each = (self.block_bytes // 4) ** level
        begin = start = count = 0
        for place in struct.unpack(f"<{self.block_bytes // 4}I", self.block(block)):
            if first >= blocks:
                break
            if place and level:
                yield from self._indirect(place, level - 1, first, blocks)
            elif place and count and place == start + count and first == begin + count:
                count += 1
            elif place:
                if count:
                    yield begin, start, count
                begin, start, count = first, place, 1
            first += each
        if count:
            yield begin, start, count


def _is_power(number: int, base: int) -> bool:
    while number % base == 0:
        number //= base
    return number == 1
