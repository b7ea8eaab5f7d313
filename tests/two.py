"""Shares the tests between two processes of pytest (`--two`), since many tests mostly wait.

Both processes collect the same tests, and take one module after the other until none is left.  One process runs all
tests of a module, with their fixtures.  The second process writes its reports to a file.  The first process shows them
like its own, one module at a time, so there is one summary and one exit status.  A test is identified by its position
in the collection, because a parameter's name may differ between the processes, for example if it contains the time.
"""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.reports import line_of, report_of

REPORTS, OUTPUT = "reports", "output"  # names inside the shared folder
MODULES = "modules"
END_S = 60.0  # for the second process to run the teardown of its test
POLL_S = 0.2
TAIL_LINES = 60
ENDED_WELL = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)


def add_options(parser: pytest.Parser) -> None:
    """Add the options of this module."""
    parser.addoption("--two", action="store_true", help="share the tests between two processes")
    parser.addoption("--second", metavar="FOLDER", help="this is the second process, which reports to FOLDER")


def configure(config: pytest.Config) -> None:
    """Become the first or second process, as the options say.  The terminal reporter must be registered already."""
    if config.option.second:
        config.pluginmanager.register(Second(config, Path(config.option.second)))
    elif config.option.two and not config.option.collectonly:
        config.pluginmanager.register(First(config))


def module_of(nodeid: str) -> str:
    """Return the name of a test's module."""
    return nodeid.partition("::")[0]


def function_of(nodeid: str) -> str:
    """Return the name of a test without its parameters."""
    return nodeid.partition("[")[0]


