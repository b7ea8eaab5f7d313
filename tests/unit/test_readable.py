"""Waiting for one descriptor: any file, and any number."""

import fcntl
import os
import resource
import select
import socket
from types import SimpleNamespace

import pytest

from vmd.readable import readable

HIGH = 1500  # beyond the 1024 descriptors that select(2) can wait for


@pytest.mark.parametrize("number", [0, HIGH])
def test_a_pipe(number: int) -> None:
    """It is readable if it has data, or if nobody can write to it any more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft <= HIGH:
        resource.setrlimit(resource.RLIMIT_NOFILE, (HIGH + 1, hard))
    low, writer = os.pipe()
    reader = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, number)
    os.close(low)
    try:
        assert not readable(reader)
        assert not readable(reader, 0.001)
        os.write(writer, b"x")
        assert readable(reader)
        assert readable(reader, 60)
        os.read(reader, 1)
        assert not readable(reader)
        os.close(writer)
        assert readable(reader)
    finally:
        os.close(reader)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_a_time_it_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A time is in seconds."""
    waited: list[float] = []
    poll = SimpleNamespace(register=lambda *_: None, poll=waited.append)
    monkeypatch.setattr(select, "poll", lambda: poll)
    for times in ((), (0.5,), (60,)):
        readable(0, *times)
    assert waited == [0, 500, 60_000]


def test_a_socket_object() -> None:
    """Anything with `fileno` will do."""
    one, other = socket.socketpair()
    with one, other:
        assert not readable(one)
        other.send(b"x")
        assert readable(one)
