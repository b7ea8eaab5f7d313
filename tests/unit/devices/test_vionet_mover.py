"""The thread that moves frames: its events, and how the main thread starts and stops it."""

import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import pytest

from tests.support.fakedriver import DEADLINE_S, LAYOUT, Ring, release
from tests.support.figures import unseen
from tests.support.movers import close, end_thread
from vmd.devices.vionet import mover as movers
from vmd.devices.vionet.mover import Mover
from vmd.devices.vionet.worker import Worker
from vmd.errors import GuestError, HostError
from vmd.guestmem import GuestMemory
from vmd.virtio.queue import Queue


class Services:
    """A device process that keeps the messages of its threads."""

    def __init__(self) -> None:
        self.posts: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.broken: SimpleQueue[str] = SimpleQueue()
        self.figures = unseen("vionet")

    def interrupt(self, queue: int) -> None:
        """Do nothing."""

    def post(self, job: Callable[[], None]) -> None:
        """Keep the job."""
        self.posts.put(job)

    def broke(self, text: str) -> None:
        """Keep the error."""
        self.broken.put(text)


class Gate:
    """A point where a thread reports its arrival, and waits until the test opens the gate."""

    def __init__(self) -> None:
        self.reached = os.eventfd(0)
        self.opened = os.eventfd(0)

    def pass_through(self) -> None:
        """Report the arrival, and wait."""
        os.eventfd_write(self.reached, 1)
        os.eventfd_read(self.opened)

    def wait(self) -> None:
        """Wait until the thread has arrived."""
        assert select.select([self.reached], [], [], DEADLINE_S)[0]
        os.eventfd_read(self.reached)

    def open(self) -> None:
        """Let the thread continue."""
        os.eventfd_write(self.opened, 1)

    def close(self) -> None:
        """Close the eventfds.  No thread may use the gate any more."""
        os.close(self.reached)
        os.close(self.opened)


class Recorder(Worker):
    """The worker of a queue.  It records its steps, and waits at a gate in each turn."""

    def __init__(self, services: Services, number: int, kick: int) -> None:
        super().__init__(services, number, kick, 64)
        self.notes: list[str] = []
        self.gate = Gate()
        self.failure: Exception | None = None
        self.wishes: list[tuple[int, float]] = []  # tap_events and until_s after each of the next turns
        self.shares: list[bool] = []
        self.stops: SimpleQueue[None] = SimpleQueue()

    def stopped(self) -> None:
        """Tell the test."""
        super().stopped()
        self.stops.put(None)

    def begin(self) -> None:
        """Record the call."""
        super().begin()
        self.notes.append("begin")

    def serve(self, queue: Queue) -> bool:
        """Record the call, and wait at the gate."""
        self.notes.append(f"serve {queue.size}")
        self.shares.append(self.shared)
        self.gate.pass_through()
        if self.failure is not None:
            raise self.failure
        if self.wishes:
            self.tap_events, self.until_s = self.wishes.pop(0)
        return False


class Moved:
    """A stopped mover thread, the workers of two queues, and both ends of a tap."""

    def __init__(self, services: Services) -> None:
        self.host, self.tap = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.kicks = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]
        self.workers = Recorder(services, 0, self.kicks[0]), Recorder(services, 1, self.kicks[1])
        self.mover = Mover(services, self.tap.fileno(), self.workers)
        self.mover.start()
        self.failed = False  # the thread has ended by an exception

    def go(self, queues: list[Queue]) -> None:
        """Start the thread, and let it serve both queues once."""
        for worker, queue in zip(self.workers, queues, strict=True):
            worker.queue = queue
        self.mover.go()
        for worker in self.workers:
            worker.gate.wait()
            worker.gate.open()

    def close(self) -> None:
        """End the thread, and close the descriptors."""
        for worker in self.workers:
            worker.gate.open()
        self.mover.stop()
        if self.failed:
            close(self.mover)
        else:
            end_thread(self.mover)
        for worker in self.workers:
            worker.queue = None
            worker.gate.close()
        self.host.close()
        self.tap.close()


@pytest.fixture
def services() -> Services:
    """Return a process."""
    return Services()


@pytest.fixture
def queues() -> Iterator[list[Queue]]:
    """Yield two queues of different sizes."""
    with GuestMemory.create(LAYOUT) as memory:
        made = []
        for size in (8, 16):
            ring = Ring(memory, size, 0x10000 * size)
            made.append(Queue(memory, 0, size, ring.desc, ring.avail, ring.used))
        yield made
        for queue in made:
            release(queue)
        made.clear()


