"""Timers of chips, which wait while the machine is paused."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.ipc.loop import Loop, Timer


class HeldTimers:
    """Timers of chips: callbacks that are due while the machine is paused are held back until it goes on."""

    def __init__(self, loop: "Loop") -> None:
        self.loop = loop
        self.holding = False
        self.held: list[Callable[[], None]] = []

    def schedule(self, delay_s: float, callback: "Callable[[], None]") -> "Timer":
        """Schedule a callback, as `Loop.schedule` does."""
        return self.loop.schedule(delay_s, lambda: self._due(callback))

    def _due(self, callback: "Callable[[], None]") -> None:
        if self.holding:
            self.held.append(callback)
        else:
            callback()

    def hold(self) -> None:
        """Hold back callbacks from now on."""
        self.holding = True

    def release(self) -> None:
        """Call all callbacks that were held back, and hold back no more."""
        self.holding = False
        held, self.held = self.held, []
        for callback in held:
            callback()
