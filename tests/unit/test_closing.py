"""Closing descriptors, also of files whose server reports an error."""

import errno
import os

import pytest

from vmd.closing import close, close_all


def is_open(fd: int) -> bool:
    """Return whether a descriptor is open."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_all_are_closed() -> None:
    """In any order."""
    reader, writer = os.pipe()
    close_all([writer, reader])
    assert not is_open(reader)
    assert not is_open(writer)
    close_all([])


def test_a_descriptor_that_is_not_open() -> None:
    """It is a mistake of ours: another file could be closed in its place."""
    reader, writer = os.pipe()
    close_all((reader, writer))
    with pytest.raises(OSError, match="Bad file descriptor"):
        close(reader)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EINTR, errno.EDQUOT])
def test_errors_of_a_file_server(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """They must not end a process on which all guests depend.  The other descriptors are closed, too."""
    closed: list[int] = []

    def fail(fd: int) -> None:
        closed.append(fd)
        raise OSError(number, "")

    monkeypatch.setattr(os, "close", fail)
    close_all((1000, 1001))
    monkeypatch.undo()
    assert closed == [1000, 1001]
