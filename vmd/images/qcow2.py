"""qcow2 images, versions 2 and 3: reading, writing, and the order of writes that keeps them consistent after a crash.

Two levels of tables map a cluster of the guest's disk to a cluster of the file.  The L1 table is in memory, L2 tables
are cached in slices.  A request whose clusters are all allocated takes one lookup in a slice and one preadv or pwritev,
and no lock.  Code that allocates or frees clusters holds the lock `allocating`.

Crash consistency.  Changes of L2 entries, of the L1 table and of the refcount table stay in memory until `flush`, or
until there are too many.  A flush writes them in this order, with an fdatasync at each bar:

    refcounts of new clusters (their data has been written before) | refcount table | L2 entries | L1 entries |

Only after that are replaced and discarded clusters freed.  So the file is consistent at any moment.  A kill -9 or a
power cut can lose data that was not flushed, and can leak clusters (`qemu-img check -r leaks` frees them).  But no
table on disk ever refers to a free cluster.  Writes in place need no order, as on any disk.

No space left.  A write that cannot allocate fails alone: its clusters are freed, and the tables are unchanged.  Before
metadata is changed in memory, its unchanged bytes are written to their place in the file (`units.Prepared`), so a flush
needs no new space.  If a flush still fails, nothing is forgotten, and the next flush tries again.  Only a failed
fdatasync is final, because it loses data: no later flush succeeds.  The file may end inside its last cluster, as images
of QEMU do.  A block device does not grow; only its whole clusters are used.

Freed clusters are reused only after all requests that began before the freeing have ended.  Otherwise a write that is
still in flight could overwrite the data of the new owner.
"""

import _thread
import errno
import posix as os
import struct
import zlib
from io import SEEK_END

from vmd.errors import ImageError
from vmd.images.header import (
    ALL_ZERO,
    AT_AUTOCLEAR,
    AT_INCOMPATIBLE,
    AT_L1,
    AT_SIZE,
    COMPRESSED,
    CORRUPT,
    GOING_BACK,
    MAX_TABLE_BYTES,
    OFFSET_MASK,
    SNAPSHOT_BYTES,
    Header,
    parse_header,
)
from vmd.images.hostfile import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    ZEROES,
    Cursor,
    DataLost,
    FlushFailed,
    StableStorage,
    clear,
    data_span,
    fallocate,
    is_device,
    padding,
    read_bytes,
    read_views,
    require_larger,
    storage_granularity,
    total,
    write_bytes,
    write_views,
)
from vmd.images.refcounts import TABLE_OFFSET_MASK, Damage, Refcounts
from vmd.images.snapshots import ENTRY, LEAST_EXTRA, read_snapshots, state_offset
from vmd.images.units import Prepared, runs, unit_bytes
from vmd.images.words import big_endian, native, zeroes
from vmd.ipc.foreign import left_dirty, odd_length

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import TypeVar

    from vmd.images.image import Image
    from vmd.images.snapshots import Snapshot

    K = TypeVar("K")
    # Decompresses bytes to at most the given number of bytes.  The input may have garbage after the compressed data.
    # Raises ValueError.
    Unpack = Callable[[bytes, int], bytes]

COPIED = 1 << 63  # refcount 1: no snapshot shares this cluster
DEFLATE_BITS = -15  # raw deflate with any window; QEMU writes windows of 2^12

L1_PLACE = struct.Struct(">IQ")

SLICE_BYTES = 1 << 16  # the part of an L2 table that is read and cached at once
CACHE_BYTES = 8 << 20
MAX_SLICES = 4096
INFLATED_BYTES = 1 << 20
MAX_RETIRED = 4096  # runs that wait for a flush; with more we flush ourselves
MAX_WAITING = 1 << 16  # runs that wait for requests to end; further ones are leaked
SPAN_BYTES = 64 << 20
SPAN_FIRST_BYTES = 1 << 20  # looked up first: most runs of data are short
WALK_MAX_BYTES = 256 << 20  # of L2 tables read to find the end of use: those of 2 TiB in 64 KiB clusters
REPAIR = "repair it first with qemu-img check -r all"

DATA, HOLE, ZERO, PACKED = range(4)  # kinds of a run; in a hole the backing file is visible


def inflate(packed: bytes, most: int) -> bytes:
    """Decompress a cluster of zlib; see Unpack.  Raises ValueError."""
    try:
        return zlib.decompressobj(DEFLATE_BITS).decompress(packed, most)
    except zlib.error as error:
        raise ValueError(str(error)) from None


UNPACK: "Mapping[str, Unpack]" = {"zlib": inflate}  # by names of `header.COMPRESSIONS`


def at_snapshot(header: Header, one: "Snapshot") -> Header:
    """Return the header of an image that shows the disk as of a snapshot, followed by the state of the machine."""
    size = state_offset(one, header) + one.state_bytes if one.state_bytes else one.size
    return header.replace(size=size, l1_offset=one.l1_offset, l1_entries=one.l1_entries)


class Slice:
    """A part of an L2 table, in native byte order.  `units`: bit set of the units that are not written yet."""

    __slots__ = ("pinned", "table", "units", "used")

    def __init__(self, table: memoryview) -> None:
        self.table = table
        self.units = 0
        self.pinned = False  # a flush is writing it: keep it in the cache
        self.used = 0

    @property
    def dirty(self) -> bool:
        """Whether it has changes that are not written yet."""
        return self.units != 0


