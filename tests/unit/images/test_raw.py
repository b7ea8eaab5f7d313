"""Raw images: what a host file gets to do for each request, and what is refused."""

import errno
import os
from pathlib import Path

import pytest

from tests.support.images import KIB, MIB, opened, read, write
from vmd.images import raw as module
from vmd.images.guard import Guard
from vmd.images.hostfile import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, fallocate
from vmd.images.raw import RawImage

BLOCK = 4 * KIB
SIZE = 64 * KIB + 512
PUNCH, ZERO = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, FALLOC_FL_KEEP_SIZE | FALLOC_FL_ZERO_RANGE


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A disk that is full of the letter x."""
    path = tmp_path / "disk"
    path.write_bytes(b"x" * SIZE)
    return path


@pytest.mark.parametrize(
    ("start", "end", "inside"),
    [
        (0, BLOCK, (0, BLOCK)),
        (512, 3 * BLOCK + 512, (BLOCK, 2 * BLOCK)),
        (512, 2 * BLOCK, (BLOCK, BLOCK)),
        (BLOCK, 2 * BLOCK + 512, (BLOCK, BLOCK)),
        (512, BLOCK, None),
        (512, BLOCK + 512, None),
        (60 * KIB + 512, SIZE, (64 * KIB, 512)),  # the end of the disk counts as a whole block
        (60 * KIB + 512, SIZE - 256, None),
    ],
)
@pytest.mark.parametrize("what", ["discard", "unmap", "zero"])
def test_only_whole_blocks_of_a_device_are_given_back(
    path: Path, what: str, start: int, end: int, inside: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeroes are written to the rest, so that a write beside it is not undone."""
    calls: list[tuple[int, int, int]] = []

    def note(fd: int, mode: int, offset: int, length: int) -> None:
        calls.append((mode, offset, length))
        fallocate(fd, mode, offset, length)

    monkeypatch.setattr(module, "fallocate", note)
    image = opened(path, writable=True, formats=("raw",))
    assert isinstance(image, RawImage)
    image.granularity = BLOCK
    if what == "discard":
        image.discard(start, end - start)
    else:
        image.write_zeroes(start, end - start, what == "unmap")
    image.close()

    assert calls == ([(ZERO if what == "zero" else PUNCH, *inside)] if inside else [])
    if what == "discard":
        start, end = (inside[0], sum(inside)) if inside else (0, 0)
    assert path.read_bytes() == b"x" * start + bytes(end - start) + b"x" * (SIZE - end)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EPERM])
