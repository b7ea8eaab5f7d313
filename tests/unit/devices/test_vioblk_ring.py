"""The hot loop of vioblk does what the slow walk does, on any ring."""

import contextlib
import errno
import os
import posix
import random
import select
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tests.support.fakedriver import (
    DATA,
    EVENT_IDX,
    EXTRA,
    INDIRECT,
    INDIRECT_DESC,
    LAYOUT,
    NEXT,
    ROM,
    WRITE,
    Desc,
    Ring,
    release,
)
from tests.support.figures import unseen
from vmd.devices.vioblk.device import ROUND, Vioblk, Workers
from vmd.devices.vioblk.request import Limits, carry_out, parse
from vmd.errors import GuestError
from vmd.guestmem import GuestMemory
from vmd.images.hostfile import FlushFailed
from vmd.images.raw import RawImage
from vmd.ipc import devmsg
from vmd.virtio import spec
from vmd.virtio.queue import Queue

Row = tuple[int | None, int, int, int | None]  # gpa or the next free place, length, flags, next or the following
# descriptors, type, sector; in a table of its own, odd bytes of that
Requests = list[tuple[tuple[list[Row], int, int], bool, int]]

SIZE = 16
DISK = 64 * 512
DISCARDS, FLUSHES = 1 << spec.VIRTIO_BLK_F_DISCARD, 1 << spec.VIRTIO_BLK_F_FLUSH
ZEROES = 1 << spec.VIRTIO_BLK_F_WRITE_ZEROES
FEATURES = st.sampled_from([0, EVENT_IDX, INDIRECT_DESC | EVENT_IDX]).flatmap(
    lambda ring: st.sampled_from([0, FLUSHES, DISCARDS, ZEROES, FLUSHES | DISCARDS | ZEROES]).map(ring.__or__)
)
CONTENT = random.Random(2).randbytes(DISK)
HEADERS = DATA - 0x8000
TABLES, TABLE_BYTES = DATA - 0x4000, 512
DATA_BYTES = 2 << 20  # more than any requests have
PREADV = os.preadv


class MemoryDisk:
    """A disk in memory."""

    def __init__(self, writable: bool) -> None:
        self.fd = -1
        self.path = "disk"
        self.remark = ""
        self.discard_granularity = 4096
        self.size = DISK
        self.writable = writable
        self.bytes = bytearray(CONTENT)

    def settle(self) -> None:
        """Nothing is in memory only."""

    def reload(self) -> None:
        """Nobody else writes to it."""

    def finish(self) -> None:
        """Leave nothing to be stored later."""

    def preadv(self, offset: int, views: Sequence[memoryview]) -> None:
        """Read."""
        for view in views:
            view[:] = self.bytes[offset : offset + len(view)]
            offset += len(view)

    def pwritev(self, offset: int, views: Sequence[memoryview]) -> None:
        """Write."""
        for view in views:
            self.bytes[offset : offset + len(view)] = view
            offset += len(view)

    def flush(self) -> None:
        """Nothing is behind it."""

    def discard(self, offset: int, length: int) -> None:
        """Be seen."""
        self.bytes[offset : offset + length] = b"\xdd" * length

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Be seen."""
        self.bytes[offset : offset + length] = bytes((unmap,)) * length

    def span(self, offset: int) -> tuple[bool, int]:
        """Data everywhere."""
        return True, DISK - offset

    def grow(self, size: int) -> None:
        """Nobody asks."""

    def content(self) -> bytes:
        """Return all of it."""
        return bytes(self.bytes)

    def close(self) -> None:
        """Nothing is held."""


class FileDisk(RawImage):
    """A disk in a file, which the hot loop reads and writes past the image."""

    def __init__(self, fd: int, writable: bool) -> None:
        os.pwrite(fd, CONTENT, 0)
        super().__init__(fd, "disk", writable=writable)

    def discard(self, offset: int, length: int) -> None:
        """Be seen, as above; what a hole has in it is the file system's."""
        os.pwrite(self.fd, b"\xdd" * length, offset)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Be seen."""
        os.pwrite(self.fd, bytes((unmap,)) * length, offset)

    def content(self) -> bytes:
        """Return all of it."""
        return os.pread(self.fd, DISK, 0)


def disk_in_memory_file(writable: bool) -> FileDisk:
    """Return a disk on a file system that does not know RWF_NOWAIT."""
    return FileDisk(os.memfd_create("disk"), writable)


def disk_in_file(writable: bool) -> FileDisk:
    """Return a disk on a file system that may know it."""
    return FileDisk(os.open(tempfile.gettempdir(), os.O_RDWR | os.O_TMPFILE), writable)


Disk = MemoryDisk | FileDisk
DISKS: list[Callable[[bool], Disk]] = [MemoryDisk, disk_in_memory_file, disk_in_file]


class Now(Workers):
    """Workers that are done when they are asked."""

    def __init__(self) -> None:
        self.done = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def submit(self, job: Callable[[], None]) -> None:
        """Do it."""
        job()
        os.eventfd_write(self.done, 1)


class Held(Now):
    """Workers that are done when somebody waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[Callable[[], None]] = []

    def submit(self, job: Callable[[], None]) -> None:
        """Keep it."""
        self.held.append(job)

    def release(self) -> None:
        """Do all."""
        while self.held:
            super().submit(self.held.pop())


