"""Runs the tests marked `l1` inside one emulated machine, and reports each as if it had run here.

Two pytest processes work together.  Outside, `OutsideL1` starts the machine after the collection, lets the other tests
run first, and then reads each `l1` test's reports from a file.  Inside, `InsideL1` writes that file: one line of JSON
for each report, in pytest's own serialised form.
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
from tests.l1.machine import HEARTBEAT, NICE, L1Error, Machine
from tests.support.bootable import bootable
from tests.support.kernels import memtest86, packed_linux, vmlinux
from tests.support.reports import line_of, report_of
from tools import debian_image
from tools.debian_image import ImageError
from tools.debian_kernel import KernelError

REPORTS = "reports"  # names in the shared folder
TESTS = "tests"
BROKEN = "broken_by_the_emulator"  # in a report: the emulator caused the failure
HEARTBEAT_S = 5.0
RESTARTS = 2
LIMIT_S = 1200  # watchdogs, for busy hosts
DEEP_LIMIT_S = 5400  # a third of it is for three boots of a Debian with cloud-init


class InsideL1:
    """Writes each report at once to the file that the outer side reads."""

    def __init__(self, config: pytest.Config, path: str) -> None:
        self.config = config
        self.path = path
        self.faults = TripleFaults()
        self.faults_before = 0
        self.broken_module = ""  # later tests may share the broken guests of this module
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while True:
            Path(self.path).with_name(HEARTBEAT).touch()
            time.sleep(HEARTBEAT_S)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Note the number of triple faults before a test."""
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
    """Starts the machine, and reports the tests that run in it."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.out = config.rootpath / "build" / "l1" / str(os.getpid())  # runs may overlap
        self.machine: Machine | None = None
        self.failure = ""
        self.restarts: list[str] = []  # reasons
        self.wakes = 0  # total of the machines that have ended
        self.over = False  # no more reports will come

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Remove the timeout, which would include the wait for the machine.  Inside, each test has its own timeout."""
        for item in items:
            if item.get_closest_marker("l1"):
                item.add_marker(pytest.mark.timeout(0), append=False)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Start the machine if one of the tests needs it."""
        wanted = [item.nodeid for item in session.items if item.get_closest_marker("l1")]
        if not wanted or self.config.option.collectonly or session.testsfailed:
            return  # after a collection error pytest runs no tests
        self.out.mkdir(parents=True, exist_ok=True)
        Path(self.out, REPORTS).write_text("")
        self._start(wanted)

    def _start(self, tests: list[str]) -> None:
        """Start the machine for some tests.  If that fails, the tests fail with the reason."""
        Path(self.out, TESTS).write_text("".join(f"{nodeid}\n" for nodeid in tests))
        deep = self.config.getoption("--deep")
        command = [
            sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "--color=no",
            "--inside-l1", f"/l1/{REPORTS}", *(["--deep"] if deep else []), f"@/l1/{TESTS}",
        ]  # fmt: skip
        try:
            # Make and fetch these outside: inside there is no network, and everything is slower.
            bootable()
            if any(nodeid.startswith("tests/l1/test_login.py") for nodeid in tests):
                debian_image.cached()
            if deep:
                memtest86("x64")
                packed_linux()
                vmlinux()
            # Of the deep tests those in the machine would end last.
            self.machine = Machine(self.out, command, *((DEEP_LIMIT_S, 0) if deep else (LIMIT_S, NICE)))
        except (L1Error, KernelError, ImageError, OSError, subprocess.CalledProcessError) as error:
            self.failure = f"the emulated machine was not started: {error}"

    def _ended(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s`.  Return whether no more reports will come."""
        self.over = self.over or self._over(timeout_s)
        return self.over

    def _over(self, timeout_s: float) -> bool:
        """Do the work of `_ended`.  Start the machine again for the tests that it broke or did not complete."""
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
        rest.sort(key=lambda nodeid: nodeid in spoilt + ended_in)  # last, because they may break the machine again
        self._start(rest)
        return bool(self.failure)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say that the machine had to be restarted or woken."""
        for why in self.restarts:
            terminalreporter.section("THE EMULATED MACHINE WAS STARTED AGAIN", "!", red=True, bold=True)
            terminalreporter.write_line(why)
        if self.wakes:
            terminalreporter.section("the emulated machine")
            terminalreporter.write_line(f"it was silent for long, and was sent {self.wakes} interrupts to wake it")

    def pytest_unconfigure(self) -> None:
        """Stop the machine if the run was interrupted."""
        if self.machine is not None:
            self.machine.stop()
            if not self.failure:
                shutil.rmtree(self.out)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Report a test of the machine after it has run there.  All other tests run as usual."""
        if item.get_closest_marker("l1") is None:
            self._ended(0)  # so that a machine that needs a restart gets it soon
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports_on(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _reports_on(self, item: pytest.Item) -> Iterator[pytest.TestReport]:
        """Yield the reports of a test, or one failure if the test was not completed."""
        began = time.time()
        while not self._complete(item.nodeid):
            if self._ended(1.0):
                break
        reports = self._read().get(item.nodeid, [])
        if not self._complete(item.nodeid):
            reports = []  # the machine died during this test; its set-up may have passed
            yield pytest.TestReport(
                item.nodeid, item.location, dict.fromkeys(item.keywords, 1), "failed",
                self._why(), "call", start=began, stop=time.time(), duration=time.time() - began,
            )  # fmt: skip
        for data in reports:
            yield report_of(self.config, data)

    def _complete(self, nodeid: str) -> bool:
        """Return whether a test was completed, and its result counts."""
        reports = self._read().get(nodeid, [])
        counts = len(self.restarts) == RESTARTS or not _broken(reports)
        return counts and any(data["when"] == "teardown" for data in reports)

    def _read(self) -> dict[str, list[dict[str, Any]]]:
        """Return the reports written up to now, by test.  The last line may be incomplete."""
        path = self.out / REPORTS
        by_test: dict[str, list[dict[str, Any]]] = {}
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        for line in lines:
            if line.endswith("\n"):
                data = json.loads(line)
                by_test.setdefault(data["nodeid"], []).append(data)
        return by_test

    def _why(self) -> str:
        """Return why a test has no result: with details for the first test, in a sentence for the others."""
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