def test_error_of_the_storage_is_the_guests(path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a file system that does not know the mode has another way."""
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module, "fallocate", fail)
    image = opened(path, writable=True, formats=("raw",))
    for unmap in (True, False):
        with pytest.raises(OSError, match=os.strerror(number)):
            image.write_zeroes(0, BLOCK, unmap)
    with pytest.raises(OSError, match=os.strerror(number)):
        image.discard(0, BLOCK)
    image.close()
    assert path.read_bytes() == b"x" * SIZE


def test_device_has_the_size_of_its_device(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must have been enlarged before.  A part of a sector at its end counts as one."""
    image = opened(path, writable=True, formats=("raw",))
    monkeypatch.setattr(module, "is_device", lambda _fd: True)
    os.truncate(path, SIZE + BLOCK + 100)
    for size in (SIZE, SIZE + BLOCK, SIZE + 2 * BLOCK):
        with pytest.raises(OSError, match=f"is a device of {SIZE + BLOCK + 100} bytes, and the disk has the size of"):
            image.grow(size)
        assert image.size == SIZE
    image.grow(SIZE + BLOCK + 512)
    assert (image.size, path.stat().st_size) == (SIZE + BLOCK + 512, SIZE + BLOCK + 100)
    assert "no multiple of 512" in image.remark
    image.close()


@pytest.mark.parametrize("left", [0, SIZE - BLOCK, SIZE - 1])
def test_file_that_was_cut_is_not_read_as_zeroes(path: Path, left: int) -> None:
    """Bytes that were there are lost, so a read of them is an error.  A read before them is none."""
    image = opened(path, formats=("raw",))
    os.truncate(path, left)
    buffer = bytearray(BLOCK)
    with pytest.raises(OSError, match=f"the file has become shorter than {SIZE} bytes"):
        image.preadv(SIZE - BLOCK, [memoryview(buffer)])
    if left >= BLOCK:
        image.preadv(0, [memoryview(buffer)])
        assert bytes(buffer) == b"x" * BLOCK
    image.close()


def test_file_that_was_cut_does_not_grow(path: Path) -> None:
    """Its lost end would become zeroes."""
    image = opened(path, writable=True, formats=("raw",))
    os.truncate(path, SIZE - 1)
    with pytest.raises(OSError, match=f"the file has become shorter than {SIZE} bytes"):
        image.grow(MIB)
    assert path.stat().st_size == SIZE - 1
    image.close()


# -- the guard


KOLY = b"koly" + (4).to_bytes(4, "big") + (512).to_bytes(4, "big")
VHD = b"conectix".ljust(60, b"\0") + (2).to_bytes(4, "big")


@pytest.mark.parametrize("trailer", [KOLY, VHD], ids=["DMG", "VHD"])
def test_guessed_raw_disk_takes_no_signature_at_its_end_31(path: Path, trailer: bytes) -> None:
    """It is refused as a whole, with bytes before it, with all of the disk, and in its last byte (hostile 31)."""
    image = opened(path, writable=True, formats=("raw",), guessed=True)
    last = trailer.ljust(512, b"\0")
    for offset, data in (
        (SIZE - 512, last),
        (SIZE - 600, b"y" * 88 + last),
        (0, b"y" * (SIZE - 512) + last),
        (SIZE - 512, last[: len(trailer)]),
    ):
        write(image, SIZE - 512, bytes(512))
        with pytest.raises(OSError, match="may not write the signature") as refused:
            write(image, offset, data)
        assert refused.value.errno == errno.EPERM
    write(image, SIZE - 512, b"\xff" * 512)
    for at in range(len(trailer) - 1):
        write(image, SIZE - 512 + at, trailer[at : at + 1])
    with pytest.raises(OSError, match="may not write the signature"):
        write(image, SIZE - 512 + len(trailer) - 1, trailer[-1:])
    write(image, SIZE - 1024, last)  # one sector earlier it means nothing
    write(image, SIZE - 513, b"y" + last[:1])
    image.close()
    assert path.read_bytes()[: SIZE - 1024] == b"x" * (SIZE - 1024)


def test_signature_byte_by_byte_31(path: Path) -> None:
    """The write of its last byte is refused (hostile 31)."""
    image = opened(path, writable=True, formats=("raw",), guessed=True)
    for at, byte in enumerate(b"QFI"):
        write(image, at, bytes([byte]))
    with pytest.raises(OSError, match="may not write the signature of a qcow2 image"):
        write(image, 3, b"\xfb")
    assert read(image, 0, 5) == b"QFIxx"
    image.close()


@pytest.mark.parametrize("size", [512, 1024, 1536, 4096])
def test_small_guessed_disk_is_written_correctly(tmp_path: Path, size: int) -> None:
    """Its first and its last bytes may be the same ones."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(size))
    flat = bytearray(size)
    image = opened(path, writable=True, formats=("raw",), guessed=True)
    for number, (start, end) in enumerate((a, b) for a in range(0, size, 256) for b in range(a, size + 1, 256)):
        data = bytes([number % 255 + 1]) * (end - start)
        image.pwritev(start, [memoryview(data)[:100], memoryview(data)[100:]])
        flat[start:end] = data
        assert path.read_bytes() == flat
    image.close()


def test_writes_that_the_guard_checks(path: Path) -> None:
    """All that touch the first 1024 or the last 512 bytes, and no others."""
    with path.open("rb") as file:
        guard = Guard(file.fileno(), str(path))
        for offset, length, checked in (
            (0, 1, True), (1023, 1, True), (1024, SIZE - 1024 - 512, False), (1024, SIZE - 1024 - 511, True),
            (SIZE - 512, 1, True), (SIZE - 513, 1, False), (SIZE, 0, False), (0, 0, False),
        ):  # fmt: skip
            assert guard.concerns(offset, length) == checked, (offset, length)
