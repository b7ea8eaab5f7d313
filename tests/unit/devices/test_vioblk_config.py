"""The configuration space and the counters of a disk, without a process."""

import errno
import gc
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest

from tests.support.fakedriver import DATA, EVENT_IDX, LAYOUT, WRITE, Desc, Ring
from tests.support.ioworkers import end_workers
from tests.unit.devices.test_vioblk_ring import CONTENT, DISK, FLUSHES, HEADERS, SIZE, Held, MemoryDisk, Now, Services
from vmd.devices.vioblk import device as vioblk
from vmd.devices.vioblk.device import Vioblk, Workers
from vmd.devices.vioblk.request import DISCARD_MAX_SECTORS, WRITE_ZEROES_MAX_SECTORS
from vmd.guestmem import GuestMemory
from vmd.images.hostfile import FlushFailed
from vmd.ipc.devmsg import FIGURES
from vmd.virtio import spec
from vmd.virtio.queue import Queue

WCE = 1 << spec.VIRTIO_BLK_F_CONFIG_WCE
DISCARDS, ZEROES = 1 << spec.VIRTIO_BLK_F_DISCARD, 1 << spec.VIRTIO_BLK_F_WRITE_ZEROES
ALWAYS = 1 << spec.VIRTIO_BLK_F_SEG_MAX | 1 << spec.VIRTIO_BLK_F_BLK_SIZE | FLUSHES
WRITEBACK = 32  # offset in the configuration space
PLACES = {name: place for place, name in enumerate(FIGURES["vioblk"])}


def new(*, writable: bool = True, granularity: int = 4096, size: int = DISK) -> Vioblk:
    """Return a disk of a VM."""
    image = MemoryDisk(writable)
    image.discard_granularity, image.size = granularity, size
    return Vioblk(image, Services(), Now())


