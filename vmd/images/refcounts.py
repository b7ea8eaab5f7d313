"""Refcounts of a qcow2 image: which clusters are in use, and the search for those that are not.

Everything here is called with the image's allocation lock held.  What a refcount says on disk may be too
high after a crash (a leak), never too low: increments are written before what uses the cluster is,
decrements after nothing does any more.  So a block may be written at any time, but the entry of the refcount table
that names a new block only once the block itself is on stable storage.

An allocation that fails leaves nothing behind but clusters that are no longer known to be zero.  Metadata that is
changed in memory has been written to its place before, so that to write the change later needs no room.
"""

import errno
import posix as os
import struct
from io import SEEK_END

from vmd.images.header import AT_REFCOUNT_TABLE, MAX_TABLE_BYTES, Header
from vmd.images.hostfile import read_bytes, write_bytes
from vmd.images.units import runs, unit_bytes
from vmd.images.words import big_endian, zeroes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.images.hostfile import StableStorage
    from vmd.images.units import Prepared

TABLE_OFFSET_MASK = 0xFFFFFFFFFFFFFE00
CACHE_BYTES = 4 << 20
SEARCH_BYTES = 512
NO_LIMIT = 1 << 62

table_place = struct.Struct(">QI")


class Damage(Exception):
    """The image contradicts itself in a way that forbids to go on writing; says how."""


class Block:
    """A refcount block in memory; `units` are not written yet."""

    __slots__ = ("data", "number", "offset", "units", "used")

    def __init__(self, number: int, offset: int, data: bytearray) -> None:
        self.number = number
        self.offset = offset
        self.data = data
        self.units = 0
        self.used = 0


def full_bytes(bits: int) -> bytes:
    """Return a translation that makes a byte 0 if one of its refcounts of `bits` < 8 bits is 0, else 1."""
    mask = (1 << bits) - 1
    return bytes(all(byte >> shift & mask for shift in range(0, 8, bits)) for byte in range(256))


