"""Log lines, each tagged with the title of the process that wrote it (*cat. 9.1*).

Each process writes whole lines to fd 2, which its parent has prepared.  So a confined process needs neither a path nor
a socket call.  The kind of fd 2 decides the form of a line:

    STDERR   `vm/db1: text`                     a terminal or file (`vmd -d`)
    JOURNAL  `<6>vm/db1: text`                  the stream that systemd has made for us
    SYSLOG   `<30>vmd[4711]: vm/db1: text`      a datagram socket connected to /dev/log
    LEAF     `<6>vm/db1: text`                  a packet for the process "log", which writes one of the others

The parent begins with one of the first three, and changes to LEAF as soon as the process "log" runs.  All other
processes use LEAF from the start.  If the process "log" does not take a line at once, the line is dropped: no process
may hang because a reader of the log hangs.  Dropped lines are counted, and the next line that arrives tells the number.
Imports little of the standard library, because device processes import this module.
"""

import _socket
import posix as os
import time

STDERR, JOURNAL, SYSLOG, LEAF = "stderr", "journal", "syslog", "leaf"
FORMS = (STDERR, JOURNAL, SYSLOG, LEAF)

CRIT, ERR, WARNING, INFO, DEBUG = 2, 3, 4, 6, 7  # syslog(3) severities
LOG_DAEMON = 3 << 3
LINE_MAX = 2000  # bytes; longer text is cut, so that one line cannot drown the others


def visible(text: str) -> str:
    """Return a text with control characters escaped, so that a guest or client cannot make it more than one line."""
    return text if text.isprintable() else "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def shaped(form: str, severity: int, text: str, pid: int) -> bytes:
    """Return a line in one of FORMS.  `text` includes the title."""
    if form == SYSLOG:
        text = f"<{LOG_DAEMON | severity}>vmd[{pid}]: {text}"
    elif form != STDERR:
        text = f"<{severity}>{text}"
    raw = text.encode("utf-8", "backslashreplace")[:LINE_MAX]
    return raw + b"\n" if form in (STDERR, JOURNAL) else raw


class Log:
    """The log of one process; `verbosity` 0, 1 or 2 as in `vmd -v`, `vmctl log` (*cat. 9.1*)."""

    def __init__(self) -> None:
        self.title = "vmd"
        self.form = STDERR
        self.verbosity = 0
        self.fd = 2
        self.lost = 0  # number of lines that the process "log" did not take
        self._leaf: _socket.socket | None = None

    def setup(self, title: str, form: str, verbosity: int, fd: int = 2) -> None:
        """Set the title, the form of lines, the verbosity and the descriptor.  Called first in each process."""
        if self._leaf is not None:
            self._leaf.detach()  # otherwise the descriptor would be closed
        self.title = title
        self.form = form
        self.verbosity = verbosity
        self.fd = fd
        self._leaf = _socket.socket(fileno=fd) if form == LEAF else None

    def write(self, severity: int, text: str) -> None:
        """Write one line."""
        line = shaped(self.form, severity, f"{self.title}: {visible(text)}", os.getpid())
        if self._leaf is None:
            try:
                os.write(self.fd, line)
            except OSError:
                return  # a full, closed or broken log must not stop a daemon
        elif not self.say_lost() or not self._send(line):
            self.lost += 1

    def say_lost(self) -> bool:
        """Log the number of lost lines, if there are any; return whether the line arrived."""
        if not self.lost:
            return True
        text = f"{self.title}: {self.lost} lines were lost: the log did not take them"
        arrived = self._send(shaped(LEAF, WARNING, text, 0))
        if arrived:
            self.lost = 0
        return arrived

    def _send(self, line: bytes) -> bool:
        """Send a line to the process "log"; return whether there was room for it."""
        assert self._leaf is not None
        try:
            # O_NONBLOCK alone is not enough: other processes of the VM share the open file, and could clear the flag.
            self._leaf.send(line, _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    def crit(self, text: str) -> None:
        """Log why this process ends."""
        self.write(CRIT, text)

    def error(self, text: str) -> None:
        """Log a failure that an operator has to look at."""
        self.write(ERR, text)

    def warn(self, text: str) -> None:
        """Log an unusual event after which the process goes on."""
        self.write(WARNING, text)

    def info(self, text: str) -> None:
        """Log an event in the life of a VM or the daemon."""
        self.write(INFO, text)

    def debug(self, text: str) -> None:
        """Log a detail, which is shown only with `-vv` or after `vmctl log verbose`."""
        if self.verbosity > 1:
            self.write(DEBUG, text)


log = Log()


class RateLimit:
    """Lets `burst` events pass, then one in each `interval_s`.  Counts the events that it suppresses.

    Log lines that a guest, a client or a peer can cause must pass such a limit.
    """

    def __init__(self, burst: int = 5, interval_s: float = 10.0) -> None:
        self.burst = burst
        self.interval_s = interval_s
        self.tokens = float(burst)
        self.last_s = time.monotonic()
        self.suppressed = 0

    def allow(self) -> bool:
        """Return whether the event may pass now."""
        now_s = time.monotonic()
        self.tokens = min(self.burst, self.tokens + (now_s - self.last_s) / self.interval_s)
        self.last_s = now_s
        if self.tokens < 1:
            self.suppressed += 1
            return False
        self.tokens -= 1
        return True

    def warn(self, text: str) -> None:
        """Log a warning if the limit allows it, with the number of warnings that were suppressed before it."""
        if self.allow():
            more = f" ({self.suppressed} more not shown)" if self.suppressed else ""
            self.suppressed = 0
            log.warn(text + more)
