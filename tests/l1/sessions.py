"""Runs the tests marked `l1` inside one emulated machine, and reports each as if it had run here.

Two halves of one pytest run.  Outside, `OutsideL1` starts the machine as soon as it knows which tests are
wanted, lets the other tests go first, and then takes each `l1` test's reports from a file.  Inside,
`InsideL1` writes that file: one line of JSON for each report, in pytest's own serialised form.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.l1.faults import TripleFaults
from tests.l1.machine import HEARTBEAT, L1Error, Machine
from tests.support.bootable import bootable
from tests.support.kernels import memtest86, packed_linux, vmlinux
from tests.support.reports import line_of, report_of
from tools import debian_image
from tools.debian_image import ImageError
from tools.debian_kernel import KernelError

REPORTS = "reports"  # names inside the shared folder
TESTS = "tests"
BROKEN = "broken_by_the_emulator"  # in a report: the failure is not the test's
HEARTBEAT_S = 5.0
RESTARTS = 2
LIMIT_S = 1200  # watchdogs, for busy hosts
DEEP_LIMIT_S = 5400  # a third of it for three boots of a Debian that sets itself up


class InsideL1:
    """Writes each report where the other side reads it, at once."""

    def __init__(self, config: pytest.Config, path: str) -> None:
        self.config = config
        self.path = path
        self.faults = TripleFaults()
        self.faults_before = 0
        self.broken_module = ""  # its guests, which later tests may share, are not what they were
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while True:
            Path(self.path).with_name(HEARTBEAT).touch()
            time.sleep(HEARTBEAT_S)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Remember how things are before a test."""
        self.faults_before = self.faults.count()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Append one report."""
        module = report.nodeid.partition("::")[0]
        if report.failed and self.faults.count() > self.faults_before:
            self.broken_module = module
        broken = report.failed and module == self.broken_module
        with open(self.path, "a", encoding="utf-8") as reports:
            reports.write(line_of(self.config, report, **{BROKEN: broken}))


class OutsideL1:
    """Starts the machine and answers for the tests that run in it."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.out = config.rootpath / "build" / "l1" / str(os.getpid())  # runs may overlap
        self.machine: Machine | None = None
        self.failure = ""
        self.restarts: list[str] = []  # why
        self.wakes = 0  # of machines that are off
        self.over = False  # nothing more will be reported

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Take the watchdog off: it would count the wait for the machine; inside, each test has its own."""
        for item in items:
            if item.get_closest_marker("l1"):
                item.add_marker(pytest.mark.timeout(0), append=False)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Start the machine if one of the tests to run is for it."""
        wanted = [item.nodeid for item in session.items if item.get_closest_marker("l1")]
        if not wanted or self.config.option.collectonly or session.testsfailed:
            return  # with a module that cannot be collected, pytest runs nothing
        self.out.mkdir(parents=True, exist_ok=True)
        Path(self.out, REPORTS).write_text("")
        self._start(wanted)

    def _start(self, tests: list[str]) -> None:
        """Start the machine for some tests; what prevents that is their failure."""
        Path(self.out, TESTS).write_text("".join(f"{nodeid}\n" for nodeid in tests))
        deep = self.config.getoption("--deep")
        command = [
            sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "--color=no",
            "--inside-l1", f"/l1/{REPORTS}", *(["--deep"] if deep else []), f"@/l1/{TESTS}",
        ]  # fmt: skip
        try:
            # Made and fetched here: there is no network inside, and all is slower.
            bootable()
            if any(nodeid.startswith("tests/l1/test_login.py") for nodeid in tests):
                debian_image.cached()
            if deep:
                memtest86("x64")
                packed_linux()
                vmlinux()
            self.machine = Machine(self.out, command, DEEP_LIMIT_S if deep else LIMIT_S)
        except (L1Error, KernelError, ImageError, OSError, subprocess.CalledProcessError) as error:
            self.failure = f"the emulated machine was not started: {error}"

    def _ended(self, timeout_s: float) -> bool:
        """Wait at most so long; return whether nothing more will be reported."""
        self.over = self.over or self._over(timeout_s)
        return self.over

    def _over(self, timeout_s: float) -> bool:
        """Do so; the machine is started again for what it spoilt."""
        if self.machine is None:
            return True
        stuck = False
        if not self.machine.ended(timeout_s):
            stuck = self.machine.stuck()
            if not stuck:
                return False
            self.machine.stop()
        wanted = Path(self.out, TESTS).read_text().splitlines()
        rest = [nodeid for nodeid in wanted if not self._complete(nodeid)]
        reports = self._read()
        spoilt = [nodeid for nodeid in rest if _broken(reports.get(nodeid, []))]
        self.wakes += self.machine.wakes
        if not rest or len(self.restarts) == RESTARTS or not (spoilt or stuck or self.machine.died()):
            return True
        why = "it was stuck" if stuck else "it died"
        self.restarts.append(f"it broke the guests of {', '.join(spoilt)}" if spoilt else why)
        lines = [json.dumps(data) + "\n" for nodeid in reports.keys() - rest for data in reports[nodeid]]
        Path(self.out, REPORTS).write_text("".join(lines))
        ended_in = [nodeid for nodeid in rest if nodeid not in spoilt][:1]
        rest.sort(key=lambda nodeid: nodeid in spoilt + ended_in)  # last, lest they take the others along again
        self._start(rest)
        return bool(self.failure)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say that a result took more than one start."""
        for why in self.restarts:
            terminalreporter.section("THE EMULATED MACHINE WAS STARTED AGAIN", "!", red=True, bold=True)
            terminalreporter.write_line(why)
        if self.wakes:
            terminalreporter.section("the emulated machine")
            terminalreporter.write_line(f"it was silent for long, and was sent {self.wakes} interrupts to wake it")

    def pytest_unconfigure(self) -> None:
        """Leave nothing behind when the run was interrupted."""
        if self.machine is not None:
            self.machine.stop()
            if not self.failure:
                shutil.rmtree(self.out)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Report on one test of the machine, when it is done in there; all others run as usual."""
        if item.get_closest_marker("l1") is None:
            self._ended(0)  # so that one that has to be started again is so soon
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports_on(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _reports_on(self, item: pytest.Item) -> Iterator[pytest.TestReport]:
        """Yield the reports on a test, or one failure if it was not run to its end."""
        began = time.time()
        while not self._complete(item.nodeid):
            if self._ended(1.0):
                break
        reports = self._read().get(item.nodeid, [])
        if not self._complete(item.nodeid):
            reports = []  # the test that the machine died in; its set-up may have passed
            yield pytest.TestReport(
                item.nodeid, item.location, dict.fromkeys(item.keywords, 1), "failed",
                self._why(), "call", start=began, stop=time.time(), duration=time.time() - began,
            )  # fmt: skip
        for data in reports:
            yield report_of(self.config, data)

    def _complete(self, nodeid: str) -> bool:
        """Return whether a test was run to its end, and its result counts."""
        reports = self._read().get(nodeid, [])
        counts = len(self.restarts) == RESTARTS or not _broken(reports)
        return counts and any(data["when"] == "teardown" for data in reports)

    def _read(self) -> dict[str, list[dict[str, Any]]]:
        """Return the reports that are there, by test; the last line may be half written."""
        path = self.out / REPORTS
        by_test: dict[str, list[dict[str, Any]]] = {}
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        for line in lines:
            if line.endswith("\n"):
                data = json.loads(line)
                by_test.setdefault(data["nodeid"], []).append(data)
        return by_test

    def _why(self) -> str:
        """Return why a test has no result; at length for the first, in a sentence for the others."""
        if self.failure:
            return self.failure.partition("\n")[0]
        if self.machine is None:
            return "the emulated machine was not started"
        try:
            status = self.machine.status()
        except L1Error as error:
            self.failure = str(error)
        else:
            self.failure = f"pytest inside the emulated machine ended with status {status}\n{self.machine.tail()}"
        return self.failure


def _broken(reports: list[dict[str, Any]]) -> bool:
    """Return whether a test failed with a guest that the emulator had broken."""
    return any(data[BROKEN] for data in reports)
