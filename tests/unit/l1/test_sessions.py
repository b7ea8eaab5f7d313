"""Tests of the emulated machine count as passed only when it said so."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.l1.machine import L1Error, Machine
from tests.l1.sessions import REPORTS, TESTS, OutsideL1


class BrokenMachine(Machine):
    """A machine that went off before its command was done."""

    def __init__(self) -> None:
        self.looked = 0

    def ended(self, timeout_s: float) -> bool:
        """It is off."""
        self.looked += 1
        return True

    def status(self) -> int:
        """Nothing was written."""
        raise L1Error("the emulated machine ended before its command did\n--- console\nKernel panic")

    def hung(self) -> bool:
        """Nobody knows why."""
        return False

    def stop(self) -> None:
        """It is off already."""


@pytest.fixture
def outside(pytestconfig: pytest.Config, tmp_path: Path) -> Iterator[OutsideL1]:
    """The outer half, with a machine that does not work."""
    half = OutsideL1(pytestconfig)
    half.out = tmp_path
    half.machine = BrokenMachine()
    Path(tmp_path, TESTS).write_text("")
    yield half
    half.pytest_unconfigure()


def inner_report(item: pytest.Item, when: str, outcome: str) -> str:
    """Return a line as the inner half writes it."""
    report = pytest.TestReport.from_item_and_call(item, pytest.CallInfo.from_call(lambda: None, "call"))
    report.when = when  # type: ignore[assignment]
    report.outcome = outcome  # type: ignore[assignment]
    data = item.config.hook.pytest_report_to_serializable(config=item.config, report=report)
    return json.dumps(data) + "\n"


def test_without_a_report_a_test_has_failed(outside: OutsideL1, request: pytest.FixtureRequest) -> None:
    """The first failure shows what the machine said, the others do not repeat it."""
    first, second = [next(outside._reports_on(request.node)) for _ in range(2)]

    assert (first.outcome, second.outcome) == ("failed", "failed")
    assert "Kernel panic" in str(first.longrepr)
    assert str(second.longrepr) == "the emulated machine ended before its command did"


def test_the_test_that_the_machine_died_in_has_failed(
    outside: OutsideL1, request: pytest.FixtureRequest
) -> None:
    """A set-up that passed, and a line that was being written, are not a result."""
    Path(outside.out, REPORTS).write_text(
        inner_report(request.node, "setup", "passed") + inner_report(request.node, "call", "passed")[:-10]
    )

    reports = list(outside._reports_on(request.node))

    assert [(report.when, report.outcome) for report in reports] == [("call", "failed")]


@pytest.mark.parametrize("outcome", ["passed", "failed", "skipped"])
def test_the_inner_result_is_the_result(
    outside: OutsideL1, request: pytest.FixtureRequest, outcome: str
) -> None:
    """All three phases, as they were reported."""
    phases = [("setup", "passed"), ("call", outcome), ("teardown", "passed")]
    Path(outside.out, REPORTS).write_text("".join(inner_report(request.node, *phase) for phase in phases))

    reports = list(outside._reports_on(request.node))

    assert [(report.when, report.outcome) for report in reports] == phases
    assert all(report.nodeid == request.node.nodeid for report in reports)


def test_a_machine_that_could_not_be_started_fails_its_tests(
    outside: OutsideL1, request: pytest.FixtureRequest
) -> None:
    """The reason is that of the start."""
    outside.machine = None
    outside.failure = "the emulated machine was not started: apt-get: no network"

    (report,) = outside._reports_on(request.node)

    assert report.outcome == "failed"
    assert "no network" in str(report.longrepr)


class HungMachine(BrokenMachine):
    """A machine whose own watchdog ended it."""

    def hung(self) -> bool:
        """It says so on its console."""
        return True


@pytest.mark.parametrize(("machines", "restarts"), [([HungMachine, BrokenMachine], 1), ([HungMachine] * 3, 2)])
def test_a_machine_that_hung_is_started_again_a_few_times(
    outside: OutsideL1,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    machines: list[type[BrokenMachine]],
    restarts: int,
) -> None:
    """For the tests without a result only, and not for ever."""
    Path(outside.out, TESTS).write_text(f"tests/done.py::test_done\n{request.node.nodeid}\n")
    done = inner_report(request.node, "teardown", "passed").replace(request.node.nodeid, "tests/done.py::test_done")
    Path(outside.out, REPORTS).write_text(done + inner_report(request.node, "setup", "passed"))
    left = list(machines)
    outside.machine = left.pop(0)()
    started = []

    def start(tests: list[str]) -> None:
        started.append(tests)
        outside.machine = left.pop(0)()

    monkeypatch.setattr(outside, "_start", start)

    (report,) = outside._reports_on(request.node)

    assert report.outcome == "failed"
    assert outside.restarts == restarts
    assert started == [[request.node.nodeid]] * restarts
    assert Path(outside.out, REPORTS).read_text() == done


@pytest.mark.parametrize(
    ("console", "status", "hung"),
    [
        ("Kernel panic - not syncing: softlockup: hung tasks", None, True),
        ("Kernel panic - not syncing: RCU Stall", None, True),
        ("BUG: TASK stack guard page was hit at 000000008dee1d23", None, True),
        ("Kernel panic - not syncing: Attempted to kill init!", None, False),
        ("Kernel panic - not syncing: softlockup: hung tasks", "0", False),
    ],
)
def test_only_a_watchdog_makes_a_machine_hung(tmp_path: Path, console: str, status: str | None, hung: bool) -> None:
    """Any other end is a failure."""
    machine = BrokenMachine()
    machine.out = tmp_path
    (tmp_path / "console").write_text(console)
    if status is not None:
        (tmp_path / "status").write_text(status)

    assert Machine.hung(machine) is hung
