"""A file is copied with its holes, by whatever the file system can do."""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.images import KIB, MIB
from vmd.images import filecopy
from vmd.images.filecopy import CANNOT, FICLONE, copy_file

SIZE = 3 * MIB + 100
DATA = b"d" * (300 * KIB)


@pytest.fixture
def source(tmp_path: Path) -> int:
    """A file with data at three places, and a hole at its end."""
    with (tmp_path / "source").open("wb") as file:
        for at in (0, MIB, 2 * MIB):
            file.seek(at)
            file.write(DATA)
        file.truncate(SIZE)
    return os.open(tmp_path / "source", os.O_RDONLY)


def copied(source: int, folder: Path) -> tuple[Path, list[tuple[int, int]]]:
    """Copy a file; return the copy, and its progress."""
    told: list[tuple[int, int]] = []
    target = os.open(folder / "copy", os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        copy_file(source, target, lambda done, size: told.append((done, size)))
    finally:
        os.close(target)
        os.close(source)
    return folder / "copy", told


def refuse(error: int) -> "Callable[..., object]":
    """Return a system call that fails."""

    def fail(*_arguments: object) -> object:
        raise OSError(error, os.strerror(error))

    return fail


@pytest.mark.parametrize("cannot", [(), ("copy_file_range",), ("lseek",), ("copy_file_range", "lseek")])
def test_copy_without_a_reflink(
    source: int, tmp_path: Path, cannot: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is as long as the source, and has its holes where the file system tells them."""
    monkeypatch.setattr(fcntl, "ioctl", refuse(errno.EOPNOTSUPP))
    monkeypatch.setattr(filecopy, "STEP_BYTES", 128 * KIB)
    if "copy_file_range" in cannot:
        monkeypatch.setattr(os, "copy_file_range", refuse(errno.EXDEV))
    if "lseek" in cannot:
        real = os.lseek

        def lseek(fd: int, offset: int, whence: int) -> int:
            if whence in (os.SEEK_DATA, os.SEEK_HOLE):
                raise OSError(errno.EINVAL, "it knows no holes")
            return real(fd, offset, whence)

        monkeypatch.setattr(os, "lseek", lseek)

    copy, told = copied(source, tmp_path)

    assert copy.read_bytes() == (tmp_path / "source").read_bytes()
    assert all(size == SIZE for _, size in told)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    if "lseek" in cannot:
        assert told[-1] == (SIZE, SIZE)
    else:
        assert copy.stat().st_blocks == (tmp_path / "source").stat().st_blocks
        assert len(told) == 9


def test_reflink_needs_no_copy(source: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system shares the data."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(fcntl, "ioctl", lambda _fd, request, fd: asked.append((request, fd)))
    copy, told = copied(source, tmp_path)
    assert (copy.stat().st_size, told) == (0, [])
    assert asked == [(FICLONE, source)]
    assert FICLONE == 1 << 30 | 4 << 16 | 0x94 << 8 | 9  # _IOW(0x94, 9, int)


@pytest.mark.parametrize("call", ["ioctl", "copy_file_range"])
def test_other_errors_are_not_hidden(source: int, tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full or broken disk is reported, and not tried in another way."""
    assert errno.ENOSPC not in CANNOT
    monkeypatch.setattr(fcntl, "ioctl", refuse(errno.EOPNOTSUPP))
    monkeypatch.setattr(fcntl if call == "ioctl" else os, call, refuse(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        copied(source, tmp_path)


@pytest.mark.parametrize("knows", [True, False])
def test_file_that_becomes_shorter(source: int, tmp_path: Path, knows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy does not go on for ever."""
    monkeypatch.setattr(fcntl, "ioctl", refuse(errno.EOPNOTSUPP))
    monkeypatch.setattr(os, "pread", lambda *_: b"")
    monkeypatch.setattr(os, "copy_file_range", (lambda *_: 0) if knows else refuse(errno.ENOSYS))
    with pytest.raises(OSError, match="the file has become shorter"):
        copied(source, tmp_path)


def test_file_without_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its copy has the same length; an empty file has an empty copy."""
    monkeypatch.setattr(fcntl, "ioctl", refuse(errno.EOPNOTSUPP))
    for size in (MIB, 0):
        (tmp_path / "source").touch()
        os.truncate(tmp_path / "source", size)
        copy, told = copied(os.open(tmp_path / "source", os.O_RDONLY), tmp_path)
        assert (copy.stat().st_size, copy.stat().st_blocks, told) == (size, 0, [])
        copy.unlink()