class Modules:
    """The modules of this process.  A module belongs to the process that first creates a file of its name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ours: dict[str, bool] = {}

    def ask(self, item: pytest.Item) -> bool:
        """Return whether a test belongs to this process.  Take its module if it is free."""
        module = module_of(item.nodeid)
        if module not in self.ours:
            try:
                (self.folder / f"{module.replace('/', '-')}.taken").touch(exist_ok=False)
                self.ours[module] = True
            except FileExistsError:
                self.ours[module] = False
        return self.ours[module]


def run(session: pytest.Session, items: Iterator[pytest.Item], before: Callable[[pytest.Item], None]) -> None:
    """Run these tests as pytest's own loop does.  `before` is called before each test.

    pytest needs to know the next test: the fixtures of modules and folders that contain both tests then stay.  So a
    process takes its next module before it runs the last test of the current one.
    """
    if session.testsfailed and not session.config.option.continue_on_collection_errors:
        raise session.Interrupted(f"{session.testsfailed} errors during collection")
    item = next(items, None)
    while item is not None:
        before(item)
        stop_if_told(session)
        following = next(items, None)
        item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
        stop_if_told(session)
        item = following


def stop_if_told(session: pytest.Session) -> None:
    """Raise the exception that ends a run early, after too many failures or on request."""
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)


class Second:
    """The second process: runs its modules, and writes each report to the file at once."""

    def __init__(self, config: pytest.Config, folder: Path) -> None:
        self.config = config
        self.modules = Modules(folder / MODULES)
        self.reports = folder / REPORTS
        self.places: dict[str, int] = {}  # position in the collection, by test
        self.output = (folder / OUTPUT).open("w", encoding="utf-8")

        # The terminal report of this process goes to a file.  Uncaptured output of tests is still shown.
        config.pluginmanager.unregister(name="terminalreporter")
        config.pluginmanager.register(pytest.TerminalReporter(config, self.output), "terminalreporter")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run the tests that the first process does not run."""
        self.places = {item.nodeid: place for place, item in enumerate(session.items)}
        run(session, filter(self.modules.ask, session.items), lambda item: None)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Append one report."""
        with self.reports.open("a", encoding="utf-8") as reports:
            reports.write(line_of(self.config, report, place=self.places[report.nodeid]))

    def pytest_unconfigure(self) -> None:
        """Close the output file."""
        self.output.close()


class First:
    """The first process: starts the second one, runs its own modules, and reports on all."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.folder = Path(tempfile.mkdtemp(prefix="vmd-two-"))
        (self.folder / MODULES).mkdir()
        (self.folder / REPORTS).touch()
        self.modules = Modules(self.folder / MODULES)
        self.process: subprocess.Popen[bytes] | None = None
        self.all: list[pytest.Item] = []
        self.items: dict[str, dict[str, pytest.Item]] = {}  # tests that the second process may run, by module and name
        self.lines = (self.folder / REPORTS).open(encoding="utf-8")
        self.begun = ""  # an incomplete line of the reports
        self.reports: dict[str, list[pytest.TestReport]] = {}  # reports that are not shown yet, by test
        self.complete: dict[str, int] = {}  # number of completed tests, by module
        self.said = ""  # the last output of the second process, if it failed

    def pytest_sessionstart(self) -> None:
        """Start the second process, so that both collect in parallel."""
        # A killed process cannot end the other one, so the kernel does.
        command = ["setpriv", "--pdeathsig", "INT", sys.executable, "-m", "pytest"]
        options = [f"--second={self.folder}"]
        if self.config.option.basetemp:
            options += [f"--basetemp={self.config.option.basetemp}-second"]  # each process empties its own
        capture = self.config.pluginmanager.getplugin("capturemanager")
        assert capture is not None
        with capture.global_and_fixture_disabled():
            self.process = subprocess.Popen(
                [*command, *self.config.invocation_params.args, *options],
                cwd=self.config.invocation_params.dir, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note the collected tests."""
        self.all = session.items
        for item in session.items:
            if not self._elsewhere(item):
                self.items.setdefault(module_of(item.nodeid), {})[item.nodeid] = item

    def _elsewhere(self, item: pytest.Item) -> bool:
        """Return whether a test runs in the emulated machine instead of these processes."""
        return item.get_closest_marker("l1") is not None and self.config.pluginmanager.has_plugin("outside-l1")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run the tests that the second process does not take.  Show the results of both."""
        run(session, (item for item in session.items if self._elsewhere(item) or self.modules.ask(item)), self._before)
        self._finish(session)
        stop_if_told(session)
        return True

    def _before(self, item: pytest.Item) -> None:
        """Show new results of the second process."""
        if self._elsewhere(item):
            self._finish(item.session)  # the tests of the emulated machine come last
        else:
            self._show()

    def pytest_sessionfinish(self) -> None:
        """End the second process if the run was interrupted."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            if not self._ended(END_S):
                self.process.kill()
                self.process.wait()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Show the last output of the second process if it failed."""
        if self.said:
            terminalreporter.section("the second process did not end as it should", "!", red=True, bold=True)
            terminalreporter.write_line(self.said)

    def pytest_unconfigure(self) -> None:
        """Remove the shared folder."""
        self.lines.close()
        shutil.rmtree(self.folder)

    def _ended(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s`.  Return whether the second process has ended."""
        assert self.process is not None
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _finish(self, session: pytest.Session) -> None:
        """Show the second process's results until it ends.  Tests that it took but did not complete have failed."""
        assert self.process is not None
        while not self._ended(POLL_S):
            self._show()
            if session.shouldfail:
                return
        self._show()
        if session.shouldfail:
            return
        status = self.process.returncode
        lost = [item for tests in self.items.values() for item in tests.values() if not self.modules.ask(item)]
        if lost or status not in ENDED_WELL:
            self.said = (self.folder / OUTPUT).read_text(errors="replace")
            self.said = "\n".join(self.said.splitlines()[-TAIL_LINES:])
            session.shouldfail = f"the second process ended with status {status}"
        for item in lost:
            why = f"the second process ended with status {status} before it had run this"
            self._show_test(item, [
                pytest.TestReport(item.nodeid, item.location, dict.fromkeys(item.keywords, 1), "failed", why, "call")
            ])  # fmt: skip
        self.items.clear()

    def _read(self) -> None:
        """Read the reports that were written since the last call."""
        *lines, self.begun = (self.begun + self.lines.read()).split("\n")
        for line in lines:
            data = json.loads(line)
            report = report_of(self.config, data)
            nodeid = self._here(data["place"], report.nodeid)
            self.reports.setdefault(nodeid, []).append(report)
            if report.when == "teardown":
                module = module_of(nodeid)
                self.complete[module] = self.complete.get(module, 0) + 1

    def _here(self, place: int, name: str) -> str:
        """Return this process's name of the test at a position.  Raises UsageError if it is a different test."""
        here = self.all[place].nodeid if place < len(self.all) else "nothing"
        if function_of(here) != function_of(name):
            raise pytest.UsageError(f"the two processes collect different tests: {here} here, {name} there")
        return here

    def _show(self) -> None:
        """Show the modules that the second process has finished, so that the tests of a module are shown together.

        After its end, show all tests that it has finished.  With -x show them at once, to end this process soon.
        """
        ended = self._ended(0)
        self._read()
        for module, count in list(self.complete.items()):
            if ended or self.config.option.maxfail or count == len(self.items.get(module, {})):
                self._show_tests(module)

    def _show_tests(self, module: str) -> None:
        """Show the completed tests of a module."""
        del self.complete[module]
        tests = self.items.get(module, {})
        for nodeid, item in list(tests.items()):
            reports = self.reports.get(nodeid, [])
            if reports and reports[-1].when == "teardown":
                self._show_test(item, reports)
                del tests[nodeid], self.reports[nodeid]

    def _show_test(self, item: pytest.Item, reports: list[pytest.TestReport]) -> None:
        """Report a test as if it had run in this process."""
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
