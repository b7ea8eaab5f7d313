"""The parent's children, when they end later than they were looked at."""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support.vmprocesses import is_reaped
from vmd.parent import children as module
from vmd.parent import usage
from vmd.parent.adoption import Adopted
from vmd.parent.children import LATE_S, LATEST_S, Children
from vmd.privsep.cell import Cell
from vmd.privsep.spawn import Child


class Loop:
    """A loop whose timers are run by hand."""

    def __init__(self) -> None:
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Be `Loop.call_later`."""
        self.timers.append((delay_s, callback))

    def run(self) -> list[float]:
        """Run the timers there are; return their delays."""
        timers, self.timers = self.timers, []
        for _, callback in timers:
            callback()
        return [delay_s for delay_s, _ in timers]


class Process:
    """A child that ends when it is told to."""

    def __init__(self) -> None:
        reading, self.writing = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self.writing)
            os.read(reading, 1)
            os._exit(0)
        os.close(reading)

    def end(self) -> None:
        """End it, and wait until it has, without reaping it."""
        os.close(self.writing)
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def is_reaped(self) -> bool:
        """Return whether it was reaped."""
        return is_reaped(self.pid)


@pytest.fixture
def process() -> Process:
    """A child of ours."""
    return Process()


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], tuple[Children, Loop]]:
    """Return what makes the parent's children, where an earlier program has left these."""
    cell = SimpleNamespace(ids=None)
    monkeypatch.setattr(Cell, "build", lambda _uid, _gid: cell)
    monkeypatch.setattr(module, "vmm_place", lambda _cell, _first_id: cell)
    monkeypatch.setattr(module, "group_place", lambda: None)

    def made(left: list[int]) -> tuple[Children, Loop]:
        monkeypatch.setattr(usage, "children", lambda _pid: left)
        return Children(0, 0, 1 << 16), Loop()

    return made


Make = Callable[[list[int]], tuple[Children, Loop]]


def test_what_an_earlier_program_has_left_may_end_late(make: Make, process: Process) -> None:
    """Each look is later than the one before, and there is none when all have ended."""
    children, loop = make([process.pid])
    children.begin(cast("Any", loop))
    children.bury()  # whoever else looks does not make more of these
    delays = [delay for _ in range(8) for delay in loop.run()]
    assert delays == [LATE_S * 2**number for number in range(6)] + [LATEST_S] * 2

    process.end()
    loop.run()

    assert process.is_reaped()
    assert not loop.timers


def test_what_is_killed_may_end_late(make: Make, process: Process) -> None:
    """Nobody looks at what runs, and has not been told to end."""
    children, loop = make([])
    children.begin(cast("Any", loop))
    child = Child("slow", process.pid)
    children.adopt(child)
    children.bury()
    assert not loop.timers

    child.killed = True  # what storage keeps does not end by that
    children.bury()
    assert loop.run() == [LATE_S]
    process.end()
    loop.run()

    assert (process.is_reaped(), child.pidfd, loop.timers) == (True, -1, [])


def test_what_was_taken_over_is_looked_at_like_a_child_of_ours(make: Make, process: Process) -> None:
    """An earlier daemon has started it; killed, it may end late, too."""
    children, loop = make([])
    children.begin(cast("Any", loop))
    child = Adopted("slow", os.pidfd_open(process.pid))
    children.adopt(child)
    children.bury()
    assert not loop.timers

    child.killed = True
    children.bury()
    process.end()
    loop.run()
    assert process.is_reaped()
    assert not loop.timers
