"""Memory files that processes share: what another process can do to them."""

import fcntl
import os
from collections.abc import Callable

import pytest

from tests.support.descriptors import open_descriptors
from vmd import memfile
from vmd.memfile import bounded_file, fill_file, is_constant, is_fixed, memory_file, sealed_file

PAGE = 4096


def test_size_of_a_sealed_file_is_fixed() -> None:
    """Its contents can change.  No seal can be added."""
    given = memory_file("given")
    for fd in (sealed_file("new", 3 * PAGE), sealed_file("given", 3 * PAGE, given)):
        assert os.pread(fd, 4 * PAGE, 0) == bytes(3 * PAGE)
        assert (is_fixed(fd), is_constant(fd), os.get_inheritable(fd)) == (True, False, False)
        for size in (0, 4 * PAGE):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        assert os.pwrite(fd, b"x", 0) == 1
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        os.close(fd)


def test_bounded_file_becomes_smaller_only() -> None:
    """Another process fills it, and cuts it to the length of its data."""
    fd = bounded_file("kernel", 3 * PAGE)
    assert os.pread(fd, 4 * PAGE, 0) == bytes(3 * PAGE)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 4 * PAGE)
    os.ftruncate(fd, 5)
    assert not is_fixed(fd)
    memfile.seal(fd, memfile.CONSTANT)
    assert is_constant(fd)
    os.close(fd)


def test_filled_file_is_constant() -> None:
    """It is read from its beginning, and nobody can change it."""
    fd = memory_file("boot")
    assert not is_constant(fd)
    assert not is_fixed(fd)
    fill_file(fd, b"content" * 100_000)
    assert os.read(fd, 1 << 20) == b"content" * 100_000
    assert is_constant(fd)
    assert is_fixed(fd)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    os.close(fd)


def test_file_that_is_no_memory_file_is_not_fixed() -> None:
    """A pipe has no seals."""
    reader, writer = os.pipe()
    assert not is_fixed(reader)
    os.close(reader)
    os.close(writer)


def test_failure_closes_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the file that was given."""
    before = open_descriptors()
    given = memory_file("given")

    def fail(_fd: int, _seals: int) -> None:
        raise OSError(28, "no")

    monkeypatch.setattr(memfile, "seal", fail)
    made: list[Callable[[], int]] = [lambda: sealed_file("given", PAGE, given), lambda: bounded_file("new", PAGE)]
    for make in made:
        with pytest.raises(OSError, match="no"):
            make()
    assert open_descriptors() == before
