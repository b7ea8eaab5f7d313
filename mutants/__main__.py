"""`make mutants`: how many random single changes of a module its own tests notice.

    python -m mutants [--count N] [--seed N] [--near | --unit] [module[:line] ...]

Each change is made in a copy of this checkout, one at a time.  The module's nearest unit tests that reach the changed
lines are run first, then others that do, then the tests with processes that hold the module.  The first failure ends
it.  What no test notices is printed.  Changes that change nothing that matters stand in mutants/equal.toml with a
reason; `--entries` prints the others as entries for that file.
"""

import argparse
import importlib
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from mutants import known
from mutants.apart import FAILED, Copy, run
from mutants.changes import Change, changes_of, sample
from mutants.holders import modules, process_tests, unit_tests
from mutants.reach import Choose, Follow, Test, file_of

TOP = Path(__file__).resolve().parents[1]
ENOUGH = 95  # in a hundred of the changes that matter
COUNT, SEED = 10, 1
NEAR, UNIT, ALL = range(3)  # which tests are run
OPTIONS = (
    "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-o", "timeout=0",
    "-W", "ignore::pytest.PytestAssertRewriteWarning",
)  # fmt: skip
SLACK_S, TIMES = 10.0, 10.0  # a deadline is a multiple of what the tests take without a change, and some more
FOLLOW_S = 3600.0
USAGE = pytest.ExitCode.USAGE_ERROR
NONE = pytest.ExitCode.NO_TESTS_COLLECTED
# What a run of tests loads from elsewhere anyway: it is here once, and not in each process.
LOADED = (
    "hypothesis",
    "hypothesis.strategies",
    "msgpack",
    "ply.lex",
    "ply.yacc",
    "pytest_timeout",
    "_pytest.assertion.rewrite",
)


@dataclass(slots=True)
class Score:
    """What became of the changes of one module, or of all."""

    noticed: int = 0
    late: int = 0  # of them, by the deadline only
    equal: int = 0  # they change nothing that matters
    missed: int = 0

    @property
    def mattering(self) -> int:
        """How many of them matter."""
        return self.noticed + self.missed

    def add(self, other: "Score") -> None:
        """Count another one's, too."""
        self.noticed += other.noticed
        self.late += other.late
        self.equal += other.equal
        self.missed += other.missed

    def is_enough(self) -> bool:
        """Return whether so many are noticed as should be."""
        return self.noticed * 100 >= self.mattering * ENOUGH

    def __str__(self) -> str:
        share = f"{self.noticed * 100 / self.mattering:.0f} %" if self.mattering else "nothing to notice"
        late = f" ({self.late} by the deadline)" if self.late else ""
        return (
            f"{self.noticed} of {self.mattering} noticed{late}, {share}; {self.equal} more change nothing that matters"
        )


class Bench:
    """The copy, and the tests that hold one module."""

    process: ClassVar[dict[str, dict[str, Test]]] = {}  # what is known of the tests with processes, by file
    names: ClassVar[set[str]] = set()  # of all tests, also of those that fail without a change

    def __init__(self, copy: Copy, module: str, slack_s: float) -> None:
        self.copy = copy
        self.module = module
        self.slack_s = slack_s
        self.source = (copy.top / module).read_bytes()
        self.files = unit_tests(copy.top, module)
        self.unit: list[tuple[dict[str, Test], Test]] = []  # of `files`: those that were needed up to now
        self.output = copy.folder / "output"

    def notices(self, change: Change, far: int) -> tuple[bool, bool]:
        """Return whether some of the tests notice a change, and whether that is only by the deadline."""
        try:
            for tests in filter(None, self._choices(change, far)):
                self.copy.write(change.module, change.apply(self.source))
                status = self._run(tests)
                if status is None:
                    return True, True
                if status not in (0, NONE):
                    return True, False
                self.copy.write(change.module, self.source)
        finally:
            self.copy.write(change.module, self.source)
        return False, False

    def _choices(self, change: Change, far: int) -> Iterator[dict[str, Test]]:
        """Yield the tests that hold a change, the near ones first.  Meanwhile the source is as it was."""
        for at, files in enumerate(self.files[: None if far > NEAR else 1]):
            if at == len(self.unit):
                self.unit.append(self._follow(files, [self.module]))
            tests, loading = self.unit[at]
            reaching = {name: test for name, test in tests.items() if test.reaches(self.module, *change.lines)}
            if change.at_import or (not reaching and loading.reaches(self.module, *change.lines)):
                reaching = tests  # any of them may use what is made then
            yield reaching
        if far == ALL:
            yield self._processes()

    def _processes(self) -> dict[str, Test]:
        """Return the tests with processes that hold the module."""
        found: dict[str, Test] = {}
        for file in process_tests(self.copy.top, self.module):
            if file not in self.process:
                self.process[file] = self._follow([file], [])[0]
            found |= self.process[file]
        return found

    def _follow(self, files: Collection[str], changed: list[str]) -> tuple[dict[str, Test], Test]:
        """Run tests without a change; return those that pass, with what they reach of the modules."""
        result = self.copy.folder / "followed"
        result.unlink(missing_ok=True)

        def work() -> int:
            follow = Follow(self.copy.top, changed)
            follow.load()
            status = pytest.main([*OPTIONS, *sorted(files)], plugins=[follow])
            result.write_bytes(pickle.dumps((follow.found(), follow.loading)))
            return int(status)

        run(work, self.copy.top, self.output, FOLLOW_S)
        if not result.exists():
            raise SystemExit(f"mutants: the tests do not run without a change:\n{self._said()}")
        tests, loading = pickle.loads(result.read_bytes())
        self.names.update(tests)
        failed = [name for name, test in tests.items() if not test.passed]
        if failed:
            say(f"mutants: without a change these do not pass, and are left out: {', '.join(failed)}")
        return {name: test for name, test in tests.items() if test.passed}, loading

    def _run(self, tests: Mapping[str, Test]) -> int | None:
        files = sorted({file_of(name) for name in tests})
        deadline_s = self.slack_s + TIMES * sum(test.seconds for test in tests.values())

        def work() -> int:
            try:
                return int(pytest.main([*OPTIONS, "-x", *files], plugins=[Choose(tests, self.names)]))
            except Exception:  # of what a failed test has left behind
                traceback.print_exc()
                return int(pytest.ExitCode.INTERNAL_ERROR)

        status = run(work, self.copy.top, self.output, deadline_s)
        if status in (FAILED, USAGE):
            raise SystemExit(f"mutants: the tests could not be run:\n{self._said()}")
        return status

    def _said(self) -> str:
        return self.output.read_text(errors="replace")[-4000:]


