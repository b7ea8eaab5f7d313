"""The one future call of a chip."""

import threading
from collections.abc import Callable

import pytest

from vmd.vm.chips.wakeup import EARLIEST_S, Wakeup


class Loop:
    """An event loop whose time is ours."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.waits: list[float] = []
        self.callbacks: list[Callable[[], None]] = []
        self.cancelled = 0
        self.looks = 0
        self.lock = threading.Lock()
        self.wakeup = Wakeup(self.schedule, lambda: self.now_s, self.lock, self.look)

    def schedule(self, seconds: float, callback: Callable[[], None]) -> "Loop":
        """Remember; the loop itself is the handle."""
        self.waits.append(seconds)
        self.callbacks.append(callback)
        return self

    def cancel(self) -> None:
        """Count."""
        self.cancelled += 1

    def look(self) -> None:
        """Count, under the chip's lock."""
        assert self.lock.locked()
        self.looks += 1


@pytest.fixture
def loop() -> Loop:
    """A loop with nothing scheduled."""
    return Loop()


def test_looks_once(loop: Loop) -> None:
    """And may then be asked again."""
    loop.wakeup.within(2.0)
    assert loop.waits == [2.0]
    loop.callbacks[0]()
    assert loop.looks == 1
    loop.wakeup.within(3.0)
    assert loop.waits == [2.0, 3.0]


def test_keeps_a_call_that_comes_soon_enough(loop: Loop) -> None:
    """Whatever is asked for later."""
    loop.wakeup.within(2.0)
    loop.wakeup.within(5.0)
    loop.now_s += 1
    loop.wakeup.within(1.0)
    assert loop.waits == [2.0]
    assert loop.cancelled == 0


def test_replaces_a_call_that_comes_too_late(loop: Loop) -> None:
    """The old one does nothing, even if it was on its way."""
    loop.wakeup.within(5.0)
    loop.wakeup.within(2.0)
    assert loop.waits == [5.0, 2.0]
    assert loop.cancelled == 1
    loop.callbacks[0]()
    assert loop.looks == 0
    loop.callbacks[1]()
    assert loop.looks == 1


@pytest.mark.parametrize("wait_s", [0.0, -7.5, 1e-9])
def test_never_at_once(loop: Loop, wait_s: float) -> None:
    """What is overdue still lets the event thread breathe."""
    loop.wakeup.within(wait_s)
    assert loop.waits == [EARLIEST_S]
