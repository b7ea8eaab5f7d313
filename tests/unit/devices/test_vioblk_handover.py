"""The lock of a disk whose guest may move to another host, with real files and real locks."""

import contextlib
import errno
import fcntl
import os
from pathlib import Path

import pytest

from vmd.devices.vioblk import handover
from vmd.devices.vioblk.handover import HandOver
from vmd.errors import InUse
from vmd.images.chain import Link, open_chain
from vmd.images.create import new_file, write_empty
from vmd.images.locks import flock, lock, unlock
from vmd.ipc import devmsg

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.images.image import Image

BYTES = 1 << 20
CLUSTER = 1 << 16


def opened(path: Path, kind: str, *, writable: bool = True) -> "Image":
    """Return an open and locked image, as a VM has it."""
    fd = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
    lock(fd, str(path), writable=writable)
    return open_chain([Link(fd=fd, path=str(path), format=kind)], writable=writable)


def is_free(path: Path) -> bool:
    """Return whether another process could lock the image for writing."""
    fd = os.open(path, os.O_RDWR)
    try:
        lock(fd, str(path), writable=True)
    except InUse:
        return False
    finally:
        os.close(fd)
    return True


@pytest.fixture(params=["raw", "qcow2"])
def kind(request: pytest.FixtureRequest) -> str:
    """Return an image format."""
    found: str = request.param
    return found


@pytest.fixture
def path(tmp_path: Path, kind: str) -> Path:
    """Return the path of an empty image."""
    path = tmp_path / "disk"
    with new_file(str(path)) as fd:
        write_empty(fd, str(path), kind, BYTES)
    return path


def lose(image: "Image") -> None:
    """Remove the lock, as happens when network storage was disconnected."""
    unlock(image.fd)


def test_a_lock_that_is_held_is_found(path: Path, kind: str) -> None:
    """Every check finds the lock, and it is never free in between."""
    image = opened(path, kind)
    hand_over = HandOver(image)
    for _ in range(3):
        assert hand_over.check() == ""
        assert not is_free(path)
    image.close()


def test_a_lock_that_another_process_has_is_lost(path: Path, kind: str) -> None:
    """The disk cannot be handed over.  The lock is taken back only after the other process has released it."""
    image = opened(path, kind)
    hand_over = HandOver(image)
    lose(image)
    other = opened(path, kind)
    assert "somebody else has locked" in hand_over.check()
    assert hand_over.let_go() == 1
    assert hand_over.take_back() == devmsg.TAKEN_IN_USE
    os.close(other.fd)
    assert is_free(path), "a lost lock is taken again only on request"
    assert "somebody else has locked" in hand_over.check()
    assert hand_over.take_back() == devmsg.TAKEN
    assert hand_over.check() == ""
    assert not is_free(path)
    image.close()


def test_a_lock_that_nobody_else_has_is_taken_again(path: Path, kind: str) -> None:
    """After a restart, a file server has lost the lock.  All its bytes are locked again, also those for QEMU."""
    image = opened(path, kind)
    lose(image)
    assert HandOver(image).check() == ""
    for writable in (True, False):
        fd = os.open(path, os.O_RDWR)
        with pytest.raises(InUse):
            lock(fd, str(path), writable=writable)
        os.close(fd)
    image.close()


