"""The first code of a process: its user, its control group, its name, and the end of its starter."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vmd import signals
from vmd.privsep import linux, start

ROOT = Path(__file__).resolve().parents[3]


class Steps:
    """The steps of `begin`, without effect."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: list[tuple[object, ...]] = []
        for name in ("become_user", "close_on_exec_from", "prctl", "die_with_parent"):
            monkeypatch.setattr(linux, name, self._step(name))
        monkeypatch.setattr(start, "set_title", self._step("title"))
        monkeypatch.setattr(sys, "argv", ["-c"])

    def _step(self, name: str) -> Callable[..., None]:
        return lambda *arguments: self.taken.append((name, *arguments))

    def names(self) -> list[object]:
        """Return the names of the steps."""
        return [name for name, *_ in self.taken]


def test_the_user_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user has no parent death signal and may be traced, until both are set again."""
    steps = Steps(monkeypatch)

    start.begin("vm/a", os.getppid(), uid=5)

    assert steps.taken[0] == ("become_user", 5, 5, 0)
    assert ("die_with_parent", signals.SIGKILL) in steps.taken
    assert ("close_on_exec_from", 3) in steps.taken
    assert steps.taken[-1] == ("title", "vm/a")


def test_a_process_without_a_user_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was given one between fork and exec."""
    steps = Steps(monkeypatch)

    start.begin("vm/a", os.getppid())

    assert "become_user" not in steps.names()


def test_a_process_whose_starter_has_ended_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal would not come any more."""
    Steps(monkeypatch)

    with pytest.raises(SystemExit) as ended:
        start.begin("vm/a", os.getppid() + 1)

    assert ended.value.code == 1


def test_a_process_may_outlive_its_starter(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not look for it either."""
    steps = Steps(monkeypatch)

    start.begin("vmm", None)

    assert "die_with_parent" not in steps.names()


def test_a_process_joins_its_control_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 means the writing process.  The descriptor is closed, because it lets its owner move others."""
    steps = Steps(monkeypatch)
    reading, writing = os.pipe()

    start.begin("vm/a", os.getppid(), group_fd=writing)

    assert os.read(reading, 10) == b"0"
    assert os.read(reading, 10) == b""
    assert steps.names()
    os.close(reading)


ENDS = {
    "a status": ("return 7", 7, ""),
    "no status": ("return None", 0, ""),
    "an exit": ("sys.exit(5)", 5, ""),
    "an exit without a status": ("sys.exit()", 0, ""),
    "an error": ("raise OSError(5, 'no luck')", 1, "OSError: [Errno 5] no luck"),
}


@pytest.mark.parametrize(("last", "status", "said"), ENDS.values(), ids=ENDS.keys())
@pytest.mark.parametrize("closed", ["", "2>&-"])
def test_a_process_ends_without_finalization(last: str, status: int, said: str, closed: str) -> None:
    """It reports errors, but a thread that has not begun yet finds everything in place."""
    program = f"""
import _thread, atexit, os, sys
from vmd.privsep.start import run

def main():
    atexit.register(os.write, 2, b"finalized")
    _thread.start_new_thread(_thread.allocate_lock().acquire, ())
    {last}

run(main)
"""
    command = f'exec "$0" -c "$1" {closed}'
    ended = subprocess.run(
        ["sh", "-c", command, sys.executable, program], capture_output=True, text=True, check=False, cwd=ROOT
    )

    assert ended.returncode == status
    assert ended.stderr.strip().endswith(said if closed != "2>&-" else "")
    assert "finalized" not in ended.stderr
