"""The chips' timers, which wait while their machine stands still."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.ipc.loop import Loop, Timer


class HeldTimers:
    """The chips' timers: those that are due while the machine stands still are held back until it goes on."""

    def __init__(self, loop: "Loop") -> None:
        self.loop = loop
        self.holding = False
        self.held: list[Callable[[], None]] = []

    def schedule(self, delay_s: float, callback: "Callable[[], None]") -> "Timer":
        """Do as `Loop.schedule`."""
        return self.loop.schedule(delay_s, lambda: self._due(callback))

    def _due(self, callback: "Callable[[], None]") -> None:
        if self.holding:
            self.held.append(callback)
        else:
            callback()

    def hold(self) -> None:
        """Hold back what comes."""
        self.holding = True

    def release(self) -> None:
        """Do what was held back; later ones come on time."""
        self.holding = False
        held, self.held = self.held, []
        for callback in held:
            callback()
