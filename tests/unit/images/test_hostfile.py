"""Positional I/O on a host file: all bytes or an error, whatever one system call does."""

import errno
import os
import posix
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.images import KIB, MIB
from vmd import native
from vmd.images import hostfile
from vmd.images.hostfile import (
    FILE_MAX,
    clear,
    data_span,
    read_bytes,
    read_views,
    require_larger,
    storage_granularity,
    write_bytes,
    write_views,
    write_zeroes,
)

REGULAR, BLOCK = 0o100600, 0o060600  # modes


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """An empty file."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("most", [1, 1000, 1 << 30])
def test_calls_that_move_less_than_asked(fd: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is moved by further calls; a file that ends gives fewer bytes."""
    real = posix.pread, posix.preadv, posix.pwritev

    def short(views: list[memoryview]) -> list[memoryview]:
        return [views[0][:most]] if most < 1 << 30 else views

    monkeypatch.setattr(posix, "pread", lambda fd, length, at: real[0](fd, min(length, most), at))
    monkeypatch.setattr(posix, "preadv", lambda fd, views, at: real[1](fd, short(views), at))
    monkeypatch.setattr(posix, "pwritev", lambda fd, views, at: real[2](fd, short(views), at))
    data = os.urandom(2500)

    write_views(fd, [memoryview(data)[:700], memoryview(data)[700:701], memoryview(data)[701:]], 100, 2500)
    assert read_bytes(fd, 2500, 100) == data
    assert read_bytes(fd, 5000, 100) == data
    assert read_bytes(fd, 10, 5000) == b""
    buffer = memoryview(bytearray(b"\xee" * 2600))
    assert read_views(fd, [buffer[:10], buffer[10:2500]], 100, 2500) == 2500
    assert buffer == data + b"\xee" * 100
    assert read_views(fd, [buffer], 200, 2600) == 2400
    assert buffer[:2400] == data[100:]
    write_zeroes(fd, 200, 300)
    write_bytes(fd, b"end", 2600)
    assert read_bytes(fd, 5000, 0) == bytes(100) + data[:100] + bytes(300) + data[400:] + b"end"


def test_call_that_writes_nothing(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not tried for ever."""
    answers = iter([3, 0])
    monkeypatch.setattr(posix, "pwritev", lambda *_: next(answers))
    with pytest.raises(OSError, match="nothing could be written"):
        write_bytes(fd, b"data", 0)


def test_views_of_any_length_are_cleared() -> None:
    """None of their bytes stays."""
    views = [memoryview(bytearray(b"x" * length)) for length in (0, 1, 64 * KIB, 64 * KIB + 1, 150_000)]
    clear(views)
    assert not any(map(any, views))


@pytest.mark.parametrize("retries", [0, 3])
def test_fallocate(fd: int, retries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal does not end it; its error is reported."""
    calls: list[tuple[int, ...]] = []
    real = hostfile._fallocate

    def interrupted(*arguments: int) -> int:
        calls.append(arguments)
        return -1 if len(calls) <= retries else int(real(*arguments))

    monkeypatch.setattr(native, "get_errno", lambda: errno.EINTR)
    monkeypatch.setattr(hostfile, "_fallocate", interrupted)
    hostfile.fallocate(fd, 0, 0, 8 * KIB)
    assert os.fstat(fd).st_size == 8 * KIB
    assert len(calls) == retries + 1
    monkeypatch.undo()
    with pytest.raises(OSError, match="Invalid argument") as refused:
        hostfile.fallocate(fd, 0, 0, 0)
    assert refused.value.errno == errno.EINVAL


def test_data_and_holes(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each place has the length up to the next change, the end asked for, or the end of the file."""
    os.ftruncate(fd, MIB + 100)
    os.pwrite(fd, b"d" * 64 * KIB, 256 * KIB)
    os.fsync(fd)
    whole = MIB + 100
    spans = {
        (0, whole): (False, 256 * KIB),
        (100, 1000): (False, 900),
        (256 * KIB, whole): (True, 64 * KIB),
        (300 * KIB, 301 * KIB): (True, KIB),
        (320 * KIB, whole): (False, whole - 320 * KIB),
        (320 * KIB, 2 * MIB): (False, whole - 320 * KIB),
        (320 * KIB, 321 * KIB): (False, KIB),
        (whole - 1, whole): (False, 1),
        (whole, 2 * MIB): (True, 2 * MIB - whole),
        (2 * MIB, 3 * MIB): (True, MIB),
    }
    assert {place: data_span(fd, *place) for place in spans} == spans

    real = os.lseek

    def lseek(fd: int, offset: int, whence: int) -> int:
        if whence in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, "it knows no holes")
        return real(fd, offset, whence)

    monkeypatch.setattr(posix, "lseek", lseek)
    assert data_span(fd, 0, whole) == (True, whole)


@pytest.mark.parametrize(
    ("mode", "block", "device", "found"),
    [
        (REGULAR, 4096, 0, 4096), (REGULAR, 512, 1 << 20, 512), (REGULAR, 1 << 30, 0, 1 << 30),
        (REGULAR, (1 << 30) + 512, 0, 4096), (REGULAR, 0, 512, 4096), (REGULAR, 1000, 0, 4096),
        (BLOCK, 512, 0, 4096), (BLOCK, 512, 1 << 20, 1 << 20), (BLOCK, 4096, 512, 512), (BLOCK, 4096, -512, 4096),
    ],
)  # fmt: skip
def test_storage_granularity(mode: int, block: int, device: int, found: int) -> None:
    """That of the device, or the block of the file system, if it is plausible."""
    status = os.stat_result([mode, 0, 0, 1, 0, 0, 0, 0, 0, 0], {"st_blksize": block})
    assert status.st_blksize == block
    assert storage_granularity(status, device) == found


def test_size_that_a_disk_can_get() -> None:
    """It may stay as it is; the largest one is the last sector that a file can have."""
    assert FILE_MAX == (1 << 63) - 512
    for new in (512, 1024, FILE_MAX):
        require_larger("disk", 512, new)
    refusals: list[tuple[int, int, str]] = [
        (511, errno.EINVAL, "disk: has 512 bytes, and a disk is never made smaller"),
        (FILE_MAX + 1, errno.EFBIG, f"disk: {FILE_MAX + 1} bytes are more than a file can have"),
    ]
    for new, number, words in refusals:
        with pytest.raises(OSError, match=words) as refused:
            require_larger("disk", 512, new)
        assert refused.value.errno == number
