"""The first code of a process: its user, its control group, its name, and the end of its starter."""

import os
import sys
from collections.abc import Callable

import pytest

from vmd import signals
from vmd.privsep import linux, start


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
