"""A disk that finds out whether it still has its lock, while its requests hang in the storage."""

import contextlib
import errno
import os
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest

from tests.support.figures import unseen
from vmd.devices.vioblk import device, handover
from vmd.devices.vioblk.device import Vioblk, Workers
from vmd.images.chain import Link, open_chain
from vmd.images.locks import lock, unlock
from vmd.ipc import devmsg

DEADLINE_MS = 60_000


class Hanging(Workers):
    """Workers of which none ever comes back."""

    def __init__(self) -> None:
        self.done = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def submit(self, job: Callable[[], None]) -> None:
        """Keep it for ever."""


class Services:
    """What the disk's VM hears."""

    def __init__(self) -> None:
        self.figures = unseen("vioblk")
        self.over = False
        self.lost: SimpleQueue[str] = SimpleQueue()
        self.troubles: tuple[str, ...] = ()

    def interrupt(self, queue: int) -> None:
        """No queue."""

    def watch(self, fd: int, handler: Callable[[], None]) -> None:
        """The test looks itself."""

    def serve(self, number: int) -> None:
        """No queue."""

    def call_after(self, delay_s: float, handler: Callable[[], None]) -> None:
        """Nothing has to wait."""

    def report(self, *troubles: str) -> None:
        """Keep it."""
        self.troubles = troubles

    def tell_config(self) -> None:
        """Nobody asks."""

    def changed(self, error: OSError | None = None) -> None:
        """Nobody asks."""

    def lock_lost(self, why: str) -> None:
        """Keep it; in the end, end the thread."""
        if self.over:
            raise SystemExit
        self.lost.put(why)


@pytest.fixture
def services() -> Services:
    """What is heard."""
    return Services()


@pytest.fixture
def disk(tmp_path: Path, services: Services, monkeypatch: pytest.MonkeyPatch) -> Iterator[Vioblk]:
    """Give a locked disk whose workers hang, and which looks at its lock all the time."""
    monkeypatch.setattr(device, "CHECK_LOCK_S", 0.01)
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    fd = os.open(path, os.O_RDWR)
    lock(fd, str(path), writable=True)
    image = open_chain([Link(fd=fd, path=str(path), format="raw")], writable=True)
    made = Vioblk(image, services, Hanging())
    made.watch_lock()
    yield made
    services.over, made.hand_over.lost = True, "the test is over"
    poll = select.poll()
    poll.register(made.workers.done, select.POLLIN)
    while made.trouble is None:
        assert poll.poll(DEADLINE_MS)
        os.eventfd_read(made.workers.done)
    os.close(fd)


@contextlib.contextmanager
def stolen(disk: Vioblk) -> Iterator[None]:
    """Have somebody else lock the image, and wait until the disk has found out."""
    other = os.open(disk.image.path, os.O_RDWR)
    try:
        with disk.hand_over._changing:  # as it looks all the time, it would have locked it again
            unlock(disk.image.fd)
            lock(other, disk.image.path, writable=True)
        hear(disk)
        yield
    finally:
        os.close(other)


def hear(disk: Vioblk) -> None:
    """Wait until it has found something new, and let it say that."""
    poll = select.poll()
    poll.register(disk.workers.done, select.POLLIN)
    assert poll.poll(DEADLINE_MS), "it has not looked"
    disk.on_done()


def test_requests_that_hang_do_not_keep_it_from_looking(disk: Vioblk, services: Services) -> None:
    """The VM hears of a lost lock again and again, and what is wrong until it is taken back."""
    with stolen(disk):
        assert services.lost.get(timeout=DEADLINE_MS / 1000).startswith("its lock is lost")
        assert services.lost.get(timeout=DEADLINE_MS / 1000).startswith("its lock is lost")
        assert [trouble[:16] for trouble in services.troubles] == ["its lock is lost"]
        assert disk.take_back() == devmsg.TAKEN_IN_USE
    assert disk.take_back() == devmsg.TAKEN
    assert disk.hand_over.settled
    assert not list(services.troubles)
    assert disk.hand_over.check() == ""


def test_an_error_of_the_storage_is_a_loss(
    disk: Vioblk, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The VM hears what it was."""

    def fail(_fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(handover, "refresh", fail)
    hear(disk)
    assert services.lost.get(timeout=DEADLINE_MS / 1000) == f"its lock may be lost: {os.strerror(errno.EIO)}"


def test_what_is_lost_is_not_finished(disk: Vioblk) -> None:
    """Its process ends without a write."""
    with stolen(disk):
        before = os.fstat(disk.image.fd).st_mtime_ns
        disk.close()
        assert os.fstat(disk.image.fd).st_mtime_ns == before


def wait_until_settled(disk: Vioblk) -> None:
    """Wait until it has found out how its image was left."""
    deadline_s = time.monotonic() + DEADLINE_MS / 1000
    while not disk.hand_over.settled:
        assert time.monotonic() < deadline_s
        select.select([], [], [], 0.01)


@pytest.mark.parametrize(
    ("ours", "theirs", "found"),
    [
        (False, False, devmsg.TAKEN),
        (True, False, devmsg.TAKEN),
        (False, True, devmsg.TAKEN_WRITTEN),
        (True, True, devmsg.TAKEN_WRITTEN),
    ],
)
def test_whether_somebody_has_written_to_it_meanwhile(
    disk: Vioblk, monkeypatch: pytest.MonkeyPatch, ours: bool, theirs: bool, found: int
) -> None:
    """Since the VM stands still; what it wrote itself before that, with the lock lost already, does not count."""
    monkeypatch.setattr(device, "LOST_LOCK_S", 0.01)
    with stolen(disk):
        if ours:
            touch(disk, 1)
        disk.hand_over.paused = True
        wait_until_settled(disk)
        if theirs:
            touch(disk, 2)
        disk.hand_over.check()
    assert disk.take_back() == found
    with stolen(disk):
        wait_until_settled(disk)
    assert disk.take_back() == devmsg.TAKEN  # once more, and the first time is forgotten


def test_what_happened_before_it_stood_still_is_not_known(disk: Vioblk, monkeypatch: pytest.MonkeyPatch) -> None:
    """When its storage does not tell, either."""
    with stolen(disk):
        touch(disk, 1)
    assert disk.take_back() == devmsg.TAKEN_UNSURE
    monkeypatch.setattr(handover, "mark", lambda _fd: handover.NO_MARK)
    with stolen(disk):
        disk.hand_over.paused = True
    assert disk.take_back() == devmsg.TAKEN_UNSURE


def touch(disk: Vioblk, byte: int) -> None:
    """Write to the image, at a time of its own."""
    os.pwrite(disk.image.fd, bytes([byte]), 0)
    os.utime(disk.image.fd, ns=(byte, byte))
