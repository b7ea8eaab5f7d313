"""The discipline between the queues' thread and the main thread: who may touch a ring, and when."""

import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import pytest

from tests.support.fakedriver import DEADLINE_S, LAYOUT, Ring
from vmd.devices.vionet import worker as workers
from vmd.devices.vionet.worker import POLLIN, Server, Worker
from vmd.errors import GuestError, HostError
from vmd.guestmem import GuestMemory
from vmd.virtio.queue import Queue


class Services:
    """A process that keeps what threads tell it."""

    def __init__(self) -> None:
        self.posts: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.broken: SimpleQueue[str] = SimpleQueue()

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


class Recorder(Server):
    """A queue whose thread writes down what it does, and stops where it is told to."""

    def __init__(self, services: Services, kick: int, name: str = "") -> None:
        super().__init__(services, 0, kick)
        self.name = name
        self.notes: list[str] = []
        self.gate = Gate()
        self.failure: Exception | None = None
        self.again = 0  # how often it asks to be served once more

    def begin(self) -> None:
        """Write it down."""
        self.notes.append(f"{self.name}begin")

    def serve(self, queue: Queue) -> bool:
        """Write it down, and wait."""
        self.notes.append(f"{self.name}serve {queue.size}" + " late" * self.timed_out)
        self.deadline_s = None
        self.gate.pass_through()
        if self.failure is not None:
            raise self.failure
        self.again -= 1
        return self.again >= 0


@pytest.fixture
def services() -> Services:
    """Give a process."""
    return Services()


@pytest.fixture
def kick() -> Iterator[int]:
    """Give a notification."""
    fd = os.eventfd(0, os.EFD_NONBLOCK)
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
def server(services: Services, kick: int) -> Recorder:
    """Give a queue that is served."""
    return Recorder(services, kick)


@pytest.fixture
def worker(services: Services, server: Recorder) -> Iterator[Worker]:
    """Give a thread with one queue, standing."""
    made = Worker(services, [server])
    made.start()
    yield made
    retire(made)


def retire(worker: Worker) -> None:
    """Leave a thread behind: it cannot be ended, but it can stand for ever."""
    worker.wanted = False
    for server in worker.servers:
        assert isinstance(server, Recorder)
        server.queue = None
        server.gate.open()
    worker.look()


def test_thread_that_stands_serves_nothing(worker: Worker, server: Recorder, queues: list[Queue], kick: int) -> None:
    """Whatever is notified, until it is told to go."""
    server.queue = queues[0]
    os.eventfd_write(kick, 1)
    worker.look()
    assert server.notes == []

    worker.go()
    server.gate.wait()
    assert server.notes == ["begin", "serve 8"]
    server.gate.open()


