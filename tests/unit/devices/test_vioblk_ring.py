"""The hot loop of vioblk has the same results as a simple implementation, for any ring."""

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
from tests.support.ioworkers import end_workers
from vmd.devices.vioblk.device import ROUND, Vioblk, Workers
from vmd.devices.vioblk.request import Limits, carry_out, parse
from vmd.errors import GuestError
from vmd.guestmem import GuestMemory
from vmd.images.hostfile import FlushFailed
from vmd.images.raw import RawImage
from vmd.ipc import devmsg
from vmd.virtio import spec
from vmd.virtio.queue import Queue

Row = tuple[int | None, int, int, int | None]  # gpa (None: next free place), length, flags, next (None: following)
# (descriptors, type, sector), in an indirect table, extra bytes of that table
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
DATA_BYTES = 2 << 20  # more than all requests together have
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
        """Do nothing."""

    def reload(self) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""

    def preadv(self, offset: int, views: Sequence[memoryview]) -> None:
        """Read into the views."""
        for view in views:
            view[:] = self.bytes[offset : offset + len(view)]
            offset += len(view)

    def pwritev(self, offset: int, views: Sequence[memoryview]) -> None:
        """Write from the views."""
        for view in views:
            self.bytes[offset : offset + len(view)] = view
            offset += len(view)

    def flush(self) -> None:
        """Do nothing."""

    def discard(self, offset: int, length: int) -> None:
        """Fill with a pattern, so that the test can see it."""
        self.bytes[offset : offset + length] = b"\xdd" * length

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Fill with the value of `unmap`, so that the test can see it."""
        self.bytes[offset : offset + length] = bytes((unmap,)) * length

    def span(self, offset: int) -> tuple[bool, int]:
        """Return that all of the disk is data."""
        return True, DISK - offset

    def grow(self, size: int) -> None:
        """Do nothing."""

    def content(self) -> bytes:
        """Return the content."""
        return bytes(self.bytes)

    def close(self) -> None:
        """Do nothing."""


class FileDisk(RawImage):
    """A disk in a file.  The hot loop reads and writes the file directly, without the image's methods."""

    def __init__(self, fd: int, writable: bool) -> None:
        os.pwrite(fd, CONTENT, 0)
        super().__init__(fd, "disk", writable=writable)

    def discard(self, offset: int, length: int) -> None:
        """Fill with a pattern, as above.  A real hole would depend on the file system."""
        os.pwrite(self.fd, b"\xdd" * length, offset)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Fill with the value of `unmap`, as above."""
        os.pwrite(self.fd, bytes((unmap,)) * length, offset)

    def content(self) -> bytes:
        """Return the content."""
        return os.pread(self.fd, DISK, 0)


def disk_in_memory_file(writable: bool) -> FileDisk:
    """Return a disk on a file system without RWF_NOWAIT."""
    return FileDisk(os.memfd_create("disk"), writable)


def disk_in_file(writable: bool) -> FileDisk:
    """Return a disk on a file system that may have RWF_NOWAIT."""
    return FileDisk(os.open(tempfile.gettempdir(), os.O_RDWR | os.O_TMPFILE), writable)


Disk = MemoryDisk | FileDisk
DISKS: list[Callable[[bool], Disk]] = [MemoryDisk, disk_in_memory_file, disk_in_file]


class Now(Workers):
    """Workers that finish a job in `submit`."""

    def __init__(self) -> None:
        self.done = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def submit(self, job: Callable[[], None]) -> None:
        """Do a job."""
        job()
        os.eventfd_write(self.done, 1)


class Held(Now):
    """Workers that do their jobs in `release`."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[Callable[[], None]] = []

    def submit(self, job: Callable[[], None]) -> None:
        """Keep a job."""
        self.held.append(job)

    def release(self) -> None:
        """Do all jobs."""
        while self.held:
            super().submit(self.held.pop())


class Services:
    """A device process without a guest."""

    def __init__(self) -> None:
        self.figures = unseen("vioblk")

    def interrupt(self, queue: int) -> None:
        """Do nothing."""

    def watch(self, fd: int, handler: Callable[[], None]) -> None:
        """Do nothing."""

    def serve(self, number: int) -> None:
        """Do nothing."""

    def call_after(self, delay_s: float, handler: Callable[[], None]) -> None:
        """Do nothing."""

    def report(self, *troubles: str) -> None:
        """Do nothing."""

    def lock_lost(self, why: str) -> None:
        """Fail, because no lock is lost in these tests."""
        raise AssertionError(why)

    def tell_config(self) -> None:
        """Do nothing."""

    def changed(self, error: OSError | None = None) -> None:
        """Do nothing."""


class ServedAgain(Services):
    """A process that serves the device's queue again on request."""

    def __init__(self) -> None:
        super().__init__()
        self.device: Vioblk | None = None

    def serve(self, number: int) -> None:
        """Serve the queue at once."""
        assert self.device is not None
        assert number == 0  # the only queue
        self.device.on_notify(number)


# Mostly the values of real drivers, and some of everything else.
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
    """Return a read or write as real drivers send it."""
    kind = draw(st.sampled_from([0, 1]))
    lengths = draw(st.lists(st.sampled_from(pieces), min_size=1, max_size=3))
    flags = NEXT | (0 if kind else WRITE)
    data: list[Row] = [(None, length, flags, None) for pair in lengths for length in pair]
    return [(None, 16, NEXT, None), *data, (None, 1, WRITE, None)], kind, draw(st.integers(0, 62))


