"""One future call of a chip that wants to look at something by itself.

A cancelled timer may stay in the event loop's heap until it would have been due.  A guest that makes a chip
change its mind a million times must not fill memory with those, so an outstanding call that comes early enough
is left alone, whatever it was for: the chip looks, finds nothing to do, and asks again.
"""

from vmd import threads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class Cancellable(Protocol):
        """What `schedule` returns."""

        def cancel(self) -> object:
            """Never make the call; harmless after it was made."""

    Schedule = Callable[[float, Callable[[], None]], Cancellable]

EARLIEST_S = 250e-6  # bounds how often a chip can make the event thread work


class Wakeup:
    """Calls `look` on the event thread, under the chip's lock, no later than it was last asked for.

    `schedule(seconds, callback)` makes one call on the event thread and may be used from any thread.  It is
    called under `lock`, so it must not call back at once, and the event thread must hold no lock of its own
    when it does.
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
        self._generation = 0  # tells a call that was replaced as it came from the present one

    def within(self, wait_s: float) -> None:
        """Ask for a look in `wait_s` seconds or before; called under the chip's lock."""
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
