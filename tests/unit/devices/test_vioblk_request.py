"""Block requests as the walk of a chain finds them: what reaches the image, and what the guest is told (5.2.6)."""

import struct
from collections.abc import Iterator, Sequence

import pytest

from tests.support.fakedriver import DATA, KIB, LAYOUT, ROM
from vmd.devices.vioblk.request import (
    DISCARD_MAX_RANGES,
    DISCARD_MAX_SECTORS,
    REQUEST_MAX_BYTES,
    WRITE_ZEROES_MAX_RANGES,
    WRITE_ZEROES_MAX_SECTORS,
    Limits,
    carry_out,
    parse,
)
from vmd.errors import GuestError
from vmd.guestmem import GuestMemory
from vmd.virtio.queue import Chain

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
SECTORS = 1 << 30
HEADER, STATUS, BUFFER, NOWHERE = DATA, DATA + KIB, DATA + 4 * KIB, 1 << 40
SERIAL = b"a serial of 20 bytes"
Parts = list[tuple[int, int]]


class Image:
    """An image that keeps its calls; a read returns the letter r."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def preadv(self, offset: int, views: Sequence[memoryview]) -> None:
        """Fill the views."""
        self.calls.append(("read", offset, [len(view) for view in views]))
        for view in views:
            view[:] = b"r" * len(view)

    def pwritev(self, offset: int, views: Sequence[memoryview]) -> None:
        """Keep the data."""
        self.calls.append(("write", offset, b"".join(views)))

    def flush(self) -> None:
        """Keep the call."""
        self.calls.append(("flush",))

    def discard(self, offset: int, length: int) -> None:
        """Keep the range."""
        self.calls.append(("discard", offset, length))

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Keep the range."""
        self.calls.append(("zeroes", offset, length, unmap))


