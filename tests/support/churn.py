"""The guest that keeps its disk busy for ever (`guests/blk/churn.c`), and its reports."""

import re
import time
from typing import NamedTuple

import pytest

from tests.support.daemon import DEADLINE_S, Attached

LINE = re.compile(
    r"churn: rounds=(\d+) errors=(\d+) lost=(\d+) silent=(\d+) interrupts=(\d+) spurious=(\d+) beats=(\d+)"
    r" backwards=(\d+)\r\n"
)
# The guest's parameters, and the statements of its VM.
LOADS = [
    ("smp", ("vcpus 2",)),
    ("smp intx-ioapic", ("vcpus 2",)),
    ("intx-pic legacy", ("virtio legacy",)),
    ("polled flags", ("virtio modern",)),
]
FAST = ("smp",)
WAYS = pytest.mark.parametrize(("cmdline", "lines"), [
    pytest.param(cmdline, lines, id=cmdline, marks=() if cmdline in FAST else pytest.mark.deep)
    for cmdline, lines in LOADS
])  # fmt: skip


class Report(NamedTuple):
    """One line of the guest's report."""

    rounds: int
    errors: int
    lost: int
    silent: int
    interrupts: int
    spurious: int
    beats: int
    backwards: int

    def check(self) -> None:
        """Raise AssertionError if anything was lost or wrong."""
        assert (self.errors, self.lost, self.silent, self.backwards) == (0, 0, 0, 0), self


def begin(console: Attached, timeout_s: float = DEADLINE_S) -> None:
    """Wait until the guest has begun its rounds."""
    console.expect("churn: begin\r\n", timeout_s)


def ask(console: Attached, timeout_s: float = DEADLINE_S) -> Report:
    """Have the guest report; check and return the report."""
    console.type("\r")
    return _next(console, timeout_s)


def ask_until_rounds(console: Attached, more: int, timeout_s: float = DEADLINE_S) -> Report:
    """Wait until the guest has done `more` further rounds; return its last report."""
    deadline = time.monotonic() + timeout_s
    wanted = ask(console, timeout_s).rounds + more
    while (report := ask(console, timeout_s)).rounds < wanted:
        assert time.monotonic() < deadline, f"{report.rounds} of {wanted} rounds after {timeout_s} s"
    return report


def finish(console: Attached, timeout_s: float = DEADLINE_S) -> Report:
    """Have the guest end its rounds and switch itself off; return its last report."""
    console.type("q\r")
    console.expect("churn: end\r\n", timeout_s)
    reports = list(LINE.finditer(console.text()))
    return _checked(reports[-1])


def _next(console: Attached, timeout_s: float) -> Report:
    console.expect("churn: rounds=", timeout_s)
    at = console.seen - len("churn: rounds=")
    console.expect("\r\n", timeout_s)
    found = LINE.match(console.said[at : console.seen].decode())
    assert found is not None, console.text()
    return _checked(found)


def _checked(found: "re.Match[str]") -> Report:
    report = Report(*map(int, found.groups()))
    report.check()
    return report
