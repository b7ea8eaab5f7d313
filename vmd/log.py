"""Log lines, each tagged with the title of the process that wrote it (*cat. 9.1*).

Every process writes whole lines to the descriptor that its parent left at fd 2, so that a confined
process needs neither a path nor a socket call.  What fd 2 is decides the form of a line:

    STDERR   `vm/db1: text`                     a terminal or file (`vmd -d`)
    JOURNAL  `<6>vm/db1: text`                  the stream systemd made for us
    SYSLOG   `<30>vmd[4711]: vm/db1: text`      a datagram socket connected to /dev/log

A line is lost rather than waited for: no process may hang because a log reader does.
Standard library only, and little of it: device processes import this.
"""

import os
import time

STDERR, JOURNAL, SYSLOG = "stderr", "journal", "syslog"
FORMS = (STDERR, JOURNAL, SYSLOG)

CRIT, ERR, WARNING, INFO, DEBUG = 2, 3, 4, 6, 7  # syslog(3) severities
LOG_DAEMON = 3 << 3
LINE_MAX = 2000  # bytes; longer text is cut, so that one line cannot drown the others


class Log:
    """The log of one process; `verbosity` 0, 1 or 2 as in `vmd -v`, `vmctl log` (*cat. 9.1*)."""

    def __init__(self) -> None:
        self.title = "vmd"
        self.form = STDERR
        self.verbosity = 0
        self.fd = 2

    def setup(self, title: str, form: str, verbosity: int) -> None:
        """Say who we are and how lines look; called once, first thing in a process."""
        self.title = title
        self.form = form
        self.verbosity = verbosity

    def write(self, severity: int, text: str) -> None:
        """Write one line; control characters that a guest or client slipped in are made visible."""
        clean = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
        if self.form == SYSLOG:
            line = f"<{LOG_DAEMON | severity}>vmd[{os.getpid()}]: {self.title}: {clean}"
        elif self.form == JOURNAL:
            line = f"<{severity}>{self.title}: {clean}"
        else:
            line = f"{self.title}: {clean}"
        raw = line.encode("utf-8", "backslashreplace")[:LINE_MAX]
        try:
            os.write(self.fd, raw if self.form == SYSLOG else raw + b"\n")
        except OSError:
            return  # a full, closed or broken log must not stop a daemon

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
        """Return whether the event may be logged now."""
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
