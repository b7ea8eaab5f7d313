"""`make mutants`: mutation testing.  It counts how many random single changes of a module the module's tests notice.

    python -m mutants [--count N | --sample N] [--seed N] [--near | --unit] [module[:line] ...]

Each change is made in a copy of this checkout, one at a time.  First the module's nearest unit tests that reach the
changed lines run, then other unit tests that reach them, then the tests with processes that cover the module.  After
the first failure no more tests run for this change.  Changes that no test notices are printed.  mutants/equal.toml
lists the changes that change no behaviour that matters, each with the reason.  `--entries` prints the unnoticed changes
as entries for that file.  `--count` changes each module; `--sample` measures a large tree: each change of all named
modules is equally likely to be tried.
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
ENOUGH = 95  # wanted percentage of noticed changes
COUNT, SEED = 10, 1
NEAR, UNIT, ALL = range(3)  # which tests run
OPTIONS = (
    "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-o", "timeout=0",
    "-W", "ignore::pytest.PytestAssertRewriteWarning",
)  # fmt: skip
SLACK_S, TIMES = 10.0, 10.0  # a deadline is TIMES times the tests' duration without a change, plus SLACK_S
FOLLOW_S = 3600.0
USAGE = pytest.ExitCode.USAGE_ERROR
NONE = pytest.ExitCode.NO_TESTS_COLLECTED
# Third-party modules that every test run needs.  They are imported here once, before the fork of each run.
LOADED = (
    "hypothesis",
    "hypothesis.strategies",
    "msgpack",
    "pytest_timeout",
    "_pytest.assertion.rewrite",
)


@dataclass(slots=True)
class Score:
    """The counted results for the changes of one module, or of all."""

    noticed: int = 0
    late: int = 0  # those of `noticed` that only exceeded the deadline
    equal: int = 0  # listed in equal.toml
    missed: int = 0

    @property
    def mattering(self) -> int:
        """The number of changes that matter."""
        return self.noticed + self.missed

    def add(self, other: "Score") -> None:
        """Add the counts of another score."""
        self.noticed += other.noticed
        self.late += other.late
        self.equal += other.equal
        self.missed += other.missed

    def is_enough(self) -> bool:
        """Return whether at least ENOUGH percent are noticed."""
        return self.noticed * 100 >= self.mattering * ENOUGH

    def __str__(self) -> str:
        share = f"{self.noticed * 100 / self.mattering:.0f} %" if self.mattering else "nothing to notice"
        late = f" ({self.late} by the deadline)" if self.late else ""
        return (
            f"{self.noticed} of {self.mattering} noticed{late}, {share}; {self.equal} more change nothing that matters"
        )


class Bench:
    """The copy of the checkout, and the tests that cover one module."""

    process: ClassVar[dict[str, dict[str, Test]]] = {}  # the tests with processes, by file
    names: ClassVar[set[str]] = set()  # of all known tests, including those that fail without a change

    def __init__(self, copy: Copy, module: str, slack_s: float) -> None:
        self.copy = copy
        self.module = module
        self.slack_s = slack_s
        self.source = (copy.top / module).read_bytes()
        self.files = unit_tests(copy.top, module)
        self.unit: list[tuple[dict[str, Test], Test]] = []  # of `files`, on demand: tests, and import record
        self.output = copy.folder / "output"

    def notices(self, change: Change, far: int) -> tuple[bool, bool]:
        """Return whether any test notices a change, and whether only the deadline did."""
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
        """Yield groups of tests that cover a change, the nearest first.  The source must be unchanged at each step."""
        for at, files in enumerate(self.files[: None if far > NEAR else 1]):
            if at == len(self.unit):
                self.unit.append(self._follow(files, [self.module]))
            tests, loading = self.unit[at]
            reaching = {name: test for name, test in tests.items() if test.reaches(self.module, *change.lines)}
            if change.at_import or (not reaching and loading.reaches(self.module, *change.lines)):
                reaching = tests  # any test may depend on code that runs at import
            yield reaching
        if far == ALL:
            yield self._processes()

    def _processes(self) -> dict[str, Test]:
        """Return the tests with processes that cover the module."""
        found: dict[str, Test] = {}
        for file in process_tests(self.copy.top, self.module):
            if file not in self.process:
                self.process[file] = self._follow([file], [])[0]
            found |= self.process[file]
        return found

    def _follow(self, files: Collection[str], changed: list[str]) -> tuple[dict[str, Test], Test]:
        """Run tests without a change.  Return the passing ones, and the record of the imports."""
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
            except Exception:  # a consequence of an earlier failed test
                traceback.print_exc()
                return int(pytest.ExitCode.INTERNAL_ERROR)

        status = run(work, self.copy.top, self.output, deadline_s)
        if status in (FAILED, USAGE):
            raise SystemExit(f"mutants: the tests could not be run:\n{self._said()}")
        return status

    def _said(self) -> str:
        return self.output.read_text(errors="replace")[-4000:]


def say(line: str) -> None:
    """Print a line, and flush it at once because a run takes hours."""
    print(line, flush=True)


def wanted(top: Path, names: list[str]) -> dict[str, set[int]]:
    """Return the named modules with their named lines; no lines mean all.  Raises SystemExit for unknown names."""
    there = modules(top)
    found: dict[str, set[int]] = {}
    for name in names or there:
        module, _, line = name.partition(":")
        if module not in there or (line and not line.isdigit()):
            raise SystemExit(f"mutants: {name} is no module of vmd or vmctl")
        found.setdefault(module, set()).update([int(line)] if line else [])
    return found


def chosen(top: Path, names: Mapping[str, set[int]], count: int, whole: int, seed: int) -> dict[str, list[Change]]:
    """Return the changes to be tried, by module: all changes of named lines, else a sample.

    The sample has `count` changes of each module, or `whole` changes of all modules together if that is not 0.
    """
    found = {}
    for module, lines in names.items():
        changes = changes_of(module, (top / module).read_bytes())
        if lines:
            changes = [change for change in changes if change.line in lines]
        elif not whole:
            changes = sample(changes, count, seed)
        found[module] = changes
    if not whole:
        return found
    picked = set(sample([change for changes in found.values() for change in changes], whole, seed))
    rest = {module: [change for change in changes if change in picked] for module, changes in found.items()}
    return {module: changes for module, changes in rest.items() if changes}


def show(change: Change, source: bytes, entries: bool) -> None:
    """Print a change that no test has noticed."""
    lines = change.apply(source).decode().splitlines()
    after = lines[change.line - 1].removesuffix("\\").strip()
    say(f"{change.module}:{change.line}: {change.what}\n    - {change.text}\n    + {after}")
    if entries:
        say(known.entry(change) + '\nwhy = ""\n')


def main(arguments: list[str]) -> int:
    """Try the changes.  Return 0 if the tests notice enough of them."""
    parser = argparse.ArgumentParser(prog="mutants", description="How many single changes the tests notice.")
    parser.add_argument("modules", nargs="*", help="vmd/ipc/channel.py, or vmd/ipc/channel.py:154 for all of a line")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--count", type=int, default=COUNT, help=f"changes of each module ({COUNT})")
    size.add_argument("--sample", type=int, default=0, help="changes of all modules together")
    parser.add_argument("--seed", type=int, default=SEED, help=f"seed of their random choice ({SEED})")
    parser.add_argument(
        "--slack", type=float, default=SLACK_S, help=f"seconds beyond the tests' duration ({SLACK_S:.0f})"
    )
    parser.add_argument("--near", action="store_true", help="the module's nearest unit tests only")
    parser.add_argument("--unit", action="store_true", help="unit tests only")
    parser.add_argument("--verbose", action="store_true", help="also print noticed changes")
    parser.add_argument("--entries", action="store_true", help=f"also print entries for {known.FILE}")
    parser.add_argument("--top", type=Path, default=TOP, help="another checkout")
    given = parser.parse_args(arguments)

    reasons = known.read(given.top)
    stale = known.stale(given.top, reasons)
    for line in stale:
        say(f"{known.FILE}: no such change any more: {line}")
    names = wanted(given.top, given.modules)
    for name in LOADED:
        importlib.import_module(name)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("mutants: ended"))  # SystemExit removes the copy
    total = Score()
    with Copy(given.top.resolve()) as copy:
        for module, changes in chosen(copy.top, names, given.count, given.sample, given.seed).items():
            score, bench = Score(), Bench(copy, module, given.slack)
            for change in changes:
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
