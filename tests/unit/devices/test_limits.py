"""Limited disks and interfaces pass as much each second as their limits allow, by a fake clock."""

import os
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from tests.support.fakedriver import DATA, EVENT_IDX, LAYOUT, NEXT, WRITE, Desc, Ring, release
from tests.support.figures import unseen
from tests.support.packets import any_frame
from tests.support.packettap import PacketTap
from vmd.devices import bucket
from vmd.devices.bucket import KEPT_S, LEAST_S, Bucket, Throttled
from vmd.devices.vioblk.device import ROUND, Vioblk, Workers
from vmd.devices.vionet.receive import Receiver
from vmd.devices.vionet.transmit import Transmitter
from vmd.devices.vionet.worker import NEVER
from vmd.guestmem import GuestMemory
from vmd.images.raw import RawImage
from vmd.ipc import devmsg
from vmd.virtio import spec
from vmd.virtio.queue import Queue

SIZE = 64
HEADERS, STATUSES = DATA - 0x8000, DATA - 0x4000
DISK_BYTES = 1 << 20
SECONDS = 2


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        """Return seconds."""
        return self.now_s

    def monotonic_ns(self) -> int:
        """Return nanoseconds."""
        return int(self.now_s * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return the fake clock of all buckets."""
    made = Clock()
    monkeypatch.setattr(bucket, "time", made)
    return made


# --- disks -----------------------------------------------------------------------------------------------------


class Services:
    """The process of a disk.  It keeps the timer for the test."""

    def __init__(self) -> None:
        self.figures = unseen("vioblk")
        self.timer: tuple[float, Callable[[], None]] | None = None
        self.device: Vioblk | None = None

    def interrupt(self, queue: int) -> None:
        """Do nothing."""

    def watch(self, fd: int, handler: Callable[[], None]) -> None:
        """Do nothing."""

    def serve(self, number: int) -> None:
        """Serve the queue at once."""
        assert self.device is not None
        while self.device.on_notify(number):
            pass
        self.device.on_done()

    def call_after(self, delay_s: float, handler: Callable[[], None]) -> None:
        """Keep the timer."""
        assert delay_s > 0
        self.timer = delay_s, handler

    def report(self, *troubles: str) -> None:
        """Do nothing."""

    def tell_config(self) -> None:
        """Do nothing."""

    def lock_lost(self, why: str) -> None:
        """Fail, because no lock is lost in these tests."""
        raise AssertionError(why)

    def changed(self, error: OSError | None = None) -> None:
        """Do nothing."""


class Now(Workers):
    """Workers that finish a job in `submit`."""

    def __init__(self) -> None:
        self.done = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def submit(self, job: Callable[[], None]) -> None:
        """Do a job."""
        job()
        os.eventfd_write(self.done, 1)


class Disk:
    """A limited disk, and a driver that keeps its ring full."""

    def __init__(self, clock: Clock, bytes_each: int, *, kind: int = spec.VIRTIO_BLK_T_IN) -> None:
        self.clock = clock
        fd = os.memfd_create("disk")
        os.truncate(fd, DISK_BYTES)
        self.services = Services()
        self.device = self.services.device = Vioblk(RawImage(fd, "disk", writable=True), self.services, Now())
        self.memory = GuestMemory.create(LAYOUT)
        self.ring = Ring(self.memory, SIZE)
        self.queue = Queue(self.memory, EVENT_IDX, SIZE, self.ring.desc, self.ring.avail, self.ring.used)
        self.device.activate(EVENT_IDX | 1 << spec.VIRTIO_BLK_F_FLUSH, [self.queue])
        self.memory.load(HEADERS, struct.pack("<IIQ", kind, 0, 0))
        data = NEXT if kind == spec.VIRTIO_BLK_T_OUT else NEXT | WRITE
        self.heads = SIZE // 3
        for head in range(self.heads):
            parts = [Desc(HEADERS, 16, NEXT), Desc(DATA, bytes_each, data), Desc(STATUSES + head, 1, WRITE)]
            self.ring.describe(3 * head, [part._replace(next=3 * head + i + 1) for i, part in enumerate(parts)])
            self.ring.offer(3 * head)

    def served(self) -> int:
        """Return how many requests were served since the last call, and offer them again."""
        heads = [head for head, _ in self.ring.reap()]
        for head in heads:
            self.ring.offer(head)
        return len(heads)

    def run(self, seconds: float) -> int:
        """Let time pass.  Return how many requests were served."""
        until_s = self.clock.now_s + seconds
        total = 0
        self.services.serve(0)
        while True:
            total += (found := self.served())
            if found:
                self.services.serve(0)
                continue
            assert self.services.timer is not None
            delay_s, handler = self.services.timer
            if self.clock.now_s + delay_s > until_s:
                self.clock.now_s = until_s
                return total
            self.clock.now_s += delay_s
            handler()

    def throttled(self) -> tuple[int, int]:
        """Return how often, and for how many ns, requests had to wait."""
        figures = dict(zip(devmsg.FIGURES["vioblk"], self.services.figures, strict=True))
        return figures["throttled"], figures["throttled_ns"]

    def close(self) -> None:
        """Release all resources."""
        self.device.quiesce(forget=True)
        self.device.close()
        os.close(self.device.workers.done)
        release(self.queue)
        del self.queue, self.device, self.services.device
        self.memory.close()


@pytest.fixture
def disk(clock: Clock) -> Iterator[Disk]:
    """Yield a disk whose guest reads 4 KiB at a time."""
    made = Disk(clock, 4096)
    yield made
    made.close()


@pytest.mark.parametrize("iops", [1, 3, 7, 50, 999])
def test_requests_of_a_disk(disk: Disk, iops: int) -> None:
    """The number of requests a second is limited."""
    disk.device.limit(iops, 0)
    served = disk.run(SECONDS)
    assert 0 <= served - iops * SECONDS + max(1, iops // 50) <= 2 * max(1, iops * KEPT_S) + ROUND
    times, waited_ns = disk.throttled()
    assert times
    assert 0 < waited_ns <= SECONDS * 1e9


@pytest.mark.parametrize(
    ("rate", "each"), [(64 << 10, 512), (64 << 10, 256 << 10), (1_000_000, 4096), (100 << 20, 256 << 10)]
)
def test_bytes_of_a_disk(clock: Clock, rate: int, each: int) -> None:
    """The bytes a second are limited for small and large requests, even if one has more bytes than pass in a second."""
    made = Disk(clock, each)
    made.device.limit(0, rate)
    passed = made.run(SECONDS) * each
    most_at_once = ROUND * each + rate * KEPT_S
    assert -most_at_once <= passed - rate * SECONDS <= 2 * most_at_once
    made.close()


def test_both_limits_of_a_disk(disk: Disk) -> None:
    """The limit that is reached first counts."""
    disk.device.limit(1000, 64 << 10)
    assert abs(disk.run(SECONDS) * 4096 - SECONDS * (64 << 10)) <= 2 * (ROUND * 4096 + (64 << 10))
    disk.device.limit(5, 1 << 30)
    assert abs(disk.run(SECONDS) - SECONDS * 5) <= ROUND


def test_writes_count_like_reads(clock: Clock) -> None:
    """The limit holds for writes too."""
    made = Disk(clock, 4096, kind=spec.VIRTIO_BLK_T_OUT)
    made.device.limit(100, 0)
    assert abs(made.run(SECONDS) - SECONDS * 100) <= ROUND + 10
    made.close()


def test_a_limit_that_is_lifted_while_requests_wait(disk: Disk) -> None:
    """The requests are served at once.  Later time does not count as throttled."""
    disk.device.limit(1, 0)
    disk.run(3)
    assert disk.device.throttled.now
    disk.device.limit(0, 0)
    before = disk.throttled()
    assert disk.served() == disk.heads
    disk.clock.now_s += 5
    disk.services.serve(0)
    assert disk.throttled() == before


def test_waiting_requests_do_not_delay_a_pause(disk: Disk) -> None:
    """They stay in the ring, and are served after the pause."""
    disk.device.limit(1, 0)
    disk.run(1)
    disk.device.quiesce(forget=False)
    assert disk.device.in_flight == 0
    served = disk.run(10)
    assert abs(served - 10) <= 2


def test_an_idle_guest_is_not_throttled(clock: Clock) -> None:
    """Time counts as throttled only while requests wait."""
    made = Disk(clock, 4096)
    made.device.limit(made.heads, 0)
    clock.now_s += 1
    made.services.serve(0)
    while made.ring.reap():
        clock.now_s += 1
        made.services.serve(0)
    before = made.throttled()
    for _ in range(10):
        clock.now_s += 0.001
        made.services.serve(0)
    assert made.throttled() == before
    assert not made.device.throttled.now
    made.close()


# --- interfaces ------------------------------------------------------------------------------------------------


class NoThreads:
    """A process without threads, which ignores all calls."""

    def __init__(self) -> None:
        self.figures = unseen("vionet")

    def interrupt(self, queue: int) -> None:
        """Do nothing."""

    def post(self, job: Callable[[], None]) -> None:
        """Do nothing."""

    def broke(self, text: str) -> None:
        """Fail, because no ring is broken in these tests."""
        raise AssertionError(text)


FRAME = any_frame(1000)


class Wire:
    """One queue of a limited interface, without its thread, and the other end of its tap."""

    def __init__(self, clock: Clock, rate: int) -> None:
        self.clock = clock
        self.host, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.host.setblocking(False)
        self.tap = PacketTap(ours.detach())
        self.kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.memory = GuestMemory.create(LAYOUT)
        self.ring = Ring(self.memory, SIZE)
        self.queue = Queue(self.memory, EVENT_IDX, SIZE, self.ring.desc, self.ring.avail, self.ring.used)
        self.worker = self.made()
        self.worker.link_up = True
        self.worker.queue = self.queue
        self.worker.limit(rate)

    def made(self) -> Transmitter | Receiver:
        """Return the device's worker for this queue."""
        raise NotImplementedError

    def refill(self) -> None:
        """Provide more frames."""
        raise NotImplementedError

    def run(self, seconds: float) -> int:
        """Let time pass and serve the queue as its thread does.  Return how many bytes have passed."""
        until_s, before = self.clock.now_s + seconds, self.worker.bytes
        while True:
            self.refill()
            self.worker.turn()
            if self.worker.throttled.now:
                if self.worker.until_s > until_s:
                    self.clock.now_s = until_s
                    return self.worker.bytes - before
                self.clock.now_s = self.worker.until_s

    def close(self) -> None:
        """Release all resources."""
        self.host.close()
        for fd in (self.tap.fd, self.kick):
            os.close(fd)
        if isinstance(self.worker, Receiver):
            os.close(self.worker.injection)
        release(self.queue)
        del self.queue, self.worker
        self.memory.close()


class Out(Wire):
    """A guest that always has frames to send."""

    def made(self) -> Transmitter:
        """Return the worker of a transmit queue."""
        worker = Transmitter(NoThreads(), self.kick, self.tap, fail)
        worker.header = 12
        self.memory.load(DATA, bytes(12) + FRAME)
        self.ring.describe(0, [Desc(DATA, 12 + len(FRAME))])
        return worker

    def refill(self) -> None:
        """Offer frames, and read those that have arrived."""
        self.ring.reap()
        while (self.ring.avail_idx - self.queue.next_avail & 0xFFFF) < 8:
            self.ring.offer(0)
        try:
            while self.host.recv(2000):
                pass
        except BlockingIOError:
            return


class In(Wire):
    """A network that always has frames for the guest."""

    def made(self) -> Receiver:
        """Return the worker of a receive queue."""
        worker = Receiver(NoThreads(), self.kick, self.tap, fail)
        worker.configure(12, mergeable=True, sums=True)
        for head in range(SIZE):
            self.ring.describe(head, [Desc(DATA + 2048 * head, 2048, WRITE)])
            self.ring.offer(head)
        return worker

    def refill(self) -> None:
        """Send frames, and offer used buffers again."""
        for head, _ in self.ring.reap():
            self.ring.offer(head)
        try:
            for _ in range(8):
                self.host.send(bytes(12) + FRAME)
        except BlockingIOError:
            return


def fail(error: OSError) -> None:
    """Raise the error."""
    raise error


@pytest.mark.parametrize("direction", [In, Out])
@pytest.mark.parametrize("rate", [64 << 10, 1_000_000])
def test_bytes_of_an_interface(clock: Clock, direction: type[Wire], rate: int) -> None:
    """Each direction has the limit.  One turn takes so few frames that they pass evenly."""
    wire = direction(clock, rate)
    passed = wire.run(SECONDS)
    most_at_once = wire.worker.budget * len(FRAME) + rate * KEPT_S
    assert -most_at_once - len(FRAME) <= passed - rate * SECONDS <= 2 * most_at_once
    assert wire.worker.budget * 65536 <= max(65536, rate // 10)
    figures = dict(zip(devmsg.COUNTER_NAMES, wire.worker.figures, strict=True))
    ours, other = ("rx", "tx") if direction is In else ("tx", "rx")
    assert figures[f"{ours}_throttled"]
    assert 0 < figures[f"{ours}_throttled_ns"] <= SECONDS * 1e9
    assert not figures[f"{other}_throttled"]

    wire.worker.limit(0)
    wire.refill()
    wire.worker.turn()
    assert wire.worker.until_s == NEVER
    assert not wire.worker.throttled.now
    wire.close()


def test_a_bucket_has_its_rate_and_a_small_burst(clock: Clock) -> None:
    """The unused rate of 0.1 s is kept.  After more than that has passed, the bucket makes the caller wait."""
    one = Bucket(1000)
    clock.now_s += 3600
    assert one.wait_s() == 0.0
    assert one.level == 1000 * KEPT_S
    one.take(1100)
    wait_s = one.wait_s()
    assert 1.0 < wait_s < 1.1
    clock.now_s += wait_s
    assert one.wait_s() == 0.0
    one.take(10)
    assert one.wait_s() > 0.0


@pytest.mark.parametrize(
    ("rate", "most", "level", "wait_s"),
    [
        (5, 1.0, 1.0, 0.0), (5, 1.0, 0.5, 0.1), (5, 1.0, -1.0, 0.4), (99, 9.9, 1.0, 0.0), (99, 9.9, 0.99, LEAST_S),
        (10_000, 1000.0, 1.0, 0.0), (10_000, 1000.0, 0.0, 0.01), (10_000, 1000.0, -900.0, 0.1),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("clock")
def test_how_long_a_bucket_makes_its_user_wait(rate: int, most: float, level: float, wait_s: float) -> None:
    """Something passes from one token on.  A wait is for the tokens of 10 ms, but for one token at least."""
    one = Bucket(rate)
    assert one.level == most
    one.level = level
    assert one.wait_s() == pytest.approx(wait_s, abs=1e-9)


def test_waits_are_counted(clock: Clock) -> None:
    """A wait that goes on is one wait.  Its time is counted up to the last look, and not after its end."""
    figures = memoryview(bytearray(8 * 6)).cast("Q")
    throttled = Throttled(figures, 2)

    def seen(*, now: bool) -> tuple[int, int]:
        assert throttled.now == now
        assert not any((*figures[:2], *figures[4:]))
        return figures[2], figures[3]

    throttled.end()
    assert seen(now=False) == (0, 0)
    throttled.begin()
    assert seen(now=True) == (1, 0)
    clock.now_s += 2
    throttled.begin()
    assert seen(now=True) == (1, 2_000_000_000)
    clock.now_s += 1
    throttled.end()
    assert seen(now=False) == (1, 3_000_000_000)
    clock.now_s += 5
    throttled.end()
    throttled.begin()
    assert seen(now=True) == (2, 3_000_000_000)


def test_a_stopped_queue_waits_for_nothing(clock: Clock) -> None:
    """Neither for the tap, nor for a time, nor for its limit."""
    wire = Out(clock, 1000)
    for stop in (wire.worker.stopped, wire.worker.begin):
        wire.worker.tap_events, wire.worker.until_s = 4, 1.0
        wire.worker.throttled.begin()
        stop()
        assert (wire.worker.tap_events, wire.worker.until_s) == (0, NEVER)
        assert wire.worker.throttled.now == (stop == wire.worker.begin)
    wire.close()