class Refcounts:
    """Allocates and frees clusters, numbered by their place in the file."""

    def __init__(
        self,
        fd: int,
        header: Header,
        table: memoryview,
        file_bytes: int,
        stable: "StableStorage",
        prepared: "Prepared",
        *,
        device: bool,
    ) -> None:
        """`table` has the native numbers of the refcount table."""
        self.fd = fd
        self.stable = stable
        self.prepared = prepared
        self.unit_bytes = unit_bytes(header.cluster_size)
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self.order = header.refcount_order
        self.bits = 1 << self.order
        self.per_block = self.cluster_size * 8 >> self.order
        self.table = table
        self.table_offset = header.refcount_offset
        self.unpublished: set[int] = set()  # entries of the table that are in memory only
        self.blocks: dict[int, Block] = {}
        self.max_blocks = max(4, CACHE_BYTES // self.cluster_size)
        self.clock = 0
        self.full = full_bytes(self.bits) if self.bits < 8 else b""
        self.zero = bytes(self.bits // 8)
        self.end = -(-file_bytes // self.cluster_size)  # first cluster that was never part of the file
        self.limit = file_bytes // self.cluster_size if device else NO_LIMIT  # first cluster that cannot be had
        self.hint = 0  # no cluster before this one is free
        self.floor = 0  # clusters before this one are left alone: their refcounts are not to be trusted
        self.metadata: set[int] = set()

    def protect(self, offset: int, length: int) -> None:
        """Never hand out the clusters of a piece of metadata, whatever their refcounts say."""
        self.metadata.update(range(offset >> self.cluster_bits, -(-(offset + length) >> self.cluster_bits)))

    # -- blocks

    def _load(self, number: int) -> "Block | None":
        """Return a refcount block, or None if there is none: all refcounts are 0."""
        block = self.blocks.get(number)
        self.clock += 1
        if block is None:
            offset = self.table[number] & TABLE_OFFSET_MASK
            if not offset:
                return None
            if offset & (self.cluster_size - 1):
                raise Damage(f"refcount block at {offset} is not at the start of a cluster")
            data = bytearray(read_bytes(self.fd, self.cluster_size, offset))
            if len(data) != self.cluster_size:  # it was there when the image was opened
                raise OSError(errno.EIO, f"the file now ends before the refcount block at {offset}")
            block = self._keep(Block(number, offset, data))
        block.used = self.clock
        return block

    def _keep(self, block: Block) -> Block:
        """Put a block into the cache; of those that can be written, the one used least recently leaves it."""
        failure: OSError | None = None
        for oldest in sorted(self.blocks.values(), key=lambda kept: kept.used):
            if len(self.blocks) < self.max_blocks:
                break
            try:
                self._write(oldest)
                del self.blocks[oldest.number]
            except OSError as error:
                failure = error
        if failure is not None and len(self.blocks) >= self.max_blocks:
            raise failure
        self.blocks[block.number] = block
        return block

    def _write(self, block: Block) -> None:
        """Write what has changed."""
        for first, end in runs(block.units):
            start, stop = first * self.unit_bytes, end * self.unit_bytes
            write_bytes(self.fd, memoryview(block.data)[start:stop], block.offset + start)
            block.units &= ~((1 << end) - 1)

    def _make_ready(self, block: Block, start: int, stop: int) -> None:
        """Before refcounts are changed: see whether they can be written.  Raises OSError."""
        first = start << self.order >> 3
        self.prepared.prepare(block.offset + first, ((stop << self.order) + 7 >> 3) - first)

    def require(self, end: int) -> None:
        """Raise OSError unless there can be clusters up to `end`; a device may have grown since it was opened."""
        if end > self.limit:
            device_bytes = os.lseek(self.fd, 0, SEEK_END)
            self.limit = device_bytes >> self.cluster_bits
            if end > self.limit:
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: it ends after {device_bytes} bytes")

    def extend(self, end: int) -> None:
        """Take clusters up to `end` for part of the file, before one of them is written.

        A write that fails half-way leaves something else there than zeroes.
        """
        self.end = max(self.end, end)

    def _create(self, number: int) -> Block:
        """Make the block of a range of clusters that has none; it is the first cluster of that range itself."""
        cluster = number * self.per_block
        if cluster in self.metadata:
            raise Damage(f"cluster {cluster} is in use and has no refcount")
        self.require(cluster + 1)
        self.prepared.prepare(self.table_offset + number * 8, 8)
        block = Block(number, cluster << self.cluster_bits, bytearray(self.cluster_size))
        self._set(block, 0, 1)
        self.extend(cluster + 1)
        # All of it now: a disk that is full is to be found out before anything depends on this block.
        self.prepared.write(block.data, block.offset)
        block.units = 0
        self._keep(block)
        self.table[number] = block.offset
        self.unpublished.add(number)
        self.metadata.add(cluster)
        self.clock += 1
        block.used = self.clock
        return block

    # -- single refcounts

    def _get(self, block: Block, index: int) -> int:
        """Return a refcount."""
        at = index << self.order
        if self.bits >= 8:
            return int.from_bytes(block.data[at >> 3 : (at + self.bits) >> 3], "big")
        return block.data[at >> 3] >> (at & 7) & ((1 << self.bits) - 1)

    def _set(self, block: Block, index: int, value: int) -> None:
        """Change a refcount."""
        at = index << self.order
        low, high = at >> 3, (at + max(8, self.bits)) >> 3
        if self.bits >= 8:
            block.data[low:high] = value.to_bytes(high - low, "big")
        else:
            mask = ((1 << self.bits) - 1) << (at & 7)
            block.data[low] = block.data[low] & ~mask | value << (at & 7)
        block.units |= 1 << low // self.unit_bytes

    def get(self, cluster: int) -> int:
        """Return the refcount of a cluster.  Raises Damage, OSError."""
        number, index = divmod(cluster, self.per_block)
        block = self._load(number) if number < len(self.table) else None
        return self._get(block, index) if block else 0

    def _find_free(self, block: Block, index: int) -> int:
        """Return the first index from `index` on whose refcount is 0, or -1."""
        if self.bits >= 8:
            width = self.bits >> 3
            at = block.data.find(self.zero, index * width)
            while at >= 0 and at % width:
                at = block.data.find(self.zero, at + width - at % width)
            return at // width if at >= 0 else -1
        per_byte = 8 >> self.order
        while index % per_byte:
            if not self._get(block, index):
                return index
            index += 1
        for start in range(index // per_byte, self.cluster_size, SEARCH_BYTES):
            at = block.data[start : start + SEARCH_BYTES].translate(self.full).find(b"\0")
            if at >= 0:
                index = (start + at) * per_byte
                return next(i for i in range(index, index + per_byte) if not self._get(block, i))
        return -1

    # -- allocation

    def allocate(self, want: int) -> tuple[int, int]:
        """Take up to `want` clusters that follow one another; return the first and how many there are.

        Raises:
            Damage: what is free according to its refcount is in use.
            OSError: there is no room, or the refcount table is at its largest.
        """
        index = max(self.hint, self.floor)
        while True:
            number, start = divmod(index, self.per_block)
            if number >= len(self.table):
                self._grow()
            block = self._load(number)
            if block is None:
                if number * self.per_block < self.floor:
                    index = (number + 1) * self.per_block  # its place is not ours to take
                    continue
                block = self._create(number)
            start = self._find_free(block, start)
            if start < 0:
                index = (number + 1) * self.per_block
                continue
            first = number * self.per_block + start
            if first >= self.limit:
                self.require(first + 1)
            most = min(start + want, self.per_block, self.limit - number * self.per_block)
            stop = start + 1
            while stop < most and not self._get(block, stop):
                stop += 1
            self._make_ready(block, start, stop)
            for cluster in range(first, first + stop - start):
                if cluster in self.metadata:
                    raise Damage(f"cluster {cluster} is in use and has refcount 0")
            for position in range(start, stop):
                self._set(block, position, 1)
            self.hint = first + stop - start
            return first, stop - start

    def allocate_together(self, count: int) -> int:
        """Take `count` clusters that follow one another, and return the first.  Raises Damage, OSError."""
        if count >= self.per_block:
            return self._allocate_behind_end(count)
        aside = []  # what was found before, and is too short
        try:
            while True:
                first, found = self.allocate(count)
                if found == count:
                    return first
                aside.append((first, found))
        finally:
            for first, found in aside:
                self.free(first, found)

    def _allocate_behind_end(self, count: int) -> int:
        """Take more clusters than a refcount block covers: a range of new blocks, which are its first clusters."""
        blocks = 1
        while blocks * self.per_block < blocks + count:
            blocks += 1
        number = -(-self.end // self.per_block)
        while number + blocks > len(self.table):
            self._grow()
            number = -(-self.end // self.per_block)
        first = number * self.per_block
        if any(self.table[number : number + blocks]) or self.metadata & set(range(first, first + blocks + count)):
            raise Damage(f"what is behind cluster {first} is in use, and behind the end of the file")
        self.require(first + blocks + count)
        self.extend(first + blocks + count)
        for position in range(blocks):
            block = Block(number + position, (first + position) << self.cluster_bits, bytearray(self.cluster_size))
            for index in range(min(self.per_block, blocks + count - position * self.per_block)):
                self._set(block, index, 1)
            self.prepared.prepare(self.table_offset + block.number * 8, 8)
            self.prepared.write(block.data, block.offset)
            block.units = 0
            self._keep(block)
            self.table[block.number] = block.offset
            self.unpublished.add(block.number)
            self.metadata.add(first + position)
        return first + blocks

    def free(self, first: int, count: int) -> list[tuple[int, int]]:
        """Drop one reference of each cluster of a run; return the runs nobody refers to any more.

        Clusters whose refcount cannot be read, or has no room to be written, are leaked: nothing fails for that.
        """
        gone: list[tuple[int, int]] = []
        for cluster in range(first, first + count):
            number, index = divmod(cluster, self.per_block)
            try:
                block = self._load(number) if number < len(self.table) else None
                if block is not None:
                    self._make_ready(block, index, index + 1)
            except OSError:
                continue
            value = self._get(block, index) if block else 0
            if block is None or value == 0:
                raise Damage(f"cluster {cluster} was in use and has refcount 0")
            self._set(block, index, value - 1)
            if value > 1:
                continue
            self.metadata.discard(cluster)
            self.hint = min(self.hint, cluster)
            if gone and sum(gone[-1]) == cluster:
                gone[-1] = (gone[-1][0], gone[-1][1] + 1)
            else:
                gone.append((cluster, 1))
        return gone

    def _grow(self) -> None:
        """Put a refcount table of twice the size behind all that the present one covers.

        It lies in the range it adds, after the blocks that cover it.  Rare, so it waits for the disk: blocks and
        table are there before the header names them.
        """
        per_cluster = self.cluster_size // 8
        clusters = -(-len(self.table) * 2 // per_cluster)
        if clusters * self.cluster_size > MAX_TABLE_BYTES:
            raise OSError(errno.ENOSPC, "the refcount table of the image is at its largest")
        blocks = 1
        while blocks * self.per_block < blocks + clusters:
            blocks += 1
        number = len(self.table)
        first = number * self.per_block
        self.require(first + blocks + clusters)
        self.extend(first + blocks + clusters)
        table = zeroes(clusters * per_cluster)
        table[: len(self.table)] = self.table
        for position in range(blocks):
            block = Block(number + position, (first + position) << self.cluster_bits, bytearray(self.cluster_size))
            for index in range(min(self.per_block, blocks + clusters - position * self.per_block)):
                self._set(block, index, 1)
            self.prepared.write(block.data, block.offset)
            table[number + position] = block.offset
        self.write_blocks()
        offset = (first + blocks) << self.cluster_bits
        self.prepared.write(big_endian(table), offset)
        self.stable.sync()
        write_bytes(self.fd, table_place.pack(offset, clusters), AT_REFCOUNT_TABLE)
        # From here on the header names the new table, so memory does as well, whatever fails next.
        old_offset, old_bytes = self.table_offset, len(self.table) * 8
        self.table, self.table_offset = table, offset
        self.unpublished.clear()
        self.protect(first << self.cluster_bits, (blocks + clusters) << self.cluster_bits)
        self.stable.sync()
        old_first = old_offset >> self.cluster_bits
        if old_first >= self.floor:
            self.free(old_first, old_bytes >> self.cluster_bits)

    # -- writing back

    def write_blocks(self) -> None:
        """Write all that has changed in blocks; one that cannot be written keeps no other from it.  Raises OSError."""
        failure: OSError | None = None
        for block in self.blocks.values():
            try:
                self._write(block)
            except OSError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def publish(self, entries: "set[int]") -> None:
        """Write entries of the table; their blocks are on stable storage."""
        for number in sorted(entries & self.unpublished):
            write_bytes(self.fd, self.table[number].to_bytes(8, "big"), self.table_offset + number * 8)
            self.unpublished.discard(number)
