"""Two pytest processes that share the tests give one result, even if one of them fails."""

import os
import re
import select
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 100.0

CONFTEST = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import pytest
from tests import two

def pytest_addoption(parser):
    two.add_options(parser)

@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    two.configure(config)

def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            terminalreporter.write_line(f"{{name}} of {{report.nodeid}}: {{text}}")
"""
# Each test ends only when the other has begun, so one process cannot run both.
MEETING = """
import os
import pytest

@pytest.fixture(scope="module")
def met():
    open("meeting", "{mode}").close()

@pytest.fixture
def second(request):
    return bool(request.config.option.second)

@pytest.fixture
def kept():
    yield
    open(f"put-away-{{os.getpid()}}", "w").close()
"""


class Project:
    """A folder with tests: two modules with the same tests, and more on request."""

    def __init__(self, above: Path, text: str) -> None:
        self.above = above
        self.folder = folder = above / "project"
        folder.mkdir()
        for name in ("meeting", "begun", "never", "end"):
            os.mkfifo(folder / name)
        (folder / "conftest.py").write_text(CONFTEST)
        (folder / "pytest.ini").write_text("[pytest]\ntimeout = 100\n")
        for module, mode in (("pair/test_a.py", "r"), ("pair/test_b.py", "w")):
            self.add(module, MEETING.format(mode=mode) + textwrap.dedent(text))

    def add(self, module: str, text: str) -> None:
        """Add a module."""
        path = self.folder / module
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    def start(self, *options: str) -> "subprocess.Popen[str]":
        """Start pytest."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", "-v", "-ra", "--color=no", "--two", *options],
            cwd=self.folder, env=environment | {"TMPDIR": str(self.above)}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *options: str) -> tuple[int, str]:
        """Run pytest to its end.  Return its status and output, and check that no files are left."""
        with self.start(*options) as process:
            output, _ = process.communicate(timeout=DEADLINE_S)
        assert list(self.above.glob("vmd-two-*")) == []
        return process.returncode, output

    def start_and_wait(self) -> tuple["subprocess.Popen[str]", int]:
        """Start pytest, and wait until both processes are in a test.  Return it, and the pid of the second one."""
        begun = os.open(self.folder / "begun", os.O_RDWR)
        process = self.start()
        said = b""
        while said.count(b"\n") < 2:
            assert select.select([begun], [], [], DEADLINE_S)[0], "no test has begun"
            said += os.read(begun, 100)
        os.close(begun)
        (second,) = {int(number) for number in said.split()} - {process.pid}
        return process, second


def count(output: str) -> str:
    """Return the last line of a run without its time."""
    return re.sub(r" in [0-9.]+s.*", "", output.splitlines()[-1].strip("= "))


def test_both_run_and_one_reports(tmp_path: Path) -> None:
    """Each test runs once, a module in one process, and failures of the second process are reported in full."""
    project = Project(tmp_path, """
        @pytest.mark.parametrize("number", [1, 2])
        def test_of_both(met, second, number, record_property):
            record_property("second", second)

        def test_of_one(second):
            print("captured words")
            assert not second, "the words of a failure"

        @pytest.mark.skip(reason="not wanted")
        def test_of_none():
            pass
    """)

    status, output = project.run()

    assert (status, count(output)) == (1, "1 failed, 5 passed, 2 skipped"), output
    assert output.count("captured words") == 2  # in the source as well
    assert output.count("AssertionError: the words of a failure") == 2  # with the test, and in the summary
    assert "SKIPPED [1] pair/test_a.py" in output
    said = dict(re.findall(r"^second of (\S+): (\w+)$", output, re.MULTILINE))
    a, b = ([said[f"pair/test_{name}.py::test_of_both[{number}]"] for number in (1, 2)] for name in "ab")
    assert sorted([a, b]) == [["False"] * 2, ["True"] * 2]


