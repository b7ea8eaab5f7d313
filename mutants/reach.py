"""Plugins of pytest.  `Follow` records for each test the lines that it reaches, its duration, and whether it passes.

A test that forks, or starts a Python process, may reach any line in that process: it counts as reaching all lines.
`Choose` runs only given tests: the fastest file first, and in each file the fastest test first.
"""

import _thread
import os
import sys
import threading
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    Tracer = Callable[[FrameType, str, object], "Tracer | None"]

START_THREAD = _thread.start_new_thread
STARTS = ("subprocess.Popen", "os.posix_spawn")  # the interpreter's events whose first argument is a program
FORKS = ("os.fork", "os.forkpty")
STARTERS = ("python", "sh", "bash", "env", "unshare")  # programs that may start Python


@dataclass(slots=True)
class Test:
    """The record of a test."""

    __test__ = False  # tells pytest that this class is no test

    seconds: float = 0.0
    passed: bool = True
    lines: dict[str, int] = field(default_factory=dict)  # by module: a bit for each line
    starts: bool = False  # whether it forks or starts a Python process

    def reaches(self, module: str, first: int, last: int) -> bool:
        """Return whether the test reaches one of these lines, or may do so in a process that it starts."""
        return self.starts or bool(self.lines.get(module, 0) >> first & (1 << (last - first + 1)) - 1)

    def add(self, other: "Test") -> None:
        """Add what another record has."""
        self.starts = self.starts or other.starts
        for module, bits in other.lines.items():
            self.lines[module] = self.lines.get(module, 0) | bits


def file_of(test: str) -> str:
    """Return the file of a test."""
    return test.partition("::")[0]


class Follow:
    """Records the lines of the modules that each test reaches."""

    def __init__(self, top: Path, modules: list[str]) -> None:
        self.files = {str(top / module): module for module in modules}
        self.tests: dict[str, Test] = {}
        self.shared: dict[str, Test] = {}  # by file: the lines that fixtures reach; several tests may share fixtures
        self.loading = Test()  # the lines that run when modules are imported
        self.now: dict[str, set[int]] = {module: set() for module in modules}
        self.starts = False  # whether a Python process was started or forked

    def _on_call(self, frame: "FrameType", _event: str, _argument: object) -> "Tracer | None":
        return self._on_line if frame.f_code.co_filename in self.files else None

    def _on_line(self, frame: "FrameType", event: str, _argument: object) -> "Tracer":
        if event == "line":
            self.now[self.files[frame.f_code.co_filename]].add(frame.f_lineno)
        return self._on_line

    def load(self) -> None:
        """Begin to record what runs at imports."""
        sys.settrace(self._on_call)
        sys.addaudithook(self._on_event)

    def _on_event(self, event: str, arguments: tuple[object, ...]) -> None:
        if event in FORKS or (event in STARTS and os.path.basename(str(arguments[0])).startswith(STARTERS)):
            self.starts = True

    def pytest_collection_finish(self) -> None:
        """End the recording of imports: all modules are loaded."""
        sys.settrace(None)
        self._take(self.loading)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        """Record what the fixtures reach."""
        with self._into(self.shared.setdefault(file_of(item.nodeid), Test())):
            yield

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Record what the test reaches."""
        with self._into(self.tests.setdefault(item.nodeid, Test())):
            yield

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Iterator[None]:
        """Record what the ends of fixtures reach."""
        with self._into(self.shared.setdefault(file_of(item.nodeid), Test())):
            yield

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the duration of a test, and whether it passed."""
        test = self.tests.setdefault(report.nodeid, Test())
        test.seconds += report.duration
        test.passed = test.passed and report.passed

    def found(self) -> dict[str, Test]:
        """Return the records.  Each test also reaches the lines that the fixtures of its file reach."""
        for name, test in self.tests.items():
            shared = self.shared.get(file_of(name))
            if shared is not None:
                test.add(shared)
        return self.tests

    @contextmanager
    def _into(self, test: Test) -> Iterator[None]:
        """Record for `test` the lines of all calls that begin meanwhile, in all threads."""
        threading.settrace(self._on_call)
        vars(_thread).update(start_new_thread=self._start_thread)
        sys.settrace(self._on_call)
        try:
            yield
        finally:
            sys.settrace(None)
            vars(_thread).update(start_new_thread=START_THREAD)
            threading.settrace(None)
            self._take(test)

    def _start_thread(self, function: "Callable[..., object]", arguments: tuple[object, ...]) -> int:
        """Replaces `start_new_thread`: `vmd.threads` uses it, and `threading.settrace` does not know such threads."""

        def traced() -> None:
            sys.settrace(self._on_call)
            function(*arguments)

        return START_THREAD(traced, ())

    def _take(self, test: Test) -> None:
        # A thread may still run, so the lines are copied first.
        lines = {module: sum(1 << line for line in tuple(lines)) for module, lines in self.now.items() if lines}
        test.add(Test(lines=lines, starts=self.starts))
        self.starts = False
        for seen in self.now.values():
            seen.clear()


class Choose:
    """Runs the given tests, and unknown ones: a change may rename parametrised tests."""

    def __init__(self, tests: Mapping[str, Test], known: Container[str]) -> None:
        self.tests = tests
        self.known = known
        self.files: dict[str, float] = {}
        for name, test in tests.items():
            self.files[file_of(name)] = self.files.get(file_of(name), 0.0) + test.seconds

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Select and sort the tests."""

        def seconds(item: pytest.Item) -> tuple[float, str, float]:
            file = file_of(item.nodeid)
            return self.files.get(file, 0.0), file, self.tests.get(item.nodeid, Test()).seconds

        items[:] = [item for item in items if item.nodeid in self.tests or item.nodeid not in self.known]
        items.sort(key=seconds)
