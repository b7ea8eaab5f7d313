"""The parent reaps children that end late: after the first look at them."""

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
    """A loop whose timers the test runs."""

    def __init__(self) -> None:
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Start a timer."""
        self.timers.append((delay_s, callback))

    def run(self) -> list[float]:
        """Run the present timers.  Return their delays."""
        timers, self.timers = self.timers, []
        for _, callback in timers:
            callback()
        return [delay_s for delay_s, _ in timers]


class Process:
    """A child that ends when the test calls `end`."""

    def __init__(self) -> None:
        reading, self.writing = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self.writing)
            os.read(reading, 1)
            os._exit(0)
        os.close(reading)

    def end(self) -> None:
        """End the process, and wait for that without reaping it."""
        os.close(self.writing)
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def is_reaped(self) -> bool:
        """Return whether the process was reaped."""
        return is_reaped(self.pid)


@pytest.fixture
def process() -> Process:
    """Return a child process."""
    return Process()


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], tuple[Children, Loop]]:
    """Return a function that makes `Children`, with these children of an earlier program."""
    cell = SimpleNamespace(ids=None)
    monkeypatch.setattr(Cell, "build", lambda _uid, _gid: cell)
    monkeypatch.setattr(module, "vmm_place", lambda _cell, _first_id: cell)
    monkeypatch.setattr(module, "group_place", lambda: None)

    def made(left: list[int]) -> tuple[Children, Loop]:
        monkeypatch.setattr(usage, "children", lambda _pid: left)
        return Children(0, 0, 1 << 16), Loop()

    return made


Make = Callable[[list[int]], tuple[Children, Loop]]


def test_children_of_an_earlier_program_may_end_late(make: Make, process: Process) -> None:
    """The delay between looks doubles up to a limit.  There are no more looks when all have ended."""
    children, loop = make([process.pid])
    children.begin(cast("Any", loop))
    children.bury()  # other calls start no further timers
    delays = [delay for _ in range(8) for delay in loop.run()]
    assert delays == [LATE_S * 2**number for number in range(6)] + [LATEST_S] * 2

    process.end()
    loop.run()

    assert process.is_reaped()
    assert not loop.timers


def test_a_killed_child_may_end_late(make: Make, process: Process) -> None:
    """There are no looks at a child that runs and was not killed."""
    children, loop = make([])
    children.begin(cast("Any", loop))
    child = Child("slow", process.pid)
    children.adopt(child)
    children.bury()
    assert not loop.timers

    child.killed = True  # a process that storage blocks does not end at once
    children.bury()
    assert loop.run() == [LATE_S]
    process.end()
    loop.run()

    assert (process.is_reaped(), child.pidfd, loop.timers) == (True, -1, [])


def test_an_adopted_process_is_reaped_like_a_child(make: Make, process: Process) -> None:
    """An earlier daemon has started it.  When it is killed, it may also end late."""
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
