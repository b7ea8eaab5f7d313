"""A host without room for another thread or process: all code that starts one raises the same error."""

import errno
import os
import posix
import re

import pytest

from tests.support.daemon import ROOT
from vmd.errors import HostError
from vmd.tasks import fork, start_thread

ALLOWED = {  # calls that start a thread or process, and the modules that turn their failures into errors
    r"os\.fork\(": {"tasks.py", "privsep/spawn.py"},
    r"posix_spawn\(": {"privsep/spawn.py"},
    r"^\s*_thread\.start_new_thread\(": {"threads.py"},  # within a call of start_thread by its users
    r"(_thread|Thread\(.*\))\.start\(\)": set(),
}


@pytest.mark.parametrize("pattern", ALLOWED)
def test_nothing_else_starts_threads_or_forks(pattern: str) -> None:
    """Other calls would end in a traceback on such a host."""
    files = {path.relative_to(ROOT / "vmd"): path.read_text() for path in (ROOT / "vmd").rglob("*.py")}
    found = {str(path) for path, text in files.items() if re.search(pattern, text, re.MULTILINE)}
    assert found <= ALLOWED[pattern], f"use vmd.tasks in {found - ALLOWED[pattern]}"


def test_no_room_for_a_thread() -> None:
    """Python raises a RuntimeError."""

    def start() -> None:
        raise RuntimeError("can't start new thread")

    with pytest.raises(HostError, match=r"^start thread vcpu0: Resource temporarily unavailable$") as failed:
        start_thread("vcpu0", start)
    assert failed.value.number == errno.EAGAIN


def test_no_room_for_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's error is reported."""

    def no_fork() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(posix, "fork", no_fork)
    with pytest.raises(HostError, match=r"^build the cell: Resource temporarily unavailable$"):
        fork("build the cell")
