"""A chip has one future call at a time."""

import threading
from collections.abc import Callable

import pytest

from vmd.vm.chips.wakeup import EARLIEST_S, Wakeup


class Loop:
    """An event loop with a fake time."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.waits: list[float] = []
        self.callbacks: list[Callable[[], None]] = []
        self.cancelled = 0
        self.looks = 0
        self.lock = threading.Lock()
        self.wakeup = Wakeup(self.schedule, lambda: self.now_s, self.lock, self.look)

    def schedule(self, seconds: float, callback: Callable[[], None]) -> "Loop":
        """Record a call.  The loop itself is the handle."""
        self.waits.append(seconds)
        self.callbacks.append(callback)
        return self

    def cancel(self) -> None:
        """Count a cancelled call."""
        self.cancelled += 1

    def look(self) -> None:
        """Count a call, which must have the chip's lock."""
        assert self.lock.locked()
        self.looks += 1


@pytest.fixture
def loop() -> Loop:
    """Return a loop without a scheduled call."""
    return Loop()


def test_calls_once(loop: Loop) -> None:
    """After the call, a new one can be scheduled."""
    loop.wakeup.within(2.0)
    assert loop.waits == [2.0]
    loop.callbacks[0]()
    assert loop.looks == 1
    loop.wakeup.within(3.0)
    assert loop.waits == [2.0, 3.0]


def test_keeps_a_call_that_comes_soon_enough(loop: Loop) -> None:
    """A request for a later time changes nothing."""
    loop.wakeup.within(2.0)
    loop.wakeup.within(5.0)
    loop.now_s += 1
    loop.wakeup.within(1.0)
    assert loop.waits == [2.0]
    assert loop.cancelled == 0


def test_replaces_a_call_that_comes_too_late(loop: Loop) -> None:
    """The old call does nothing, even if it is already under way."""
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
    """Even an overdue call waits for EARLIEST_S, so that the event thread can do other work."""
    loop.wakeup.within(wait_s)
    assert loop.waits == [EARLIEST_S]
