"""Block requests (virtio 1.2, 5.2.6): `parse` checks a descriptor chain, `carry_out` does what it asks for."""

from struct import Struct

from vmd.errors import GuestError
from vmd.units import SECTOR
from vmd.virtio.spec import (
    VIRTIO_BLK_ID_BYTES,
    VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.guestmem import GuestMemory
    from vmd.images.image import Image
    from vmd.virtio.queue import Chain

HEADER = Struct("<IIQ")  # type, reserved, sector
RANGE = Struct("<QII")  # virtio_blk_discard_write_zeroes: sector, number of sectors, flags
UNMAP = 1

REQUEST_MAX_BYTES = 256 << 20  # bounds a reset, which waits for running requests; no driver comes near this
DISCARD_MAX_SECTORS = 1 << 22
DISCARD_MAX_RANGES = 16
WRITE_ZEROES_MAX_SECTORS = 1 << 17  # on a file system without holes the zeroes have to be written
WRITE_ZEROES_MAX_RANGES = 4


class Request:
    """One request.  `status` is the offset of its status byte in `GuestMemory.memory`.

    `refused` is VIRTIO_BLK_S_OK, or the status that the request gets without being carried out.
    """

    __slots__ = ("begun_ns", "head", "kind", "length", "offset", "ranges", "refused", "status", "views")

    def __init__(self, head: int, kind: int, status: int) -> None:
        self.begun_ns = 0  # when it was taken from the ring
        self.head = head
        self.kind = kind
        self.status = status
        self.refused = VIRTIO_BLK_S_OK
        self.offset = 0
        self.length = 0  # of the data; for kinds without data an estimate of the work, as bytes
        self.views: list[memoryview] = []
        self.ranges: list[tuple[int, int, bool]] = []  # offset, length, whether it may be unmapped


class Limits:
    """The size of a disk, and the requests that its driver may send."""

    __slots__ = ("discard", "size", "writable", "write_zeroes")

    def __init__(self, size: int, *, writable: bool, discard: bool = False, write_zeroes: bool = False) -> None:
        self.size = size  # bytes, a multiple of SECTOR
        self.writable = writable
        self.discard = discard  # the feature was negotiated
        self.write_zeroes = write_zeroes  # the feature was negotiated


def gather(memory: "GuestMemory", parts: "list[tuple[int, int]]", *, write: bool) -> list[memoryview]:
    """Return views of guest memory that cover all parts, in order.  Raises GuestError if one is not in memory."""
    return [window for gpa, length in parts if length for window in memory.slices(gpa, length, write=write)]


def split(parts: "list[tuple[int, int]]", at: int) -> "tuple[list[tuple[int, int]], list[tuple[int, int]]]":
    """Cut a list of (gpa, length) in two after `at` bytes.  A descriptor may end at any byte (2.7.4.3)."""
    before: list[tuple[int, int]] = []
    for position, (gpa, length) in enumerate(parts):
        if length > at:
            if at:
                before.append((gpa, at))
            return before, [(gpa + at, length - at), *parts[position + 1 :]]
        before.append((gpa, length))
        at -= length
    return before, []


def total(parts: "list[tuple[int, int]]") -> int:
    """Return the number of bytes of all parts."""
    return sum(length for _, length in parts)


def parse(chain: "Chain", memory: "GuestMemory", limits: Limits) -> Request:
    """Turn a chain into a checked request.

    Raises:
        GuestError: header or status byte is missing or not in memory; the ring can no longer be trusted.
    """
    if total(chain.readable) < HEADER.size:
        raise GuestError(f"block request of {total(chain.readable)} bytes has no header")
    room = total(chain.writable)
    if not room:
        raise GuestError("block request without a status byte")
    first, source = split(chain.readable, HEADER.size)
    target, last = split(chain.writable, room - 1)
    status_gpa = next(gpa for gpa, length in last if length)
    # Read once, into our own memory: the guest cannot change the header between check and use.
    kind, _, sector = HEADER.unpack(b"".join(gather(memory, first, write=False)))
    request = Request(chain.head, kind, memory.offset(status_gpa, 1, write=True))
    if kind == VIRTIO_BLK_T_IN:
        transfer(request, memory, limits, sector, target)
    elif kind == VIRTIO_BLK_T_OUT:
        transfer(request, memory, limits, sector, source)
    elif kind == VIRTIO_BLK_T_GET_ID:
        map_data(request, memory, split(target, VIRTIO_BLK_ID_BYTES)[0])
    elif kind in (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES):
        parse_ranges(request, memory, limits, source)
    elif kind != VIRTIO_BLK_T_FLUSH:
        request.refused = VIRTIO_BLK_S_UNSUPP
    return request


def transfer(
    request: Request, memory: "GuestMemory", limits: Limits, sector: int, parts: "list[tuple[int, int]]"
) -> None:
    """Check a read or a write, and find its data."""
    length = total(parts)
    request.offset = sector * SECTOR
    if (
        length % SECTOR
        or length > REQUEST_MAX_BYTES
        or request.offset + length > limits.size
        or (request.kind == VIRTIO_BLK_T_OUT and not limits.writable)
    ):
        request.refused = VIRTIO_BLK_S_IOERR
        return
    map_data(request, memory, parts)


def map_data(request: Request, memory: "GuestMemory", parts: "list[tuple[int, int]]") -> None:
    """Find the data in memory.  A buffer outside of memory makes only this request fail (*cat. 6.4*)."""
    try:
        request.views = gather(memory, parts, write=request.kind != VIRTIO_BLK_T_OUT)
        request.length = total(parts)
    except GuestError:
        request.refused = VIRTIO_BLK_S_IOERR


def parse_ranges(request: Request, memory: "GuestMemory", limits: Limits, source: "list[tuple[int, int]]") -> None:
    """Check DISCARD or WRITE_ZEROES: all ranges, before the first is changed."""
    zeroes = request.kind == VIRTIO_BLK_T_WRITE_ZEROES
    most = WRITE_ZEROES_MAX_RANGES if zeroes else DISCARD_MAX_RANGES
    longest = WRITE_ZEROES_MAX_SECTORS if zeroes else DISCARD_MAX_SECTORS
    room = total(source)
    if not (limits.write_zeroes if zeroes else limits.discard):
        request.refused = VIRTIO_BLK_S_UNSUPP
        return
    request.refused = VIRTIO_BLK_S_IOERR
    if not limits.writable or not room or room % RANGE.size or room > most * RANGE.size:
        return
    try:
        raw = b"".join(gather(memory, source, write=False))
    except GuestError:
        return
    for sector, sectors, flags in RANGE.iter_unpack(raw):
        if flags & ~UNMAP or (flags and not zeroes):
            request.refused = VIRTIO_BLK_S_UNSUPP  # 5.2.6.2 demands this status for unknown flags, not IOERR
            return
        if sectors > longest or (sector + sectors) * SECTOR > limits.size:
            return
        request.ranges.append((sector * SECTOR, sectors * SECTOR, bool(flags)))
        request.length += sectors * SECTOR if zeroes else SECTOR
    request.refused = VIRTIO_BLK_S_OK


def carry_out(request: Request, image: "Image", serial: bytes) -> tuple[int, int]:
    """Carry out a request; return its status and the number of bytes written to the guest, status included.

    Raises:
        OSError: of the image.
    """
    if request.refused:
        return request.refused, 1
    written = 1
    if request.kind == VIRTIO_BLK_T_IN:
        if request.length:
            image.preadv(request.offset, request.views)
        written += request.length
    elif request.kind == VIRTIO_BLK_T_OUT:
        if request.length:
            image.pwritev(request.offset, request.views)
    elif request.kind == VIRTIO_BLK_T_FLUSH:
        image.flush()
    elif request.kind == VIRTIO_BLK_T_GET_ID:
        at = 0
        for view in request.views:
            view[:] = serial[at : at + len(view)]
            at += len(view)
        written += at
    elif request.kind == VIRTIO_BLK_T_DISCARD:
        for offset, length, _ in request.ranges:
            image.discard(offset, length)
    else:
        for offset, length, unmap in request.ranges:
            image.write_zeroes(offset, length, unmap)
    return VIRTIO_BLK_S_OK, written
