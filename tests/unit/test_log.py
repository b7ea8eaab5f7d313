"""Lines of the log in each form, and the limit for lines that others can cause."""

import socket
from collections.abc import Iterator

import pytest

from vmd import log as module
from vmd.log import FORMS, LEAF, LINE_MAX, Log, RateLimit, shaped


@pytest.mark.parametrize(
    ("form", "line"),
    [
        ("stderr", b"vm/web: text\n"), ("journal", b"<4>vm/web: text\n"), ("syslog", b"<28>vmd[77]: vm/web: text"),
        ("leaf", b"<4>vm/web: text"),
    ],
)  # fmt: skip
def test_line_in_each_form(form: str, line: bytes) -> None:
    """Priorities as of syslog(3): facility daemon, severity warning.  A long line is cut."""
    assert form in FORMS
    assert shaped(form, 4, "vm/web: text", 77) == line
    end = b"\n" * (form in ("stderr", "journal"))
    assert shaped(form, 4, "x" * 5000, 77) == (shaped(form, 4, "", 77).rstrip(b"\n") + b"x" * 5000)[:LINE_MAX] + end


class Lines:
    """A log that is a socket; `take` returns what has arrived."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.setblocking(False)
        self.log = Log()
        self.log.setup("vm/web", LEAF, 0, self.theirs.fileno())

    def take(self) -> list[bytes]:
        """Return the lines."""
        found = []
        while True:
            try:
                found.append(self.ours.recv(4096))
            except BlockingIOError:
                return found


@pytest.fixture
def lines() -> Iterator[Lines]:
    """A log and its reader."""
    made = Lines()
    yield made
    made.log.setup("vmd", "stderr", 0)
    made.ours.close()
    made.theirs.close()


def test_severities_and_verbosity(lines: Lines) -> None:
    """Details are shown from the second `-v` on only.  A text stays one line."""
    log = lines.log
    for verbosity in (0, 1, 2):
        log.verbosity = verbosity
        for write in (log.crit, log.error, log.warn, log.info, log.debug):
            write(f"{verbosity}\n")
    assert lines.take() == [
        f"<{severity}>vm/web: {verbosity}\\x0a".encode()
        for verbosity, severities in ((0, "2346"), (1, "2346"), (2, "23467"))
        for severity in severities
    ]


def test_lost_lines_are_counted(lines: Lines) -> None:
    """A log that takes nothing keeps nobody waiting; as soon as it has room, it is told how many lines it lacks."""
    sent = 0
    while not lines.log.lost:
        lines.log.info("x" * 1000)
        sent += 1
    lines.log.info("also lost")
    assert lines.log.lost == 2
    assert len(lines.take()) == sent - 1

    lines.log.info("next")
    assert lines.take() == [
        b"<4>vm/web: 2 lines were lost: the log did not take them", b"<6>vm/web: next",
    ]  # fmt: skip
    lines.log.info("last")
    assert lines.take() == [b"<6>vm/web: last"]


def test_log_that_is_set_up_again_keeps_its_descriptor(lines: Lines) -> None:
    """It is another process's, too."""
    lines.log.setup("vm/db", LEAF, 0, lines.theirs.fileno())
    lines.log.info("text")
    assert lines.take() == [b"<6>vm/db: text"]


def test_broken_log_stops_nobody() -> None:
    """Neither a closed descriptor nor a reader that has ended."""
    log = Log()
    assert log.fd == 2
    log.setup("vmd", "stderr", 0)
    assert (log.fd, log.title, log.form, log.verbosity) == (2, "vmd", "stderr", 0)
    log.setup("vmd", "stderr", 0, -1)
    log.error("text")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    log.setup("vmd", LEAF, 0, ours.fileno())
    log.error("text")
    assert log.lost == 1
    log.setup("vmd", "stderr", 0)
    ours.close()


def test_limit_of_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some at once, then one in each interval; the next line that passes says how many did not."""

    class Clock:
        now_s = 1000.0

        def monotonic(self) -> float:
            return self.now_s

    clock, said = Clock(), list[str]()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module.log, "warn", said.append)
    limit = RateLimit(burst=3, interval_s=10.0)
    for number in range(5):
        limit.warn(f"{number}")
    assert said == ["0", "1", "2"]
    clock.now_s += 9.0
    limit.warn("too early")
    clock.now_s += 1.5
    limit.warn("5")
    limit.warn("6")
    assert said[3:] == ["5 (3 more not shown)"]
    clock.now_s += 1000.0
    for number in range(7, 12):
        limit.warn(f"{number}")
    assert said[4:] == ["7 (1 more not shown)", "8", "9"]


def test_usual_limit() -> None:
    """Five lines at once."""
    limit = RateLimit()
    assert [limit.allow() for _ in range(6)] == [True] * 5 + [False]
    assert (limit.interval_s, limit.suppressed) == (10.0, 1)
