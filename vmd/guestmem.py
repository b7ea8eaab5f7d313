"""Guest memory: one sealed memfd, and the only place that turns a guest-physical address into bytes.

Every address that comes from a guest is checked in `GuestMemory._locate`, and nowhere else.  A hot loop that has to
inline the check uses `ranges` and `memory` for it.

The file has the regions one after another, in the order of the layout.  So if the first region starts at address 0, its
addresses and file offsets are equal.  Memory that was never touched costs nothing.  But even a *read* through the
mapping allocates the page.  So code that copies or hashes memory asks `touched_runs` first.

The last pages of the file are not guest memory.  They have a mark of one byte for each page before them.  While
`marking`, each process that stores into guest memory, including device processes, first marks the changed pages with
`mark`, and only then publishes the change.  Changes by vCPUs are in KVM's log (`vm/dirty.py` reads both).
"""

import errno
import fcntl
import mmap
import posix as os

from vmd import native
from vmd.errors import GuestError, HostError
from vmd.memfile import FIXED, sealed_file
from vmd.record import Record
from vmd.units import PAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

KVM_MEM_READONLY = 1 << 1  # device processes use this module and must not import kvmapi

_MAP_NORESERVE = 0x4000  # mmap has no name for it before Python 3.13


class RegionSpec(Record):
    """A range of guest-physical addresses that gets memory."""

    gpa: int
    size: int
    name: str
    read_only: bool = False  # for the guest and for devices; `load` can still fill it

    @property
    def end(self) -> int:
        """The first address behind the region."""
        return self.gpa + self.size

    def check(self) -> None:
        """Refuse values that KVM would refuse, with an error that names the region.  Raises ValueError."""
        if self.size <= 0 or self.size % PAGE or self.gpa < 0 or self.gpa % PAGE:
            raise ValueError(f"memory region {self.name}: {self.size:#x} bytes at {self.gpa:#x}")


class Region(RegionSpec):
    """A region with its place in the memfd."""

    offset: int


