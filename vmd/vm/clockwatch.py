"""Notices that the host's clock has jumped: it slept, or somebody set it (*cat. 4.6*).

The kernel ends a timer that is to be cancelled when the clock is set (timerfd_create(2)), which includes waking up
from sleep; so nothing ticks.  (vmd compares two clocks each second instead.)
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

JUMP_S = 5.0  # smaller ones a guest's time daemon sees to


class ClockWatch:
    """Calls `on_jump` on the event thread when wall time has moved by more than JUMP_S against the monotonic clock."""

    def __init__(self, loop: "Loop", on_jump: "Callable[[], object]") -> None:
        self._on_jump = on_jump
        self._ahead_s = self._ahead()
        try:
            self._fd = linux.timerfd_create(linux.CLOCK_REALTIME, linux.TFD_CLOEXEC | linux.TFD_NONBLOCK)
        except HostError as error:
            log.warn(f"guests will not hear of it when this host has slept: {error}")
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