class Disk:
    """Guest memory, an image, and the limits of a disk."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.image = Image()
        self.limits = Limits(SECTORS * 512, writable=True, discard=True, write_zeroes=True)

    def ask(
        self, kind: int, sector: int = 0, readable: Parts | None = None, writable: Parts | None = None
    ) -> tuple[int, int]:
        """Carry out a request with these buffers beside header and status; return its status and written bytes."""
        self.memory.load(HEADER, struct.pack("<IIQ", kind, 0, sector))
        chain = Chain(3, [(HEADER, 16), *(readable or [])], [*(writable or []), (STATUS, 1)])
        request = parse(chain, self.memory, self.limits)
        assert (request.head, request.kind, request.status) == (3, kind, STATUS)
        return carry_out(request, self.image, SERIAL)  # type: ignore[arg-type]

    def ranges(self, kind: int, *rows: tuple[int, int, int], cut: int = 0) -> tuple[int, int]:
        """Discard or zero ranges: sector, number of sectors, flags; `cut` bytes are missing at the end."""
        raw = b"".join(struct.pack("<QII", *row) for row in rows)
        self.memory.load(BUFFER, raw)
        return self.ask(kind, readable=[(BUFFER, len(raw) - cut)])


@pytest.fixture
def disk() -> Iterator[Disk]:
    """A disk that can be written."""
    with GuestMemory.create(LAYOUT) as memory:
        yield Disk(memory)


def test_read_and_write_and_flush(disk: Disk) -> None:
    """Data goes to its sector, from or into the buffers in their order; empty ones are left out."""
    disk.memory.load(BUFFER, b"w" * 100 + b"x" * 412)
    assert disk.ask(OUT, 7, [(BUFFER, 100), (BUFFER, 0), (BUFFER + 100, 412)]) == (OK, 1)
    assert disk.ask(IN, 8, writable=[(BUFFER, 500), (BUFFER + KIB, 524)]) == (OK, 1025)
    assert disk.ask(FLUSH) == (OK, 1)
    assert disk.image.calls == [
        ("write", 7 * 512, b"w" * 100 + b"x" * 412), ("read", 8 * 512, [500, 524]), ("flush",),
    ]  # fmt: skip
    assert disk.memory.read(BUFFER, 512) == b"r" * 500 + b"x" * 12
    assert disk.memory.read(BUFFER + KIB, 525) == b"r" * 524 + b"\0"


@pytest.mark.parametrize("kind", [IN, OUT])
def test_transfer_that_cannot_be(disk: Disk, kind: int) -> None:
    """It ends with an error, and the image is left alone."""

    def move(sector: int, *parts: tuple[int, int]) -> tuple[int, int]:
        return disk.ask(kind, sector, None, [*parts]) if kind == IN else disk.ask(kind, sector, [*parts])

    last = SECTORS - 1
    assert move(last, (BUFFER, 512))[0] == move(SECTORS)[0] == OK
    done = len(disk.image.calls)
    for sector, part in (
        (0, (BUFFER, 511)), (last, (BUFFER, 1024)), (SECTORS, (BUFFER, 512)), (1 << 55, (BUFFER, 512)),
        (0, (NOWHERE, 512)), (0, (BUFFER, REQUEST_MAX_BYTES + 512)),
    ):  # fmt: skip
        assert move(sector, part) == (IOERR, 1)
    assert move(0, (BUFFER, 512), (NOWHERE, 512)) == (IOERR, 1)
    assert len(disk.image.calls) == done == 1


def test_disk_that_is_read_only(disk: Disk) -> None:
    """It is only read."""
    disk.limits.writable = False
    assert disk.ask(OUT, 0, [(BUFFER, 512)]) == (IOERR, 1)
    assert disk.ranges(DISCARD, (0, 8, 0)) == disk.ranges(WRITE_ZEROES, (0, 8, 0)) == (IOERR, 1)
    assert disk.image.calls == []
    assert disk.ask(IN, 0, writable=[(BUFFER, 512)]) == (OK, 513)


def test_buffer_that_the_device_must_not_write(disk: Disk) -> None:
    """A read into it fails, a write from it does not."""
    assert disk.ask(IN, 0, writable=[(ROM, 512)]) == (IOERR, 1)
    assert disk.ask(OUT, 0, [(ROM, 512)]) == (OK, 1)


@pytest.mark.parametrize(("room", "written"), [(5, 5), (20, 20), (40, 20), (0, 0)])
def test_serial_is_cut_to_its_buffers(disk: Disk, room: int, written: int) -> None:
    """They may be shorter or longer, and in parts."""
    disk.memory.load(BUFFER, b"-" * 100)
    assert disk.ask(GET_ID, writable=[(BUFFER, room // 2), (BUFFER + 50, room - room // 2)]) == (OK, 1 + written)
    found = disk.memory.read(BUFFER, min(room // 2, 20)) + disk.memory.read(BUFFER + 50, written - min(room // 2, 20))
    assert found == SERIAL[:written]
    assert disk.memory.read(BUFFER + 50 + room - room // 2, 1) == b"-"


def test_ranges_are_discarded_or_zeroed(disk: Disk) -> None:
    """All of them; only zeroes have a flag, which allows to free the storage."""
    assert disk.ranges(DISCARD, (8, 16, 0), (SECTORS - 1, 1, 0)) == (OK, 1)
    assert disk.ranges(WRITE_ZEROES, (8, 16, 1), (64, 8, 0)) == (OK, 1)
    assert disk.image.calls == [
        ("discard", 8 * 512, 16 * 512), ("discard", (SECTORS - 1) * 512, 512),
        ("zeroes", 8 * 512, 16 * 512, True), ("zeroes", 64 * 512, 8 * 512, False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "most", "longest"),
    [
        (DISCARD, DISCARD_MAX_RANGES, DISCARD_MAX_SECTORS),
        (WRITE_ZEROES, WRITE_ZEROES_MAX_RANGES, WRITE_ZEROES_MAX_SECTORS),
    ],
)
def test_bounds_of_ranges(disk: Disk, kind: int, most: int, longest: int) -> None:
    """The bounds that the configuration space names are allowed; nothing is done of a request beyond one."""
    assert disk.ranges(kind, *[(0, 1, 0)] * most)[0] == OK
    assert disk.ranges(kind, (0, longest, 0))[0] == OK
    assert len(disk.image.calls) == most + 1

    good = (0, 1, 0)
    assert disk.ranges(kind, *[good] * (most + 1)) == (IOERR, 1)
    assert disk.ranges(kind, good, (0, longest + 1, 0)) == (IOERR, 1)
    assert disk.ranges(kind, good, (SECTORS - 1, 2, 0)) == (IOERR, 1)
    assert disk.ranges(kind, good, ((1 << 64) - 1, 1, 0)) == (IOERR, 1)
    assert disk.ranges(kind, good, good, cut=1) == (IOERR, 1)
    assert disk.ranges(kind) == (IOERR, 1)
    assert disk.ask(kind, readable=[(NOWHERE, 16)]) == (IOERR, 1)
    assert disk.ranges(kind, good, (0, 1, 2)) == (UNSUPP, 1)
    assert disk.ranges(kind, good, (0, 1, 1))[0] == (UNSUPP if kind == DISCARD else OK)
    assert len(disk.image.calls) == most + (1 if kind == DISCARD else 3)


def test_feature_that_was_not_negotiated(disk: Disk) -> None:
    """Each of the two stands alone; unknown requests are not supported either."""
    disk.limits.discard = False
    assert disk.ranges(DISCARD, (0, 8, 0)) == (UNSUPP, 1)
    assert disk.ranges(WRITE_ZEROES, (0, 8, 0)) == (OK, 1)
    disk.limits.discard, disk.limits.write_zeroes = True, False
    assert disk.ranges(DISCARD, (0, 8, 0)) == (OK, 1)
    assert disk.ranges(WRITE_ZEROES, (0, 8, 0)) == (UNSUPP, 1)
    assert [disk.ask(kind)[0] for kind in (2, 3, 5, 6, 7, 9, 10, 12, 14, 99)] == [UNSUPP] * 10
    assert len(disk.image.calls) == 2


@pytest.mark.parametrize(
    ("readable", "writable", "words"),
    [
        ([(HEADER, 15)], [(STATUS, 1)], "block request of 15 bytes has no header"),
        ([(HEADER, 16)], [(STATUS, 0)], "block request without a status byte"),
        ([(NOWHERE, 16)], [(STATUS, 1)], "no memory"),
        ([(HEADER, 16)], [(NOWHERE, 1)], "no memory"),
        ([(HEADER, 16)], [(ROM, 1)], "read-only memory"),
    ],
)
def test_request_without_header_or_status_breaks_the_ring(
    disk: Disk, readable: Parts, writable: Parts, words: str
) -> None:
    """There is no place for an answer, or nothing to answer."""
    with pytest.raises(GuestError, match=words):
        parse(Chain(0, readable, writable), disk.memory, disk.limits)


def test_header_and_status_in_any_layout(disk: Disk) -> None:
    """The header is the first sixteen readable bytes, and the status the last writable one (2.7.4.3)."""
    disk.memory.load(HEADER, struct.pack("<IIQ", OUT, 0, 5) + b"d" * 512)
    parts = [(HEADER, 3), (HEADER + 3, 0), (HEADER + 3, 20), (HEADER + 23, 505)]
    request = parse(Chain(0, parts, [(STATUS, 1), (STATUS, 0)]), disk.memory, disk.limits)
    assert (request.status, carry_out(request, disk.image, SERIAL)) == (STATUS, (OK, 1))  # type: ignore[arg-type]
    disk.memory.load(HEADER, struct.pack("<IIQ", IN, 0, 6))
    request = parse(Chain(0, [(HEADER, 16)], [(BUFFER, 513)]), disk.memory, disk.limits)
    assert (request.status, request.length) == (BUFFER + 512, 512)
    assert carry_out(request, disk.image, SERIAL) == (OK, 513)  # type: ignore[arg-type]
    assert disk.image.calls == [("write", 5 * 512, b"d" * 512), ("read", 6 * 512, [512])]
