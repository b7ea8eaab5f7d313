"""A host that has no room for another thread or process: one sentence, wherever one is started."""

import errno
import os
import posix
import re

import pytest

from tests.support.daemon import ROOT
from vmd.errors import HostError
from vmd.tasks import fork, start_thread

ALLOWED = {  # what starts something, and where that is turned into a sentence
    r"os\.fork\(": {"tasks.py", "privsep/spawn.py"},
    r"posix_spawn\(": {"privsep/spawn.py"},
    r"^\s*_thread\.start_new_thread\(": {"threads.py"},  # but in a call of start_thread, as whoever starts those does
    r"(_thread|Thread\(.*\))\.start\(\)": set(),
}


@pytest.mark.parametrize("pattern", ALLOWED)
def test_nothing_else_starts_threads_or_forks(pattern: str) -> None:
    """A call beside these would be a traceback on such a host, for users to read."""
    files = {path.relative_to(ROOT / "vmd"): path.read_text() for path in (ROOT / "vmd").rglob("*.py")}
    found = {str(path) for path, text in files.items() if re.search(pattern, text, re.MULTILINE)}
    assert found <= ALLOWED[pattern], f"use vmd.tasks in {found - ALLOWED[pattern]}"


def test_no_room_for_a_thread() -> None:
    """Python says so by a RuntimeError."""

    def start() -> None:
        raise RuntimeError("can't start new thread")

    with pytest.raises(HostError, match=r"^start thread vcpu0: Resource temporarily unavailable$") as failed:
        start_thread("vcpu0", start)
    assert failed.value.number == errno.EAGAIN


def test_no_room_for_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says so."""

    def no_fork() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(posix, "fork", no_fork)
    with pytest.raises(HostError, match=r"^build the cell: Resource temporarily unavailable$"):
        fork("build the cell")