def test_a_failure_of_the_second_one_stops_both(tmp_path: Path) -> None:
    """With -x, no test begins after the running one."""
    project = Project(tmp_path, """
        def test_of_both(met, second):
            assert not second

        def test_more(second):
            open("end").read()  # blocks until the second process has ended
    """)
    second_ends = """
        @pytest.fixture(scope="session", autouse=True)
        def end(request):
            if request.config.option.second:
                pytest.end = os.open("end", os.O_RDWR)
    """
    with (project.folder / "conftest.py").open("a") as conftest:
        conftest.write("import os\n" + textwrap.dedent(second_ends))
    project.add("test_c.py", "def test_later(): pass\n")

    status, output = project.run("-x")

    assert status == 1, output
    assert "stopping after 1 failures" in output
    assert "test_c.py" not in output


def test_the_second_one_is_killed(tmp_path: Path) -> None:
    """The test that it had begun fails, and its other tests run in the first process."""
    project = Project(tmp_path, """
        def test_of_both(met, second):
            if second:
                os.kill(os.getpid(), 9)

        def test_more():
            pass
    """)
    project.add("test_c.py", "def test_later(): pass\n")

    status, output = project.run()

    assert (status, count(output)) == (1, "2 failed, 3 passed"), output
    assert "the second process ended with status -9 before it had run this" in output
    assert "test_c.py::test_later PASSED" in output


def test_names_that_differ_between_the_two(tmp_path: Path) -> None:
    """A parameter may have another name in each process.  The tests are the same."""
    project = Project(tmp_path, """
        @pytest.mark.parametrize("number", [os.getpid(), os.urandom(8)])
        def test_of_both(met, second, number):
            assert second or isinstance(number, bytes)
    """)

    status, output = project.run()

    assert (status, count(output)) == (1, "1 failed, 3 passed"), output


def test_tests_that_differ_between_the_two(tmp_path: Path) -> None:
    """A test that one of them does not have cannot be reported, so pytest fails with a message."""
    project = Project(tmp_path, """
        if "--second" in " ".join(__import__("sys").argv):
            def test_of_one():
                pass

        def test_of_both(met):
            pass

        def test_more():
            pass
    """)

    status, output = project.run()

    assert status == pytest.ExitCode.USAGE_ERROR, output
    assert "the two processes collect different tests" in output


def test_fixtures_of_folders_end_with_the_last_test_of_the_process(tmp_path: Path) -> None:
    """pytest gets the next test of this process as the following one, and not a test that the other process runs."""
    project = Project(tmp_path, """
        def test_of_both(met):
            pass

        def test_of_b():
            if __file__.endswith("b.py"):
                open("end").close()  # blocks until the other process runs the next module

        def test_more():
            pass
    """)
    project.add("single/test_c.py", 'def test_later(): open("end", "w").close()\n')

    status, output = project.run()

    assert (status, count(output)) == (0, "7 passed"), output


WAITING = """
    def test_of_both(met, kept):
        with open("begun", "w") as begun:
            begun.write(f"{os.getpid()}\\n")
        open("never")

    def test_more():
        pass
"""


def test_an_interrupt_ends_both(tmp_path: Path) -> None:
    """Both tear down their fixtures, and no file is left."""
    process, second = Project(tmp_path, WAITING).start_and_wait()
    with process:
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=DEADLINE_S)

    assert process.returncode == pytest.ExitCode.INTERRUPTED, output
    assert {int(path.name.split("-")[2]) for path in tmp_path.glob("project/put-away-*")} == {process.pid, second}
    assert list(tmp_path.glob("vmd-two-*")) == []
    assert not Path(f"/proc/{second}").exists()


def test_the_second_one_does_not_outlive_the_first(tmp_path: Path) -> None:
    """It is interrupted, and tears down its fixtures."""
    process, second = Project(tmp_path, WAITING).start_and_wait()
    end = os.pidfd_open(second)
    try:
        with process:
            process.kill()
        assert select.select([end], [], [], DEADLINE_S)[0], "the second process did not end"
    finally:
        os.close(end)

    assert (tmp_path / f"project/put-away-{second}").exists()