@pytest.fixture
def moved(services: Services, queues: list[Queue]) -> Iterator[Moved]:
    """Yield a stopped thread.  `queues` is closed after it."""
    made = Moved(services)
    yield made
    made.close()


def test_stopped_thread_serves_nothing(moved: Moved, queues: list[Queue]) -> None:
    """Notifications have no effect until it is started."""
    worker = moved.workers[0]
    worker.queue = queues[0]
    os.eventfd_write(moved.kicks[0], 1)
    moved.mover.look()
    assert worker.notes == []

    moved.mover.go()
    worker.gate.wait()
    assert worker.notes == ["begin", "serve 8"]
    worker.gate.open()


def test_each_notification_causes_a_turn_of_its_queue(moved: Moved, queues: list[Queue]) -> None:
    """The eventfd is never read.  A notification during a turn counts too.  The other queue has no turn."""
    moved.go(queues)
    for kick, worker in zip(moved.kicks, moved.workers, strict=True):
        os.eventfd_write(kick, 1)
        worker.gate.wait()
        os.eventfd_write(kick, 1)
        worker.gate.open()
        worker.gate.wait()
        worker.gate.open()
    moved.mover.stop()
    assert [worker.notes for worker in moved.workers] == [
        ["begin"] + [f"serve {size}"] * 3 for size in (8, 16)
    ]


def test_a_queue_knows_that_the_other_one_waits(moved: Moved, queues: list[Queue]) -> None:
    """Its turn can then be short."""
    moved.go(queues)
    os.eventfd_write(moved.kicks[0], 1)
    moved.workers[0].gate.wait()
    moved.workers[0].gate.open()
    moved.mover.stop()
    assert moved.workers[0].shares == [True, False]


def test_only_a_queue_that_waits_for_the_tap_gets_its_events(moved: Moved, queues: list[Queue]) -> None:
    """It gets them as long as it waits."""
    first, second = moved.workers
    for worker, queue in zip(moved.workers, queues, strict=True):
        worker.queue = queue
    first.wishes = [(select.EPOLLIN, first.until_s), (0, first.until_s)]
    moved.host.send(b"frame")
    moved.mover.go()
    first.gate.wait()
    first.gate.open()
    second.gate.wait()
    second.gate.open()
    first.gate.wait()  # the tap is still readable
    first.gate.open()
    os.eventfd_write(moved.kicks[1], 1)
    second.gate.wait()
    second.gate.open()
    moved.mover.stop()
    assert first.notes == ["begin"] + ["serve 8"] * 2
    assert second.notes == ["begin"] + ["serve 16"] * 2


def test_a_timeout_needs_no_notification(moved: Moved, queues: list[Queue]) -> None:
    """The queue that waits for a time has a turn then."""
    worker = moved.workers[1]
    worker.queue = queues[1]
    worker.wishes = [(0, time.monotonic() + 0.01)]
    moved.mover.go()
    worker.gate.wait()
    worker.gate.open()
    worker.gate.wait()
    worker.gate.open()
    moved.mover.stop()
    assert worker.notes == ["begin"] + ["serve 16"] * 2