def test_configuration_of_a_disk_that_is_written() -> None:
    """Each field has its value (5.2.4)."""
    disk = new(size=DISK + 511)
    space = disk.config
    assert struct.unpack_from("<Q", space, 0) == (DISK // 512,)
    assert struct.unpack_from("<I", space, 12) == (vioblk.SEG_MAX,)
    assert struct.unpack_from("<I", space, 20) == (512,)
    assert space[WRITEBACK] == 1
    most, ranges, alignment, zeroes, zero_ranges, unmap = struct.unpack_from("<5IB", space, 36)
    assert (alignment, unmap) == (8, 1)
    assert (most, zeroes) == (DISCARD_MAX_SECTORS // 8 * 8, WRITE_ZEROES_MAX_SECTORS // 8 * 8)
    assert min(ranges, zero_ranges) >= 1
    assert len(space) == 60
    assert disk.features == ALWAYS | WCE | DISCARDS | ZEROES
    os.close(disk.workers.done)


def test_configuration_of_a_disk_that_is_only_read() -> None:
    """Features and fields for requests that write are absent."""
    disk = new(writable=False)
    assert disk.features == ALWAYS | 1 << spec.VIRTIO_BLK_F_RO
    assert disk.config[36:] == bytes(24)
    os.close(disk.workers.done)


def test_the_most_zeroes_of_a_request_are_never_0() -> None:
    """If a cluster is larger than the most that one request may zero, that maximum is not rounded down to 0."""
    granularity = 2 * WRITE_ZEROES_MAX_SECTORS * 512
    disk = new(granularity=granularity)
    _, _, alignment, zeroes = struct.unpack_from("<4I", disk.config, 36)
    assert (alignment, zeroes) == (granularity // 512, WRITE_ZEROES_MAX_SECTORS)
    os.close(disk.workers.done)


class Driven:
    """A disk with a ring, and its driver."""

    def __init__(self, memory: GuestMemory, features: int, workers: Now | None = None) -> None:
        self.memory = memory
        self.image = MemoryDisk(writable=True)
        self.workers = workers or Now()
        self.services = Services()
        self.disk = Vioblk(self.image, self.services, self.workers)
        self.ring = Ring(memory, SIZE)
        self.queue: Queue | None = Queue(memory, EVENT_IDX, SIZE, self.ring.desc, self.ring.avail, self.ring.used)
        self.disk.activate(EVENT_IDX | features, [self.queue])

    def ask(self, kind: int, sector: int, *data: Desc) -> int:
        """Send a request, and return its status."""
        self.memory.write(HEADERS, struct.pack("<IIQ", kind, 0, sector))
        self.memory.write(HEADERS + 256, b"\xee")
        self.ring.add([Desc(HEADERS, 16), *data, Desc(HEADERS + 256, 1, WRITE)])
        while self.disk.on_notify(0):
            pass
        self.disk.on_done()
        return self.memory.read(HEADERS + 256, 1)[0]

    def figure(self, name: str) -> int:
        """Return a counter."""
        found: int = self.disk.figures[PLACES[name]]
        return found

    def close(self) -> None:
        """Release the memory."""
        self.disk.quiesce(forget=True)
        self.queue = None
        os.close(self.workers.done)


@pytest.fixture
def drive() -> Iterator[Callable[..., Driven]]:
    """Yield a function that makes a disk with a driver."""
    made: list[Driven] = []
    with GuestMemory.create(LAYOUT) as memory:

        def make(features: int = 0, workers: Now | None = None) -> Driven:
            made.append(Driven(memory, features, workers))
            return made[-1]

        yield make
        for each in made:
            each.close()
        gc.collect()  # tracebacks of errors that were raised hold views of the memory


def test_the_figures_of_a_disk(drive: Callable[..., Driven]) -> None:
    """Each kind of request has its own counters of requests and bytes.  Errors and refused requests have theirs."""
    driven = drive(FLUSHES | DISCARDS | ZEROES)
    span = struct.pack("<QII", 8, 8, 0)
    driven.memory.write(DATA + 8192, span)
    spans = Desc(DATA + 8192, 16)
    before = {name: driven.figure(name) for name in PLACES}

    assert driven.ask(spec.VIRTIO_BLK_T_IN, 0, Desc(DATA, 1024, WRITE)) == spec.VIRTIO_BLK_S_OK
    assert driven.memory.read(DATA, 1024) == CONTENT[:1024]
    assert driven.ask(spec.VIRTIO_BLK_T_OUT, 4, Desc(DATA, 512)) == spec.VIRTIO_BLK_S_OK
    assert driven.ask(spec.VIRTIO_BLK_T_OUT, 4, Desc(DATA, 1536)) == spec.VIRTIO_BLK_S_OK
    assert driven.ask(spec.VIRTIO_BLK_T_FLUSH, 0) == spec.VIRTIO_BLK_S_OK
    assert driven.ask(spec.VIRTIO_BLK_T_DISCARD, 0, spans) == spec.VIRTIO_BLK_S_OK
    assert driven.ask(spec.VIRTIO_BLK_T_WRITE_ZEROES, 0, spans) == spec.VIRTIO_BLK_S_OK
    assert driven.ask(spec.VIRTIO_BLK_T_IN, DISK // 512, Desc(DATA, 512, WRITE)) == spec.VIRTIO_BLK_S_IOERR
    assert driven.ask(77, 0, Desc(DATA, 512, WRITE)) == spec.VIRTIO_BLK_S_UNSUPP

    after = {name: driven.figure(name) - before[name] for name in PLACES}
    counted = {name: value for name, value in after.items() if value and not name.endswith("_ns")}
    assert counted == {
        "read_requests": 1, "read_bytes": 1024, "write_requests": 2, "write_bytes": 2048, "flush_requests": 1,
        "discard_requests": 1, "discard_bytes": 4096, "zero_requests": 1, "zero_bytes": 4096, "errors": 1, "refused": 1,
    }  # fmt: skip
    for name in ("read_ns", "write_ns", "busy_ns"):
        assert 0 < after[name] < 120_000_000_000


@pytest.mark.parametrize(
    ("accepted", "through", "then"),
    [(0, True, True), (FLUSHES, False, False), (WCE, True, True), (FLUSHES | WCE, False, True)],
)
def test_when_a_write_is_done(drive: Callable[..., Driven], accepted: int, through: bool, then: bool) -> None:
    """5.2.6.2: a write is done when the image has it if the driver can flush, and else when it is on stable storage.

    A write to `writeback` changes that only if the driver accepted CONFIG_WCE.
    """
    driven = drive(accepted)
    disk = driven.disk
    assert disk.write_through == through

    disk.write_config(WRITEBACK, b"\0")

    assert disk.write_through == then
    driven.disk.on_done()


def test_writes_that_were_acknowledged_are_flushed_when_the_mode_changes(drive: Callable[..., Driven]) -> None:
    """Several changes before the flush is done cause one flush.  A write without a change causes none."""
    workers = Held()
    driven = drive(FLUSHES | WCE, workers)
    disk = driven.disk
    disk.write_config(WRITEBACK, b"\1")
    assert workers.held == []
    for _ in range(3):
        disk.write_config(WRITEBACK, b"\0")
        disk.write_config(WRITEBACK, b"\1")
    assert len(workers.held) == 1
    workers.release()
    disk.on_done()
    disk.write_config(WRITEBACK, b"\0")
    assert len(workers.held) == 1
    workers.release()
    disk.on_done()


@pytest.mark.parametrize(
    ("offset", "data", "kept"),
    [
        (WRITEBACK, b"\0", 0), (WRITEBACK, b"\2", 0), (WRITEBACK, b"\3", 1), (WRITEBACK - 1, b"\1\0", 0),
        (WRITEBACK - 1, b"\0", 1), (WRITEBACK + 1, b"\0", 1), (0, bytes(60), 0), (WRITEBACK - 4, bytes(4), 1),
    ],
)  # fmt: skip
def test_one_bit_of_the_configuration_can_be_written(offset: int, data: bytes, kept: int) -> None:
    """It is the lowest bit of `writeback`, written by an access of any width.  All other bits stay."""
    disk = new()
    before = disk.config

    disk.write_config(offset, data)

    assert disk.config == before[:WRITEBACK] + bytes((kept,)) + before[WRITEBACK + 1 :]
    os.close(disk.workers.done)


def test_a_disk_that_grows_reports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest gets the new capacity, and the VM the success.  If it cannot grow, the VM only gets the error."""
    disk = new()
    told: list[object] = []
    monkeypatch.setattr(disk.services, "tell_config", lambda: told.append("config"))
    monkeypatch.setattr(disk.services, "changed", lambda error=None: told.append(error))

    def grow(size: int) -> None:
        disk.image.size = size

    monkeypatch.setattr(disk.image, "grow", grow)
    disk.resize(DISK * 2 + 100)
    disk.on_done()
    assert told == ["config", None]
    assert struct.unpack_from("<Q", disk.config, 0) == (DISK * 2 // 512,)
    assert (disk.size, disk.limits.size, disk.figures[vioblk.SIZE]) == (DISK * 2, DISK * 2, DISK * 2)

    full = OSError(errno.ENOSPC, "full")

    def fail(_size: int) -> None:
        raise full

    monkeypatch.setattr(disk.image, "grow", fail)
    told.clear()
    disk.resize(DISK * 4)
    disk.on_done()
    assert (told, disk.size) == ([full], DISK * 2)
    os.close(disk.workers.done)


@pytest.mark.parametrize(
    ("remark", "flushes", "lock", "reported"),
    [
        ("", "", "", ()),
        ("left dirty", "", "", ("left dirty",)),
        ("left dirty", "flush fails: full", "lost", ("lost", "flush fails: full", "left dirty")),
    ],
)
def test_all_troubles_of_a_disk_are_reported(
    monkeypatch: pytest.MonkeyPatch, remark: str, flushes: str, lock: str, reported: tuple[str, ...]
) -> None:
    """Each report has all troubles.  A trouble that is missing in a report has ended."""
    disk = new()
    told: list[tuple[str, ...]] = []
    monkeypatch.setattr(disk.services, "report", lambda *troubles: told.append(troubles))
    disk.image.remark, disk.flush_trouble = remark, flushes
    disk.lock_reported = disk.lock_trouble = lock

    disk.resize(DISK)
    disk.on_done()

    assert told == [reported]
    os.close(disk.workers.done)


def test_failing_flushes_are_reported_once(
    drive: Callable[..., Driven], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The next report comes when flushes work again, or when a failure is worse."""
    driven = drive(FLUSHES)
    told: list[tuple[str, ...]] = []
    monkeypatch.setattr(driven.services, "report", lambda *troubles: told.append(troubles))
    failing = [True, True, False, False]

    def flush() -> None:
        if failing.pop(0):
            raise FlushFailed(errno.ENOSPC, "no room")

    monkeypatch.setattr(driven.image, "flush", flush)
    answers = [driven.ask(spec.VIRTIO_BLK_T_FLUSH, 0) for _ in range(4)]

    assert answers == [spec.VIRTIO_BLK_S_IOERR] * 2 + [spec.VIRTIO_BLK_S_OK] * 2
    assert told == [("flush fails: no room",), ()]
    said = capfd.readouterr().err
    assert said.count("flush fails: disk: no room") == 1
    assert said.count("flush works again") == 1
    assert driven.figure("errors") == 2


def test_threads_have_names() -> None:
    """A list of threads shows these names."""
    workers = Workers(1)
    found: SimpleQueue[str] = SimpleQueue()

    workers.submit(lambda: found.put(Path("/proc/thread-self/comm").read_text()))

    assert found.get(timeout=60) == "io\n"
    end_workers(workers, 1)
