"""The checksum of a file that is read while it is copied."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmctl.checksum import Checksum
from vmctl.errors import CommandError

CONTENT = os.urandom(3 << 20)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """A file of some megabytes."""
    (tmp_path / "file").write_bytes(CONTENT)
    fd = os.open(tmp_path / "file", os.O_RDWR)
    yield fd
    os.close(fd)


def of(content: bytes) -> Checksum:
    """Return the expected checksum of some content."""
    return Checksum(f"sha256:{hashlib.sha256(content).hexdigest()}")


@pytest.mark.parametrize(
    "steps", [[], [(0, 0)], [(0, 5)], [(1, 7), (2, 7), (7, 7)], [(1, 1000), (999, 1000)], [(5, 5), (5, 5)]]
)
def test_any_progress_of_the_copy(file: int, steps: list[tuple[int, int]]) -> None:
    """The whole file counts once, also if a disk has no data to copy."""
    checksum = of(CONTENT)
    checksum.begin(file)
    for done, whole in steps:
        checksum.follow(done, whole)
        assert checksum.at == len(CONTENT) * done // max(whole, 1)
    checksum.verify("disk")


def test_an_empty_file(file: int) -> None:
    """It has a checksum, too."""
    os.ftruncate(file, 0)
    checksum = of(b"")
    checksum.begin(file)
    checksum.verify("disk")


def test_a_file_that_is_written(file: int) -> None:
    """Its size may stay.  The time of its last change was another."""
    checksum = of(CONTENT)
    checksum.begin(file)
    checksum.before_ns -= 1
    with pytest.raises(CommandError, match=r"^disk was changed while it was read$"):
        checksum.verify("disk")


def test_a_file_that_becomes_longer(file: int) -> None:
    """Its checksum would be that of its former content."""
    checksum = of(CONTENT)
    checksum.begin(file)
    os.pwrite(file, b"x", len(CONTENT))
    checksum.before_ns = os.fstat(file).st_ctime_ns  # clocks of file systems are coarse
    with pytest.raises(CommandError, match=r"^disk was changed while it was read$"):
        checksum.verify("disk")


def test_a_file_that_becomes_shorter(file: int) -> None:
    """This is no damage, and the wait for the rest ends."""
    checksum = of(CONTENT)
    checksum.begin(file)
    os.ftruncate(file, 5)
    with pytest.raises(CommandError, match=r"^disk was changed while it was read$"):
        checksum.verify("disk")
