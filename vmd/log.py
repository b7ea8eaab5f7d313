"""Log lines, each tagged with the title of the process that wrote it (*cat. 9.1*).

Every process writes whole lines to the descriptor that its parent left at fd 2, so that a confined
process needs neither a path nor a socket call.  What fd 2 is decides the form of a line:

    STDERR   `vm/db1: text`                     a terminal or file (`vmd -d`)
    JOURNAL  `<6>vm/db1: text`                  the stream systemd made for us
    SYSLOG   `<30>vmd[4711]: vm/db1: text`      a datagram socket connected to /dev/log
    LEAF     `<6>vm/db1: text`                  a packet for the process "log", which writes one of the others

The parent begins with one of the first three, and goes over to LEAF as soon as there is the process "log".  All others
have LEAF from the start.  A line for it is lost rather than waited for: no process may hang because a reader of the log
does.  Lost lines are counted, and the next line that arrives says how many there were.
Standard library only, and little of it: device processes import this.
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
    """Return a text with the control characters that a guest or client slipped in made visible: it stays one line."""
    return text if text.isprintable() else "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def shaped(form: str, severity: int, text: str, pid: int) -> bytes:
    """Return a line, title included, as it is written in a form."""
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
        self.lost = 0  # lines that the process "log" did not take
        self._leaf: _socket.socket | None = None

    def setup(self, title: str, form: str, verbosity: int, fd: int = 2) -> None:
        """Say who we are, how lines look and where they go; the first thing in a process."""
        if self._leaf is not None:
            self._leaf.detach()  # or the descriptor would be closed
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
        """Say how many lines were lost, if any; return whether that arrived."""
        if not self.lost:
            return True
        text = f"{self.title}: {self.lost} lines were lost: the log did not take them"
        arrived = self._send(shaped(LEAF, WARNING, text, 0))
        if arrived:
            self.lost = 0
        return arrived

    def _send(self, line: bytes) -> bool:
        """Give a line to the process "log" if it has room for it."""
        assert self._leaf is not None
        try:
            # Not by O_NONBLOCK alone: the other processes of a VM share the open file, and could take that off.
            self._leaf.send(line, _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    def crit(self, text: str) -> None:
        """Log why this process ends."""
        self.write(CRIT, text)

    def error(self, text: str) -> None:
        """Log a failure that somebody has to look at."""
        self.write(ERR, text)

    def warn(self, text: str) -> None:
        """Log something odd that we went on from."""
        self.write(WARNING, text)

    def info(self, text: str) -> None:
        """Log an event in the life of a VM or the daemon."""
        self.write(INFO, text)

    def debug(self, text: str) -> None:
        """Log detail, shown from `-vv` or `vmctl log verbose` on."""
        if self.verbosity > 1:
            self.write(DEBUG, text)


log = Log()


class RateLimit:
    """Lets `burst` events pass, then one each `interval_s`; counts those it held back.

    What a guest, a client or a peer can cause goes to the log only through one of these.
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
        """Log a warning if the limit allows it, with the number of those before it that were not."""
        if self.allow():
            more = f" ({self.suppressed} more not shown)" if self.suppressed else ""
            self.suppressed = 0
            log.warn(text + more)
