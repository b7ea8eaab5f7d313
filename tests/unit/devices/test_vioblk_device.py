"""A disk between its ring and its workers: who carries out a request, when it is safe, and what is logged."""

import contextlib
import errno
import gc
import os
import posix
import struct
from collections.abc import Iterator, Sequence

import pytest

from tests.support.fakedriver import DATA, EXTRA_END, INDIRECT_DESC, LAYOUT, NEXT, ROM, WRITE, Desc, Ring
from tests.unit.devices.test_vioblk_ring import (
    CONTENT,
    DISCARDS,
    DISK,
    FLUSHES,
    HEADERS,
    SIZE,
    TABLES,
    ZEROES,
    Held,
    MemoryDisk,
    Now,
    Row,
    Services,
    disk_in_memory_file,
    hot,
    reference,
    rings,
)
from vmd.devices.vioblk import device as module
from vmd.devices.vioblk.device import Vioblk
from vmd.errors import GuestError, HostError
from vmd.guestmem import GuestMemory
from vmd.images.hostfile import DataLost, FlushFailed
from vmd.ipc import devmsg
from vmd.virtio import spec
from vmd.virtio.queue import Queue
from vmd.vm.kinds import DISK as KIND

IN, OUT, FLUSH = spec.VIRTIO_BLK_T_IN, spec.VIRTIO_BLK_T_OUT, spec.VIRTIO_BLK_T_FLUSH
DISCARD, ZERO = spec.VIRTIO_BLK_T_DISCARD, spec.VIRTIO_BLK_T_WRITE_ZEROES
OK, IOERR = spec.VIRTIO_BLK_S_OK, spec.VIRTIO_BLK_S_IOERR
STATUS, SPAN = HEADERS + 256, DATA - 512
PLACES = {name: place for place, name in enumerate(devmsg.FIGURES["vioblk"])}


class Watched(MemoryDisk):
    """A disk in memory that keeps its calls.  A call may take time, or fail."""

    def __init__(self) -> None:
        super().__init__(writable=True)
        self.calls: list[str] = []
        self.failure: OSError | None = None

    def _called(self, name: str) -> None:
        self.calls.append(name)

    def preadv(self, offset: int, views: Sequence[memoryview]) -> None:
        """Keep the call."""
        self._called("read")
        super().preadv(offset, views)

    def pwritev(self, offset: int, views: Sequence[memoryview]) -> None:
        """Keep the call."""
        self._called("write")
        super().pwritev(offset, views)

    def flush(self) -> None:
        """Keep the call, and fail if the test wants that."""
        self._called("flush")
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """Keep the call, and fail if the test wants that."""
        self._called("close")
        if self.failure is not None:
            raise self.failure


class Seen(Services):
    """A process that looks at ring and figures when the guest is interrupted."""

    def __init__(self) -> None:
        super().__init__()
        self.drive: Drive | None = None
        self.looks: list[tuple[int, int]] = []

    def interrupt(self, queue: int) -> None:
        """Keep how many requests the guest finds in the ring and in the figures."""
        assert (queue, self.drive is None) == (0, False)
        assert self.drive is not None
        self.looks.append((self.drive.ring.device_idx, self.drive.figure("read_requests")))


