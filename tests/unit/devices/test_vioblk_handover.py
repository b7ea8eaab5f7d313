"""The lock of a disk whose guest may go on elsewhere, on real files with real locks."""

import os
from pathlib import Path

import pytest

from vmd.devices.vioblk.handover import HandOver
from vmd.errors import InUse
from vmd.images.chain import Link, open_chain
from vmd.images.create import new_file, write_empty
from vmd.images.locks import lock
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
