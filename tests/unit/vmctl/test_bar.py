"""The progress bar in terminals of any width, with a clock of its own."""

import os
from types import SimpleNamespace

import pytest

from vmctl import bar as bar_
from vmctl.bar import Bar
from vmd.ipc.messages.shared import TransferProgress

MIB = 1 << 20


class Shown:
    """What the terminal has got."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        self.columns = 80
        self.is_tty = True
        self.said: list[str] = []
        monkeypatch.setattr(bar_, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        monkeypatch.setattr(bar_, "notice", self.said.append)
        monkeypatch.setattr(
            bar_, "os",
            SimpleNamespace(
                isatty=lambda _fd: self.is_tty, get_terminal_size=lambda _fd: os.terminal_size((self.columns, 24))
            ),
        )  # fmt: skip

    def line(self) -> str:
        """Return the only line that was drawn since the last call."""
        (line,) = self.said
        self.said.clear()
        assert line.startswith("\r")
        return line[1:]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    """A terminal of 80 columns."""
    return Shown(monkeypatch)


@pytest.mark.parametrize(
    ("columns", "name", "line"),
    [
        (80, "web", f"web  50% |{'*' * 20}{' ' * 20}|   2.0M"),
        (0, "web", f"web  50% |{'*' * 20}{' ' * 20}|   2.0M"),
        (80, "n" * 24, f"{'n' * 24}  50% |{'*' * 20}{' ' * 20}|   2.0M"),
        (80, "n" * 25, f"{'n' * 25}  50% |{'*' * 19}{' ' * 20}|   2.0M"),
        (0, "n" * 25, f"{'n' * 25}  50% |{'*' * 19}{' ' * 20}|   2.0M"),
        (80, "n" * 99, f"{'n' * 64}  50% ||   2.0M"),
        (40, "n" * 12, f"{'n' * 12}  50% |{'*' * 6}{' ' * 6}|   2.0M"),
        (40, "web", f"web  50% |{'*' * 8}{' ' * 8}|   2.0M"),
        (26, "web", "web  50% |* |   2.0M"),
        (20, "webserver", "webs  50% ||   2.0M"),
        (16, "web", "  50% ||   2.0M"),
        (10, "web", "  50% ||   2.0M"),
        (80, "a\x1bb", f"a?b  50% |{'*' * 20}{' ' * 20}|   2.0M"),
    ],
)
def test_width(shown: Shown, columns: int, name: str, line: str) -> None:
    """One column stays free.  The bar gives way first, and then the name."""
    shown.columns = columns
    Bar(name).show(2 * MIB, 4 * MIB)

    assert shown.line() == line


@pytest.mark.parametrize(("rate", "rounds"), [(False, True), (True, False), (True, True)])
def test_width_with_rate_and_round(shown: Shown, rate: bool, rounds: bool) -> None:
    """The line fills the terminal but for one column, before and after the rate is known."""
    bar = Bar("w" * 50, rate=rate, rounds=rounds)
    for number in (0, 9999):
        bar.show(2 * MIB, 4 * MIB, number)
        assert len(shown.line()) == 79
        shown.now_s += 10


def test_rate(shown: Shown) -> None:
    """It is shown after a second, with the remaining time."""
    bar = Bar("web", rate=True)
    for now_s, done, pace in (
        (100.5, 1, "-/s        -"),
        (101.0, 1, "1B/s 00:00:03"),
        (102.0, 0, "-/s        -"),
        (110.0, 1, "0B/s 00:00:30"),
        (200.0, 2, "0B/s 00:01:40"),
        (4000.0, 1, "0B/s 03:15:00"),
        (999_999.0, 1, "0B/s 99:00:00"),
        (1_000_000.0, 4, "0B/s 00:00:00"),
    ):
        shown.now_s = now_s
        bar.show(done, 4)
        assert shown.line().endswith(f" {pace}")
    shown.now_s = 100.0
    bar = Bar("web", rate=True)
    shown.now_s = 102.0
    bar.show(3 * MIB, 4 * MIB)
    assert shown.line().endswith(" 1.5M/s 00:00:00")


def test_draws(shown: Shown) -> None:
    """It is drawn ten times a second at most, and always when it is complete."""
    bar = Bar("web")
    for now_s, done, drawn in ((100.0, 0, True), (100.05, 1, False), (100.2, 2, True), (100.25, 4, True)):
        shown.now_s = now_s
        bar.show(done, 4)
        assert bool(shown.said) is drawn
        shown.said.clear()
    bar.end()
    assert shown.said == ["\n"]


@pytest.mark.parametrize(("done", "whole", "percent"), [(0, 0, "  0%"), (1, 0, "100%"), (5, 4, "100%"), (1, 3, " 33%")])
def test_totals(shown: Shown, done: int, whole: int, percent: str) -> None:
    """They may be estimates that are too small."""
    Bar("web").show(done, whole)

    assert shown.line().startswith(f"web {percent} |")


@pytest.mark.parametrize(("is_tty", "asked"), [(False, True), (True, False), (False, False)])
def test_no_bar(shown: Shown, is_tty: bool, asked: bool) -> None:
    """Without a terminal, and for programs, nothing is drawn."""
    shown.is_tty = is_tty
    bar = Bar("web", shown=asked)
    bar.show(4, 4)
    bar.end()

    assert shown.said == []


def test_reports_of_the_daemon(shown: Shown) -> None:
    """A report without a total is not drawn.  The last bar is full."""
    bar = Bar("web", rounds=True)
    bar.complete()
    bar.follow(TransferProgress(done_bytes=1, total_bytes=0))
    bar.complete()
    assert shown.said == []
    bar.end()
    assert shown.said == []
    bar.follow(TransferProgress(done_bytes=1, total_bytes=4, round=3))
    assert shown.line().endswith(" round    3")
    bar.complete()
    line = shown.line()
    assert line.startswith("web 100% |")
    assert line.endswith(" round     ")
