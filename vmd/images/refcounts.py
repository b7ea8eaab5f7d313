"""Refcounts of a qcow2 image: which clusters are in use, and the search for free ones.

The caller of every method holds the image's lock `allocating`.  After a crash a refcount on disk may be too high (a
leak), but never too low.  An increment is written before the tables that refer to the cluster, a decrement after no
table refers to it any more.  So a block can be written at any time.  Only the entry of the refcount table for a new
block must wait until the block is on stable storage.

A failed allocation has one effect: some free clusters are no longer known to be zero.  Before metadata is changed in
memory, its unchanged bytes are written to their place in the file, so that the later write needs no new space.
"""

import errno
import posix as os
import struct
from io import SEEK_END

from vmd.images.header import AT_REFCOUNT_TABLE, MAX_TABLE_BYTES, Header
from vmd.images.hostfile import read_bytes, write_bytes
from vmd.images.units import runs, unit_bytes
from vmd.images.words import big_endian, zeroes
from vmd.units import SECTOR

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
    """The image is corrupt, so that it must not be written any more; the text says how."""


class Block:
    """A refcount block in memory.  `units`: bit set of the units that are not written yet."""

    __slots__ = ("data", "number", "offset", "units", "used")

    def __init__(self, number: int, offset: int, data: bytearray) -> None:
        self.number = number
        self.offset = offset
        self.data = data
        self.units = 0
        self.used = 0


def full_bytes(bits: int) -> bytes:
    """Return a table for bytes.translate: a byte becomes 0 if one of its refcounts of `bits` < 8 bits is 0, else 1."""
    mask = (1 << bits) - 1
    return bytes(all(byte >> shift & mask for shift in range(0, 8, bits)) for byte in range(256))


