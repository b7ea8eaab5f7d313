"""vmctl top: the activity of VMs, again after each interval."""

import os
import select
import sys
import time

from vmctl import rates
from vmctl.errors import ArgumentError
from vmctl.numbers import count
from vmctl.options import Given
from vmctl.output import clean, put_json, put_lines
from vmctl.rates import Reading
from vmctl.session import Session
from vmctl.terminal import RawTerminal
from vmd.client import LOOK_UP_MS, NoDaemon
from vmd.stdio import STDIN, STDOUT
from vmd.units import NS

INTERVAL_S, INTERVALS_S = 2.0, (0.1, 3600.0)
OPEN, BEGIN, END_OF_LINE, END_OF_SCREEN = "\x1b[?1049h\x1b[?25l", "\x1b[H", "\x1b[K\r\n", "\x1b[J"
REVERSE, PLAIN = "\x1b[7m", "\x1b[m"
QUIT, SUSPEND, NOW, REVERSED = ("q", "\x03", "\x04"), "\x1a", (" ", "\r"), "r"
KEYS = "c m d n i a sort, r reverses, space reads now, q quits"


def run(session: Session, given: Given) -> int:
    """Show a table after each interval."""
    interval_s = interval(given.operand) if given.operand else INTERVAL_S
    times = count(given.value("-n") or "", "number of tables") if given.has("-n") else None
    if session.json:
        before = read(session)
        time.sleep(interval_s)
        put_document(before, read(session))
        return 0
    try:
        if os.isatty(STDOUT):
            with RawTerminal(STDIN, "top") as terminal:
                Top(session, terminal, interval_s, times).run()
        else:
            stream(session, interval_s, times)
    except KeyboardInterrupt:
        return 0  # the usual end
    return 0


def interval(word: str) -> float:
    """Return the seconds between two tables.  Raises ArgumentError."""
    try:
        seconds = float(word)
    except ValueError:
        raise ArgumentError(f"interval is invalid: {word}") from None
    if not INTERVALS_S[0] <= seconds <= INTERVALS_S[1]:
        raise ArgumentError(f"interval is not from {INTERVALS_S[0]:g} to {INTERVALS_S[1]:g} seconds: {word}")
    return seconds


def read(session: Session) -> Reading:
    """Return the figures of all VMs.  Raises CommandError, PeerError."""
    vms = tuple(session.client.figures())
    return Reading(at_ns=time.monotonic_ns(), vms=vms)


def put_document(before: Reading, now: Reading) -> None:
    """Print the activity between two readings."""
    found = rates.ordered(rates.rows(before, now, time.time()), rates.FIRST_ORDER)
    elapsed_s = (now.at_ns - before.at_ns) / NS
    put_json({"interval_s": round(elapsed_s, 3), "vms": [rates.as_json(one) for one in found]})


def stream(session: Session, interval_s: float, times: int | None) -> None:
    """Print a table after each interval, if standard output is not a terminal."""
    before = read(session)
    while times is None or times > 0:
        time.sleep(interval_s)
        now = read(session)
        found = rates.ordered(rates.rows(before, now, time.time()), rates.FIRST_ORDER)
        put_lines([rates.summary(found, len(now.vms)), rates.HEADER, *map(rates.line, found), ""])
        before = now
        times = times and times - 1


class Top:
    """The screen of a terminal, and its keys."""

    def __init__(self, session: Session, terminal: RawTerminal, interval_s: float, times: int | None) -> None:
        self.session = session
        self.terminal = terminal
        self.interval_s = interval_s
        self.times = times
        self.order, self.reverse = rates.FIRST_ORDER, False
        self.before: Reading | None = None
        self.now: Reading | None = None
        self.trouble = ""  # why there is no new reading
        self.quits = False

    def run(self) -> None:
        """Show tables until the operator leaves or the wanted number was shown.  Raises CommandError."""
        self._show(OPEN)
        self.now = read(self.session)
        self._paint()
        while self.times != 0 and self._wait(time.monotonic() + self.interval_s):
            self._read()
            self._paint()
            if self.times is not None:
                self.times -= 1

    def _read(self) -> None:
        """Take another reading.  The daemon may be away for a moment, for example during an upgrade."""
        try:
            now = read(self.session)
        except NoDaemon as error:
            self.session.reconnect()
            self.trouble = str(error)
            return
        self.before, self.now, self.trouble = self.now, now, ""

    def _wait(self, until_s: float) -> bool:
        """Handle keys until `until_s`, or until a key asks for the next table.  Return False if the operator quits."""
        size = self._size()
        poll = select.poll()
        if self.terminal.is_tty:
            poll.register(self.terminal.fd, select.POLLIN)
        while not self.quits and (left_s := until_s - time.monotonic()) > 0:
            ready = poll.poll(min(LOOK_UP_MS, max(1, int(left_s * 1000))))
            if ready and self._on_keys():
                break
            if ready or size != self._size():
                size = self._size()
                self._paint()
        return not self.quits

    def _on_keys(self) -> bool:
        """Read keys; return whether one asks for a new reading."""
        try:
            typed = os.read(self.terminal.fd, 256).decode("ascii", "replace")
        except OSError:
            typed = ""
        if not typed:  # the terminal has hung up
            self.quits = True
        wants_more = False
        for key in typed.lower():
            if key in QUIT:
                self.quits = True
            elif key in rates.ORDERS:
                self.order = key
            elif key == REVERSED:
                self.reverse = not self.reverse
            elif key == SUSPEND:
                self.terminal.suspend()
            elif key in NOW:
                wants_more = True
        return wants_more

    def _size(self) -> tuple[int, int]:
        try:
            size = os.get_terminal_size(STDOUT)
        except OSError:
            return 80, 24
        return size.columns or 80, size.lines or 24

    def _paint(self) -> None:
        assert self.now is not None
        columns, height = self._size()
        found = rates.ordered(rates.rows(self.before, self.now, time.time()), self.order, reverse=self.reverse)
        word = f"by {rates.ORDERS[self.order][0]}{', reversed' if self.reverse else ''}"
        head = [
            self.trouble or f"{rates.summary(found, len(self.now.vms))}; every {self.interval_s:g} s, {word}",
            KEYS,
        ]
        room = max(1, height - len(head) - 1)
        lines = [rates.line(one) for one in found]
        if len(lines) > room:
            lines = [*lines[: room - 1], f"and {len(lines) - room + 1} more"]
        painted = [fitting(each, columns) for each in head]
        painted.append(f"{REVERSE}{fitting(rates.HEADER, columns):<{columns}}{PLAIN}")
        painted += [fitting(each, columns) for each in lines]
        # No line end after the last line: a full screen would scroll.
        self._show(BEGIN + END_OF_LINE.join(painted) + "\x1b[K" + END_OF_SCREEN)

    def _show(self, text: str) -> None:
        self.terminal.screen.show(text.encode(sys.getfilesystemencoding(), "replace"))


def fitting(text: str, columns: int) -> str:
    """Return the part of a line that fits the screen, with unprintable characters as escapes."""
    return clean(text)[:columns]