@pytest.mark.parametrize("greedy", [0, 1])
def test_a_timeout_comes_while_the_other_queue_is_always_busy(
    moved: Moved, queues: list[Queue], greedy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit, or the wait of a frame for buffers, ends in time, even with much traffic in the other direction."""
    always, timed = moved.workers[greedy], moved.workers[1 - greedy]
    for worker, queue in zip(moved.workers, queues, strict=True):
        worker.queue = queue
    monkeypatch.setattr(always, "serve", lambda _: True)
    timed.wishes = [(0, time.monotonic())]
    moved.mover.go()
    for _ in range(2):
        timed.gate.wait()
        timed.gate.open()
    moved.mover.stop()
    assert timed.notes == ["begin"] + [f"serve {queues[1 - greedy].size}"] * 2


def test_stop_waits_until_the_ring_is_left(
    moved: Moved, queues: list[Queue], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If that takes too long, it raises HostError."""
    monkeypatch.setattr(movers, "QUIESCE_TIMEOUT_S", 0.05)
    worker = moved.workers[0]
    worker.queue = queues[0]
    moved.mover.go()
    worker.gate.wait()
    with pytest.raises(HostError):
        moved.mover.stop()

    worker.gate.open()
    monkeypatch.setattr(movers, "QUIESCE_TIMEOUT_S", DEADLINE_S)
    moved.mover.stop()
    worker.queue = None
    assert worker.notes == ["begin", "serve 8"]


def test_a_stopped_thread_waits_for_nothing(moved: Moved, queues: list[Queue]) -> None:
    """The queues hear of it each time, so that the time until `go` is no time of theirs."""
    for worker in moved.workers:
        worker.stops.get(timeout=DEADLINE_S)
    for _ in range(2):
        moved.go(queues)
        moved.mover.stop()
        for worker in moved.workers:
            worker.stops.get(timeout=DEADLINE_S)


def test_a_stopped_thread_sleeps(services: Services) -> None:
    """It uses no processor until `go`."""
    asked: SimpleQueue[None] = SimpleQueue()
    kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    workers = Recorder(services, 0, kick), Recorder(services, 1, os.dup(kick))
    mover = Mover(services, -1, workers)
    sleep = mover.stop_epoll

    class Watched:
        def poll(self) -> None:
            asked.put(None)
            sleep.poll()

    mover.stop_epoll = Watched()  # type: ignore[assignment]
    mover.start()
    asked.get(timeout=DEADLINE_S)
    mover.look()
    asked.get(timeout=DEADLINE_S)

    mover.stop_epoll = sleep
    end_thread(mover)
    for worker in workers:
        worker.gate.close()


IN, OUT = select.EPOLLIN, select.EPOLLOUT


def test_events_of_the_tap_follow_the_wishes_of_the_queues(services: Services) -> None:
    """Each change counts.  Without a wish not even the end of the tap is an event."""
    host, tap = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kicks = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]
    workers = Recorder(services, 0, kicks[0]), Recorder(services, 1, kicks[1])
    mover = Mover(services, tap.fileno(), workers)
    host.send(b"frame")
    for wishes in ((IN, 0), (0, OUT), (IN, OUT), (0, OUT), (0, 0), (IN, 0), (0, 0)):
        for worker, wish in zip(workers, wishes, strict=True):
            worker.tap_events = wish
        mover._watch_tap(wishes[0] | wishes[1])
        expected = [(tap.fileno(), wishes[0] | wishes[1])] if any(wishes) else []
        assert mover.epoll.poll(0) == expected
        assert mover.wakes[tap.fileno()] == tuple(
            worker for worker, wish in zip(workers, wishes, strict=True) if wish
        )
    host.close()
    assert mover.epoll.poll(0) == []
    tap.close()
    close(mover)
    for worker in workers:
        worker.gate.close()


def test_thread_that_did_not_notice_its_stop_still_begins_again(moved: Moved, queues: list[Queue]) -> None:
    """It may sleep from stop to start.  It still drops what it knows of the old ring."""
    worker = moved.workers[0]
    for queue in (queues[0], queues[1]) * 50:
        worker.queue = queue
        moved.mover.go()
        worker.gate.wait()
        worker.gate.open()
        moved.mover.stop()

    assert worker.notes == [note for size in (8, 16) * 50 for note in ("begin", f"serve {size}")]


def test_queue_that_is_not_used_is_not_served(moved: Moved, queues: list[Queue]) -> None:
    """The thread does not poll for it either."""
    worker = moved.workers[0]
    moved.mover.go()
    os.eventfd_write(moved.kicks[0], 1)
    moved.mover.stop()
    assert "serve" not in " ".join(worker.notes)

    worker.queue = queues[0]
    moved.mover.go()
    worker.gate.wait()
    worker.gate.open()


def test_broken_ring_is_reported_and_stops_the_thread(moved: Moved, queues: list[Queue], services: Services) -> None:
    """The thread stops for both queues until it is started again."""
    worker, other = moved.workers
    worker.failure = GuestError("broken")
    worker.queue, other.queue = queues
    moved.mover.go()
    worker.gate.wait()
    worker.gate.open()
    assert services.broken.get(timeout=DEADLINE_S) == "broken"
    assert not moved.mover.wanted
    os.eventfd_write(moved.kicks[1], 1)
    moved.mover.stop()
    assert other.notes == ["begin"]

    worker.failure = None
    moved.mover.go()
    for each in moved.workers:
        each.gate.wait()
        each.gate.open()


def test_internal_error_ends_the_process(moved: Moved, queues: list[Queue], services: Services) -> None:
    """The exception is raised again on the main thread."""
    worker = moved.workers[0]
    worker.failure = ValueError("a bug")
    worker.queue = queues[0]
    moved.mover.go()
    worker.gate.wait()
    worker.gate.open()

    job = services.posts.get(timeout=DEADLINE_S)
    moved.failed = True
    with pytest.raises(ValueError, match="a bug"):
        job()
