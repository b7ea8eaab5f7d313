"""Limits on what guests and users may make the daemon do again and again."""

import time

RESTART_WINDOW_S = 6.0
RESTART_LIMIT = 3


class RestartLimit:
    """Stops a guest that reboots in a loop: the third start within 6 s of the one before is refused (*cat. 4.3*).

    Unlike vmd, only guest reboots count: a user who starts and stops a VM by hand is not a loop.
    """

    def __init__(self) -> None:
        self.last_start_s: float | None = None
        self.quick_restarts = 0

    def started_by_user(self) -> None:
        """Note a start that somebody asked for."""
        self.last_start_s = time.monotonic()
        self.quick_restarts = 0

    def may_restart(self) -> bool:
        """Note a restart and return whether it is allowed."""
        now_s = time.monotonic()
        quick = self.last_start_s is not None and now_s - self.last_start_s < RESTART_WINDOW_S
        self.quick_restarts = self.quick_restarts + 1 if quick else 0
        self.last_start_s = now_s
        return self.quick_restarts < RESTART_LIMIT
