"""Makes, deletes and goes back to snapshots of a qcow2 image.  Each change takes effect by one write of one sector.

A snapshot changes the refcount of every cluster, and the flag COPIED in every L2 entry; QEMU reports an image as
corrupt if the two do not agree.  So no table is changed in place.  New L1 and L2 tables, a new snapshot table and new
refcounts are written to free clusters.  Then one write to the header makes it name all of them at once.  After a crash
before that write the image is unchanged, and the written clusters are free.  After that write the change is complete.
No cluster is leaked at any moment.

    new tables and refcounts, the state of the machine | header | old clusters are free

A new snapshot gets the old tables, and the disk gets the new ones.  The flag COPIED has no meaning in the tables of
snapshots.

For speed, all refcounts are in one array meanwhile, and an L2 table is processed as one large integer: 100 GiB in
clusters of 64 KiB have 1.6 million entries, and the guest is paused.
"""

import errno

from vmd.errors import ImageError
from vmd.images.header import (
    AT_AUTOCLEAR,
    AT_CONTENT,
    AT_INCOMPATIBLE,
    COMPRESSED,
    CONTENT,
    GOING_BACK,
    MAX_TABLE_BYTES,
    OFFSET_MASK,
)
from vmd.images.hostfile import read_bytes, write_bytes, write_views
from vmd.images.names import check_name
from vmd.images.qcow2 import COPIED, REPAIR, Qcow2Image
from vmd.images.refcounts import TABLE_OFFSET_MASK, Damage
from vmd.images.snapshots import Snapshot, find, new_id, pack_snapshots, read_snapshots, tables
from vmd.images.words import FORMATS, big_endian, native, zeroes
from vmd.units import NS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

LARGEST_WRITE = 8 << 20
NO_REFCOUNT = "a cluster in use has no refcount"
MAX_COUNTS_BYTES = 512 << 20  # of refcounts in memory, briefly three times that; for 16 TiB in 64 KiB clusters


class Full(Exception):
    """A refcount is at the maximum of its width."""