def test_a_lock_counts_as_lost_if_storage_fails(path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason has the error.  The lock is taken back when storage works again."""
    image = opened(path, kind)
    hand_over = HandOver(image)
    with monkeypatch.context() as patch:
        patch.setattr(handover, "refresh", refused)
        assert hand_over.check() == f"its lock may be lost: {os.strerror(errno.ENOTCONN)}"
    assert hand_over.take_back() == devmsg.TAKEN
    assert hand_over.check() == ""
    image.close()


def refused(_fd: int) -> None:
    """Fail as a network file system without its servers."""
    raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))


def test_no_reader_keeps_a_writer_from_its_lock(path: Path, kind: str) -> None:
    """Locks of processes that can only read the file do not count as a loss."""
    image = opened(path, kind)
    reader = os.open(path, os.O_RDONLY)
    for byte in range(300):
        with contextlib.suppress(BlockingIOError):
            fcntl.fcntl(reader, fcntl.F_OFD_SETLK, flock.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
    assert HandOver(image).check() == ""
    os.close(reader)
    image.close()


def test_a_released_or_read_only_disk_is_not_checked(path: Path, kind: str) -> None:
    """A check does not lock such an image."""
    image = opened(path, kind)
    hand_over = HandOver(image)
    hand_over.let_go()
    assert hand_over.check() == ""
    assert is_free(path)
    image.close()
    image = opened(path, kind, writable=False)
    lose(image)
    assert HandOver(image).check() == ""
    assert is_free(path)
    image.close()


def test_a_lock_is_released_and_taken_back(path: Path, kind: str) -> None:
    """Another process may lock it in between.  A second request changes nothing."""
    image = opened(path, kind)
    hand_over = HandOver(image)
    assert not is_free(path)
    for _ in range(2):
        assert hand_over.let_go() == 0
        assert is_free(path)
    for _ in range(2):
        assert hand_over.take_back() == devmsg.TAKEN
        assert not is_free(path)
    image.close()


def test_a_released_disk_is_closed_without_another_write(path: Path, kind: str) -> None:
    """The refcounts of freed clusters are stored before the release, so the next user of the image finds them."""
    image = opened(path, kind)
    image.pwritev(0, [memoryview(b"x" * 4 * CLUSTER)])
    image.flush()
    image.discard(CLUSTER, 2 * CLUSTER)
    assert HandOver(image).let_go() == 0
    before = path.read_bytes(), path.stat().st_mtime_ns

    image.close()

    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_a_disk_that_is_in_use_is_not_taken_back(path: Path, kind: str) -> None:
    """It is taken back after the other process has released it."""
    image = opened(path, kind)
    hand_over = HandOver(image)
    hand_over.let_go()
    other = opened(path, kind)
    assert hand_over.take_back() == devmsg.TAKEN_IN_USE
    os.close(other.fd)
    assert hand_over.take_back() == devmsg.TAKEN
    image.close()


@pytest.mark.parametrize("how", ["write", "truncate"])
def test_a_disk_that_was_written_to_is_not_taken_back(path: Path, kind: str, how: str) -> None:
    """The lock stays free for others."""
    image = opened(path, kind)
    hand_over = HandOver(image)
    hand_over.let_go()
    if how == "write":
        other = opened(path, kind)
        other.pwritev(0, [memoryview(b"y" * CLUSTER)])
        other.flush()
        other.close()
    else:
        os.truncate(path, 2 * BYTES)
    assert hand_over.take_back() == devmsg.TAKEN_CHANGED
    assert is_free(path)
    image.close()


def test_a_read_only_disk_keeps_its_lock(path: Path, kind: str) -> None:
    """Both hosts may read the image."""
    image = opened(path, kind, writable=False)
    hand_over = HandOver(image)
    assert hand_over.let_go() == 0
    assert not is_free(path)
    assert hand_over.take_back() == devmsg.TAKEN
    image.close()


def test_a_guest_that_ran_elsewhere_without_writing_is_noticed(path: Path, kind: str) -> None:
    """The other host has changed the image's mark, but not its content."""
    image = opened(path, kind)
    hand_over = HandOver(image)
    hand_over.let_go()
    content = path.read_bytes()
    other = opened(path, kind)
    assert HandOver(other).sign() == 0
    other.close()
    assert hand_over.take_back() == devmsg.TAKEN_CHANGED
    assert path.read_bytes() == content
    image.close()


@pytest.mark.parametrize("before", ["let go", "lost"])
def test_storage_that_fails_during_the_return_of_the_lock(
    path: Path, kind: str, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock stays free, because the image may have changed; the next attempt asks again."""
    image = opened(path, kind)
    hand_over = HandOver(image)
    if before == "lost":
        lose(image)
        other = opened(path, kind)
        assert hand_over.check()
        os.close(other.fd)
    else:
        assert hand_over.let_go() == 0

    def fail(_fd: int) -> tuple[int, int]:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr(handover, "mark", fail)
        assert hand_over.take_back() == devmsg.TAKEN_FAILED
    assert is_free(path)
    assert hand_over.take_back() == devmsg.TAKEN
    image.close()


NO_ANSWER = OSError(errno.EIO, "no answer")


@pytest.mark.parametrize("failing", [None, "flush", "finish", "mark"])
def test_steps_of_letting_go(
    path: Path, kind: str, failing: str | None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The image is on stable storage and finished before its lock is free.  After a failure the lock is kept."""
    image = opened(path, kind)
    hand_over = HandOver(image)
    steps: list[str] = []

    def watch(place: object, name: str) -> None:
        real = getattr(place, name)

        def step(*args: object) -> object:
            steps.append(name)
            if name == failing:
                raise NO_ANSWER
            return real(*args)

        monkeypatch.setattr(place, name, step)

    watch(image, "flush")
    watch(image, "finish")
    watch(handover, "mark")
    watch(handover, "unlock")
    assert hand_over.let_go() == (failing is not None)
    order = ["flush", "finish", "mark", "unlock"]
    assert steps == (order if failing is None else order[: order.index(failing) + 1])
    said = capfd.readouterr().err
    assert (f"{path}: cannot be handed over: no answer" in said) == (failing is not None)
    monkeypatch.undo()
    assert is_free(path) == (failing is None)
    image.close()


@pytest.mark.parametrize("failing", ["mark", "flush"])
def test_an_image_that_cannot_be_signed(
    path: Path, kind: str, failing: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The guest must not run here: the other host could not notice that it has."""
    image = opened(path, kind)

    def fail(*_: object) -> None:
        raise NO_ANSWER

    with monkeypatch.context() as patch:
        patch.setattr(handover if failing == "mark" else image, failing, fail)
        hand_over = HandOver(image)
        assert hand_over.sign() == 1
    assert f"{path}: cannot be written: no answer" in capfd.readouterr().err
    assert hand_over.sign() == 0
    image.close()


@pytest.mark.parametrize("what", ["read-only", "block device"])
def test_an_image_that_needs_no_signature(path: Path, kind: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is only read tells nothing, and a block device has no mark.  Neither is written to."""
    image = opened(path, kind, writable=what != "read-only")
    before = path.stat().st_mtime_ns
    os.utime(path, ns=(before - 10**9, before - 10**9))
    if what == "block device":
        monkeypatch.setattr(handover, "mark", lambda _fd: handover.NO_MARK)
    assert HandOver(image).sign() == 0
    assert path.stat().st_mtime_ns == before - 10**9
    image.close()


def test_a_lock_that_cannot_be_taken_back_is_logged(
    path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the reason.  That somebody else has the image is no error here; the VM tells it."""
    image = opened(path, kind)
    hand_over = HandOver(image)
    assert hand_over.let_go() == 0
    other = opened(path, kind)
    assert hand_over.take_back() == devmsg.TAKEN_IN_USE
    assert capfd.readouterr().err == ""
    other.close()
    assert hand_over.let_go() == 0

    def fail(_fd: int) -> tuple[int, int]:
        raise NO_ANSWER

    with monkeypatch.context() as patch:
        patch.setattr(handover, "mark", fail)
        assert hand_over.take_back() == devmsg.TAKEN_FAILED
    assert f"{path}: cannot be taken back: " in capfd.readouterr().err
    image.close()


@pytest.mark.parametrize("own", [False, True])
def test_a_lost_lock_is_not_let_go(path: Path, kind: str, own: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """Somebody else may have the image.  An image that was let go before stays so."""
    image = opened(path, kind)
    hand_over = HandOver(image)
    if own:
        assert hand_over.let_go() == 0
    hand_over.lost = "its lock is lost"
    assert hand_over.let_go() == (0 if own else 1)
    assert (f"{path}: cannot be handed over: its lock is lost" in capfd.readouterr().err) == (not own)
    image.close()
