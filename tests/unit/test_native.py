"""Our replacements for ctypes agree with ctypes."""

import ctypes
import errno
import os

import pytest

from vmd import native

TYPES = [name for name in native.__all__ if name.startswith("c_")]


@pytest.mark.parametrize("name", TYPES)
def test_types_are_those_of_c(name: str) -> None:
    """They have the same size and sign."""
    ours, theirs = getattr(native, name), getattr(ctypes, name)
    assert native.sizeof(ours) == ctypes.sizeof(theirs)
    if isinstance(theirs().value, int):
        assert ours(-1).value == theirs(-1).value


def test_a_call_that_fails_leaves_its_errno() -> None:
    """It returns an int, even if no argument types were declared."""
    libc = native.CDLL(None, use_errno=True)
    assert libc.close(native.c_int(-1)) == -1
    assert native.get_errno() == errno.EBADF
    assert libc.getpid() == os.getpid()
    with pytest.raises(AttributeError):
        _ = libc.no_such_function


def test_memory_is_seen_and_changed_in_place() -> None:
    """A buffer copies its initial bytes, including zeros.  Memory at its address is the buffer itself."""
    content = b"a\0b\0"
    made = native.buffer(content)
    there = native.memory_at(native.addressof(made), len(content))
    assert (made.raw, there.raw) == (content, content)
    there.raw = b"xy"
    assert made.raw == b"xyb\0"
    assert content == b"a\0b\0"
