"""Output of vmctl to descriptors that do not take everything at once."""

import os
import select
from types import SimpleNamespace

import pytest

from vmctl import output
from vmctl.errors import CommandError


def test_a_full_pipe_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its other users may have made it non-blocking.  Every byte arrives, in order."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    data = os.urandom(1 << 18)
    got = bytearray()
    wanted: list[tuple[int, int]] = []

    class Poll:
        def register(self, fd: int, events: int) -> None:
            wanted.append((fd, events))

        def poll(self) -> None:
            assert wanted.pop() == (writer, select.POLLOUT)
            got.extend(os.read(reader, 1 << 16))

    monkeypatch.setattr(output, "select", SimpleNamespace(poll=Poll, POLLOUT=select.POLLOUT))
    output.write_all(writer, data)
    os.close(writer)
    while piece := os.read(reader, 1 << 16):
        got += piece
    os.close(reader)

    assert got == data


@pytest.mark.parametrize(("fd", "name"), [(1, "output"), (2, "error")])
def test_failures_name_the_output(monkeypatch: pytest.MonkeyPatch, fd: int, name: str) -> None:
    """A document may go to either of them."""

    def fail(_fd: int, _data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output, "write_all", fail)
    with pytest.raises(CommandError, match=f"^standard {name}: No space left on device$"):
        output.put(b"x", fd)


def test_unprintable_characters() -> None:
    """They are escaped, with two digits or more."""
    assert output.clean("a\n\x1b\x9b\u200bé") == "a\\x0a\\x1b\\x9b\\x200bé"