class Services:
    """A process without a guest behind it."""

    def __init__(self) -> None:
        self.figures = unseen("vioblk")

    def interrupt(self, queue: int) -> None:
        """Nobody hears it."""

    def watch(self, fd: int, handler: Callable[[], None]) -> None:
        """Nothing is waited for."""

    def serve(self, number: int) -> None:
        """Nothing stays behind."""

    def call_after(self, delay_s: float, handler: Callable[[], None]) -> None:
        """Nothing has to wait."""

    def report(self, *troubles: str) -> None:
        """Nobody asks."""

    def lock_lost(self, why: str) -> None:
        """Nobody locks anything here."""
        raise AssertionError(why)

    def tell_config(self) -> None:
        """Nobody asks."""

    def changed(self, error: OSError | None = None) -> None:
        """Nobody asks."""


class ServedAgain(Services):
    """A process that serves the device's queue when it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.device: Vioblk | None = None

    def serve(self, number: int) -> None:
        """Do it at once."""
        assert self.device is not None
        assert number == 0  # the only queue
        self.device.on_notify(number)


# Mostly what drivers do, and from everything else something.
GPAS = st.sampled_from([None] * 8 + [0, EXTRA - 5, EXTRA + (1 << 20) - 1, ROM, 1 << 40, (1 << 64) - 1])
LENGTHS = st.sampled_from([512, 512, 512, 1024, 1, 1, 16, 16, 0, 3, 509, 4096, 0xFFFFFFFF])
FLAGS = st.sampled_from([NEXT, NEXT | WRITE, NEXT | WRITE, WRITE, WRITE, 0, INDIRECT, INDIRECT | NEXT, 8 | NEXT])
DESCRIPTORS = st.tuples(GPAS, LENGTHS, FLAGS, st.sampled_from([None] * 9 + [0, 3, SIZE - 1, SIZE, 0xFFFF]))
KINDS = st.sampled_from([0, 0, 0, 1, 1, 1, 4, 8, 11, 13, 2, 99])
SECTORS = st.sampled_from([0, 1, 7, 60, 62, 63, 64, 65, 1 << 55, (1 << 64) - 1])
CHAINS = st.tuples(st.lists(DESCRIPTORS, min_size=1, max_size=7), KINDS, SECTORS)


SHORT = [[512], [1024], [500, 12]]
LONG = [[64] * 8, [512] * 9]


@st.composite
def usual(draw: st.DrawFn, pieces: list[list[int]]) -> tuple[list[Row], int, int]:
    """Return a read or write as drivers send it."""
    kind = draw(st.sampled_from([0, 1]))
    lengths = draw(st.lists(st.sampled_from(pieces), min_size=1, max_size=3))
    flags = NEXT | (0 if kind else WRITE)
    data: list[Row] = [(None, length, flags, None) for pair in lengths for length in pair]
    return [(None, 16, NEXT, None), *data, (None, 1, WRITE, None)], kind, draw(st.integers(0, 62))


@st.composite
def nearly_usual(draw: st.DrawFn, pieces: list[list[int]]) -> tuple[list[Row], int, int]:
    """Return the same but for one field."""
    rows, kind, sector = draw(usual(pieces))
    place, field = draw(st.integers(0, len(rows) - 1)), draw(st.integers(0, 5))
    gpa, length, flags, following = rows[place]
    match field:
        case 0:
            gpa = draw(st.sampled_from([EXTRA - 5, EXTRA - 1, EXTRA + (1 << 20) - 1, ROM, ROM, 1 << 40, (1 << 64) - 1]))
        case 1:
            length = draw(st.sampled_from([0, 1, 2, 15, 17, 511, 512, 4096, 0xFFFFFE00]))
        case 2:
            flags = draw(st.sampled_from([0, NEXT, WRITE, NEXT | WRITE, 8 | NEXT, 8 | WRITE, INDIRECT | NEXT]))
        case 3:
            following = draw(st.sampled_from([0, 1, 2, 9, SIZE - 1, SIZE, SIZE + 1, 30, 0xFFFF]))
        case 4:
            kind = draw(KINDS)
        case _:
            sector = draw(SECTORS)
    rows[place] = (gpa, length, flags, following)
    return rows, kind, sector


HEAD: Row = (None, 16, NEXT, None)
INTO: Row = (None, 512, NEXT | WRITE, None)
LAST: Row = (None, 1, WRITE, 0)
STATUS_IN_ROM: list[Row] = [HEAD, INTO, (ROM, 1, WRITE, None)]
LONG_INTO_ROM: list[Row] = [(ROM, 16, NEXT, None), *[(ROM + 4096, 512, NEXT | WRITE, None)] * 9, LAST]
LONG_AND_FROM: list[Row] = [HEAD, *[INTO] * 5, (None, 512, NEXT, None), *[INTO] * 5, LAST]
LONG_WITH_GAP: list[Row] = [(None, 16, NEXT, 2), *[INTO] * 9, LAST]
ODD_BYTES = st.sampled_from([0, 0, 0, 0, 0, 1, 8, 16])  # what an indirect table is longer than its descriptors
REQUESTS = st.one_of(
    st.tuples(st.one_of(CHAINS, usual(SHORT), nearly_usual(SHORT), nearly_usual(SHORT)), st.booleans(), ODD_BYTES),
    st.tuples(st.one_of(usual(LONG), nearly_usual(LONG), nearly_usual(LONG)), st.just(True), st.just(0)),
)


def build(memory: GuestMemory, requests: Requests) -> Ring:
    """Lay requests out; no two descriptors share memory, except where they are wrong."""
    ring = Ring(memory, SIZE)
    at, place = 0, DATA
    memory.load(DATA, random.Random(3).randbytes(256 * 1024))
    for number, ((parts, kind, sector), indirect, odd_bytes) in enumerate(requests):
        header = HEADERS + 64 * number
        memory.load(header, struct.pack("<IIQ", kind, 0, sector) + struct.pack("<QII", sector, 3, number & 1))
        first = 0 if indirect else at
        rows = b""
        for position, (gpa, length, flags, following) in enumerate(parts):
            where = gpa if gpa is not None else header if position == 0 else place
            place += 4096
            rows += struct.pack("<QIHH", where, length, flags, first + position + 1 if following is None else following)
        if indirect:
            memory.load(TABLES + TABLE_BYTES * number, rows)
            rows = struct.pack("<QIHH", TABLES + TABLE_BYTES * number, len(rows) + odd_bytes, INDIRECT, 0)
        if at + len(rows) // 16 > SIZE:
            break
        memory.load(ring.desc + 16 * at, rows)
        ring.offer(at)
        at += len(rows) // 16
    return ring


@contextlib.contextmanager
def rings(requests: Requests, features: int) -> Iterator[tuple[GuestMemory, Ring, Queue]]:
    """Give fresh memory, the driver's side and the device's."""
    with GuestMemory.create(LAYOUT) as memory:
        ring = build(memory, requests)
        queue = Queue(memory, features, SIZE, ring.desc, ring.avail, ring.used)
        try:
            yield memory, ring, queue
        finally:
            release(queue)


def reference(queue: Queue, disk: Disk, features: int) -> str:
    """Serve all requests the obvious way; return what stopped it."""
    limits = Limits(
        disk.size, writable=disk.writable, discard=bool(features & DISCARDS), write_zeroes=bool(features & ZEROES)
    )
    try:
        while (chain := queue.take()) is not None:
            request = parse(chain, queue.memory, limits)
            status, written = carry_out(request, disk, b"vioblk0".ljust(20, b"\0"))
            queue.memory.memory[request.status] = status
            queue.put(chain.head, written)
    except GuestError as error:
        return str(error)
    finally:
        queue.publish()
    return ""


def entangled(queue: Queue) -> bool:
    """Return whether one request's status byte lies in another's buffers: then the order shows."""
    chains = []
    try:
        while (chain := queue.take()) is not None:
            chains.append(chain)
    except GuestError:
        pass
    places = [[part for part in (*chain.readable, *chain.writable) if part[1]] for chain in chains]
    statuses = [[gpa + length - 1 for gpa, length in chain.writable if length][-1:] for chain in chains]
    return any(
        gpa <= status < gpa + length
        for number, last in enumerate(statuses)
        for status in last
        for other, parts in enumerate(places)
        for gpa, length in parts
        if other != number
    )


def hot(queue: Queue, disk: Disk, features: int) -> str:
    """Serve all requests as the device does; return what stopped it."""
    device = Vioblk(disk, Services(), Now())
    device.activate(features, [queue])
    error = ""
    try:
        while device.on_notify(0):
            pass
    except GuestError as stopped:
        error = str(stopped)
    device.on_done()
    os.close(device.workers.done)
    return error


@pytest.mark.parametrize("make", DISKS)
@settings(max_examples=150)
@given(st.lists(REQUESTS, min_size=1, max_size=8), st.booleans(), FEATURES)
@example([((STATUS_IN_ROM, 0, 0), False, 0)], True, 0)
@example([((LONG_INTO_ROM, 0, 0), True, 0)], True, INDIRECT_DESC)
@example([((LONG_AND_FROM, 0, 0), True, 0)], True, INDIRECT_DESC)
@example([((LONG_WITH_GAP, 0, 0), True, 0)], True, INDIRECT_DESC)
def test_hot_loop_does_what_the_walk_does(
    make: Callable[[bool], Disk], requests: Requests, writable: bool, features: int
) -> None:
    """The same memory, disk, used elements and sentence; only the order of completion is free."""
    with rings(requests, features) as (_, _, queue):
        assume(not entangled(queue))
    outcomes = []
    for serve in (reference, hot):
        disk = make(writable)
        with rings(requests, features) as (memory, ring, queue):
            error = serve(queue, disk, features)
            used = sorted(ring.reap())
            guest = memory.read(HEADERS, DATA + DATA_BYTES - HEADERS) + memory.read(EXTRA - 4096, 8192)
            # Of a broken ring, how far it was read does not matter: only a reset follows.
            outcomes.append((error, used, error or queue.next_avail, disk.content(), guest))
        disk.close()
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("kind", [0, 1], ids=["reads", "writes"])
def test_the_guest_hears_of_each_round_before_the_next_is_served(kind: int) -> None:
    """It works on one meanwhile.  What waits for a flush waits for one of all rounds."""
    heard: list[int] = []  # by request served: how many the guest has been told of
    flushes = []

    class Watched(MemoryDisk):
        def preadv(self, offset: int, views: Sequence[memoryview]) -> None:
            heard.append(ring_used())
            super().preadv(offset, views)

        def pwritev(self, offset: int, views: Sequence[memoryview]) -> None:
            heard.append(ring_used())
            super().pwritev(offset, views)

        def flush(self) -> None:
            flushes.append(len(heard))

    features = INDIRECT_DESC | EVENT_IDX
    data = NEXT if kind else NEXT | WRITE
    parts: list[Row] = [(None, 16, NEXT, None), (None, 512, data, None), (None, 1, WRITE, None)]
    with rings([((parts, kind, number), True, 0) for number in range(SIZE)], features) as (memory, ring, queue):
        def ring_used() -> int:
            number: int = struct.unpack_from("<H", memory.memory, ring.used + 2)[0]
            return number

        device = Vioblk(Watched(writable=True), Services(), Now())
        device.activate(features, [queue])  # without FLUSHES: writes are written through

        while device.on_notify(0):
            pass
        device.on_done()

        assert len(ring.reap()) == SIZE
    os.close(device.workers.done)
    if kind:
        assert flushes == [SIZE]
    else:
        assert heard == [number // ROUND * ROUND for number in range(SIZE)]
        assert heard[-1] > 0


def offer_two_reads(memory: GuestMemory, ring: Ring) -> None:
    """Offer a read of 1024 bytes and one of 512; their heads are 0 and 3."""
    for number, length in enumerate((1024, 512)):
        memory.write(HEADERS + 16 * number, struct.pack("<IIQ", 0, 0, 0))
        ring.add([Desc(HEADERS + 16 * number, 16), Desc(DATA, length, WRITE), Desc(HEADERS + 256, 1, WRITE)])


@pytest.mark.parametrize("failure", [None, errno.EAGAIN, errno.EIO], ids=["short", "would wait", "error"])
def test_a_read_that_does_not_wait_may_end_early(failure: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short or refused read from the page cache is repeated by a worker: the guest gets all of its data."""
    flags_seen = []

    def preadv(fd: int, views: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        flags_seen.append(flags)
        if flags and failure is not None:
            raise OSError(failure, os.strerror(failure))
        return PREADV(fd, [views[0][:100]] if flags else views, offset, flags)

    services, workers = ServedAgain(), Now()
    disk = disk_in_file(writable=True)
    device = services.device = Vioblk(disk, services, workers)
    monkeypatch.setattr(posix, "preadv", preadv)
    with GuestMemory.create(LAYOUT) as memory:
        ring = Ring(memory, SIZE)
        queue = Queue(memory, EVENT_IDX, SIZE, ring.desc, ring.avail, ring.used)
        device.activate(EVENT_IDX | FLUSHES, [queue])
        offer_two_reads(memory, ring)
        while device.on_notify(0):
            pass
        device.on_done()

        assert sorted(ring.reap()) == [(0, 1025), (3, 513)]
        assert memory.read(DATA, 1024) == CONTENT[:1024]
        assert memory.read(HEADERS + 256, 1) == b"\0"
        device.quiesce(forget=True)
        del queue  # its views on memory
    os.close(workers.done)
    disk.close()
    assert flags_seen[0]
    assert not all(flags_seen)


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a request of 1024 bytes fill what may be in flight with the workers."""
    monkeypatch.setattr("vmd.devices.vioblk.device.IN_FLIGHT_MAX_BYTES", 1024)
    monkeypatch.setattr("vmd.devices.vioblk.device.INLINE_MAX", 512)


@pytest.mark.usefixtures("small_limits")
def test_requests_left_in_the_ring_are_served_when_workers_have_finished() -> None:
    """The driver does not notify again, so the end of a request has to bring the device back to the ring."""
    services, workers = ServedAgain(), Held()
    device = services.device = Vioblk(MemoryDisk(writable=True), services, workers)
    with GuestMemory.create(LAYOUT) as memory:
        ring = Ring(memory, SIZE)
        queue = Queue(memory, EVENT_IDX, SIZE, ring.desc, ring.avail, ring.used)
        device.activate(EVENT_IDX | FLUSHES, [queue])
        offer_two_reads(memory, ring)
        assert not device.on_notify(0)
        assert queue.next_avail == 1
        workers.release()

        device.on_done()

        assert [head for head, _ in ring.reap()] == [0, 3]
        device.quiesce(forget=True)
        del queue  # its views on memory
    os.close(workers.done)


@pytest.mark.usefixtures("small_limits")
def test_pause_while_requests_were_left_in_the_ring() -> None:
    """Resumed, the device serves them, and asks to be notified of more."""
    workers = Held()
    device = Vioblk(MemoryDisk(writable=True), Services(), workers)
    with GuestMemory.create(LAYOUT) as memory:
        ring = Ring(memory, SIZE)
        queue = Queue(memory, EVENT_IDX, SIZE, ring.desc, ring.avail, ring.used)
        device.activate(EVENT_IDX | FLUSHES, [queue])
        offer_two_reads(memory, ring)
        assert not device.on_notify(0)
        assert queue.next_avail == 1
        workers.release()
        device.quiesce(forget=False)

        assert not device.on_notify(0)
        assert [head for head, _ in ring.reap()] == [0, 3]
        assert ring.avail_event == 2
        device.quiesce(forget=True)
        del queue  # its views on memory
    os.close(workers.done)


def settle(device: Vioblk, workers: Held) -> list[int]:
    """Ask a disk that stands still whether all is on stable storage, until it says so or that it cannot be."""
    said = [device.settle(), device.settle()]
    workers.release()
    device.on_done()
    return [*said, device.settle()]


def test_a_disk_is_settled_once_in_each_pause() -> None:
    """By one flush, however often it is asked; what is written after the pause needs another one."""
    workers, image = Held(), MemoryDisk(writable=True)
    device = Vioblk(image, Services(), workers)
    not_yet, done = devmsg.SETTLED_NOT_YET, devmsg.SETTLED
    for _ in range(2):
        device.quiesce(forget=False)

        assert settle(device, workers) == [not_yet, not_yet, done]
        assert device.settle() == done
    os.close(workers.done)


def test_a_disk_that_cannot_be_settled_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The failure is told once.  The next question begins another flush."""
    workers, image = Held(), MemoryDisk(writable=True)
    device = Vioblk(image, Services(), workers)
    device.quiesce(forget=False)

    def full() -> None:
        raise FlushFailed(errno.ENOSPC, "no room")

    with monkeypatch.context() as patch:
        patch.setattr(image, "flush", full)
        assert settle(device, workers)[-1] == devmsg.SETTLED_FAILED
    assert settle(device, workers)[-1] == devmsg.SETTLED
    os.close(workers.done)


def test_a_flush_of_our_own_does_not_hold_up_a_pause() -> None:
    """It may take as long as storage takes, and touches no ring; it does not count for the next pause."""
    workers = Held()
    device = Vioblk(MemoryDisk(writable=True), Services(), workers)
    device.quiesce(forget=False)
    assert device.settle() == devmsg.SETTLED_NOT_YET

    device.quiesce(forget=False)

    assert device.in_flight == 1
    assert settle(device, workers) == [devmsg.SETTLED_NOT_YET] * 3
    assert settle(device, workers)[-1] == devmsg.SETTLED
    os.close(workers.done)


def test_jobs_that_never_wait_for_each_other_share_one_thread() -> None:
    """A thread that has finished counts as idle: the next job starts no other."""
    workers = Workers(4)
    threads = set()
    wait = select.poll()
    wait.register(workers.done, select.POLLIN)
    for _ in range(10):
        workers.submit(lambda: threads.add(threading.get_ident()))
        assert wait.poll(20_000)
        os.eventfd_read(workers.done)

    assert len(threads) == 1
    assert workers.missing == 3


def test_jobs_that_wait_have_threads_of_their_own_up_to_the_limit() -> None:
    """Three jobs that wait for one another are carried out at a time; a fourth has to wait for a thread."""
    workers = Workers(3)
    together = threading.Barrier(4)
    rest = threading.Event()

    def meet() -> None:
        together.wait(20)

    for _ in range(3):
        workers.submit(meet)
    workers.submit(rest.set)

    assert workers.missing == 0
    assert not rest.is_set()
    together.wait(20)
    assert rest.wait(20)
