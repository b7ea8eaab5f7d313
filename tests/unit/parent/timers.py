"""The timers of a loop that does not run: a test fires them."""

from collections.abc import Callable
from typing import Any

from vmd.ipc.loop import Timer


class Timers:
    """Replaces the timers of a loop."""

    def __init__(self) -> None:
        self.timers: list[tuple[float, Timer]] = []

    def call_later(self, delay_s: float, callback: Callable[..., Any], _source: object = None) -> Timer:
        """Start a timer, as the loop."""
        timer = Timer(delay_s, callback)
        self.timers.append((delay_s, timer))
        return timer

    def fire(self, delay_s: float) -> None:
        """Run the timers of this delay."""
        due = [timer for each, timer in self.timers if each == delay_s]
        self.timers = [each for each in self.timers if each[0] != delay_s]
        for timer in due:
            callback, timer.callback = timer.callback, None
            if callback is not None:
                callback()