class Counts:
    """All refcounts of an image, as an array of numbers of 1, 2, 4 or 8 bytes."""

    def __init__(self, raw: bytearray, order: int) -> None:
        """`raw` is the concatenated refcount blocks.  A refcount has 2^order bits."""
        self.order = order
        self.most = (1 << (1 << order)) - 1
        self.width = max(1, (1 << order) >> 3)
        if order < 3:
            per_byte = 8 >> order
            wide = bytearray(len(raw) * per_byte)
            for place in range(per_byte):
                shift = place << order
                wide[place::per_byte] = raw.translate(bytes(byte >> shift & self.most for byte in range(256)))
            raw = wide
        self.numbers = native(raw, self.width)
        # Clusters in use before or after the change.  Those that it frees are reused only after it.
        self.taken = bytearray(self.numbers.cast("B"))

    def __len__(self) -> int:
        return len(self.numbers)

    def extend(self, more: int) -> None:
        """Append `more` refcounts, all 0."""
        raw = bytearray(self.numbers.cast("B"))
        raw.extend(bytes(more * self.width))
        self.numbers = memoryview(raw).cast(FORMATS[self.width])
        self.taken.extend(bytes(more * self.width))

    def find(self, count: int, start: int) -> int:
        """Return the first of `count` consecutive free clusters, from `start` on; they may be after the end."""
        nothing, width = bytes(count * self.width), self.width
        at = self.taken.find(nothing, start * width)
        while at >= 0 and at % width:
            at = self.taken.find(nothing, at + width - at % width)
        if at >= 0:
            return at // width
        at = len(self.taken.rstrip(b"\0"))
        return max(start, -(-at // width))

    def take(self, first: int, count: int) -> None:
        """Set the refcounts of free clusters to 1."""
        for cluster in range(first, first + count):
            self.numbers[cluster] = 1
        self.taken[first * self.width : (first + count) * self.width] = b"\xff" * (count * self.width)

    def add(self, clusters: "Iterable[int]") -> None:
        """Increment the refcounts of clusters.  Cluster 0 stands for none.  Raises Damage, Full."""
        numbers = self.numbers
        try:
            for cluster in clusters:
                if cluster:
                    number = numbers[cluster]
                    if not number:
                        raise Damage(f"cluster {cluster} is in use and has refcount 0")
                    numbers[cluster] = number + 1
        except ValueError:
            raise Full from None
        except IndexError:
            raise Damage(NO_REFCOUNT) from None

    def drop(self, clusters: "Iterable[int]", freed: list[int]) -> None:
        """Decrement the refcounts of clusters.  Those that become free are appended to `freed`.  Raises Damage."""
        numbers = self.numbers
        try:
            for cluster in clusters:
                if cluster:
                    number = numbers[cluster] - 1
                    if number < 0:
                        raise Damage(f"cluster {cluster} is in use and has refcount 0")
                    numbers[cluster] = number
                    if not number:
                        freed.append(cluster)
        except IndexError:
            raise Damage(NO_REFCOUNT) from None

    def block(self, first: int, count: int) -> bytearray:
        """Return a refcount block in the format of the file.  Raises Full."""
        part = self.numbers[first : first + count]
        if self.order >= 3:
            return big_endian(part)
        per_byte = 8 >> self.order
        wide = bytes(part)
        if max(wide) > self.most:
            raise Full
        packed = 0
        for place in range(per_byte):
            packed |= int.from_bytes(wide[place::per_byte], "little") << (place << self.order)
        return bytearray(packed.to_bytes(len(wide) // per_byte, "little"))


class Rewrite:
    """One change of an image.  Nobody else may read or write the image meanwhile.

    One of `create`, `delete` and `go_back` prepares the change, `commit` makes it.  `abandon` instead of `commit`
    leaves the image unchanged.  Every method raises ImageError if something is wrong with the image, or OSError.
    """

    def __init__(self, image: Qcow2Image) -> None:
        self.image = image
        self.header = header = image.header
        if not image.writable:
            raise ImageError(image.path, "opened for reading only")
        if header.dirty:
            raise ImageError(image.path, f"is dirty: its refcounts cannot be trusted; {REPAIR}")
        image.settle()
        self.snapshots = read_snapshots(image.fd, header, image.path)
        self._table_bytes = sum(len(one.raw) for one in self.snapshots)
        self.cluster_size, self.bits = image.cluster_size, image.cluster_bits
        self.entries = self.cluster_size // 8
        every = int.from_bytes((1).to_bytes(8, "big") * self.entries, "big")
        # Bits of an L2 entry, repeated for all entries of a table:
        self._offsets = OFFSET_MASK * every
        self._special = (COMPRESSED | OFFSET_MASK & image.cluster_mask) * every
        self._not_copied = (~COPIED & (1 << 64) - 1) * every
        self.counts = self._read_counts()
        self.allocated: list[tuple[int, int]] = []  # runs of clusters that this change has allocated
        self.freed: list[int] = []
        self.state: list[int] = []  # clusters with the state of the machine
        self.state_bytes = 0
        self.announced = False
        self._hint = 0
        self.l1, self.l1_offset = image.l1, header.l1_offset
        self.size = header.size
        self._pending: list[tuple[int, bytes | bytearray]] = []  # unwritten tables: (first cluster, bytes)

    def _read_counts(self) -> Counts:
        """Read all refcount blocks.  Raises ImageError, OSError."""
        table = self.image.refcounts.table
        used = max((number for number, entry in enumerate(table) if entry & TABLE_OFFSET_MASK), default=-1) + 1
        size = used * self.cluster_size << max(0, 3 - self.header.refcount_order)
        if size > MAX_COUNTS_BYTES:
            what = f"its {size} bytes of refcounts are more than {MAX_COUNTS_BYTES}"
            raise ImageError(self.image.path, f"cannot have snapshots: {what}")
        raw = bytearray()
        for entry in table[:used]:
            offset = entry & TABLE_OFFSET_MASK
            raw += self._read(offset, "refcount block") if offset else bytes(self.cluster_size)
        return Counts(raw, self.header.refcount_order)

    def _read(self, offset: int, what: str, length: int = 0) -> bytes:
        """Return `length` bytes of the file, or one cluster.  `what` is for the error.  Raises OSError."""
        raw = read_bytes(self.image.fd, length or self.cluster_size, offset)
        if len(raw) != (length or self.cluster_size):
            raise OSError(errno.EIO, f"file ends before the {what} at {offset}")
        return raw

    # --- clusters

    def _take(self, count: int, start: int = 0) -> int:
        """Allocate consecutive clusters from `start` on, and return the first.  Raises OSError, Damage."""
        image, counts = self.image, self.counts
        first = counts.find(count, self._hint if count == 1 else start)
        if count == 1:
            self._hint = first + 1
        image.refcounts.require(first + count)
        if first + count > len(counts):
            per_block = image.refcounts.per_block
            blocks = len(counts) // per_block
            more = max(-(-(first + count) // per_block) - blocks, 1 + blocks // 8)
            counts.extend(more * per_block)
        for cluster in range(first, first + count):
            if cluster in image.refcounts.metadata:
                raise Damage(f"cluster {cluster} is in use and has refcount 0")
        counts.take(first, count)
        image.refcounts.extend(first + count)
        if self.allocated and sum(self.allocated[-1]) == first:
            self.allocated[-1] = (self.allocated[-1][0], self.allocated[-1][1] + count)
        else:
            self.allocated.append((first, count))
        return first

    def _put(self, raw: "bytes | bytearray") -> int:
        """Allocate clusters for a table that is written later; return its offset.  Raises OSError, Damage."""
        raw += bytes(-len(raw) % self.cluster_size)
        first = self._take(len(raw) >> self.bits)
        self._pending.append((first, raw))
        if len(self._pending) << self.bits >= LARGEST_WRITE:
            self._write_pending()
        return first << self.bits

    def _write_pending(self) -> None:
        """Write the pending tables; adjacent ones with one call.  Raises OSError."""
        pending, self._pending = sorted(self._pending, key=lambda one: one[0]), []
        while pending:
            first, raw = pending.pop(0)
            views, end = [memoryview(raw)], first + (len(raw) >> self.bits)
            while pending and pending[0][0] == end:
                views.append(memoryview(pending[0][1]))
                end += len(pending.pop(0)[1]) >> self.bits
            write_views(self.image.fd, views, first << self.bits, (end - first) << self.bits)

    # --- L2 tables

    def _clusters(self, raw: bytes) -> "Iterable[int]":
        """Return the clusters of the entries of an L2 table; 0 for an entry that has none."""
        number = int.from_bytes(raw, "big")
        if not number & self._special:
            return native(((number & self._offsets) >> self.bits).to_bytes(len(raw), "big"))
        return self._any_clusters(native(raw))

    def _any_clusters(self, table: memoryview) -> "Iterator[int]":
        """Yield the same for any L2 table.  A compressed cluster yields all clusters of the file that it is in."""
        image = self.image
        for entry in table:
            if entry & COMPRESSED:
                offset, length = image.packed_place(entry)
                last = min(offset + length - 1 >> self.bits, image.refcounts.end - 1)
                yield from range(offset >> self.bits, last + 1)
            elif entry & OFFSET_MASK & image.cluster_mask:
                raise Damage(f"an L2 entry leads to {entry & OFFSET_MASK}, not the start of a cluster")
            else:
                yield (entry & OFFSET_MASK) >> self.bits

    def _l2(self, entry: int) -> bytes:
        """Return the L2 table of an L1 entry.  Raises Damage, OSError."""
        offset = entry & OFFSET_MASK
        if offset & self.image.cluster_mask or offset < self.cluster_size:
            raise Damage(f"an L1 entry leads to {offset}, which is not a cluster for a table")
        return self._read(offset, "L2 table")

    def _drop_l1(self, l1: "Sequence[int] | memoryview") -> None:
        """Drop a reference of each L2 table of an L1 table, and of all their clusters."""
        for entry in l1:
            if entry & OFFSET_MASK:
                self.counts.drop(self._clusters(self._l2(entry)), self.freed)
                self.counts.drop([(entry & OFFSET_MASK) >> self.bits], self.freed)

    def _drop_run(self, offset: int, length: int) -> None:
        """Drop a reference of each cluster of a table."""
        if length:
            self.counts.drop(range(offset >> self.bits, (offset + length - 1 >> self.bits) + 1), self.freed)

    def _shared(self, l1: "Sequence[int] | memoryview") -> list[int]:
        """Copy the L2 tables of an L1 table; their clusters get one more reference.  Return the new L1 entries."""
        new = []
        for entry in l1:
            if entry & OFFSET_MASK:
                raw = self._l2(entry)
                self.counts.add(self._clusters(raw))
                raw = (int.from_bytes(raw, "big") & self._not_copied).to_bytes(len(raw), "big")
                entry = self._put(raw) | COPIED
            new.append(entry)
        return new

    def _new_l1(self, entries: list[int], least: int) -> None:
        """Make a new L1 table for the disk."""
        l1 = zeroes(max(1, least, len(entries)))
        for index, entry in enumerate(entries):
            l1[index] = entry
        self.l1, self.l1_offset = l1, self._put(big_endian(l1))

    # --- preparing a change

    def add_state(self, views: "Sequence[memoryview]", length: int) -> None:
        """Write more of the state of the machine.  Only the last call may have a part of a cluster.

        Raises ImageError, OSError.
        """
        try:
            first = self._take(-(-length >> self.bits), self.state[-1] if self.state else 0)
        except Damage as damage:
            raise self._corrupt(damage) from None
        padding = -length % self.cluster_size
        data = [*views, memoryview(bytes(padding))] if padding else views
        write_views(self.image.fd, data, first << self.bits, length + padding)
        self.state += range(first, first + (length + padding >> self.bits))
        self.state_bytes += length

    def create(self, name: str, date_ns: int = 0, clock_ns: int = 0) -> None:
        """Prepare a new snapshot, with the state from `add_state`.  Raises ImageError, OSError."""
        path = self.image.path
        try:
            check_name(name)
        except ValueError as error:
            raise ImageError(path, str(error)) from None
        if any(one.name == name for one in self.snapshots):
            raise ImageError(path, f"has a snapshot {name} already")
        if not self.size:
            raise ImageError(path, "has no bytes")
        with self.image.allocating:
            try:
                self._create(name, date_ns, clock_ns)
                self._write_tables()
            except Damage as damage:
                raise self._corrupt(damage) from None
            except Full:
                raise self._full() from None

    def _create(self, name: str, date_ns: int, clock_ns: int) -> None:
        header, index = self.header, tables(self.size, self.header)
        old, old_offset = self.l1, self.l1_offset
        self._new_l1(self._shared(old[:index]), header.l1_entries)
        if self.state:
            own = [*old[:index], *self._state_tables()]
            if len(own) * 8 > MAX_TABLE_BYTES:
                raise ImageError(self.image.path, f"{self.state_bytes} bytes of state are too many for it")
            l1 = zeroes(len(own))
            for place, entry in enumerate(own):
                l1[place] = entry
            offset, entries = self._put(big_endian(l1)), len(own)
            self._drop_l1(old[index:])
            self._drop_run(old_offset, header.l1_entries * 8)
        else:
            offset, entries = old_offset, header.l1_entries
        self.snapshots.append(
            Snapshot(
                id=new_id(self.snapshots),
                name=name,
                l1_offset=offset,
                l1_entries=entries,
                size=self.size,
                date_s=date_ns // NS,
                date_ns=date_ns % NS,
                clock_ns=clock_ns,
                state_bytes=self.state_bytes,
            )
        )

    def _state_tables(self) -> "Iterator[int]":
        """Yield entries for new L2 tables that lead to the machine's state."""
        for start in range(0, len(self.state), self.entries):
            table = zeroes(self.entries)
            for index, cluster in enumerate(self.state[start : start + self.entries]):
                table[index] = cluster << self.bits | COPIED
            yield self._put(big_endian(table)) | COPIED

    def delete(self, tag: str) -> None:
        """Prepare to delete a snapshot.  Raises ImageError, OSError."""
        one = self._find(tag)
        with self.image.allocating:
            try:
                self._drop_l1(self._l1_of(one))
                self._drop_run(one.l1_offset, one.l1_entries * 8)
                self.snapshots.remove(one)
                try:
                    self._mark_copied()
                except IndexError:
                    raise Damage(NO_REFCOUNT) from None
                self._write_tables()
            except Damage as damage:
                raise self._corrupt(damage) from None

    def go_back(self, tag: str) -> None:
        """Prepare to take the disk back to a snapshot.  Raises ImageError, OSError."""
        one = self._find(tag)
        with self.image.allocating:
            try:
                # Increments come first, so that a cluster of both the disk and the snapshot never becomes free.
                new = self._shared(self._l1_of(one)[: tables(one.size, self.header)])
                self._drop_l1(self.l1)
                self._drop_run(self.l1_offset, len(self.l1) * 8)
                self._new_l1(new, 0)
                self.size = one.size
                self._write_tables()
            except Damage as damage:
                raise self._corrupt(damage) from None
            except Full:
                raise self._full() from None

    def _find(self, tag: str) -> Snapshot:
        one = find(self.snapshots, tag)
        if one is None:
            raise ImageError(self.image.path, f"has no snapshot {tag}")
        return one

    def _l1_of(self, one: Snapshot) -> memoryview:
        """Return the L1 table of a snapshot."""
        if not one.l1_entries:
            return zeroes(0)
        return native(self._read(one.l1_offset, "L1 table of a snapshot", one.l1_entries * 8))

    def _mark_copied(self) -> None:
        """Set the flag COPIED in the disk's tables anew: it marks clusters with refcount 1."""
        entries, numbers = list(self.l1), self.counts.numbers
        numbers[0] = 0  # cluster 0 stands for an entry without a cluster
        for place, entry in enumerate(entries):
            if not entry & OFFSET_MASK:
                continue
            raw = self._l2(entry)
            marks = bytearray(len(raw))
            marks[::8] = bytes([0x80 if numbers[cluster] == 1 else 0 for cluster in self._plain_clusters(raw)])
            number = int.from_bytes(raw, "big")
            marked = number & self._not_copied | int.from_bytes(marks, "big")
            if marked != number:
                self.counts.drop([(entry & OFFSET_MASK) >> self.bits], self.freed)
                entries[place] = self._put(marked.to_bytes(len(raw), "big")) | COPIED
            else:
                alone = numbers[(entry & OFFSET_MASK) >> self.bits] == 1
                entries[place] = entry & ~COPIED | (COPIED if alone else 0)
        numbers[0] = 1
        if entries != list(self.l1):
            self._drop_run(self.l1_offset, len(self.l1) * 8)
            self._new_l1(entries, 0)

    def _plain_clusters(self, raw: bytes) -> "Iterable[int]":
        """Return the cluster of each entry of an L2 table; 0 for an entry without one and for a compressed cluster."""
        number = int.from_bytes(raw, "big")
        if not number & self._special:
            return self._clusters(raw)
        return [0 if entry & COMPRESSED else (entry & OFFSET_MASK) >> self.bits for entry in native(raw)]

    # --- the change

    def _write_tables(self) -> None:
        """Write the snapshot table, then all refcounts, which count everything else.  Raises ImageError, OSError."""
        image, header, counts = self.image, self.header, self.counts
        try:
            packed = pack_snapshots(self.snapshots)
        except ValueError as error:
            raise ImageError(image.path, str(error)) from None
        self.snapshots_offset = self._put(packed) if packed else 0
        self._drop_run(header.snapshots_offset, self._table_bytes)
        refcounts = image.refcounts
        per_block = refcounts.per_block
        for entry in refcounts.table:
            self._drop_run(entry & TABLE_OFFSET_MASK, self.cluster_size if entry & TABLE_OFFSET_MASK else 0)
        self._drop_run(refcounts.table_offset, len(refcounts.table) * 8)
        # The refcount table is allocated first, with room for all blocks and some more.  The clusters of the blocks
        # themselves need few further blocks, because one block counts thousands of clusters.
        blocks = len(counts) // per_block
        wanted = max(len(refcounts.table), blocks + 2 + blocks // 4)
        clusters = -(-wanted // self.entries)
        if clusters * self.cluster_size > MAX_TABLE_BYTES:
            raise OSError(errno.ENOSPC, "the refcount table of the image has its maximum size")
        table = zeroes(clusters * self.entries)
        self.table_first, self.table_clusters = self._take(clusters), clusters
        while True:
            blocks = len(counts) // per_block
            missing = [
                number for number in range(blocks) if not table[number] and self._in_use(number * per_block, per_block)
            ]
            if not missing:
                break
            if blocks > len(table):
                raise OSError(errno.ENOSPC, "the refcount table of the image has its maximum size")
            for number in missing:
                table[number] = self._take(1) << self.bits
        for number in range(blocks):
            if table[number]:
                block = counts.block(number * per_block, per_block)
                self._pending.append((table[number] >> self.bits, block))
        self._pending.append((self.table_first, big_endian(table)))
        self._write_pending()
        image.stable.sync()

    def _in_use(self, first: int, count: int) -> bool:
        """Return whether any of `count` clusters is in use."""
        raw = self.counts.numbers[first : first + count].cast("B")
        return raw.tobytes().count(0) != len(raw)

    def _corrupt(self, damage: Damage) -> ImageError:
        return ImageError(self.image.path, f"image is corrupt: {damage}; {REPAIR}")

    def _full(self) -> ImageError:
        bits = 1 << self.header.refcount_order
        return ImageError(self.image.path, f"has refcounts of {bits} bits, too few for one more snapshot")

    def announce(self) -> None:
        """Mark the disk as one of several that are going back to a snapshot.  `commit` removes the mark.

        The disks must not be used before all of them have gone back.  An image of version 2 has no field for the mark.
        Raises OSError.
        """
        if self.header.version > 2:
            self.announced = True
            write_bytes(self.image.fd, GOING_BACK.to_bytes(8, "big"), AT_AUTOCLEAR)
            self.image.stable.sync()

    def commit(self) -> None:
        """Make the prepared change.  Raises OSError; then the image cannot be written any more."""
        image = self.image
        raw = CONTENT.pack(
            self.size, 0, len(self.l1), self.l1_offset, self.table_first << self.bits, self.table_clusters,
            len(self.snapshots), self.snapshots_offset,
        )  # fmt: skip
        with image.allocating:
            image.failed = "a change of its snapshots was not completed; open the image again"
            if self.header.version > 2:  # keep the feature bits; clear the autoclear bits with the mark
                raw += read_bytes(image.fd, AT_AUTOCLEAR - AT_INCOMPATIBLE, AT_INCOMPATIBLE) + bytes(8)
            write_bytes(image.fd, raw, AT_CONTENT)
            image.stable.sync()
            image.failed = ""
            image.reload()
            image.give_back(self.freed)

    def abandon(self) -> None:
        """Leave the image unchanged, and give back the storage of the clusters that were written.  Raises OSError."""
        self._pending = []
        with self.image.allocating:
            if self.announced:
                write_bytes(self.image.fd, bytes(8), AT_AUTOCLEAR)
                self.announced = False
            for first, count in self.allocated:
                self.image.punch(first, count)
        self.allocated = []
