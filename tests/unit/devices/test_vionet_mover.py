"""What the thread that moves frames waits for, and the discipline between it and the main thread."""

import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import pytest

from tests.support.fakedriver import DEADLINE_S, LAYOUT, Ring, release
from tests.support.figures import unseen
from vmd.devices.vionet import mover as movers
from vmd.devices.vionet.mover import Mover
from vmd.devices.vionet.worker import Worker
from vmd.errors import GuestError, HostError
from vmd.guestmem import GuestMemory
from vmd.virtio.queue import Queue


class Services:
    """A process that keeps what threads tell it."""

    def __init__(self) -> None:
        self.posts: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.broken: SimpleQueue[str] = SimpleQueue()
        self.figures = unseen("vionet")

    def interrupt(self, queue: int) -> None:
        """Nobody listens."""

    def post(self, job: Callable[[], None]) -> None:
        """Keep it."""
        self.posts.put(job)

    def broke(self, text: str) -> None:
        """Keep it."""
        self.broken.put(text)


class Gate:
    """A place at which a thread says that it has come, and waits until it may go on."""

    def __init__(self) -> None:
        self.reached = os.eventfd(0)
        self.opened = os.eventfd(0)

    def pass_through(self) -> None:
        """Come, and wait."""
        os.eventfd_write(self.reached, 1)
        os.eventfd_read(self.opened)

    def wait(self) -> None:
        """Wait until the thread has come."""
        assert select.select([self.reached], [], [], DEADLINE_S)[0]
        os.eventfd_read(self.reached)

    def open(self) -> None:
        """Let it go on."""
        os.eventfd_write(self.opened, 1)


class Recorder(Worker):
    """A queue's half that writes down what it does, and stops where it is told to."""

    def __init__(self, services: Services, number: int, kick: int) -> None:
        super().__init__(services, number, kick, 64)
        self.notes: list[str] = []
        self.gate = Gate()
        self.failure: Exception | None = None
        self.wishes: list[tuple[int, float]] = []  # tap_events and until_s for after the next turns
        self.shares: list[bool] = []

    def begin(self) -> None:
        """Write it down."""
        super().begin()
        self.notes.append("begin")

    def serve(self, queue: Queue) -> bool:
        """Write it down, and wait."""
        self.notes.append(f"serve {queue.size}")
        self.shares.append(self.shared)
        self.gate.pass_through()
        if self.failure is not None:
            raise self.failure
        if self.wishes:
            self.tap_events, self.until_s = self.wishes.pop(0)
        return False


class Moved:
    """A thread that stands, two queues' halves, and both ends of a tap."""

    def __init__(self, services: Services) -> None:
        self.host, self.tap = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.kicks = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]
        self.workers = Recorder(services, 0, self.kicks[0]), Recorder(services, 1, self.kicks[1])
        self.mover = Mover(services, self.tap.fileno(), self.workers)
        self.mover.start()

    def go(self, queues: list[Queue]) -> None:
        """Have both queues served once."""
        for worker, queue in zip(self.workers, queues, strict=True):
            worker.queue = queue
        self.mover.go()
        for worker in self.workers:
            worker.gate.wait()
            worker.gate.open()

    def close(self) -> None:
        """Have the thread stand for ever: it cannot be ended."""
        for worker in self.workers:
            worker.gate.open()
        self.mover.stop()
        for worker in self.workers:
            worker.queue = None
        self.host.close()
        self.tap.close()


@pytest.fixture
def services() -> Services:
    """Give a process."""
    return Services()


@pytest.fixture
def queues() -> Iterator[list[Queue]]:
    """Give two queues that differ in size."""
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
    """Give a thread, standing; `queues` outlives it."""
    made = Moved(services)
    yield made
    made.close()


def test_thread_that_stands_serves_nothing(moved: Moved, queues: list[Queue]) -> None:
    """Whatever is notified, until it is told to go."""
    worker = moved.workers[0]
    worker.queue = queues[0]
    os.eventfd_write(moved.kicks[0], 1)
    moved.mover.look()
    assert worker.notes == []

    moved.mover.go()
    worker.gate.wait()
    assert worker.notes == ["begin", "serve 8"]
    worker.gate.open()


def test_each_notification_is_news_for_its_queue(moved: Moved, queues: list[Queue]) -> None:
    """Though nobody reads what rings, and also while the queue is served; the other queue does not hear of it."""
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


def test_a_queue_knows_that_the_other_waits(moved: Moved, queues: list[Queue]) -> None:
    """So that its turn may be short."""
    moved.go(queues)
    os.eventfd_write(moved.kicks[0], 1)
    moved.workers[0].gate.wait()
    moved.workers[0].gate.open()
    moved.mover.stop()
    assert moved.workers[0].shares == [True, False]


def test_the_tap_is_waited_for_by_who_wants_it(moved: Moved, queues: list[Queue]) -> None:
    """As long as they do."""
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
    first.gate.wait()  # it is readable, and nobody has read it
    first.gate.open()
    os.eventfd_write(moved.kicks[1], 1)
    second.gate.wait()
    second.gate.open()
    moved.mover.stop()
    assert first.notes == ["begin"] + ["serve 8"] * 2
    assert second.notes == ["begin"] + ["serve 16"] * 2


def test_a_time_comes_without_a_notification(moved: Moved, queues: list[Queue]) -> None:
    """For the queue that waits for it."""
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
def test_a_time_comes_though_the_other_queue_always_has_more(
    moved: Moved, queues: list[Queue], greedy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a limit, or a frame that waits for buffers, ends in time whatever passes the other way."""
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
    """And says so if it takes too long."""
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


def test_thread_that_did_not_notice_its_stop_begins_anew(moved: Moved, queues: list[Queue]) -> None:
    """It may sleep all the time between stop and go; what it knew of the old ring it forgets all the same."""
    worker = moved.workers[0]
    for queue in (queues[0], queues[1]) * 50:
        worker.queue = queue
        moved.mover.go()
        worker.gate.wait()
        worker.gate.open()
        moved.mover.stop()

    assert worker.notes == [note for size in (8, 16) * 50 for note in ("begin", f"serve {size}")]


def test_queue_that_is_not_used_is_not_served(moved: Moved, queues: list[Queue]) -> None:
    """Nor waited for in circles."""
    worker = moved.workers[0]
    moved.mover.go()
    os.eventfd_write(moved.kicks[0], 1)
    moved.mover.stop()
    assert "serve" not in " ".join(worker.notes)

    worker.queue = queues[0]
    moved.mover.go()
    worker.gate.wait()
    worker.gate.open()


def test_broken_ring_is_told_and_left(moved: Moved, queues: list[Queue], services: Services) -> None:
    """The thread stands until it is told to go again, and leaves the other queue, too."""
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


def test_failure_of_ours_ends_the_process(moved: Moved, queues: list[Queue], services: Services) -> None:
    """It is raised again on the main thread."""
    worker = moved.workers[0]
    worker.failure = ValueError("a bug")
    worker.queue = queues[0]
    moved.mover.go()
    worker.gate.wait()
    worker.gate.open()

    job = services.posts.get(timeout=DEADLINE_S)
    with pytest.raises(ValueError, match="a bug"):
        job()
