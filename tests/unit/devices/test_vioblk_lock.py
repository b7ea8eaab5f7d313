"""A disk checks whether it still has its lock, even while its requests hang in the storage."""

import contextlib
import errno
import os
import select
import threading
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

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.images.image import Image

DEADLINE_MS = 60_000


class Hanging(Workers):
    """Workers that never finish a job."""

    def __init__(self) -> None:
        self.done = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def submit(self, job: Callable[[], None]) -> None:
        """Drop the job, as if it hung for ever."""


class Watched(Vioblk):
    """A disk that says when the thread of its lock has ended."""

    def __init__(self, image: "Image", services: "Services") -> None:
        super().__init__(image, services, Hanging())
        self.over = threading.Event()

    def _watch_lock(self) -> None:
        super()._watch_lock()
        self.over.set()


class Services:
    """The process of the disk.  It records the messages to the VM."""

    def __init__(self) -> None:
        self.figures = unseen("vioblk")
        self.over = False
        self.lost: SimpleQueue[str] = SimpleQueue()
        self.troubles: tuple[str, ...] = ()

    def interrupt(self, queue: int) -> None:
        """Do nothing."""

    def watch(self, fd: int, handler: Callable[[], None]) -> None:
        """Do nothing: the test polls the descriptor."""

    def serve(self, number: int) -> None:
        """Do nothing."""

    def call_after(self, delay_s: float, handler: Callable[[], None]) -> None:
        """Do nothing."""

    def report(self, *troubles: str) -> None:
        """Keep the troubles."""
        self.troubles = troubles

    def tell_config(self) -> None:
        """Do nothing."""

    def changed(self, error: OSError | None = None) -> None:
        """Do nothing."""

    def lock_lost(self, why: str) -> None:
        """Keep the reason.  After the test, end the thread."""
        if self.over:
            raise SystemExit
        self.lost.put(why)


@pytest.fixture
def services() -> Services:
    """Return the recorded process."""
    return Services()


@pytest.fixture
def disk(tmp_path: Path, services: Services, monkeypatch: pytest.MonkeyPatch) -> Iterator[Vioblk]:
    """Yield a locked disk whose workers hang.  It checks its lock every 10 ms."""
    monkeypatch.setattr(device, "CHECK_LOCK_S", 0.01)
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    fd = os.open(path, os.O_RDWR)
    lock(fd, str(path), writable=True)
    image = open_chain([Link(fd=fd, path=str(path), format="raw")], writable=True)
    made = Watched(image, services)
    made.watch_lock()
    yield made
    services.over, made.hand_over.lost = True, "the test is over"
    assert made.over.wait(DEADLINE_MS / 1000)
    os.close(made.workers.done)
    os.close(fd)


@contextlib.contextmanager
def stolen(disk: Vioblk) -> Iterator[None]:
    """Have another file description lock the image, and wait until the disk notices."""
    other = os.open(disk.image.path, os.O_RDWR)
    try:
        with disk.hand_over._changing:  # otherwise a check in between would lock it again
            unlock(disk.image.fd)
            lock(other, disk.image.path, writable=True)
        report_news(disk)
        yield
    finally:
        os.close(other)


def report_news(disk: Vioblk) -> None:
    """Wait until the lock's thread has news, and let the disk report it."""
    poll = select.poll()
    poll.register(disk.workers.done, select.POLLIN)
    assert poll.poll(DEADLINE_MS), "the lock was not checked"
    disk.on_done()


def test_hanging_requests_do_not_prevent_checks(
    disk: Vioblk, services: Services, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each check reports the lost lock to the VM, and the first one logs it.

    It is a trouble of the disk until it is taken back.
    """
    with stolen(disk):
        assert services.lost.get(timeout=DEADLINE_MS / 1000).startswith("its lock is lost")
        assert services.lost.get(timeout=DEADLINE_MS / 1000).startswith("its lock is lost")
        assert capfd.readouterr().err.count(f"{disk.image.path}: its lock is lost") == 1
        assert [trouble[:16] for trouble in services.troubles] == ["its lock is lost"]
        assert disk.take_back() == devmsg.TAKEN_IN_USE
    assert disk.take_back() == devmsg.TAKEN
    assert disk.hand_over.settled
    assert not list(services.troubles)
    assert disk.hand_over.check() == ""


def test_an_error_of_the_storage_counts_as_a_loss(
    disk: Vioblk, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report has the error."""

    def fail(_fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(handover, "refresh", fail)
    report_news(disk)
    assert services.lost.get(timeout=DEADLINE_MS / 1000) == f"its lock may be lost: {os.strerror(errno.EIO)}"


def test_a_disk_with_a_lost_lock_is_not_finished(disk: Vioblk) -> None:
    """Its process ends without writing to the image."""
    with stolen(disk):
        before = os.fstat(disk.image.fd).st_mtime_ns
        disk.close()
        assert os.fstat(disk.image.fd).st_mtime_ns == before


def wait_until_settled(disk: Vioblk) -> None:
    """Wait until the disk has read the mark of its image."""
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
def test_writes_of_others_during_a_pause_are_noticed(
    disk: Vioblk, monkeypatch: pytest.MonkeyPatch, ours: bool, theirs: bool, found: int
) -> None:
    """Writes after the start of the pause count.  The VM's own writes after the loss and before the pause do not."""
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
    assert disk.take_back() == devmsg.TAKEN  # a second loss does not depend on the first one


def test_writes_before_a_pause_make_the_result_unsure(disk: Vioblk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is also unsure if the storage has no mark."""
    with stolen(disk):
        touch(disk, 1)
    assert disk.take_back() == devmsg.TAKEN_UNSURE
    monkeypatch.setattr(handover, "mark", lambda _fd: handover.NO_MARK)
    with stolen(disk):
        disk.hand_over.paused = True
    assert disk.take_back() == devmsg.TAKEN_UNSURE


def touch(disk: Vioblk, byte: int) -> None:
    """Write to the image, and set its time of change to a value that no other write has."""
    os.pwrite(disk.image.fd, bytes([byte]), 0)
    os.utime(disk.image.fd, ns=(byte, byte))