def say(line: str) -> None:
    """Print at once: a run takes hours."""
    print(line, flush=True)


def wanted(top: Path, names: list[str]) -> dict[str, set[int]]:
    """Return the modules that are named, with the lines if only these are.  Raises SystemExit for one that is none."""
    there = modules(top)
    found: dict[str, set[int]] = {}
    for name in names or there:
        module, _, line = name.partition(":")
        if module not in there or (line and not line.isdigit()):
            raise SystemExit(f"mutants: {name} is no module of vmd or vmctl")
        found.setdefault(module, set()).update([int(line)] if line else [])
    return found


def chosen(source: Path, module: str, lines: set[int], count: int, seed: int) -> list[Change]:
    """Return the changes that are tried: a sample, or all of the lines that are named."""
    changes = changes_of(module, source.read_bytes())
    if lines:
        return [change for change in changes if change.line in lines]
    return sample(changes, count, seed)


def show(change: Change, source: bytes, entries: bool) -> None:
    """Print a change that nothing has noticed."""
    lines = change.apply(source).decode().splitlines()
    after = lines[change.line - 1].removesuffix("\\").strip()
    say(f"{change.module}:{change.line}: {change.what}\n    - {change.text}\n    + {after}")
    if entries:
        say(known.entry(change) + '\nwhy = ""\n')


def main(arguments: list[str]) -> int:
    """Try the changes; return 0 if enough of them are noticed."""
    parser = argparse.ArgumentParser(prog="mutants", description="How many single changes the tests notice.")
    parser.add_argument("modules", nargs="*", help="vmd/ipc/channel.py, or vmd/ipc/channel.py:154 for all of a line")
    parser.add_argument("--count", type=int, default=COUNT, help=f"changes of each module ({COUNT})")
    parser.add_argument("--seed", type=int, default=SEED, help=f"chooses them ({SEED})")
    parser.add_argument(
        "--slack", type=float, default=SLACK_S, help=f"seconds more than the tests need ({SLACK_S:.0f})"
    )
    parser.add_argument("--near", action="store_true", help="the module's nearest unit tests only")
    parser.add_argument("--unit", action="store_true", help="unit tests only")
    parser.add_argument("--verbose", action="store_true", help="print also what is noticed")
    parser.add_argument("--entries", action="store_true", help=f"print entries for {known.FILE}, too")
    parser.add_argument("--top", type=Path, default=TOP, help="another checkout")
    given = parser.parse_args(arguments)

    reasons = known.read(given.top)
    stale = known.stale(given.top, reasons)
    for line in stale:
        say(f"{known.FILE}: no such change any more: {line}")
    names = wanted(given.top, given.modules)
    for name in LOADED:
        importlib.import_module(name)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("mutants: ended"))  # and remove what there is
    total = Score()
    with Copy(given.top.resolve()) as copy:
        for module, lines in names.items():
            score, bench = Score(), Bench(copy, module, given.slack)
            for change in chosen(copy.top / module, module, lines, given.count, given.seed):
                if change.name in reasons:
                    score.equal += 1
                    continue
                begun = time.monotonic()
                noticed, late = bench.notices(change, NEAR if given.near else UNIT if given.unit else ALL)
                if given.verbose and noticed:
                    say(f"{time.monotonic() - begun:.1f} s, noticed: {module}:{change.line}: {change.what}")
                score.noticed += noticed
                score.missed += not noticed
                score.late += late
                if late:
                    say(f"{module}:{change.line}: by the deadline only: {change.what}")
                if not noticed:
                    show(change, (copy.top / module).read_bytes(), given.entries)
            say(f"{module}: {score}")
            total.add(score)
    say(f"all: {total}")
    return 0 if total.is_enough() and not stale else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