class GuestMemory:
    """The memory of one VM, mapped into this process.

    `ranges` has (start, end, offset, writable) of each region.  `memory` is the whole mapping.  `marks` has a byte for
    each page of memory: not 0 means changed.
    """

    def __init__(self, fd: int, regions: "Sequence[Region]") -> None:
        self.fd = fd
        self.regions = tuple(regions)
        self.ranges = tuple((r.gpa, r.end, r.offset, not r.read_only) for r in self.regions)
        # Only up to the last region: a device whose regions leave out the firmware has no mapping of it.
        self.mapped_bytes = max(region.offset + region.size for region in self.regions)
        try:
            self._mapping = mmap.mmap(fd, self.mapped_bytes, flags=mmap.MAP_SHARED | _MAP_NORESERVE)
            self._mapping.madvise(mmap.MADV_DONTDUMP)  # so that a core file has no secrets of guests
            at = memory_bytes(os.fstat(fd).st_size)
            self._marks = mmap.mmap(fd, marks_bytes(at), flags=mmap.MAP_SHARED | _MAP_NORESERVE, offset=at)
        except OSError as error:
            raise HostError(f"map {self.mapped_bytes} bytes of guest memory", error) from error
        self.memory = memoryview(self._mapping)
        self.marks = memoryview(self._marks)[: at // PAGE]
        self.marking = False

    @classmethod
    def create(
        cls, layout: "Sequence[RegionSpec]", name: str = "guest-memory", fd: int | None = None
    ) -> "GuestMemory":
        """Make new memory, all zero, from the empty memory file `fd` or from a new one.

        The object owns the descriptor until `close`.

        Raises:
            ValueError: the layout is empty or overlaps itself.
            HostError: the kernel has no memory.
        """
        regions = []
        offset = 0
        for spec in layout:
            regions.append(Region(**spec.as_dict(), offset=offset))
            offset += spec.size
        _check_disjoint(regions)
        try:
            fd = sealed_file(name, offset + marks_bytes(offset), fd)
        except OSError as error:
            raise HostError(f"{offset} bytes of guest memory", error) from error
        try:
            return cls(fd, regions)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int, regions: "Sequence[Region]") -> "GuestMemory":
        """Map memory that another process has made: all its regions, or those that this process may see.

        The object owns the descriptor from here on.

        Raises:
            ValueError: the file is too small for the regions, or could still be shrunk.
        """
        _check_disjoint(regions)
        size = memory_bytes(os.fstat(fd).st_size)
        for region in regions:
            if region.offset < 0 or region.offset % PAGE or region.offset + region.size > size:
                raise ValueError(f"memory region {region.name}: outside a file of {size} bytes")
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        if seals & FIXED != FIXED:
            raise ValueError(f"memory file is not sealed: {seals:#x}")
        return cls(fd, regions)

    def __enter__(self) -> "GuestMemory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap and close.  A second call does nothing.

        Raises:
            BufferError: a view of the memory is still in use.
        """
        if self.fd >= 0:
            self.memory.release()
            self._mapping.close()
            self.marks.release()
            self._marks.close()
            os.close(self.fd)
            self.fd = -1

    # ---- the bounds check

    def _locate(self, gpa: int, size: int, write: bool, partly: bool = False) -> tuple[int, int, bool]:
        """Return the offset of `gpa`, the bytes from there to its region's end, and whether it is writable."""
        for start, end, offset, writable in self.ranges:
            if start <= gpa < end and size >= 0 and (partly or size <= end - gpa):
                if write and not writable:
                    raise GuestError(f"guest address {gpa:#x}: read-only memory")
                return offset + gpa - start, end - gpa, writable
        raise GuestError(f"guest address {gpa:#x}: no memory for {size} bytes")

    def offset(self, gpa: int, size: int, *, write: bool = False) -> int:
        """Return the offset of [gpa, gpa + size) in the file and in `memory`.

        Raises:
            GuestError: the range is not within one region, or `write` is set and the region is read-only.
        """
        return self._locate(gpa, size, write)[0]

    # ---- access

    def view(self, gpa: int, size: int, *, write: bool = False) -> memoryview:
        """Return a view of memory within one region.  The view of a read-only region is read-only.

        Raises:
            GuestError: as `offset`.
        """
        offset, _, writable = self._locate(gpa, size, write)
        window = self.memory[offset : offset + size]
        return window if writable else window.toreadonly()

    def slices(self, gpa: int, size: int, *, write: bool = False) -> list[memoryview]:
        """Return views that together cover a range, which may extend over adjacent regions.

        Raises:
            GuestError: a part of the range has no memory, or `write` is set and a part is read-only.
        """
        windows = []
        while True:
            _, room, _ = self._locate(gpa, size, write, partly=True)
            part = min(size, room)
            windows.append(self.view(gpa, part))
            gpa += part
            size -= part
            if not size:
                return windows

    def read(self, gpa: int, size: int) -> bytes:
        """Return a copy of memory.  The range may extend over adjacent regions.

        Raises:
            GuestError: as `slices`.
        """
        windows = self.slices(gpa, size)
        return bytes(windows[0]) if len(windows) == 1 else b"".join(windows)

    def write(self, gpa: int, data: "bytes | memoryview") -> None:
        """Store into memory on behalf of the guest: everything or nothing.  The range may extend over adjacent regions.

        Raises:
            GuestError: as `slices`, or a part is read-only.
        """
        position = 0
        for window in self.slices(gpa, len(data), write=True):
            window[:] = data[position : position + len(window)]
            position += len(window)
        if self.marking:
            self.mark(gpa, len(data))

    def load(self, gpa: int, data: "bytes | memoryview") -> None:
        """Fill memory within one region, even a read-only one: with firmware, or with a received page.

        Raises:
            GuestError: as `offset`.
        """
        offset = self.offset(gpa, len(data))
        self.memory[offset : offset + len(data)] = data

    def fill(self, offset: int, data: "bytes | memoryview") -> None:
        """Write at an offset of the file.  For new pages this takes half as long as through the mapping.

        Raises:
            HostError: the kernel has no memory.
        """
        view = memoryview(data)
        if offset + len(view) > self.mapped_bytes:
            raise HostError(f"{len(view)} bytes of guest memory", errno.EFBIG)
        try:
            while view:
                done = os.pwrite(self.fd, view, offset)
                offset += done
                view = view[done:]
        except OSError as error:
            raise HostError(f"{len(view)} bytes of guest memory", error) from error

    def copy_into(self, view: memoryview, offset: int) -> None:
        """Fill a view from an offset of the file.  This allocates no pages, and lets other threads run meanwhile.

        Raises:
            HostError: the file is too short, or the read fails.
        """
        try:
            while view:
                done = os.preadv(self.fd, [view], offset)
                if not done:
                    raise HostError(f"{len(view)} bytes of guest memory at {offset:#x}", errno.ENXIO)
                offset += done
                view = view[done:]
        except OSError as error:
            raise HostError(f"{len(view)} bytes of guest memory at {offset:#x}", error) from error

    def hva(self, gpa: int, size: int = 1) -> int:
        """Return the address, in this process, of guest memory within one region.

        Raises:
            GuestError: as `offset`.
        """
        return self.base + self.offset(gpa, size)

    # ---- marks of changed pages

    def mark(self, gpa: int, size: int) -> None:
        """Mark the pages of a range that was stored to.  Parts without memory are ignored."""
        for start, end, offset, _ in self.ranges:
            low, high = max(gpa, start), min(gpa + size, end)
            if low < high:
                self.mark_file(offset + low - start, high - low)

    def mark_file(self, offset: int, size: int) -> None:
        """Mark the pages of a range of `memory` that was stored to."""
        first, last = offset // PAGE, (offset + size - 1) // PAGE
        if first == last:
            self.marks[first] = 1
        else:
            self.marks[first : last + 1] = b"\1" * (last + 1 - first)

    # ---- for KVM and the host

    def kvm_slots(self) -> "Iterator[tuple[int, int, int, int, int]]":
        """Yield (slot, gpa, size, hva, flags) of each region, as KVM_SET_USER_MEMORY_REGION takes them."""
        base = self.base
        for slot, region in enumerate(self.regions):
            flags = KVM_MEM_READONLY if region.read_only else 0
            yield slot, region.gpa, region.size, base + region.offset, flags


    def resident_bytes(self) -> int:
        """Return how many bytes of the memory are allocated, in RAM or swap, by the guest or by vmd."""
        return os.fstat(self.fd).st_blocks * 512

    def touched_runs(self, region: Region) -> "Iterator[tuple[int, int, int]]":
        """Yield (gpa, file offset, length) of the allocated parts of a region.  The rest reads as zeros.

        sendfile takes the file offset.  Pages that are touched meanwhile may or may not be included.
        """
        start, end = region.offset, region.offset + region.size
        while start < end:
            try:
                start = os.lseek(self.fd, start, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # no data from here to the end of the file
                    return
                raise
            if start >= end:
                return
            stop = min(os.lseek(self.fd, start, os.SEEK_HOLE), end)
            yield region.gpa + start - region.offset, start, stop - start
            start = stop

    @property
    def base(self) -> int:
        """The address in this process of the first byte of `memory`."""
        return native.addressof(native.c_char.from_buffer(self._mapping))


def marks_bytes(size: int) -> int:
    """Return the number of bytes, in whole pages, for the marks of `size` bytes of memory."""
    return -(-size // PAGE // PAGE) * PAGE


def memory_bytes(file_bytes: int) -> int:
    """Return how many bytes of a file are memory; the rest are marks."""
    pages = file_bytes // PAGE
    return (pages - -(-pages // (PAGE + 1))) * PAGE


def _check_disjoint(regions: "Sequence[RegionSpec]") -> None:
    """Raise ValueError if there are no regions, or if two overlap."""
    if not regions:
        raise ValueError("guest memory without a region")
    ordered = sorted(regions, key=lambda region: region.gpa)
    for below, above in zip(ordered[:-1], ordered[1:], strict=True):  # noqa: RUF007 - an import for one line
        if above.gpa < below.end:
            raise ValueError(f"memory regions {below.name} and {above.name} overlap at {above.gpa:#x}")
