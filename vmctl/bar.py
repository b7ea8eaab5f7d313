"""A progress bar for a terminal."""

import os
import time

from vmctl.output import notice
from vmd.scaled import fmt_scaled
from vmd.stdio import STDERR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.ipc.messages.shared import TransferProgress

BAR_WIDTH = 40
MIN_NAME = 8  # letters of the name that a narrow terminal shows, even if there is no room for the bar
DEFAULT_COLUMNS = 80  # for a terminal without a size
REDRAW_S = 0.1
ROUND = " round {:4}"
SETTLED_S = 1.0  # before this time the rate is too inaccurate to be shown


class Bar:
    """Name, percentage, bar, size and, as options, rate with remaining time, and round.  Redrawn in place."""

    def __init__(self, name: str, *, rate: bool = False, rounds: bool = False, shown: bool = True) -> None:
        self.rate = rate
        self.rounds = rounds
        self.began_s = time.monotonic()
        self.shown = shown and os.isatty(STDERR)
        columns = os.get_terminal_size(STDERR).columns if self.shown else 0
        # One column stays free: a full line would make some terminals begin a new one.
        fixed = len(f" 100% || {fmt_scaled(0):>6}") + (len(self._pace(0, 1)) if rate else 0)
        fixed += len(ROUND.format(0)) if rounds else 0
        room = (columns or DEFAULT_COLUMNS) - 1 - fixed
        name = "".join(c if c.isprintable() else "?" for c in name)
        self.width = max(0, min(BAR_WIDTH, room - len(name), room - MIN_NAME))
        self.name = name[: max(0, room - self.width)]
        self.drawn_s = 0.0
        self.whole = 0  # bytes, from the daemon's last report

    def follow(self, progress: "TransferProgress") -> None:
        """Draw a report of the daemon, if it has a total."""
        self.whole = progress.total_bytes
        if self.whole:
            self.show(progress.done_bytes, self.whole, progress.round)

    def complete(self) -> None:
        """Draw the full bar."""
        if self.whole:
            self.show(self.whole, self.whole)

    def show(self, done: int, whole: int, number: int = 0) -> None:
        """Draw, at most once in REDRAW_S.  `whole` may be an estimate that is too small.

        `number` is the number of the round, if there are rounds.
        """
        now_s = time.monotonic()
        if not self.shown or (done < whole and now_s - self.drawn_s < REDRAW_S):
            return
        self.drawn_s = now_s
        whole = max(done, whole, 1)
        filled = "*" * (done * self.width // whole)
        pace = self._pace(done, whole) if self.rate else ""
        turn = ROUND.format(number or "") if self.rounds else ""
        notice(f"\r{self.name} {done * 100 // whole:3}% |{filled:{self.width}}| {fmt_scaled(done):>6}{pace}{turn}")

    def _pace(self, done: int, whole: int) -> str:
        """Return rate and remaining time, always with the same width."""
        spent_s = time.monotonic() - self.began_s
        if spent_s < SETTLED_S or not done:
            return f" {'-':>6}/s {'-':>8}"
        left_s = min(int((whole - done) * spent_s / done), 99 * 3600)
        return f" {fmt_scaled(int(done / spent_s)):>6}/s {left_s // 3600:02}:{left_s // 60 % 60:02}:{left_s % 60:02}"

    def end(self) -> None:
        """End the line of the bar."""
        if self.drawn_s:
            notice("\n")