class Drive:
    """A disk with a ring, and its driver, which sends indirect requests."""

    def __init__(self, memory: GuestMemory, features: int, workers: Now | None = None) -> None:
        self.memory = memory
        self.image = Watched()
        self.workers = workers or Now()
        self.services = Seen()
        self.services.drive = self
        self.disk = Vioblk(self.image, self.services, self.workers)
        self.ring = Ring(memory, SIZE)
        self.queue: Queue | None = Queue(memory, INDIRECT_DESC, SIZE, self.ring.desc, self.ring.avail, self.ring.used)
        self.disk.activate(INDIRECT_DESC | features, [self.queue])
        self.image.calls.clear()

    def offer(self, kind: int, *data: Desc) -> int:
        """Offer a request for sector 0 with its own header and status; return the head."""
        number = self.ring.avail_idx % SIZE
        self.memory.write(HEADERS + 512 * number, struct.pack("<IIQ", kind, 0, 0))
        self.memory.write(STATUS + 512 * number, b"\xee")
        parts = [Desc(HEADERS + 512 * number, 16), *data, Desc(STATUS + 512 * number, 1, WRITE)]
        return self.ring.add_indirect(parts, TABLES + 512 * number)

    def serve(self) -> None:
        """Let the device serve its ring, as after a notification."""
        while self.disk.on_notify(0):
            pass

    def ask(self, kind: int, *data: Desc) -> int:
        """Send a request; return its status, 0xee while it has none."""
        place = STATUS + 512 * (self.ring.avail_idx % SIZE)
        self.offer(kind, *data)
        self.serve()
        self.disk.on_done()
        return self.memory.read(place, 1)[0]

    def request(self, kind: int, length: int) -> int:
        """Send a request with `length` bytes of data, or with a range; return its status."""
        self.memory.write(SPAN, struct.pack("<QII", 0, 8, 0))
        data = {IN: Desc(DATA, length, WRITE), OUT: Desc(DATA, length), DISCARD: Desc(SPAN, 16), ZERO: Desc(SPAN, 16)}
        return self.ask(kind, *([data[kind]] if kind in data else []))

    def figure(self, name: str) -> int:
        """Return a counter."""
        found: int = self.services.figures[PLACES[name]]
        return found

    def close(self) -> None:
        """Release the memory."""
        if isinstance(self.workers, Held):
            self.workers.release()
        with contextlib.suppress(BlockingIOError):
            self.disk.quiesce(forget=True)
        self.queue = self.services.drive = None
        os.close(self.workers.done)


@contextlib.contextmanager
def driven(features: int = FLUSHES, workers: Now | None = None) -> Iterator[Drive]:
    """Yield a disk with its driver."""
    with GuestMemory.create(LAYOUT) as memory:
        made = Drive(memory, features, workers)
        yield made
        made.close()
        del made
        gc.collect()  # tracebacks of errors that were raised hold views of the memory


# --- when a request is done --------------------------------------------------------------------------------------

ON_MAIN, ON_WORKER = 512, 1024  # bytes of a request


