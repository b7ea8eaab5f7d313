"""imgresize without a process: a disk of a stopped VM becomes larger, or stays as it was."""

import os
import posix
from pathlib import Path

import pytest

from tests.support.images import MIB, opened, qemu, read, write
from vmd.images.create import create
from vmd.images.resize import answer
from vmd.ipc.probemsg import Probe, unpack

SIZE = 2 * MIB


def ask(size: int, *images: tuple[Path, str], guessed: bool = False) -> Probe | str:
    """Ask for a size of the disk with these images; return the answer.  All files must be closed then."""
    fds = [os.open(path, os.O_RDONLY if place else os.O_RDWR) for place, (path, _) in enumerate(images)]
    words = [str(size)]
    for path, kind in images:
        words += [str(path), kind, "1" if guessed else "0"]
    files = fds[:]
    line = answer(words, files)
    assert files == []
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    return unpack(line)


@pytest.fixture(params=["raw", "qcow2"])
def kind(request: pytest.FixtureRequest) -> str:
    """An image format."""
    found: str = request.param
    return found


@pytest.fixture
def path(tmp_path: Path, kind: str) -> Path:
    """A disk that is full of the letter a."""
    path = tmp_path / "disk"
    create(str(path), kind, SIZE)
    image = opened(path, writable=True, formats=(kind,))
    write(image, 0, b"a" * SIZE)
    image.close()
    return path


def test_disk_becomes_larger(path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its new part is zeroes.  The new size is on stable storage before the answer; the present size is no error."""
    done: list[str] = []
    real = posix.fdatasync, posix.pwritev, posix.ftruncate

    def fdatasync(fd: int) -> None:
        real[0](fd)
        done.append("sync")

    def pwritev(fd: int, views: list[memoryview], offset: int) -> int:
        done.append("write")
        return real[1](fd, views, offset)

    def ftruncate(fd: int, size: int) -> None:
        done.append("write")
        real[2](fd, size)

    monkeypatch.setattr(posix, "fdatasync", fdatasync)
    monkeypatch.setattr(posix, "pwritev", pwritev)
    monkeypatch.setattr(posix, "ftruncate", ftruncate)
    for _ in range(2):
        assert ask(2 * SIZE, (path, kind)) == Probe(format=kind, size=2 * SIZE)
    assert "write" in done
    assert done[-1] == "sync"
    image = opened(path, formats=(kind,))
    assert image.size == 2 * SIZE
    assert read(image, 0, 2 * SIZE) == b"a" * SIZE + bytes(SIZE)
    image.close()


def test_disk_becomes_no_smaller(path: Path, kind: str) -> None:
    """The sentence does not name the disk, because its reader adds the name.  Nothing is changed."""
    before = path.read_bytes()
    assert ask(SIZE - 512, (path, kind)) == f"has {SIZE} bytes, and a disk is never made smaller"
    assert path.read_bytes() == before


def test_disk_with_a_backing_file(tmp_path: Path) -> None:
    """The first image grows, and the other one is read only."""
    base, top = tmp_path / "base", tmp_path / "top"
    base.write_bytes(b"b" * SIZE)
    qemu("qemu-img", "create", "-qf", "qcow2", "-F", "raw", "-b", base, top, MIB)
    assert ask(SIZE, (top, "qcow2"), (base, "raw")) == Probe(format="qcow2", size=SIZE)
    image = opened(top, base, formats=("qcow2", "raw"))
    assert read(image, 0, SIZE) == b"b" * MIB + bytes(MIB)
    image.close()
    assert base.read_bytes() == b"b" * SIZE


def test_guessed_image_has_no_backing_file(tmp_path: Path) -> None:
    """Its guest may have written the header that names it."""
    base, top = tmp_path / "base", tmp_path / "top"
    base.write_bytes(b"b" * SIZE)
    qemu("qemu-img", "create", "-qf", "qcow2", "-F", "raw", "-b", base, top, MIB)
    said = ask(SIZE, (top, "qcow2"), (base, "raw"), guessed=True)
    assert isinstance(said, str)
    assert said.startswith("has a backing file, but only its first bytes say that it is qcow2")


def test_image_that_cannot_be_opened(tmp_path: Path) -> None:
    """It is not what it is said to be."""
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    said = ask(2 * SIZE, (tmp_path / "disk", "qcow2"))
    assert isinstance(said, str)
    assert said == "not a qcow2 image"


def test_file_without_room_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is the sentence of the system."""
    (tmp_path / "disk").write_bytes(b"a" * SIZE)

    def fail(_fd: int, _size: int) -> None:
        raise OSError(27, "File too large")

    monkeypatch.setattr(posix, "ftruncate", fail)
    assert ask(2 * SIZE, (tmp_path / "disk", "raw")) == "File too large"
    assert (tmp_path / "disk").read_bytes() == b"a" * SIZE