def test_stop_waits_until_the_ring_is_left(
    worker: Worker, server: Recorder, queues: list[Queue], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says so if it takes too long."""
    monkeypatch.setattr(workers, "QUIESCE_TIMEOUT_S", 0.05)
    server.queue = queues[0]
    worker.go()
    server.gate.wait()
    with pytest.raises(HostError):
        worker.stop()

    server.gate.open()
    monkeypatch.setattr(workers, "QUIESCE_TIMEOUT_S", DEADLINE_S)
    worker.stop()
    server.queue = None
    assert server.notes == ["begin", "serve 8"]


def test_thread_that_did_not_notice_its_stop_begins_anew(
    worker: Worker, server: Recorder, queues: list[Queue]
) -> None:
    """It may sleep all the time between stop and go; what it knew of the old ring it forgets all the same."""
    for queue in (queues[0], queues[1]) * 50:
        server.queue = queue
        worker.go()
        server.gate.wait()
        server.gate.open()
        worker.stop()

    expected = [note for size in (8, 16) * 50 for note in ("begin", f"serve {size}")]
    assert [note for note in server.notes if note == "begin"] == ["begin"] * 100
    assert server.notes == expected


def test_queue_that_is_not_used_is_not_served(
    worker: Worker, server: Recorder, queues: list[Queue], kick: int
) -> None:
    """Nor waited for in circles."""
    worker.go()
    os.eventfd_write(kick, 1)
    worker.stop()
    assert "serve" not in " ".join(server.notes)

    server.queue = queues[0]
    worker.go()
    server.gate.wait()
    server.gate.open()


def test_broken_ring_is_told_and_left(
    worker: Worker, server: Recorder, queues: list[Queue], services: Services
) -> None:
    """The thread stands until it is told to go again."""
    server.failure = GuestError("broken")
    server.queue = queues[0]
    worker.go()
    server.gate.wait()
    server.gate.open()
    assert services.broken.get(timeout=DEADLINE_S) == "broken"
    assert not worker.wanted

    server.failure = None
    worker.go()
    server.gate.wait()
    server.gate.open()


def test_failure_of_ours_ends_the_process(
    worker: Worker, server: Recorder, queues: list[Queue], services: Services
) -> None:
    """It is raised again on the main thread."""
    server.failure = ValueError("a bug")
    server.queue = queues[0]
    worker.go()
    server.gate.wait()
    server.gate.open()

    job = services.posts.get(timeout=DEADLINE_S)
    with pytest.raises(ValueError, match="a bug"):
        job()


# --- two queues ----------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(services: Services, queues: list[Queue]) -> Iterator[tuple[Recorder, Recorder]]:
    """Give two queues of one thread, which has served each once, and now waits."""
    servers = [Recorder(services, os.eventfd(0, os.EFD_NONBLOCK), name) for name in ("rx ", "tx ")]
    worker = Worker(services, servers)
    for server, queue in zip(servers, queues, strict=True):
        server.queue = queue
    worker.start()
    worker.go()
    for server in servers:
        server.gate.wait()
        server.gate.open()
    yield servers[0], servers[1]
    retire(worker)


def test_only_the_queue_that_was_notified_is_served(pair: tuple[Recorder, Recorder]) -> None:
    """The other one would be looked at in vain."""
    rx, tx = pair
    os.eventfd_write(tx.kick, 1)
    tx.gate.wait()
    tx.gate.open()
    os.eventfd_write(rx.kick, 1)
    rx.gate.wait()
    rx.gate.open()

    assert [len(server.notes) for server in pair] == [3, 3]


def test_queue_with_much_to_do_does_not_keep_the_other_waiting(pair: tuple[Recorder, Recorder]) -> None:
    """One that wants to be served again is asked after the other."""
    rx, tx = pair
    tx.again = 1 << 30
    for _ in range(3):
        os.eventfd_write(tx.kick, 1)
        tx.gate.wait()
        os.eventfd_write(rx.kick, 1)
        tx.gate.open()
        rx.gate.wait()
        rx.gate.open()
    tx.again = 0
    tx.gate.wait()
    tx.gate.open()


def test_descriptor_that_both_want_is_told_to_who_wants_what_happened(pair: tuple[Recorder, Recorder]) -> None:
    """A tap is read for one queue and written for the other."""
    rx, tx = pair
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        rx.want(ours.fileno(), POLLIN)
        os.eventfd_write(rx.kick, 1)
        rx.gate.wait()
        tx.want(ours.fileno(), select.POLLOUT)
        rx.gate.open()
        tx.gate.wait()  # there is room at once
        tx.want(ours.fileno(), 0)
        tx.gate.open()
        theirs.send(b"frame")
        rx.gate.wait()
        rx.want(ours.fileno(), 0)
        rx.gate.open()

    assert [len(server.notes) for server in pair] == [4, 3]


def test_queue_whose_time_is_up_is_served_however_busy_the_other_is(pair: tuple[Recorder, Recorder]) -> None:
    """It is told that nothing came."""
    rx, tx = pair
    rx.again = 1 << 30
    os.eventfd_write(rx.kick, 1)
    rx.gate.wait()
    tx.deadline_s = time.monotonic() + 0.01
    while tx.deadline_s is not None:
        rx.gate.open()
        select.select([rx.gate.reached, tx.gate.reached], [], [])
        if select.select([tx.gate.reached], [], [], 0)[0]:
            break
        rx.gate.wait()
    tx.gate.wait()
    rx.again = 0
    tx.gate.open()

    assert tx.notes[-1] == "tx serve 16 late"
    assert "late" not in " ".join(rx.notes)
