"""A token bucket: so much a second, and not much at once.

What passes is paid for when its size is known, so the level may become negative; nothing passes until that is made up
for.  What was not used is kept for a moment only.  Over any time no more passes than the rate allows, plus what is kept
and the last that passed.
"""

import time

KEPT_S = 0.1  # for so long what is not used is kept
LEAST_S = 0.001
STEP_S = 0.01  # whoever has to wait does so until it is worth it: each wake-up costs


class Bucket:
    """One limit of one queue; used by the thread that owns the queue."""

    def __init__(self, rate: int) -> None:
        """`rate` is what may pass each second."""
        self.rate = rate
        self.most = max(1.0, rate * KEPT_S)
        self.step = max(1.0, rate * STEP_S)
        self.level = self.most
        self.filled_s = time.monotonic()

    def wait_s(self) -> float:
        """Return for how long nothing may pass; 0.0: something may now."""
        now_s = time.monotonic()
        self.level = min(self.most, self.level + self.rate * (now_s - self.filled_s))
        self.filled_s = now_s
        return 0.0 if self.level >= 1.0 else max(LEAST_S, (self.step - self.level) / self.rate)

    def take(self, amount: int) -> None:
        """Note what has passed."""
        self.level -= amount


class Throttled:
    """Counts how often something had to wait, and for how long, as two figures behind one another."""

    def __init__(self, figures: memoryview, place: int) -> None:
        self._figures = figures
        self._place = place
        self._times = self._waited_ns = 0
        self._since_ns = 0  # it waits since then; 0: it does not

    @property
    def now(self) -> bool:
        """Return whether it waits."""
        return bool(self._since_ns)

    def begin(self) -> None:
        """It has to wait, or goes on waiting."""
        now_ns = time.monotonic_ns()
        if not self._since_ns:
            self._times += 1
            self._figures[self._place] = self._times
        self._count(now_ns)
        self._since_ns = now_ns

    def end(self) -> None:
        """It goes on, if it has waited."""
        self._count(time.monotonic_ns())
        self._since_ns = 0

    def _count(self, now_ns: int) -> None:
        """Count what it has waited until now."""
        if self._since_ns:
            self._waited_ns += now_ns - self._since_ns
            self._figures[self._place + 1] = self._waited_ns