@pytest.mark.parametrize(
    ("kind", "length", "through", "back"),
    [
        (OUT, ON_MAIN, ["write", "flush"], ["write"]), (OUT, ON_WORKER, ["write", "flush"], ["write"]),
        (ZERO, 0, ["flush"], []), (DISCARD, 0, [], []), (IN, ON_MAIN, ["read"], ["read"]),
        (IN, ON_WORKER, ["read"], ["read"]), (FLUSH, 0, ["flush"], ["flush"]),
    ],
)  # fmt: skip
def test_what_is_flushed(
    kind: int, length: int, through: list[str], back: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In write-through mode the data of a request is on stable storage before its answer; else nothing is flushed."""
    monkeypatch.setattr(module, "INLINE_MAX", ON_MAIN)
    for features, calls in ((0, through), (FLUSHES, back)):
        with driven(features | DISCARDS | ZEROES) as drive:
            assert drive.request(kind, length) == OK
            assert drive.image.calls == calls


@pytest.mark.parametrize("error", [FlushFailed, OSError])
@pytest.mark.parametrize(("kind", "length"), [(OUT, ON_MAIN), (OUT, ON_WORKER), (ZERO, 0), (FLUSH, 0)])
def test_a_request_that_is_not_on_stable_storage_fails(
    kind: int, length: int, error: type[OSError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest must not rely on it.  It is an error of the disk, and its bytes do not count."""
    monkeypatch.setattr(module, "INLINE_MAX", ON_MAIN)
    with driven(ZEROES) as drive:
        drive.image.failure = error(errno.EIO, "no answer")
        assert drive.request(kind, length) == IOERR
        counted = [drive.figure(name) for name in ("errors", "write_requests", "write_bytes", "zero_bytes")]
        assert counted == [1, 0, 0, 0]
        assert [length for _, length in drive.ring.reap()] == [1]
        drive.image.failure = None
        assert drive.request(kind, length) == OK


@pytest.mark.parametrize("kind", [IN, OUT])
def test_after_a_slow_transfer_workers_get_the_next_ones(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For as long as PENALTY says.  One that took just SLOW_S is not slow."""

    class Clock:
        now_s, takes_s = 100.0, 0.25

        def monotonic(self) -> float:
            return self.now_s

        def monotonic_ns(self) -> int:
            return int(self.now_s * 1e9)

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "SLOW_S", 0.25)
    monkeypatch.setattr(module, "PENALTY", 4)
    workers = Held()
    with driven(FLUSHES, workers) as drive:

        def slowly(name: str) -> None:
            clock.now_s += clock.takes_s

        monkeypatch.setattr(drive.image, "_called", slowly)
        assert drive.request(kind, 512) == OK
        clock.takes_s = 0.5
        assert drive.request(kind, 512) == OK
        clock.takes_s = 0.0
        until_s = clock.now_s + 2.0
        for clock.now_s in (until_s - 1.0, until_s - 0.125):
            assert drive.request(kind, 512) == 0xEE
            assert len(workers.held) == 1
            workers.release()
            drive.disk.on_done()
        clock.now_s = until_s
        assert drive.request(kind, 512) == OK
        assert workers.held == []


@pytest.mark.parametrize(
    ("number", "flags"), [(errno.EOPNOTSUPP, [True, False]), (errno.EIO, [True, True]), (errno.EAGAIN, [True, True])]
)
def test_storage_without_reads_that_do_not_wait(
    number: int, flags: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main thread then reads itself, and measures the time.  Any other failure is no reason to do that."""
    seen = []
    preadv = posix.preadv

    def read(fd: int, views: Sequence[memoryview], offset: int, how: int = 0) -> int:
        seen.append(bool(how))
        if how:
            raise OSError(number, os.strerror(number))
        return preadv(fd, views, offset)

    workers = Held()
    disk = disk_in_memory_file(writable=True)
    monkeypatch.setattr(posix, "preadv", read)
    with GuestMemory.create(LAYOUT) as memory:
        device = Vioblk(disk, Services(), workers)
        views = [memory.view(DATA, 512)]
        monkeypatch.setattr(disk, "preadv", lambda _offset, _views: seen.append(False))
        done = [device._read_now(0, views, 512) for _ in range(2)]
        assert done == [number == errno.EOPNOTSUPP] * 2
        assert seen == ([True, False, False] if number == errno.EOPNOTSUPP else flags)
        views[0].release()
    os.close(workers.done)
    disk.close()


# --- the ring and what is in flight ------------------------------------------------------------------------------


def test_a_full_ring_beside_a_flush_of_our_own() -> None:
    """The flush takes no place of the ring, so the driver may still fill it."""
    workers = Held()
    with driven(FLUSHES, workers) as drive:
        drive.disk.settle_ahead()
        assert drive.disk.settle() == devmsg.SETTLED_NOT_YET
        for _ in range(SIZE):
            drive.offer(FLUSH)
        drive.serve()
        assert (drive.disk.in_flight, len(workers.held)) == (SIZE + 1, SIZE + 1)
        workers.release()
        drive.disk.on_done()
        assert len(drive.ring.reap()) == SIZE
        assert (drive.disk.in_flight, drive.figure("in_flight")) == (0, 0)


@pytest.mark.parametrize("kind", [FLUSH, OUT])
def test_more_requests_than_the_ring_has_room_for(kind: int) -> None:
    """A driver that offers chains again before they come back has broken its ring: nothing else bounds the work."""
    workers = Held()
    data = [Desc(DATA, 512)] if kind == OUT else []
    with driven(0, workers) as drive:
        for _ in range(SIZE):
            drive.offer(kind, *data)
        drive.serve()
        for _ in range(SIZE):
            drive.offer(kind, *data)
        with pytest.raises(GuestError, match=f"more than {SIZE} requests in a queue of {SIZE}"):
            drive.serve()
        assert drive.disk.in_flight == SIZE + 1  # one more, as if for a flush of our own
        workers.release()


@pytest.mark.parametrize("count", [1, 3, SIZE])
def test_figures_are_not_behind_the_guest(count: int) -> None:
    """When the guest is interrupted for the last request, the figures have it."""
    with driven() as drive:
        for _ in range(count):
            drive.offer(IN, Desc(DATA, 512, WRITE))
        drive.serve()
        assert drive.services.looks[-1] == (count, count)
        assert drive.figure("read_bytes") == 512 * count


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> list[Held]:
    """Have the workers of the list do their jobs when the main thread waits for them."""
    workers: list[Held] = []

    class Poll:
        def register(self, fd: int, _events: int) -> None:
            self.fd = fd

        def poll(self, _timeout_ms: int) -> bool:
            for each in workers:
                each.release()
            return True

    monkeypatch.setattr("vmd.devices.vioblk.device.select.poll", Poll)
    return workers


@pytest.mark.parametrize("forget", [False, True])
def test_requests_in_flight_when_the_device_stops(wait: list[Held], forget: bool) -> None:
    """A pause waits for them.  A reset drops those that are not begun; that is no error of the disk."""
    workers = Held()
    with driven(FLUSHES | DISCARDS, workers) as drive:
        assert drive.request(DISCARD, 0) == drive.request(DISCARD, 0) == 0xEE
        wait.append(workers)
        drive.disk.quiesce(forget=forget)
        found = drive.image.content()
        assert found == (CONTENT if forget else b"\xdd" * 4096 + CONTENT[4096:])
        assert sorted(head for head, _ in drive.ring.reap()) == [0, 1]
        assert (drive.disk.in_flight, drive.figure("errors")) == (0, 0)
        assert drive.figure("discard_requests") == (0 if forget else 2)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(workers.done)  # it has taken all events
        assert not drive.disk.on_notify(0)
        assert drive.disk.cancelled is False
        wait.clear()


def test_a_request_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends with a sentence instead of a pause that never ends."""
    workers = Held()
    monkeypatch.setattr(module, "QUIESCE_TIMEOUT_S", -1.0)
    with driven(FLUSHES, workers) as drive:
        assert drive.ask(FLUSH) == 0xEE
        with pytest.raises(HostError, match="disk: requests did not end in") as raised:
            drive.disk.quiesce(forget=False)
        assert raised.value.number == errno.EIO
        workers.release()
        drive.disk.on_done()


@pytest.mark.parametrize("job", ["request", "batch", "size"])
def test_an_internal_error_of_a_worker_ends_the_process(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main thread raises it: a request without an answer would hang the guest."""

    class Broken(Exception):
        pass

    def fail(*_: object) -> None:
        raise Broken

    with driven(0 if job == "batch" else FLUSHES) as drive:
        monkeypatch.setattr(drive.image, "flush", fail)
        monkeypatch.setattr(drive.image, "grow", fail)
        with pytest.raises(Broken):  # noqa: PT012 - each of these steps may be the one
            if job == "size":
                drive.disk.resize(2 * DISK)
                drive.disk.on_done()
            else:
                drive.request(OUT if job == "batch" else FLUSH, 512)
        drive.disk.trouble = None


# --- what the log says -------------------------------------------------------------------------------------------


def test_failing_requests_are_logged(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the disk and the reason, and at a limited rate because a guest can cause them."""
    with driven() as drive:

        def fail(*_: object) -> None:
            raise OSError(errno.EIO, "no answer")

        monkeypatch.setattr(drive.image, "preadv", fail)
        assert [drive.request(IN, 512) for _ in range(50)] == [IOERR] * 50
        assert drive.figure("errors") == 50
    said = capfd.readouterr().err
    assert "request 0: disk: no answer" in said
    assert said.count("request 0") < 10


@pytest.mark.parametrize(
    ("error", "lost", "lines", "calls"),
    [
        (None, "", [], ["flush", "close"]),
        (OSError(errno.EIO, "no answer"), "", ["close: disk: no answer"], ["flush", "close"]),
        (OSError("disk: odd"), "", ["close: disk: odd"], ["flush", "close"]),
        (None, "lost", ["disk: is not flushed, because its lock is lost"], []),
    ],
)  # fmt: skip
def test_end_of_a_disk(
    error: OSError | None, lost: str, lines: list[str], calls: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """It is flushed and closed, even if the flush fails.  The same error twice is told once."""
    with driven() as drive:
        drive.image.failure = error
        drive.disk.hand_over.lost = lost
        drive.disk.close()
        assert drive.image.calls == calls
        drive.image.failure = None
    assert [line.partition(": ")[2] for line in capfd.readouterr().err.splitlines()] == lines


def test_lost_data_is_worse_than_a_failing_flush(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each step is reported once, to the VM and in the log; so is the end."""
    told: list[tuple[str, ...]] = []
    with driven() as drive:
        monkeypatch.setattr(drive.services, "report", lambda *troubles: told.append(troubles))
        for drive.image.failure in (
            FlushFailed(errno.EIO, "disk: no answer"), DataLost(errno.EIO, "lost"), DataLost(errno.EIO, "lost"), None,
        ):  # fmt: skip
            drive.request(FLUSH, 0)
    assert told == [("flush fails: no answer",), ("flush fails: lost",), ()]
    said = [line.partition(": ")[2] for line in capfd.readouterr().err.splitlines()]
    assert said == [
        "flush fails: disk: no answer", "flush fails: disk: lost", "disk: flush works again, and nothing was lost",
    ]  # fmt: skip


# --- bounds of memory and disk -----------------------------------------------------------------------------------

HEAD, INTO, LAST = (None, 16, NEXT, None), (None, 512, NEXT | WRITE, None), (None, 1, WRITE, 0)
EDGES: dict[str, tuple[list[Row], int]] = {
    "header ends": ([(EXTRA_END - 16, 16, NEXT, None), INTO, LAST], 0),
    "header is cut": ([(EXTRA_END - 15, 16, NEXT, None), INTO, LAST], 0),
    "data ends": ([HEAD, (EXTRA_END - 512, 512, NEXT | WRITE, None), LAST], 3),
    "data is cut": ([HEAD, (EXTRA_END - 511, 512, NEXT | WRITE, None), LAST], 3),
    "status ends": ([HEAD, INTO, (EXTRA_END - 1, 1, WRITE, 0)], 3),
    "status is outside": ([HEAD, INTO, (EXTRA_END, 1, WRITE, 0)], 3),
    "status is first": ([HEAD, INTO, (0, 1, WRITE, 0)], 3),
    "last sector": ([HEAD, INTO, LAST], DISK // 512 - 1),
    "behind the disk": ([HEAD, INTO, LAST], DISK // 512),
    "far behind": ([HEAD, INTO, LAST], (1 << 64) - 1),
    "many data are cut": ([HEAD, *[INTO] * 9, (EXTRA_END - 511, 512, NEXT | WRITE, None), LAST], 0),
    "a whole table": ([HEAD, *[INTO] * 9, LAST], 0),
}


PARTS = ((0, 16), (HEADERS, DATA + (64 << 10) - HEADERS), (EXTRA_END - 4096, 4096), (ROM, 4096))


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("kind", [IN, OUT])
def test_bounds(name: str, kind: int) -> None:
    """Up to its last byte memory and disk are used, and not beyond; the slow and simple way has the same results."""
    rows, sector = EDGES[name]
    if kind == OUT:
        rows = [(gpa, length, flags & ~WRITE if length == 512 else flags, then) for gpa, length, flags, then in rows]
    outcomes = []
    for serve in (reference, hot):
        disk = MemoryDisk(writable=True)
        with rings([((rows, kind, sector), True, 0)], INDIRECT_DESC) as (memory, ring, queue):
            error = serve(queue, disk, INDIRECT_DESC)
            outcomes.append((error, ring.reap(), disk.content(), [memory.read(*part) for part in PARTS]))
    assert outcomes[0] == outcomes[1]


def test_a_driver_may_use_all_descriptors_of_a_ring_but_two() -> None:
    """Header and status take one each."""
    assert KIND.queues[0] - 2 == module.SEG_MAX