class Refcounts:
    """Allocates and frees clusters.  The number of a cluster is its offset divided by the cluster size."""

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
        """`table` is the refcount table in native byte order."""
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
        self.unpublished: set[int] = set()  # numbers of new blocks whose entry of the table is not written yet
        self.blocks: dict[int, Block] = {}
        self.max_blocks = max(4, CACHE_BYTES // self.cluster_size)
        self.clock = 0
        self.full = full_bytes(self.bits) if self.bits < 8 else b""
        self.zero = bytes(self.bits // 8)
        self.end = -(-file_bytes // self.cluster_size)  # first cluster that was never part of the file
        self.limit = file_bytes // self.cluster_size if device else NO_LIMIT  # first cluster after a device
        self.hint = 0  # no cluster before this one is free
        self.floor = 0  # clusters before this one keep their refcounts, which cannot be trusted
        self.metadata: set[int] = set()

    def protect(self, offset: int, length: int) -> None:
        """Never allocate the clusters of a piece of metadata, even if their refcounts are 0."""
        self.metadata.update(range(offset >> self.cluster_bits, -(-(offset + length) >> self.cluster_bits)))

    # -- blocks

    def _load(self, number: int) -> "Block | None":
        """Return a refcount block; None if it does not exist: its refcounts are 0.  Raises OSError, Damage."""
        block = self.blocks.get(number)
        self.clock += 1
        if block is None:
            offset = self.table[number] & TABLE_OFFSET_MASK
            if not offset:
                return None
            if offset & (self.cluster_size - 1):
                raise Damage(f"refcount block at {offset} is not at the start of a cluster")
            data = bytearray(read_bytes(self.fd, self.cluster_size, offset))
            if len(data) != self.cluster_size:  # the file has been cut short since it was opened
                raise OSError(errno.EIO, f"the file now ends before the refcount block at {offset}")
            block = self._keep(Block(number, offset, data))
        block.used = self.clock
        return block

    def _keep(self, block: Block) -> Block:
        """Put a block into the cache.  If it is full, write and evict blocks, the least recently used ones first."""
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
        """Write the changed units of a block.  Raises OSError."""
        for first, end in runs(block.units):
            start, stop = first * self.unit_bytes, end * self.unit_bytes
            write_bytes(self.fd, memoryview(block.data)[start:stop], block.offset + start)
            block.units &= ~((1 << end) - 1)

    def _make_ready(self, block: Block, start: int, stop: int) -> None:
        """Check that refcounts can be written, before they are changed in memory.  Raises OSError."""
        first = start << self.order >> 3
        self.prepared.prepare(block.offset + first, ((stop << self.order) + 7 >> 3) - first)

    def require(self, end: int) -> None:
        """Raise OSError unless the file can have clusters up to `end`.  A device may have grown since it was opened."""
        if end > self.limit:
            device_bytes = os.lseek(self.fd, 0, SEEK_END)
            self.limit = device_bytes >> self.cluster_bits
            if end > self.limit:
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: it ends after {device_bytes} bytes")

    def extend(self, end: int) -> None:
        """Count clusters up to `end` as part of the file, before one of them is written.

        Even if that write fails, these clusters may not be zero any more.
        """
        self.end = max(self.end, end)

    def _create(self, number: int) -> Block:
        """Make a missing refcount block, in the first of the clusters that it counts.  Raises OSError, Damage."""
        cluster = number * self.per_block
        if cluster in self.metadata:
            raise Damage(f"cluster {cluster} is in use and has no refcount")
        self.require(cluster + 1)
        self.prepared.prepare(self.table_offset + number * 8, 8)
        block = Block(number, cluster << self.cluster_bits, bytearray(self.cluster_size))
        self._set(block, 0, 1)
        self.extend(cluster + 1)
        # Written as a whole now, so that a full file system is noticed before anything depends on this block.
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
        """Return the first index of a refcount 0, from `index` on; -1 if there is none."""
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
        """Allocate up to `want` consecutive clusters.  Return the first one and their number.

        Raises:
            Damage: a cluster with refcount 0 is in use.
            OSError: there is no space, or the refcount table has its maximum size.
        """
        index = max(self.hint, self.floor)
        while True:
            number, start = divmod(index, self.per_block)
            if number >= len(self.table):
                self._grow()
            block = self._load(number)
            if block is None:
                if number * self.per_block < self.floor:
                    index = (number + 1) * self.per_block  # the new block would be before `floor`
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
        """Allocate `count` consecutive clusters, and return the first.  Raises Damage, OSError."""
        if count >= self.per_block:
            return self._allocate_after_end(count)
        too_short = []  # runs that are too short; freed at the end
        try:
            while True:
                first, found = self.allocate(count)
                if found == count:
                    return first
                too_short.append((first, found))
        finally:
            for first, found in too_short:
                self.free(first, found)

    def _allocate_after_end(self, count: int) -> int:
        """Allocate more clusters than a refcount block counts, after the end of the file.

        The new refcount blocks for these clusters are directly before them.
        """
        blocks = 1
        while blocks * self.per_block < blocks + count:
            blocks += 1
        number = -(-self.end // self.per_block)
        while number + blocks > len(self.table):
            self._grow()
            number = -(-self.end // self.per_block)
        first = number * self.per_block
        if any(self.table[number : number + blocks]) or self.metadata & set(range(first, first + blocks + count)):
            raise Damage(f"clusters from {first} on are in use, after the end of the file")
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
        """Drop one reference of each cluster of a run.  Return the runs of clusters that are free now.

        A cluster whose refcount cannot be read or written is leaked, which is not an error.
        """
        freed: list[tuple[int, int]] = []
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
            if freed and sum(freed[-1]) == cluster:
                freed[-1] = (freed[-1][0], freed[-1][1] + 1)
            else:
                freed.append((cluster, 1))
        return freed

    def _grow(self) -> None:
        """Replace the refcount table by one of twice the size.

        The new table is in the first clusters that the old one cannot count.  The refcount blocks for them are directly
        before it.  This is rare, so it waits for the disk: blocks and table are on stable storage before the header
        names them.
        """
        per_cluster = self.cluster_size // 8
        clusters = -(-len(self.table) * 2 // per_cluster)
        if clusters * self.cluster_size > MAX_TABLE_BYTES:
            raise OSError(errno.ENOSPC, "the refcount table of the image has its maximum size")
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
        # The header names the new table now, so we must also use it, even if the next steps fail.
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
        """Write the changes of all blocks, even if one of them fails.  Raises OSError."""
        failure: OSError | None = None
        for block in self.blocks.values():
            try:
                self._write(block)
            except OSError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def publish(self, entries: "set[int]") -> None:
        """Write entries of the refcount table.  Their blocks must be on stable storage.  Raises OSError.

        The first block of `_allocate_after_end` counts the others, so its entry must be on stable storage before those
        in other sectors of the table.  A sector is stored as a whole.
        """
        last = None
        for number in sorted(entries & self.unpublished):
            place = self.table_offset + number * 8
            if last not in (None, place // SECTOR):
                self.stable.sync()
            last = place // SECTOR
            write_bytes(self.fd, self.table[number].to_bytes(8, "big"), place)
            self.unpublished.discard(number)
