"""The lock of a disk whose guest may go on elsewhere, on real files with real locks."""

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
    """Return a disk as a VM has it, with its lock."""
    fd = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
    lock(fd, str(path), writable=writable)
    return open_chain([Link(fd=fd, path=str(path), format=kind)], writable=writable)


def is_free(path: Path) -> bool:
    """Return whether somebody else could write to it."""
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
    """Give a format."""
    found: str = request.param
    return found


@pytest.fixture
def path(tmp_path: Path, kind: str) -> Path:
    """Give an empty image."""
    path = tmp_path / "disk"
    with new_file(str(path)) as fd:
        write_empty(fd, str(path), kind, BYTES)
    return path


def lose(image: "Image") -> None:
    """Take the lock away, as storage does that was cut off."""
    unlock(image.fd)


def test_a_lock_that_is_there_is_found(path: Path, kind: str) -> None:
    """However often one looks; nobody else can have it meanwhile."""
    image = opened(path, kind)
    hand_over = HandOver(image)
    for _ in range(3):
        assert hand_over.check() == ""
        assert not is_free(path)
    image.close()


def test_a_lock_that_somebody_else_has_is_lost(path: Path, kind: str) -> None:
    """Nothing is handed over then; it is taken back when they have let go, and not before."""
    image = opened(path, kind)
    hand_over = HandOver(image)
    lose(image)
    other = opened(path, kind)
    assert "somebody else has locked" in hand_over.check()
    assert hand_over.let_go() == 1
    assert hand_over.take_back() == devmsg.TAKEN_IN_USE
    os.close(other.fd)
    assert is_free(path), "a lost lock is not taken again unless somebody wants that"
    assert "somebody else has locked" in hand_over.check()
    assert hand_over.take_back() == devmsg.TAKEN
    assert hand_over.check() == ""
    assert not is_free(path)
    image.close()


def test_a_lock_that_nobody_else_has_is_taken_again(path: Path, kind: str) -> None:
    """A server that has started anew knows nothing of it: all marks are there again, those for QEMU too."""
    image = opened(path, kind)
    lose(image)
    assert HandOver(image).check() == ""
    for writable in (True, False):
        fd = os.open(path, os.O_RDWR)
        with pytest.raises(InUse):
            lock(fd, str(path), writable=writable)
        os.close(fd)
    image.close()


def test_a_storage_that_does_not_say_counts_as_lost(path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error is in the sentence; what can be locked again is taken back."""
    image = opened(path, kind)
    hand_over = HandOver(image)
    with monkeypatch.context() as patch:
        patch.setattr(handover, "refresh", refused)
        assert hand_over.check() == f"its lock may be lost: {os.strerror(errno.ENOTCONN)}"
    assert hand_over.take_back() == devmsg.TAKEN
    assert hand_over.check() == ""
    image.close()


def refused(_fd: int) -> None:
    """Fail as a file system does whose servers are gone."""
    raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))


def test_no_reader_keeps_a_writer_from_its_lock(path: Path, kind: str) -> None:
    """Whoever may only read the file has no lock that counts as a loss."""
    image = opened(path, kind)
    reader = os.open(path, os.O_RDONLY)
    for byte in range(300):
        with contextlib.suppress(BlockingIOError):
            fcntl.fcntl(reader, fcntl.F_OFD_SETLK, flock.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
    assert HandOver(image).check() == ""
    os.close(reader)
    image.close()


def test_what_is_let_go_or_only_read_is_not_looked_after(path: Path, kind: str) -> None:
    """Nothing is locked by looking."""
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


def test_let_go_and_taken_back(path: Path, kind: str) -> None:
    """Somebody else may have it in between; asked twice, it is the same."""
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


def test_it_ends_without_another_write(path: Path, kind: str) -> None:
    """What was freed has its refcounts stored before: the next one who opens it reads and writes what is there."""
    image = opened(path, kind)
    image.pwritev(0, [memoryview(b"x" * 4 * CLUSTER)])
    image.flush()
    image.discard(CLUSTER, 2 * CLUSTER)
    assert HandOver(image).let_go() == 0
    before = path.read_bytes(), path.stat().st_mtime_ns

    image.close()

    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_somebody_has_it(path: Path, kind: str) -> None:
    """It is not taken back before they let it go."""
    image = opened(path, kind)
    hand_over = HandOver(image)
    hand_over.let_go()
    other = opened(path, kind)
    assert hand_over.take_back() == devmsg.TAKEN_IN_USE
    os.close(other.fd)
    assert hand_over.take_back() == devmsg.TAKEN
    image.close()


@pytest.mark.parametrize("how", ["write", "truncate"])
def test_somebody_has_written_to_it(path: Path, kind: str, how: str) -> None:
    """Never taken back, and free for others."""
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


def test_what_is_only_read_is_kept(path: Path, kind: str) -> None:
    """It may be read at both ends."""
    image = opened(path, kind, writable=False)
    hand_over = HandOver(image)
    assert hand_over.let_go() == 0
    assert not is_free(path)
    assert hand_over.take_back() == devmsg.TAKEN
    image.close()


def test_its_guest_has_run_elsewhere_and_has_not_written(path: Path, kind: str) -> None:
    """That is known from the image all the same, which has the bytes that it had."""
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