class Qcow2Image:
    """A qcow2 image and its backing image, which it owns; see Image."""

    def __init__(
        self,
        fd: int,
        path: str,
        *,
        writable: bool,
        backing: "Image | None" = None,
        discard_granularity: int = 0,
        snapshot: "Snapshot | None" = None,
        unpack: "Mapping[str, Unpack]" = UNPACK,
    ) -> None:
        """Open the image behind `fd`; `close` closes the descriptor.  `discard_granularity` is that of a block device.

        With `snapshot`, the image shows its disk as of that snapshot, followed by the state of the machine.  It must
        not be writable then.

        Raises:
            ImageError: the file is not a qcow2 image, is damaged, or needs a feature that we do not have.
        """
        self.fd = fd
        self.path = path
        self.writable = writable
        self.backing = backing
        header = parse_header(fd, path, unpack)
        self.unpack = unpack
        if snapshot is not None:
            assert not writable
            header = at_snapshot(header, snapshot)
        self.header = header
        if header.backing and backing is None:
            raise ImageError(path, f"needs its backing file {header.backing}")
        if backing is not None and not header.backing:
            raise ImageError(path, "names no backing file")
        self.size = header.size + padding(header.size)
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self.cluster_mask = self.cluster_size - 1
        self.discard_granularity = max(self.cluster_size, storage_granularity(os.fstat(fd), discard_granularity))
        slice_bytes = min(self.cluster_size, SLICE_BYTES)
        self.slice_entries = slice_bytes // 8
        self.slice_mask = self.slice_entries - 1
        self.slice_shift = self.cluster_bits + self.slice_entries.bit_length() - 1  # guest bytes of a slice
        self.table_shift = 2 * self.cluster_bits - 3  # guest bytes of an L2 table
        misplaced = OFFSET_MASK & self.cluster_mask
        # A plain cluster has none of the bits `special` in its L2 entry.  One that may be written in place has COPIED
        # and no other bit of `in_place`.
        self.special = COMPRESSED | ALL_ZERO | misplaced
        self.in_place = self.special | COPIED
        self.packed_shift = 62 - (self.cluster_bits - 8)

        self.slices: dict[int, Slice] = {}
        self.max_slices = min(MAX_SLICES, CACHE_BYTES // slice_bytes)
        self.absent = Slice(zeroes(slice_bytes // 8))  # the slice for tables that do not exist
        self.dirty: dict[int, Slice] = {}
        self.held: Slice | None = None  # is about to be changed: keep it in the cache
        self.clock = 0
        self.inflated: dict[int, bytes] = {}

        self.loading = _thread.allocate_lock()  # protects the caches of slices and of decompressed clusters
        self.allocating = _thread.allocate_lock()  # protects refcounts, tables and the attributes below
        self.committing = _thread.allocate_lock()  # one flush at a time; taken before `allocating`
        self.prepared = Prepared(fd, self.cluster_size)
        self.unit_entries = unit_bytes(self.cluster_size) // 8
        self.dirty_l1: set[int] = set()
        self.retired: list[tuple[int, int]] = []  # runs of clusters that the next flush moves to `deferred`
        # (generation, runs): to be freed when no request of this generation, or an older one, is in flight.
        self.deferred: list[tuple[int, list[tuple[int, int]]]] = []
        self.waiting = 0  # number of runs in `deferred`
        self.generation = 0
        self.in_flight: dict[int, int] = {}  # thread -> generation in which its request began
        self.untouched = True
        self.failed = ""  # why the image is corrupt; then it must not be written
        self.stable = StableStorage(fd, path)
        self.remark = odd_length(header.size)

        try:
            self.device = is_device(fd)
            self.l1 = native(self._read_table(header.l1_offset, header.l1_entries * 8))
            if writable:
                self.refcounts = self._open_refcounts()
        except OSError as error:
            raise ImageError(path, f"cannot be read: {error.strerror}") from error

    # -- opening

    def _read_table(self, offset: int, length: int) -> bytes:
        """Read a table of the file.  Raises ImageError if it is not complete; OSError."""
        raw = read_bytes(self.fd, length, offset)
        if len(raw) != length:
            raise ImageError(self.path, f"table at {offset} is cut short")
        return raw

    def _open_refcounts(self) -> Refcounts:
        """Read the refcount table for a writer.  Raises ImageError if the image must not be written; OSError."""
        header = self.header
        if header.incompatible & CORRUPT:
            raise ImageError(self.path, "is marked as corrupt; repair it with qemu-img check -r all")
        file_bytes = os.lseek(self.fd, 0, SEEK_END)
        table = native(self._read_table(header.refcount_offset, header.refcount_clusters * self.cluster_size))
        refcounts = Refcounts(self.fd, header, table, file_bytes, self.stable, self.prepared, device=self.device)
        refcounts.protect(0, self.cluster_size)
        refcounts.protect(header.l1_offset, header.l1_entries * 8)
        refcounts.protect(header.refcount_offset, len(table) * 8)
        refcounts.protect(header.snapshots_offset, header.snapshots * SNAPSHOT_BYTES)
        for name, entries, mask in (("refcount block", table, TABLE_OFFSET_MASK), ("L2 table", self.l1, OFFSET_MASK)):
            for entry in entries:
                offset = entry & mask
                if not offset:
                    continue
                if offset & self.cluster_mask or offset + self.cluster_size > file_bytes:
                    raise ImageError(self.path, f"{name} at {offset} is not a cluster of the file")
                if offset >> self.cluster_bits in refcounts.metadata:
                    raise ImageError(self.path, f"{name} at {offset} overlaps other metadata")
                refcounts.metadata.add(offset >> self.cluster_bits)
        if header.dirty:
            # The last writer kept refcounts in memory and did not write them, so no refcount can be trusted.  Clusters
            # before the end of use are neither allocated nor freed.  The dirty bit stays set until a repair.
            refcounts.floor = self._end_of_use(refcounts, file_bytes)
            if refcounts.floor > len(table) * refcounts.per_block:
                raise ImageError(self.path, f"is dirty, and clusters in use have no refcount; {REPAIR}")
            self.remark = left_dirty(self.path)
        return refcounts

    def _end_of_use(self, refcounts: Refcounts, file_bytes: int) -> int:
        """Return the first cluster of a dirty image after all clusters in use.  Raises ImageError, OSError."""
        tables = [entry & OFFSET_MASK for entry in self.l1 if entry & OFFSET_MASK]
        # Only the active tables are read here.  Snapshots have tables of their own, and an autoclear feature may use
        # clusters that we do not know of.
        if self.header.snapshots or self.header.autoclear or len(tables) * self.cluster_size > WALK_MAX_BYTES:
            if self.device:
                raise ImageError(self.path, f"is dirty, and the end of its use is not known; {REPAIR}")
            return refcounts.end
        used = max(refcounts.metadata)
        for offset in tables:
            raw = self._read_table(offset, self.cluster_size)
            if raw.count(0) == len(raw):
                continue
            for entry in native(raw):
                if entry & COMPRESSED:
                    place, length = self.packed_place(entry)
                    used = max(used, place + length - 1 >> self.cluster_bits)
                elif entry & OFFSET_MASK > used << self.cluster_bits:
                    used = (entry & OFFSET_MASK) >> self.cluster_bits
        if used << self.cluster_bits >= file_bytes:
            raise ImageError(self.path, f"is dirty, and leads to cluster {used}, behind its end; {REPAIR}")
        return used + 1

    # -- looking up

    def _load(self, number: int) -> Slice:
        """Return a slice; read it if it is not in the cache.  Raises OSError."""
        with self.loading:
            found = self.slices.get(number)
            if found is not None:
                return found
            start = number << self.slice_shift
            table = self.l1[start >> self.table_shift] & OFFSET_MASK
            if not table:
                return self.absent
            offset = table + (start >> self.cluster_bits << 3 & self.cluster_mask)
            if table & self.cluster_mask or table < self.cluster_size:
                raise self._damaged(f"L2 table at {table} is not at the start of a cluster after the header")
            raw = read_bytes(self.fd, self.slice_entries * 8, offset)
            if len(raw) != self.slice_entries * 8:
                raise self._damaged(f"L2 table at {table} is outside the file")
            return self._keep(number, Slice(native(raw)))

    def _keep(self, number: int, new: Slice) -> Slice:
        """Put a slice into the cache.  If the cache is full, evict the least recently used quarter of it."""
        if len(self.slices) >= self.max_slices:
            clean = [
                item
                for item in self.slices.items()
                if not (item[1].dirty or item[1].pinned or item[1] is self.held)
            ]
            clean.sort(key=lambda item: item[1].used)
            for old, _ in clean[: self.max_slices // 4]:
                del self.slices[old]
        self.clock += 1
        new.used = self.clock
        self.slices[number] = new
        return new

    def _damaged(self, what: str) -> OSError:
        """Return the error for a damaged image."""
        return OSError(errno.EIO, f"{self.path}: {what}")

    def _map(self, position: int, length: int) -> list[tuple[int, int, int]]:
        """Return a range of the disk as runs (kind, place, length).

        The place is an offset in the file for DATA, an offset on the disk for HOLE and ZERO, and the L2 entry for
        PACKED.  Raises OSError.
        """
        runs: list[tuple[int, int, int]] = []
        end = position + length
        last, place, size = -1, 0, 0
        while position < end:
            number = position >> self.slice_shift
            part = self.slices.get(number) or self._load(number)
            stop = (number + 1) << self.slice_shift
            if stop > end:
                stop = end
            if part is self.absent:
                if last != HOLE:
                    if size:
                        runs.append((last, place, size))
                    last, place, size = HOLE, position, 0
                size += stop - position
                position = stop
                continue
            part.used = self.clock
            table = part.table
            index = position >> self.cluster_bits & self.slice_mask
            while position < stop:
                entry = table[index]
                index += 1
                inside = position & self.cluster_mask
                step = self.cluster_size - inside
                if step > stop - position:
                    step = stop - position
                if not entry & self.special:
                    host = entry & OFFSET_MASK
                    if host:
                        if last == DATA and place + size == host + inside:
                            size += step
                            position += step
                            continue
                        kind, here = DATA, host + inside
                    else:
                        kind, here = HOLE, position
                else:
                    kind, here = self._special_entry(entry, position)
                if kind == last and kind in (HOLE, ZERO):
                    size += step
                else:
                    if size:
                        runs.append((last, place, size))
                    last, place, size = kind, here, step
                position += step
        if size:
            runs.append((last, place, size))
        return runs

    def _special_entry(self, entry: int, position: int) -> tuple[int, int]:
        """Return kind and place of an L2 entry that is not a plain cluster.  Raises OSError."""
        if entry & COMPRESSED:
            return PACKED, entry
        if entry & OFFSET_MASK & self.cluster_mask:
            raise self._damaged(f"L2 entry for {position} leads to {entry & OFFSET_MASK}, not the start of a cluster")
        if self.header.version < 3:
            raise self._damaged(f"L2 entry for {position} needs a newer version of qcow2")
        return ZERO, position

    # -- reading

    def _check(self, offset: int, length: int) -> None:
        """Raise OSError unless a range is inside the disk."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OSError(errno.EINVAL, f"{self.path}: {length} bytes at {offset} are outside the disk")

    def preadv(self, offset: int, views: "Sequence[memoryview]") -> None:
        """See Image."""
        length = total(views)
        if offset < 0 or offset + length > self.size:
            self._check(offset, length)
        if not self.writable:
            self._read(offset, views, length)
            return
        thread = _thread.get_ident()
        # Set before the lookup: the clusters that it finds are not reused until this entry is removed.
        self.in_flight[thread] = self.generation
        try:
            self._read(offset, views, length)
        finally:
            del self.in_flight[thread]

    def _read(self, offset: int, views: "Sequence[memoryview]", length: int) -> None:
        """Fill views with a range of the disk.  Raises OSError."""
        runs = self._map(offset, length)
        if len(runs) == 1:
            self._read_run(runs[0], offset, views)
            return
        cursor = Cursor(views)
        for run in runs:
            self._read_run(run, offset, cursor.take(run[2]))
            offset += run[2]

    def _read_run(self, run: tuple[int, int, int], position: int, views: "Sequence[memoryview]") -> None:
        """Fill views from one run.  Raises OSError."""
        kind, place, length = run
        if kind == DATA:
            got = read_views(self.fd, views, place, length)
            if got != length:
                self._past_end(place, length, got, views)
        elif kind == PACKED:
            start = position & self.cluster_mask
            plain = memoryview(self._inflate(place))[start : start + length]
            for view in views:
                view[:] = plain[: len(view)]
                plain = plain[len(view) :]
        elif kind == HOLE and self.backing is not None:
            self._read_backing(position, length, views)
        else:
            clear(views)

    def _past_end(self, place: int, length: int, got: int, views: "Sequence[memoryview]") -> None:
        """Clear the bytes after the end of the file.  Raises OSError unless the file ends inside this last cluster."""
        if place + got <= place + length - 1 & ~self.cluster_mask:
            raise self._ends_before_data()
        cursor = Cursor(views)
        cursor.take(got)
        clear(cursor.take(length - got))

    def _read_backing(self, position: int, length: int, views: "Sequence[memoryview]") -> None:
        """Fill views from the backing image, with zeroes after its end.  Raises OSError."""
        assert self.backing is not None
        inside = min(length, max(0, self.backing.size - position))
        if inside == length:
            self.backing.preadv(position, views)
            return
        cursor = Cursor(views)
        if inside:
            self.backing.preadv(position, cursor.take(inside))
        clear(cursor.take(length - inside))

    def packed_place(self, entry: int) -> tuple[int, int]:
        """Return offset and length of the bytes of a compressed cluster.  There may be padding at their end."""
        offset = entry & ((1 << self.packed_shift) - 1)
        sectors = (entry & (COMPRESSED - 1)) >> self.packed_shift
        return offset, (sectors + 1) * 512 - (offset & 511)

    def _inflate(self, entry: int) -> bytes:
        """Return the decompressed bytes of a cluster: exactly cluster_size.  Raises OSError."""
        with self.loading:
            plain = self.inflated.get(entry)
        if plain is not None:
            return plain
        offset, length = self.packed_place(entry)
        try:
            plain = self.unpack[self.header.compression](read_bytes(self.fd, length, offset), self.cluster_size)
        except ValueError as error:
            raise self._damaged(f"compressed cluster at {offset} cannot be read: {error}") from None
        if len(plain) != self.cluster_size:
            raise self._damaged(f"compressed cluster at {offset} has only {len(plain)} bytes")
        with self.loading:
            while self.inflated and (len(self.inflated) + 1) * self.cluster_size > INFLATED_BYTES:
                del self.inflated[next(iter(self.inflated))]
            self.inflated[entry] = plain
        return plain

    def _reads_as_zeroes(self, position: int, length: int) -> bool:
        """Return whether a range is zero according to the tables; data is not read.  Raises OSError."""
        below = self.backing.size if self.backing is not None else 0
        return all(
            kind == ZERO or (kind == HOLE and place >= below) for kind, place, _ in self._map(position, length)
        )

    def span(self, offset: int) -> tuple[bool, int]:
        """See Image."""
        rest = self.size - offset
        runs = self._map(offset, min(SPAN_FIRST_BYTES, rest))
        if len(runs) == 1 and runs[0][0] != PACKED:
            runs = self._map(offset, min(SPAN_BYTES, rest))
        kind, place, length = runs[0]
        if kind == HOLE and self.backing is not None and place < self.backing.size:
            has_data, below = self.backing.span(place)
            return has_data, min(below, length)
        if kind == DATA:
            return data_span(self.fd, place, place + length)
        if kind == PACKED:
            for kind, _, more in runs[1:]:
                if kind != PACKED:
                    break
                length += more
            return True, length
        return False, length

    # -- writing

    def _check_write(self, offset: int, length: int) -> None:
        """Raise OSError unless a range may be written."""
        self._check(offset, length)
        if not self.writable:
            raise OSError(errno.EROFS, f"{self.path}: opened for reading only")
        if self.failed or self.stable.lost:
            self._refuse()
        if self.untouched:
            self._touch()

    def _refuse(self) -> None:
        """Raise OSError if the image must not be written any more."""
        if self.failed:
            raise DataLost(errno.EIO, f"{self.path}: {self.failed}")
        self.stable.check()

    def _touch(self) -> None:
        """Clear the autoclear feature bits, except GOING_BACK, before the first write.  Raises OSError."""
        with self.allocating:
            if self.untouched and self.header.version > 2 and self.header.autoclear:
                write_bytes(self.fd, (self.header.autoclear & GOING_BACK).to_bytes(8, "big"), AT_AUTOCLEAR)
                self.stable.sync()
            self.untouched = False

    def pwritev(self, offset: int, views: "Sequence[memoryview]") -> None:
        """See Image."""
        length = total(views)
        self._check_write(offset, length)
        thread = _thread.get_ident()
        self.in_flight[thread] = self.generation
        try:
            runs = self._map_in_place(offset, length)
            if runs is None:
                self._bound_memory()
                with self.allocating:
                    self._write_allocating(offset, views, length)
            elif len(runs) == 1:
                write_views(self.fd, views, runs[0][0], length)
            else:
                cursor = Cursor(views)
                for place, size in runs:
                    write_views(self.fd, cursor.take(size), place, size)
        except Damage as damage:
            raise self._give_up(damage) from None
        finally:
            del self.in_flight[thread]

    def _bound_memory(self) -> None:
        """Flush if there are many unwritten changes in memory.  Raises FlushFailed."""
        if len(self.dirty) > self.max_slices // 2 or len(self.retired) > MAX_RETIRED:
            self.flush()

    def _is_in_place(self, entry: int) -> bool:
        """Return whether an L2 entry has a cluster that is not shared.  Raises OSError; Damage if it is metadata."""
        if entry & self.in_place != COPIED:
            return False
        cluster = (entry & OFFSET_MASK) >> self.cluster_bits
        if not cluster:
            return False
        if cluster in self.refcounts.metadata:
            raise Damage(f"an L2 entry leads to {entry & OFFSET_MASK}, which is metadata")
        if cluster >= self.refcounts.end:
            self._check_end(cluster)
        return True

    def _check_end(self, cluster: int) -> None:
        """Look up the end of the file again.  Raises OSError or Damage unless the cluster is before it now."""
        file_bytes = os.lseek(self.fd, 0, SEEK_END)
        self.refcounts.extend(-(-file_bytes >> self.cluster_bits))
        if cluster < self.refcounts.end:
            return
        if not self.refcounts.get(cluster):
            raise Damage(f"an L2 entry leads to {cluster << self.cluster_bits}, which has refcount 0")
        raise self._ends_before_data()

    def _ends_before_data(self) -> OSError:
        """Return the error for a file that was cut short."""
        end = os.lseek(self.fd, 0, SEEK_END)
        return self._damaged(f"file ends at {end}, before a cluster that is in use")

    def _map_in_place(self, position: int, length: int) -> list[tuple[int, int]] | None:
        """Return the runs (place, length) of the file for a range of the disk; None if clusters must be allocated."""
        runs: list[tuple[int, int]] = []
        end = position + length
        place = size = 0
        metadata, file_end = self.refcounts.metadata, self.refcounts.end
        in_place, bits = self.in_place, self.cluster_bits
        while position < end:
            number = position >> self.slice_shift
            part = self.slices.get(number) or self._load(number)
            part.used = self.clock
            table = part.table
            stop = min(end, (number + 1) << self.slice_shift)
            index = position >> bits & self.slice_mask
            while position < stop:
                entry = table[index]
                index += 1
                # The checks of _is_in_place, inlined: every write of a guest comes here.
                if entry & in_place != COPIED:
                    return None
                host = entry & OFFSET_MASK
                if not host:
                    return None
                if host >> bits in metadata or host >> bits >= file_end:
                    return None  # _is_in_place then raises the error
                inside = position & self.cluster_mask
                step = self.cluster_size - inside
                if step > stop - position:
                    step = stop - position
                if size and place + size == host + inside:
                    size += step
                else:
                    if size:
                        runs.append((place, size))
                    place, size = host + inside, step
                position += step
        if size:
            runs.append((place, size))
        return runs

    def _give_up(self, damage: Damage) -> OSError:
        """Forbid all further writes to a corrupt image, which could destroy more.  Return the error for the caller."""
        with self.allocating:
            if not self.failed:
                self.failed = f"image is corrupt: {damage}; repair it with qemu-img check -r all"
                mark = (self.header.incompatible | CORRUPT).to_bytes(8, "big")
                try:
                    if self.header.version > 2:
                        write_bytes(self.fd, mark, AT_INCOMPATIBLE)
                except OSError:
                    pass  # the caller reports the damage itself, which matters more than the mark
        return OSError(errno.EIO, f"{self.path}: {self.failed}")

    def _allocate(self, want: int) -> tuple[int, int]:
        """Allocate up to `want` clusters in a row; return the first and their number.  Raises OSError, Damage."""
        if self.deferred:
            self._release()
        return self.refcounts.allocate(want)

    def _own_table(self, position: int, end: int) -> Slice:
        """Return the slice for a range of the disk, in an L2 table that no snapshot shares.  Raises OSError, Damage.

        A shared table is copied first.  The entries of the range may be changed afterwards.
        """
        number = position >> self.slice_shift
        l1_index = position >> self.table_shift
        entry = self.l1[l1_index]
        if entry & COPIED and entry & OFFSET_MASK:
            first = self._entry_place(position)
            self.prepared.prepare(first, (end - 1 >> self.cluster_bits) - (position >> self.cluster_bits) + 1 << 3)
            return self._hold(number)
        old = entry & OFFSET_MASK
        if old:
            raw = read_bytes(self.fd, self.cluster_size, old)
            if len(raw) != self.cluster_size:  # the file has been cut short since it was opened
                raise self._damaged(f"file now ends before the L2 table at {old}")
        else:
            raw = bytes(self.cluster_size)
        self.prepared.prepare(self.header.l1_offset + l1_index * 8, 8)
        cluster, _ = self._allocate(1)
        self.refcounts.extend(cluster + 1)
        offset = cluster << self.cluster_bits
        try:
            self.prepared.write(raw, offset)
        except OSError:
            self.refcounts.free(cluster, 1)
            raise
        self.refcounts.metadata.add(cluster)
        with self.loading:
            self.l1[l1_index] = offset | COPIED
        self.dirty_l1.add(l1_index)
        if old:
            self._retire(old >> self.cluster_bits, 1)
        return self._hold(number)

    def _hold(self, number: int) -> Slice:
        """Return a slice, and keep it in the cache until another one is held.  Raises OSError."""
        while True:
            part = self.slices.get(number) or self._load(number)
            with self.loading:
                if self.slices.get(number) is part:
                    self.held = part
                    return part

    def _entry_place(self, position: int) -> int:
        """Return the offset in the file of the L2 entry for a position of the disk."""
        table = self.l1[position >> self.table_shift] & OFFSET_MASK
        return table + (position >> self.cluster_bits << 3 & self.cluster_mask)

    def _set(self, number: int, part: Slice, index: int, entry: int) -> None:
        """Change an entry of a slice.  Retire the old cluster, unless the new entry has the same one."""
        old = part.table[index]
        part.table[index] = entry
        part.units |= 1 << index // self.unit_entries
        self.dirty[number] = part
        if old & COMPRESSED:
            offset, length = self.packed_place(old)
            first = offset >> self.cluster_bits
            # The padding may reach beyond the end of the file, where clusters have no refcount.
            last = min(offset + length - 1 >> self.cluster_bits, self.refcounts.end - 1)
            self._retire(first, last + 1 - first)
        elif old & OFFSET_MASK and (old ^ entry) & OFFSET_MASK:
            self._retire((old & OFFSET_MASK) >> self.cluster_bits, 1)

    def _retire(self, first: int, count: int) -> None:
        """Schedule clusters to lose a reference, once no table on disk refers to them any more."""
        if first < self.refcounts.floor or self.waiting > MAX_WAITING:
            return  # leaked: the refcount cannot be trusted, or a hanging request keeps too many runs waiting
        if self.retired and sum(self.retired[-1]) == first:
            self.retired[-1] = (self.retired[-1][0], self.retired[-1][1] + count)
        else:
            self.retired.append((first, count))

    def _write_allocating(self, position: int, views: "Sequence[memoryview]", length: int) -> None:
        """Write a range in which some clusters are missing, shared, zero or compressed.  Raises OSError, Damage."""
        self._refuse()
        cursor = Cursor(views)
        end = position + length
        while position < end:
            number = position >> self.slice_shift
            stop = min(end, (number + 1) << self.slice_shift)
            part = self._own_table(position, stop)
            table = part.table
            index = position >> self.cluster_bits & self.slice_mask
            count = (stop - 1 >> self.cluster_bits) - (position >> self.cluster_bits) + 1
            entry = table[index]
            if self._is_in_place(entry):  # another request has allocated it meanwhile
                step = min(stop, (position | self.cluster_mask) + 1) - position
                write_views(self.fd, cursor.take(step), (entry & OFFSET_MASK) + (position & self.cluster_mask), step)
                position += step
                continue
            reserved = self._reserved(table, index, count)
            if reserved:
                first, count, fresh = (entry & OFFSET_MASK) >> self.cluster_bits, reserved, False
            else:
                want = 1
                while want < count and not self._is_in_place(table[index + want]):
                    want += 1
                first, count = self._allocate(want)
                fresh = first >= self.refcounts.end and not self.device
                self.refcounts.extend(first + count)
            step = min(stop, ((position >> self.cluster_bits) + count) << self.cluster_bits) - position
            try:
                self._write_clusters(position, cursor.take(step), step, first, fresh)
            except BaseException:
                if not reserved:
                    self.refcounts.free(first, count)
                raise
            for cluster in range(first, first + count):
                self._set(number, part, index, cluster << self.cluster_bits | COPIED)
                index += 1
            position += step

    def _reserved(self, table: memoryview, index: int, count: int) -> int:
        """Return how many entries from `index` on read as zeroes but have clusters, which are consecutive."""
        reserved = 0
        first = table[index]
        while reserved < count:
            entry = table[index + reserved]
            if not entry & ALL_ZERO or not self._is_in_place(entry ^ ALL_ZERO):
                break
            if entry != first + (reserved << self.cluster_bits):
                break
            reserved += 1
        return reserved

    def _write_clusters(self, position: int, data: list[memoryview], length: int, first: int, fresh: bool) -> None:
        """Write data to clusters from `first` on.  Fill the rest of the first and last one with the old content.

        `fresh`: the clusters were never part of a regular file, so they are zero already.
        """
        head = position & self.cluster_mask
        tail = -(position + length) & self.cluster_mask
        place = (first << self.cluster_bits) + head
        before = self._old_content(position - head, head, fresh) if head else None
        behind = self._old_content(position + length, tail, fresh) if tail else None
        if before is not None:
            data = [before, *data]
            place -= head
            length += head
        if behind is not None:
            data = [*data, behind]
            length += tail
        write_views(self.fd, data, place, length)

    def _old_content(self, position: int, length: int, fresh: bool) -> memoryview | None:
        """Return the old content of a range of the disk; None if the new cluster has the same content already."""
        inside = max(0, min(length, self.size - position))
        if fresh and self._reads_as_zeroes(position, inside):
            return None
        buffer = memoryview(bytearray(length))
        if inside:
            self._read(position, [buffer[:inside]], inside)
        return buffer

    # -- flushing and freeing

    def flush(self) -> None:
        """See Image.  The docstring of this module has the order of writes."""
        if not self.writable:
            return
        try:
            with self.committing:
                self._commit()
                if self.deferred:
                    with self.allocating:
                        self._release()
        except Damage as damage:
            raise DataLost(errno.EIO, self._give_up(damage).strerror) from None
        except FlushFailed:
            raise
        except OSError as error:
            raise FlushFailed(error.errno, error.strerror) from error

    def _commit(self) -> None:
        """Write all changes to the disk.  Raises OSError; then the changes stay in memory for the next attempt."""
        with self.allocating:
            self._refuse()
            self.refcounts.write_blocks()
            entries = set(self.refcounts.unpublished)
            changed, self.dirty = self.dirty, {}
            slices: dict[tuple[int, int], tuple[int, bytearray]] = {}  # number and units -> place and bytes
            for number, part in changed.items():
                place = self._entry_place(number << self.slice_shift)
                for first, stop in runs(part.units):
                    low, high = first * self.unit_entries, stop * self.unit_entries
                    slices[number, (1 << stop) - (1 << first)] = place + low * 8, big_endian(part.table[low:high])
                part.pinned = True
                part.units = 0
            l1 = {index: self.l1[index] for index in sorted(self.dirty_l1)}
            self.dirty_l1 = set()
            retired, self.retired = self.retired, []
            stamp = self.generation
            self.generation += 1
        pointers = {
            index: (self.header.l1_offset + index * 8, bytearray(entry.to_bytes(8, "big")))
            for index, entry in l1.items()
        }
        try:
            self.stable.sync()
            if entries:
                with self.allocating:
                    self.refcounts.publish(entries)
                self.stable.sync()
            failure = self._write_each(slices)
            if pointers:
                if changed:
                    self.stable.sync()
                failure = self._write_each(pointers) or failure
            if changed or l1:
                self.stable.sync()
            if failure is not None:
                raise failure
        except BaseException:
            with self.allocating:
                for number, units in slices:
                    changed[number].units |= units
                    self.dirty[number] = changed[number]
                self.dirty_l1 |= set(pointers)
                self.retired = retired + self.retired
            raise
        finally:
            for part in changed.values():
                part.pinned = False
        if retired:
            with self.allocating:
                self.deferred.append((stamp, retired))
                self.waiting += len(retired)

    def _write_each(self, pieces: "dict[K, tuple[int, bytearray]]") -> OSError | None:
        """Write pieces of metadata, (place, bytes) each, even if one fails.  Those that fail stay in `pieces`."""
        failure: OSError | None = None
        for key, (place, raw) in list(pieces.items()):
            try:
                write_bytes(self.fd, raw, place)
                del pieces[key]
            except OSError as error:
                failure = error
        return failure

    def _release(self) -> None:
        """Free deferred clusters that no request in flight can still use.  Raises OSError, Damage."""
        oldest = min(list(self.in_flight.values()), default=self.generation)
        while self.deferred and self.deferred[0][0] < oldest:
            _, runs = self.deferred.pop(0)
            self.waiting -= len(runs)
            for first, count in runs:
                for free, length in self.refcounts.free(first, count):
                    self.punch(free, length)

    def punch(self, first: int, count: int) -> None:
        """Give the storage of free clusters back to the file system, if it supports that."""
        try:
            mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
            fallocate(self.fd, mode, first << self.cluster_bits, count << self.cluster_bits)
        except OSError:
            return  # in the image they are free anyway

    # -- for `rewrite`, which replaces all tables

    def settle(self) -> None:
        """See Image."""
        if not self.writable:
            return
        self._check_write(0, 0)
        self.flush()
        self.finish()
        if self.deferred or self.retired or self.in_flight:
            raise OSError(errno.EBUSY, f"{self.path}: requests are under way")

    def reload(self) -> None:
        """See Image.  There must be no changes in memory."""
        before, self.failed = self.failed, "the image has changed and could not be read again; open it again"
        header = parse_header(self.fd, self.path, self.unpack)
        l1 = native(self._read_table(header.l1_offset, header.l1_entries * 8))
        with self.loading:
            self.header, self.l1 = header, l1
            self.size = header.size + padding(header.size)
            self.slices.clear()
            self.inflated.clear()
        self.held = None
        self.prepared = Prepared(self.fd, self.cluster_size)
        if self.writable:
            self.refcounts = self._open_refcounts()
        self.failed = before

    def give_back(self, clusters: "Sequence[int]") -> None:
        """Give the storage of free clusters back to the file system."""
        first = count = 0
        for cluster in sorted(clusters):
            if count and cluster == first + count:
                count += 1
                continue
            if count:
                self.punch(first, count)
            first, count = cluster, 1
        if count:
            self.punch(first, count)

    # -- discarding

    def _whole_clusters(self, offset: int, length: int) -> tuple[int, int]:
        """Return start and end of the whole clusters in a range.  The last cluster of the disk counts as whole."""
        start = -(-offset >> self.cluster_bits) << self.cluster_bits
        end = offset + length
        if end < self.size:
            end &= ~self.cluster_mask
        return start, max(start, end)

    def discard(self, offset: int, length: int) -> None:
        """See Image.  Only whole clusters are discarded.

        A cluster whose parts are discarded one after the other stays allocated, because these parts are not recorded.
        `discard_granularity` tells the guest to discard whole clusters.
        """
        self._check_write(offset, length)
        start, end = self._whole_clusters(offset, length)
        if self.backing is not None and self.header.version < 3:
            return  # the content of the backing file would become visible
        self._each_slice(start, end, self._discarded)

    def _discarded(self, entry: int, position: int) -> int:
        """Return the L2 entry for a discarded cluster."""
        if entry in (0, ALL_ZERO):
            return entry
        return ALL_ZERO if self.backing is not None else 0

    def _zeroed(self, entry: int, position: int) -> int:
        """Return the L2 entry for a cluster that is zeroed and freed."""
        if entry == 0 and (self.backing is None or position >= self.backing.size):
            return 0
        return ALL_ZERO if self.header.version > 2 else 0

    def _zeroed_in_place(self, entry: int, position: int) -> int:
        """Return the L2 entry for a cluster that is zeroed and kept allocated."""
        if entry & (self.special & ~ALL_ZERO | COPIED) == COPIED and entry & OFFSET_MASK:
            return entry | ALL_ZERO
        return self._zeroed(entry, position)

    def _each_slice(self, start: int, end: int, change: "Callable[[int, int], int]") -> None:
        """Apply a change to every L2 entry from `start` to `end`.  Raises OSError."""
        while start < end:
            stop = min(end, ((start >> self.slice_shift) + 1) << self.slice_shift)
            self._bound_memory()
            try:
                with self.allocating:
                    self._change_entries(start, stop, change)
            except Damage as damage:
                raise self._give_up(damage) from None
            start = stop

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """See Image."""
        self._check_write(offset, length)
        start, end = self._whole_clusters(offset, length)
        stop = offset + length
        if end <= start or (self.header.version < 3 and (self.backing is not None or not unmap)):
            self._write_zero_bytes(offset, stop)
            return
        self._write_zero_bytes(offset, start)
        self._each_slice(start, end, self._zeroed if unmap else self._zeroed_in_place)
        self._write_zero_bytes(end, stop)

    def _write_zero_bytes(self, position: int, end: int) -> None:
        """Write zeroes as data, except where the disk reads as zeroes already.  Raises OSError."""
        while position < end:
            step = min(end, ((position >> 20) + 1) << 20) - position
            if not self._reads_as_zeroes(position, step):
                full, rest = divmod(step, len(ZEROES))
                self.pwritev(position, [ZEROES] * full + [ZEROES[:rest]])
            position += step

    def _change_entries(self, start: int, end: int, change: "Callable[[int, int], int]") -> None:
        """Apply a change to the L2 entries of one slice, from `start` to `end`.  Raises OSError, Damage."""
        self._refuse()
        number = start >> self.slice_shift
        table = (self.slices.get(number) or self._load(number)).table
        index = start >> self.cluster_bits & self.slice_mask
        changed = []
        for position in range(start, end, self.cluster_size):
            entry = table[index]
            new = change(entry, position)
            if new != entry:
                changed.append((position, index, new))
            index += 1
        if changed:  # otherwise no table must be created
            part = self._own_table(changed[0][0], changed[0][0] + 1)
            for position, _, _ in changed:
                self.prepared.prepare(self._entry_place(position), 8)
            for _, index, new in changed:
                self._set(number, part, index, new)

    def finish(self) -> None:
        """See Image."""
        if self.writable:
            self._store_freed()
            self.stable.sync()

    # -- growing

    def grow(self, size: int) -> None:
        """See Image.  The size in the header is written last.  Until then the new part is after the end of the disk."""
        self._check_write(0, 0)
        require_larger(self.path, self.size, size)
        before = self.size
        self._require_growable(before, size)
        try:
            with self.committing:
                self._commit()
                with self.allocating:
                    self._grow_l1(size)
            self.size = size  # in memory only, so that the new part can be cleared
            self._clear_new(before, size)
            self.flush()
            write_bytes(self.fd, size.to_bytes(8, "big"), AT_SIZE)
            self.stable.sync()
        except Damage as damage:
            self.size = before
            raise self._give_up(damage) from None
        except BaseException:
            self.size = before
            raise
        self.header = self.header.replace(size=size)
        self.remark = left_dirty(self.path) if self.header.dirty else ""

    def _require_growable(self, before: int, size: int) -> None:
        """Raise OSError unless this image can grow to `size` bytes."""
        if -(-size >> self.table_shift) * 8 > MAX_TABLE_BYTES:
            what = f"{size} bytes are too many for its clusters of {self.cluster_size}"
            raise OSError(errno.EFBIG, f"{self.path}: {what}")
        below = self.backing.size if self.backing is not None else 0
        if self.header.version < 3 and before < below and before < size:
            raise OSError(
                errno.ENOTSUP, f"{self.path}: its backing file is larger, and qcow2 version 2 cannot hide its rest"
            )
        if size == before or not self.header.snapshots:
            return
        try:
            snapshots = read_snapshots(self.fd, self.header, self.path)
        except ImageError as error:
            raise self._damaged(error.what) from None
        for one in snapshots:
            if ENTRY.unpack_from(one.raw)[-1] < LEAST_EXTRA:
                what = f"snapshot {one.name or one.id} in it does not record the size of the disk; delete it first"
                raise OSError(errno.ENOTSUP, f"{self.path}: {what}")

    def _grow_l1(self, size: int) -> None:
        """Grow the L1 table for `size` bytes of disk.  It must have no unwritten changes.  Raises OSError, Damage."""
        header, per_cluster = self.header, self.cluster_size // 8
        entries = -(-size >> self.table_shift)
        if entries <= header.l1_entries:
            return
        table = zeroes(entries)
        table[: header.l1_entries] = self.l1
        offset = header.l1_offset
        if header.l1_entries and entries <= -(-header.l1_entries // per_cluster) * per_cluster:
            # The new entries fit into the last cluster of the table, whose rest is unused.
            at = offset + header.l1_entries * 8
            write_bytes(self.fd, bytes((entries - header.l1_entries) * 8), at)
        else:
            clusters = -(-entries // per_cluster)
            first = self.refcounts.allocate_together(clusters)
            self.refcounts.extend(first + clusters)
            offset = first << self.cluster_bits
            try:
                write_bytes(self.fd, big_endian(table).ljust(clusters * self.cluster_size, b"\0"), offset)
                self.refcounts.write_blocks()
                self.stable.sync()
                self.refcounts.publish(set(self.refcounts.unpublished))
            except OSError:
                self.refcounts.free(first, clusters)
                raise
        self.stable.sync()
        write_bytes(self.fd, L1_PLACE.pack(entries, offset), AT_L1)
        self.stable.sync()
        with self.loading:
            self.l1 = table
        self.header = header.replace(l1_entries=entries, l1_offset=offset)
        self.refcounts.protect(offset, entries * 8)
        if offset != header.l1_offset and header.l1_entries:
            first = header.l1_offset >> self.cluster_bits
            if first >= self.refcounts.floor:
                self.refcounts.free(first, -(-header.l1_entries // per_cluster))

    def _clear_new(self, before: int, size: int) -> None:
        """Make the new part of the disk read as zeroes.  Raises OSError.

        The backing file may have data there.  So may L2 tables from a time when the disk was larger.
        """
        below = self.backing.size if self.backing is not None else 0
        if before < below:
            self._clear(before, min(size, below))
        first = before >> self.table_shift
        for index in range(first, -(-size >> self.table_shift)):
            if self.l1[index] & OFFSET_MASK:
                start, end = max(before, below, index << self.table_shift), min(size, (index + 1) << self.table_shift)
                if start < end:
                    self._clear(start, end)

    def _clear(self, start: int, end: int) -> None:
        """Make a range read as zeroes.  `end` must be the end of the disk or of an L2 table: a whole cluster."""
        aligned = min(end, -(-start >> self.cluster_bits) << self.cluster_bits)
        self._write_zero_bytes(start, aligned)
        if self.header.version < 3:
            self._write_zero_bytes(aligned, end)
        else:
            self._each_slice(aligned, end, self._zeroed)

    def close(self) -> None:
        """See Image."""
        try:
            if self.writable and not (self.failed or self.stable.lost):
                self.flush()
                self._store_freed()
        finally:
            os.close(self.fd)
            if self.backing is not None:
                self.backing.close()

    def _store_freed(self) -> None:
        """Write the refcounts of freed clusters.  If that fails, the clusters are leaked, which does no harm."""
        try:
            with self.allocating:
                self._release()
                self.refcounts.write_blocks()
        except Damage as damage:
            raise self._give_up(damage) from None
        except OSError:
            return
