"""Large guest memory is closed last by a separate process, so that the parent does not wait."""

import contextlib
import errno
import os
import select
import signal
import time
from pathlib import Path

import pytest

from tests.support.waiting import pause
from vmd.closing import close_all
from vmd.errors import HostError
from vmd.parent import freeing
from vmd.parent.freeing import let_go

DEADLINE_S = 60.0
BYTES = 1 << 20


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> int:
    """Return memory that counts as large."""
    monkeypatch.setattr(freeing, "LARGE_BYTES", BYTES)
    fd = os.memfd_create("of-a-guest-that-is-gone", os.MFD_CLOEXEC)
    os.write(fd, bytes(BYTES))
    return fd


def holders(inode: int) -> set[int]:
    """Return the processes that have a file open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if link.stat().st_ino == inode and "memfd:" in os.readlink(link):
                found.add(int(link.parts[2]))
    return found


def children() -> set[str]:
    """Return our child processes, including those that have ended and were not reaped."""
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


@pytest.fixture
def closing(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """Return a list of the other processes that have the memory open when this process closes it."""
    seen: list[set[int]] = []

    def look(fds: list[int]) -> None:
        seen.append(holders(os.fstat(fds[0]).st_ino) - {os.getpid()})
        close_all(fds)

    monkeypatch.setattr(freeing, "close_all", look)
    return seen


@pytest.mark.root
def test_another_process_closes_the_memory_last(memory: int, closing: list[set[int]]) -> None:
    """That process has no other descriptor of ours.  It ends by itself and need not be reaped."""
    inode = os.fstat(memory).st_ino
    others, theirs = os.pipe2(os.O_CLOEXEC)
    before, blocked = children(), signal.pthread_sigmask(signal.SIG_BLOCK, [])

    let_go(memory)

    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == blocked
    (last,) = closing
    assert len(last) == 1
    os.close(theirs)
    assert select.select([others], [], [], DEADLINE_S)[0] == [others], "another process has it, too"
    deadline = time.monotonic() + DEADLINE_S
    while holders(inode):
        assert time.monotonic() < deadline
        pause()
    assert children() == before
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(memory)
    os.close(others)


@pytest.mark.root
def test_small_memory_is_closed_here(memory: int, closing: list[set[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing it takes no longer than starting a process."""
    monkeypatch.setattr(freeing, "LARGE_BYTES", BYTES + 1)

    let_go(memory)

    assert closing == [set()]


def refuse_pipe(*_: object) -> None:
    """Fail as on a host without free descriptors."""
    raise OSError(errno.EMFILE, "Too many open files")


def refuse_fork(what: str) -> int:
    """Fail as on a host without free processes."""
    raise HostError(what, errno.EAGAIN)


@pytest.mark.parametrize("lack", ["pipe", "process"])
def test_a_host_without_descriptors_or_processes(memory: int, lack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory is closed here, however long that takes, and no descriptor is left."""
    before = len(os.listdir("/proc/self/fd"))
    if lack == "pipe":
        monkeypatch.setattr(os, "pipe2", refuse_pipe)
    else:
        monkeypatch.setattr(freeing, "fork", refuse_fork)

    let_go(memory)

    assert len(os.listdir("/proc/self/fd")) == before - 1