@st.composite
def nearly_usual(draw: st.DrawFn, pieces: list[list[int]]) -> tuple[list[Row], int, int]:
    """Return a usual request with one other field."""
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
ODD_BYTES = st.sampled_from([0, 0, 0, 0, 0, 1, 8, 16])  # bytes of an indirect table after its descriptors
REQUESTS = st.one_of(
    st.tuples(st.one_of(CHAINS, usual(SHORT), nearly_usual(SHORT), nearly_usual(SHORT)), st.booleans(), ODD_BYTES),
    st.tuples(st.one_of(usual(LONG), nearly_usual(LONG), nearly_usual(LONG)), st.just(True), st.just(0)),
)


def build(memory: GuestMemory, requests: Requests) -> Ring:
    """Put requests into a ring.  No two descriptors share memory, except for wrong ones."""
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
    """Yield new memory, a ring of the driver and the queue of the device."""
    with GuestMemory.create(LAYOUT) as memory:
        ring = build(memory, requests)
        queue = Queue(memory, features, SIZE, ring.desc, ring.avail, ring.used)
        try:
            yield memory, ring, queue
        finally:
            release(queue)


def reference(queue: Queue, disk: Disk, features: int) -> str:
    """Serve all requests in the simplest way.  Return the error that stopped it, or ""."""
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
    """Return whether the status byte of a request is in a buffer of another one, so that the order matters."""
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
    """Serve all requests as the device does.  Return the error that stopped it, or ""."""
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
def test_hot_loop_has_the_results_of_the_reference(
    make: Callable[[bool], Disk], requests: Requests, writable: bool, features: int
) -> None:
    """Memory, disk, used elements and error are the same.  Only the order of completion is free."""
    with rings(requests, features) as (_, _, queue):
        assume(not entangled(queue))
    outcomes = []
    for serve in (reference, hot):
        disk = make(writable)
        with rings(requests, features) as (memory, ring, queue):
            error = serve(queue, disk, features)
            used = sorted(ring.reap())
            guest = memory.read(HEADERS, DATA + DATA_BYTES - HEADERS) + memory.read(EXTRA - 4096, 8192)
            # After an error the position in the ring does not matter, because only a reset follows.
            outcomes.append((error, used, error or queue.next_avail, disk.content(), guest))
        disk.close()
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("kind", [0, 1], ids=["reads", "writes"])
def test_each_round_is_published_before_the_next_one(kind: int) -> None:
    """The guest can handle a round while the next one is served.  One flush serves the writes of all rounds."""
    published: list[int] = []  # for each request: how many requests the guest could see as used
    flushes = []

    class Watched(MemoryDisk):
        def preadv(self, offset: int, views: Sequence[memoryview]) -> None:
            published.append(ring_used())
            super().preadv(offset, views)

        def pwritev(self, offset: int, views: Sequence[memoryview]) -> None:
            published.append(ring_used())
            super().pwritev(offset, views)

        def flush(self) -> None:
            flushes.append(len(published))

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
        assert published == [number // ROUND * ROUND for number in range(SIZE)]
        assert published[-1] > 0


def offer_two_reads(memory: GuestMemory, ring: Ring) -> None:
    """Offer a read of 1024 bytes and one of 512; their heads are 0 and 3."""
    for number, length in enumerate((1024, 512)):
        memory.write(HEADERS + 16 * number, struct.pack("<IIQ", 0, 0, 0))
        ring.add([Desc(HEADERS + 16 * number, 16), Desc(DATA, length, WRITE), Desc(HEADERS + 256, 1, WRITE)])


@pytest.mark.parametrize("failure", [None, errno.EAGAIN, errno.EIO], ids=["short", "would wait", "error"])
def test_a_read_that_does_not_wait_may_end_early(failure: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a short or refused read from the page cache, a worker reads again, so the guest gets all data."""
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
    """Set limits so that one request of 1024 bytes is all that the workers may have in flight."""
    monkeypatch.setattr("vmd.devices.vioblk.device.IN_FLIGHT_MAX_BYTES", 1024)
    monkeypatch.setattr("vmd.devices.vioblk.device.INLINE_MAX", 512)


@pytest.mark.usefixtures("small_limits")
def test_requests_left_in_the_ring_are_served_when_workers_have_finished() -> None:
    """The driver does not notify again, so the device must read the ring when a request ends."""
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
    """After the pause the device serves them, and enables notifications."""
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
    """Return three answers of a paused disk whether its data is on stable storage.  The last one is final."""
    said = [device.settle(), device.settle()]
    workers.release()
    device.on_done()
    return [*said, device.settle()]


def test_a_disk_is_settled_once_in_each_pause() -> None:
    """Several questions in a pause cause one flush.  The next pause needs another one."""
    workers, image = Held(), MemoryDisk(writable=True)
    device = Vioblk(image, Services(), workers)
    not_yet, done = devmsg.SETTLED_NOT_YET, devmsg.SETTLED
    for _ in range(2):
        device.quiesce(forget=False)

        assert settle(device, workers) == [not_yet, not_yet, done]
        assert device.settle() == done
    os.close(workers.done)


def test_a_disk_that_cannot_be_settled_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The failure is reported once.  The next question begins another flush."""
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


def test_our_own_flush_does_not_delay_a_pause() -> None:
    """The flush may take long, and does not use a ring.  It does not count for the next pause."""
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
    """A thread that has finished its job is idle, so the next job starts no other thread."""
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
    end_workers(workers, 4)


def test_jobs_that_wait_have_threads_of_their_own_up_to_the_limit() -> None:
    """Three jobs that wait for one another run at the same time.  A fourth job waits for a thread."""
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
    end_workers(workers, 3)
