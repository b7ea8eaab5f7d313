"""Notices that the host's clock has jumped: the host slept, or somebody set the clock (*cat. 4.6*).

A timer with TFD_TIMER_CANCEL_ON_SET (timerfd_create(2)) becomes readable when the clock is set, and when the host wakes
up from sleep.  So nothing has to poll.  Unlike vmd, which compares two clocks each second.
"""

import errno
import os
import time

from vmd.errors import HostError
from vmd.log import log
from vmd.privsep import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.ipc.loop import Loop

JUMP_S = 5.0  # a smaller jump is left to the time daemon of the guest


class ClockWatch:
    """Calls `on_jump` on the event thread when wall time has moved by more than JUMP_S against the monotonic clock."""

    def __init__(self, loop: "Loop", on_jump: "Callable[[], object]") -> None:
        self._on_jump = on_jump
        self._ahead_s = self._ahead()
        try:
            self._fd = linux.timerfd_create(linux.CLOCK_REALTIME, linux.TFD_CLOEXEC | linux.TFD_NONBLOCK)
        except HostError as error:
            log.warn(f"guests are not told when this host has slept: {error}")
            return
        self._arm()
        loop.add(self._fd, self._on_event)

    @staticmethod
    def _ahead() -> float:
        return time.time() - time.monotonic()

    def _arm(self) -> None:
        linux.timerfd_cancel_on_set(self._fd)

    def _on_event(self, _events: int) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ECANCELED:
                raise
        self._arm()
        before_s, self._ahead_s = self._ahead_s, self._ahead()
        if abs(self._ahead_s - before_s) > JUMP_S:
            self._on_jump()
