"""A token bucket: a rate per second, with a small burst.

A request is paid for after it has passed, when its size is known.  So the level may become negative; nothing passes
until it has risen again.  Unused tokens are kept for KEPT_S.  Over any period no more passes than the rate allows, plus
the tokens kept and the last request.
"""

import time

KEPT_S = 0.1  # the burst: at most the tokens of this time are kept
LEAST_S = 0.001
STEP_S = 0.01  # a wait ends when the tokens of this time are there, since each wake-up costs


class Bucket:
    """One limit of one queue; used by the thread that owns the queue."""

    def __init__(self, rate: int) -> None:
        """`rate` is how much may pass each second."""
        self.rate = rate
        self.most = max(1.0, rate * KEPT_S)
        self.step = max(1.0, rate * STEP_S)
        self.level = self.most
        self.filled_s = time.monotonic()

    def wait_s(self) -> float:
        """Return how long nothing may pass; 0.0 if something may pass now."""
        now_s = time.monotonic()
        self.level = min(self.most, self.level + self.rate * (now_s - self.filled_s))
        self.filled_s = now_s
        return 0.0 if self.level >= 1.0 else max(LEAST_S, (self.step - self.level) / self.rate)

    def take(self, amount: int) -> None:
        """Pay for `amount`, which has passed."""
        self.level -= amount


class Throttled:
    """Counts how often a queue had to wait for a limit, and how long, in two adjacent figures."""

    def __init__(self, figures: memoryview, place: int) -> None:
        self._figures = figures
        self._place = place
        self._times = self._waited_ns = 0
        self._since_ns = 0  # the wait is counted up to this time; 0: the queue does not wait

    @property
    def now(self) -> bool:
        """Return whether the queue waits."""
        return bool(self._since_ns)

    def begin(self) -> None:
        """Begin a wait, or continue one."""
        now_ns = time.monotonic_ns()
        if not self._since_ns:
            self._times += 1
            self._figures[self._place] = self._times
        self._count(now_ns)
        self._since_ns = now_ns

    def end(self) -> None:
        """End the wait, if there is one."""
        self._count(time.monotonic_ns())
        self._since_ns = 0

    def _count(self, now_ns: int) -> None:
        """Add the time since the last count, if the queue waits."""
        if self._since_ns:
            self._waited_ns += now_ns - self._since_ns
            self._figures[self._place + 1] = self._waited_ns
