"""The whole program, with a checkout of three functions and their tests."""

import subprocess
import sys
from pathlib import Path

import pytest

from mutants import known
from mutants.__main__ import chosen, wanted
from mutants.changes import changes_of

ROOT = Path(__file__).resolve().parents[3]
MODULE = '''"""A module."""


def held(number: int) -> bool:
    return number < 10


def loose(number: int) -> bool:
    return number < 10


SIZES = (
    ("small", 1),
)


def endless(number: int) -> int:
    while number > 0:
        number -= 1
    return number
'''
TESTS = '''"""Its tests."""

import subprocess
import sys

from vmd.it import SIZES, held, loose


def test_sizes():
    assert SIZES == (("small", 1),)


def test_held():
    assert held(9) and not held(10)


def test_loose():
    assert loose(0) and not loose(20)


def test_that_fails_anyway():
    assert loose(20)
'''
PROCESS_TESTS = '''"""Its tests with processes."""

import subprocess
import sys


def test_it():
    code = "from vmd.it import loose; raise SystemExit(loose(10))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
'''
FORK_TESTS = '''"""A test of code that runs in a child."""

import os

from vmd.it import loose


def test_it():
    pid = os.fork()
    if not pid:
        try:
            os._exit(loose(10))
        finally:
            os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0
'''
THREAD_TESTS = '''"""A test of code that runs on a thread."""

from vmd import threads
from vmd.it import loose


def test_it():
    found = []
    done = threads.Event()

    def run():
        found.append(loose(10))
        done.set()

    threads.Thread(target=run, name="x", daemon=True).start()
    done.wait()
    assert found == [False]
'''


SHELL_TESTS = PROCESS_TESTS.replace("[sys.executable,", '["sh", "-c", \'exec "$0" "$@"\', sys.executable,')


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """The checkout."""
    for path, text in (
        ("vmd/__init__.py", ""),
        ("vmd/it.py", MODULE),
        ("vmctl/__init__.py", ""),
        ("tests/unit/test_it.py", TESTS),
        ("pyproject.toml", "[tool.pytest.ini_options]\npythonpath = ['.']\naddopts = ['--import-mode=importlib']\n"),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def mutants(top: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program."""
    command = [sys.executable, "-m", "mutants", "--top", str(top), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_unnoticed_changes_are_shown(top: Path) -> None:
    """The line is shown before and after.

    Tests that fail without a change are left out, and the checkout is not changed.
    """
    done = mutants(top, "vmd/it.py:5", "vmd/it.py:9")

    assert done.returncode == 1, done.stderr
    assert "left out: tests/unit/test_it.py::test_that_fails_anyway" in done.stdout
    assert (
        "vmd/it.py:9: number < 10 -> number <= 10\n    - return number < 10\n    + return (number <= 10)\n"
        in done.stdout
    )
    assert "vmd/it.py:5" not in done.stdout
    # Two changes of the comparison and two of the number.  Of the second function's, one is noticed.
    assert "all: 5 of 8 noticed, 62 %; 0 more change nothing that matters" in done.stdout
    assert (top / "vmd/it.py").read_text() == MODULE


def test_processes_load_the_change(top: Path) -> None:
    """Process tests run if no unit test notices a change.  --unit leaves them out."""
    (top / "tests/process").mkdir()
    (top / "tests/process/test_it.py").write_text(PROCESS_TESTS)

    whole, part = mutants(top, "--verbose", "vmd/it.py:9"), mutants(top, "--unit", "vmd/it.py:9")

    assert "noticed: vmd/it.py:9: number < 10 -> number <= 10" in whole.stdout
    assert "all: 3 of 4" in whole.stdout
    assert "all: 1 of 4" in part.stdout


@pytest.mark.parametrize("tests", [PROCESS_TESTS, SHELL_TESTS], ids=["itself", "by a shell"])
def test_a_unit_test_may_reach_the_change_in_a_process(top: Path, tests: str) -> None:
    """A test that starts the program counts as reaching all its lines."""
    (top / "tests/unit/test_it_too.py").write_text(tests)

    assert "all: 3 of 4" in mutants(top, "--near", "vmd/it.py:9").stdout


def test_a_unit_test_may_reach_the_change_after_a_fork(top: Path) -> None:
    """A tracer does not see what a child does, such as the steps before it becomes another program."""
    (top / "tests/unit/test_it_too.py").write_text(FORK_TESTS)

    assert "all: 3 of 4" in mutants(top, "--near", "vmd/it.py:9").stdout


def test_a_test_reaches_what_its_threads_reach(top: Path) -> None:
    """Those that `vmd.threads` starts, too."""
    (top / "vmd/threads.py").write_bytes((ROOT / "vmd/threads.py").read_bytes())
    (top / "tests/unit/test_it.py").write_text(THREAD_TESTS)

    assert "all: 3 of 4" in mutants(top, "--near", "vmd/it.py:9").stdout


def test_known_changes_are_not_tried(top: Path) -> None:
    """All other changes must be noticed.  A stale entry is an error."""
    entries = [
        f'{known.entry(change)}\nwhy = "this one is a test"\n'
        for change in changes_of("vmd/it.py", MODULE.encode())
        if change.line == 9 and change.what != "number < 10 -> number >= 10"
    ]
    (top / "mutants").mkdir()
    (top / known.FILE).write_text("".join(entries))
    done = mutants(top, "vmd/it.py:9")
    assert "all: 1 of 1 noticed, 100 %; 3 more change nothing that matters" in done.stdout
    assert done.returncode == 0

    (top / known.FILE).write_text("".join(entries).replace("function = 'loose'", "function = 'gone'", 1))
    done = mutants(top, "vmd/it.py:5")
    assert "no such change any more: vmd/it.py, gone, 'return number < 10'" in done.stdout
    assert done.returncode == 1


def test_a_change_at_import_is_noticed(top: Path) -> None:
    """A test notices it even if it calls no function of the module."""
    assert "all: 2 of 2 noticed, 100 %" in mutants(top, "vmd/it.py:13").stdout


def test_a_change_that_never_ends_is_noticed(top: Path) -> None:
    """The deadline ends it, and the output says so."""
    tests = top / "tests/unit/test_it.py"
    tests.write_text(TESTS + "\n\ndef test_endless():\n    from vmd.it import endless\n    assert endless(3) == 0\n")

    done = mutants(top, "--slack", "1", "vmd/it.py:19")

    assert "vmd/it.py:19: by the deadline only: 1 -> 0" in done.stdout
    assert "all: 2 of 2 noticed" in done.stdout


def test_a_sample_of_all_modules(top: Path) -> None:
    """It has the wanted number of changes of all modules together, and another seed gives others."""
    (top / "vmd/too.py").write_text(MODULE)
    (top / "vmd/none.py").write_text('"""Nothing that could be changed."""\n')
    names = wanted(top, [])

    first, again, other = [chosen(top, names, 10, 6, seed) for seed in (1, 1, 2)]

    assert sum(map(len, first.values())) == sum(map(len, other.values())) == 6
    assert set(first) <= {"vmd/it.py", "vmd/too.py"}
    assert first == again != other
    assert sum(map(len, chosen(top, names, 4, 0, 1).values())) == 8  # without a sample: 4 of each module


@pytest.mark.parametrize("name", ["vmd/gone.py", "tests/unit/test_it.py", "vmd/it.py:x"])
def test_an_invalid_module_is_refused(top: Path, name: str) -> None:
    """A mistyped name must not look like a module without changes."""
    done = mutants(top, name)

    assert done.returncode == 1
    assert done.stderr == f"mutants: {name} is no module of vmd or vmctl\n"
