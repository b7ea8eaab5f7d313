"""A timer of a chip: one future call, at which the chip looks at its state.

A cancelled timer may stay in the event loop's heap until it is due.  A guest can make a chip change its timer a million
times, and must not fill memory with cancelled timers.  So an outstanding call that comes early enough is kept, also if
it was asked for with another reason: the chip looks, finds nothing to do, and asks again.
"""

from vmd import threads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class Cancellable(Protocol):
        """A scheduled call."""

        def cancel(self) -> object:
            """Cancel the call.  Does nothing if the call was made already."""

    Schedule = Callable[[float, Callable[[], None]], Cancellable]

EARLIEST_S = 250e-6  # shortest wait: bounds how often a chip can make the event thread work


class Wakeup:
    """Calls `look` on the event thread, under the chip's lock, no later than the last request asked for.

    `schedule(seconds, callback)` arranges one call on the event thread.  It is called from any thread and under `lock`,
    so it must not call back at once.  The event thread must hold no other lock when it calls back.
    """

    def __init__(
        self,
        schedule: "Schedule",
        monotonic: "Callable[[], float]",
        lock: threads.Lock,
        look: "Callable[[], None]",
    ) -> None:
        self._schedule = schedule
        self._monotonic = monotonic
        self._lock = lock
        self._look = look
        self._call: Cancellable | None = None
        self._due_s = 0.0
        self._generation = 0  # number of the present call: a replaced call may already be under way

    def within(self, wait_s: float) -> None:
        """Ask for a look in `wait_s` seconds or earlier.  Called under the chip's lock."""
        wait_s = max(wait_s, EARLIEST_S)
        due_s = self._monotonic() + wait_s
        if self._call is not None:
            if self._due_s <= due_s:
                return
            self._call.cancel()
        self._due_s = due_s
        self._generation += 1
        generation = self._generation
        self._call = self._schedule(wait_s, lambda: self._on_due(generation))

    def _on_due(self, generation: int) -> None:
        with self._lock:
            if generation == self._generation:
                self._call = None
                self._look()
