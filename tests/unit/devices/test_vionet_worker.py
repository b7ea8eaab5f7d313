"""The discipline between a queue's thread and the main thread: who may touch a ring, and when."""

import os
import select
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import pytest

from tests.support.fakedriver import DEADLINE_S, LAYOUT, Ring
from vmd.devices.figures import unseen
from vmd.devices.vionet import worker as workers
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
    """A thread that writes down what it does, and stops where it is told to."""

    def __init__(self, services: Services, kick: int) -> None:
        super().__init__(services, 0, kick)
        self.notes: list[str] = []
        self.gate = Gate()
        self.failure: Exception | None = None

    def begin(self) -> None:
        """Write it down."""
        self.notes.append("begin")

    def serve(self, queue: Queue) -> bool:
        """Write it down, and wait."""
        self.notes.append(f"serve {queue.size}")
        self.gate.pass_through()
        if self.failure is not None:
            raise self.failure
        return False


@pytest.fixture
def services() -> Services:
    """Give a process."""
    return Services()


@pytest.fixture
def kick() -> Iterator[int]:
    """Give a notification."""
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


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
            for view in (queue.used_ring, queue._used_idx, queue._avail_event):
                view.release()
        made.clear()


@pytest.fixture
def worker(services: Services, kick: int) -> Iterator[Recorder]:
    """Give a thread, standing."""
    made = Recorder(services, kick)
    made.start()
    yield made
    made.queue = None  # a thread cannot be ended, but it can stand for ever
    made.wanted = False
    made.gate.open()
    made.look()


def test_thread_that_stands_serves_nothing(worker: Recorder, queues: list[Queue], kick: int) -> None:
    """Whatever is notified, until it is told to go."""
    worker.queue = queues[0]
    os.eventfd_write(kick, 1)
    worker.look()
    assert worker.notes == []

    worker.go()
    worker.gate.wait()
    assert worker.notes == ["begin", "serve 8"]
    worker.gate.open()


def test_what_rang_is_silent_while_the_queue_is_served(
    worker: Recorder, queues: list[Queue], kick: int
) -> None:
    """It wakes the thread once, and what comes later does so again."""
    another = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    worker.bells.add(another)
    worker.poll.register(another, select.POLLIN)
    worker.queue = queues[0]
    worker.go()
    worker.gate.wait()
    for bell in (kick, another, kick):
        os.eventfd_write(bell, 1)
        worker.gate.open()
        worker.gate.wait()
        with pytest.raises(BlockingIOError):
            os.eventfd_read(bell)
    worker.gate.open()
    worker.stop()
    assert worker.notes == ["begin"] + ["serve 8"] * 4
    worker.poll.unregister(another)
    os.close(another)


def test_stop_waits_until_the_ring_is_left(
    worker: Recorder, queues: list[Queue], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says so if it takes too long."""
    monkeypatch.setattr(workers, "QUIESCE_TIMEOUT_S", 0.05)
    worker.queue = queues[0]
    worker.go()
    worker.gate.wait()
    with pytest.raises(HostError):
        worker.stop()

    worker.gate.open()
    monkeypatch.setattr(workers, "QUIESCE_TIMEOUT_S", DEADLINE_S)
    worker.stop()
    worker.queue = None
    assert worker.notes == ["begin", "serve 8"]


def test_thread_that_did_not_notice_its_stop_begins_anew(worker: Recorder, queues: list[Queue]) -> None:
    """It may sleep all the time between stop and go; what it knew of the old ring it forgets all the same."""
    for queue in (queues[0], queues[1]) * 50:
        worker.queue = queue
        worker.go()
        worker.gate.wait()
        worker.gate.open()
        worker.stop()

    expected = [note for size in (8, 16) * 50 for note in ("begin", f"serve {size}")]
    assert [note for note in worker.notes if note == "begin"] == ["begin"] * 100
    assert worker.notes == expected


def test_queue_that_is_not_used_is_not_served(worker: Recorder, queues: list[Queue], kick: int) -> None:
    """Nor waited for in circles."""
    worker.go()
    os.eventfd_write(kick, 1)
    worker.stop()
    assert "serve" not in " ".join(worker.notes)

    worker.queue = queues[0]
    worker.go()
    worker.gate.wait()
    worker.gate.open()


def test_broken_ring_is_told_and_left(worker: Recorder, queues: list[Queue], services: Services) -> None:
    """The thread stands until it is told to go again."""
    worker.failure = GuestError("broken")
    worker.queue = queues[0]
    worker.go()
    worker.gate.wait()
    worker.gate.open()
    assert services.broken.get(timeout=DEADLINE_S) == "broken"
    assert not worker.wanted

    worker.failure = None
    worker.go()
    worker.gate.wait()
    worker.gate.open()


def test_failure_of_ours_ends_the_process(worker: Recorder, queues: list[Queue], services: Services) -> None:
    """It is raised again on the main thread."""
    worker.failure = ValueError("a bug")
    worker.queue = queues[0]
    worker.go()
    worker.gate.wait()
    worker.gate.open()

    job = services.posts.get(timeout=DEADLINE_S)
    with pytest.raises(ValueError, match="a bug"):
        job()
