"""Reads bytes of a disk for the file systems: checks bounds, has a small cache, and limits the work for one disk.

All the bytes are from a guest.  Every reader in this package uses `Source`.  So no structure on the disk can make us
read outside of the disk or partition, use more memory than the cache, or do more work than WORK_MAX.
"""

from vmd.errors import VmdError
from vmd.units import SECTOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Read = Callable[[int, int], bytes]

CACHED_BYTES = 4096  # size of a block of the cache
CACHED = 256  # blocks in the cache
READ_MAX = 1 << 20  # bytes of one structure
# Units of work: one for each read, one for each sector that it covers, one for each directory entry that is compared.
# The limit takes some seconds.  A journal of 1 GiB, full of the smallest transactions, takes 1.6 million units.
WORK_MAX = 1 << 21
POINTERS_SPENT = 32  # bytes of block numbers for one unit of work
SHOWN_MAX = 100


def printable(text: str) -> str:
    """Return a text as one line for a sentence: unprintable characters are escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)  # codecs cannot be loaded after confinement


def shown(name: bytes) -> str:
    """Return a name from a disk as one line of limited length for a sentence."""
    text = printable(name.decode(errors="backslashreplace"))
    return text if len(text) <= SHOWN_MAX else text[:SHOWN_MAX] + "..."


class DiskFsError(VmdError):
    """A file cannot be read from a disk.  The text is `partition p2 (ext4): /vmlinuz: what`, without unknown parts."""

    def __init__(self, what: str, *, partition: str = "", filesystem: str = "", path: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.partition = partition  # "partition p2", "the whole disk"
        self.filesystem = filesystem
        self.path = path

    def at(self, *, partition: str = "", filesystem: str = "", path: str = "") -> "DiskFsError":
        """Return the same error with parts that were not known where it was raised."""
        return type(self)(
            self.what,
            partition=self.partition or partition,
            filesystem=self.filesystem or filesystem,
            path=self.path or path,
        )

    def __str__(self) -> str:
        place = self.partition
        if self.filesystem:
            place = f"{place} ({self.filesystem})" if place else self.filesystem
        return ": ".join(part for part in (place, printable(self.path), self.what) if part)


class NoSuchFile(DiskFsError):
    """There is no such file, and the directories could be read."""


class Store:
    """A whole disk, with its cache and the remaining work."""

    def __init__(self, read: "Read", size: int) -> None:
        """`read(offset, length)` returns exactly `length` bytes, and raises OSError."""
        self.read = read
        self.size = size
        self.work = WORK_MAX
        self.cache: dict[int, bytes] = {}  # block number -> bytes; the most recently used one is last

    def spend(self, work: int) -> None:
        """Count work.  Raises DiskFsError if it exceeds WORK_MAX for this disk."""
        self.work -= work
        if self.work < 0:
            raise DiskFsError("too much would have to be read to find it")

    def plain(self, offset: int, length: int) -> bytes:
        """Read without the cache.  Raises DiskFsError."""
        try:
            data = self.read(offset, length)
        except OSError as error:
            raise DiskFsError(f"cannot be read at {offset}: {error.strerror or error}") from error
        if len(data) != length:
            raise DiskFsError(f"ends at {offset + len(data)}, before the {self.size} bytes it has")
        return data

    def cached(self, offset: int, length: int) -> bytes:
        """Read through the cache.  Raises DiskFsError."""
        first = offset // CACHED_BYTES
        last = (offset + length - 1) // CACHED_BYTES
        joined = b"".join([self._block(number) for number in range(first, last + 1)])
        begin = offset - first * CACHED_BYTES
        return joined[begin : begin + length]

    def _block(self, number: int) -> bytes:
        block = self.cache.pop(number, None)
        if block is None:
            at = number * CACHED_BYTES
            block = self.plain(at, min(CACHED_BYTES, self.size - at))
            if len(self.cache) >= CACHED:
                del self.cache[next(iter(self.cache))]
        self.cache[number] = block
        return block


class Source:
    """A disk, or a part of one: `size` bytes from byte `start` of the disk."""

    def __init__(self, store: Store, start: int, size: int) -> None:
        self.store = store
        self.start = start
        self.size = size

    def part(self, start: int, size: int) -> "Source":
        """Return a part of this source.  Raises DiskFsError if it is not inside."""
        self.inside(start, size)
        return Source(self.store, self.start + start, size)

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes of a structure; at most READ_MAX.  Raises DiskFsError."""
        if length > READ_MAX:
            raise DiskFsError(f"a structure of {length} bytes (limit is {READ_MAX})")
        self.inside(offset, length)
        self.store.spend(1 + (length + SECTOR - 1) // SECTOR)
        return self.store.cached(self.start + offset, length) if length else b""

    def content(self, offset: int, length: int) -> bytes:
        """Return bytes of a file.  They are not cached, and not counted as work: the size of the file limits them.

        Raises DiskFsError.
        """
        self.inside(offset, length)
        return self.store.plain(self.start + offset, length) if length else b""

    def spend(self, work: int) -> None:
        """Count work other than reading.  Raises DiskFsError."""
        self.store.spend(work)

    def inside(self, offset: int, length: int) -> None:
        """Raise DiskFsError unless a range is inside this source."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise DiskFsError(f"{length} bytes at {offset} are after its end at {self.size}")
