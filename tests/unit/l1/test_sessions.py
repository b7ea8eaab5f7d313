"""Tests of the emulated machine count as passed only when it said so."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.l1.machine import HEARTBEAT, STUCK_S, L1Error, Machine
from tests.l1.sessions import BROKEN, REPORTS, TESTS, OutsideL1


class BrokenMachine(Machine):
    """A machine that went off before its command was done."""

    def __init__(self) -> None:
        self.looked = 0
        self.wakes = 0

    def ended(self, timeout_s: float) -> bool:
        """It is off."""
        self.looked += 1
        return True

    def status(self) -> int:
        """Nothing was written."""
        raise L1Error("the emulated machine ended before its command did\n--- console\nKernel panic")

    def died(self) -> bool:
        """It was switched off."""
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


def inner_report(item: pytest.Item, when: str, outcome: str, *, broken: bool = False) -> str:
    """Return a line as the inner half writes it."""
    report = pytest.TestReport.from_item_and_call(item, pytest.CallInfo.from_call(lambda: None, "call"))
    report.when = when  # type: ignore[assignment]
    report.outcome = outcome  # type: ignore[assignment]
    data = item.config.hook.pytest_report_to_serializable(config=item.config, report=report)
    return json.dumps(data | {BROKEN: broken}) + "\n"


def test_without_a_report_a_test_has_failed(outside: OutsideL1, request: pytest.FixtureRequest) -> None:
    """The first failure shows what the machine said, the others do not repeat it."""
    first, second = [next(outside._reports_on(request.node)) for _ in range(2)]

    assert (first.outcome, second.outcome) == ("failed", "failed")
    assert "Kernel panic" in str(first.longrepr)
    assert str(second.longrepr) == "the emulated machine ended before its command did"


def test_the_test_that_the_machine_died_in_has_failed(outside: OutsideL1, request: pytest.FixtureRequest) -> None:
    """A set-up that passed, and a line that was being written, are not a result."""
    Path(outside.out, REPORTS).write_text(
        inner_report(request.node, "setup", "passed") + inner_report(request.node, "call", "passed")[:-10]
    )

    reports = list(outside._reports_on(request.node))

    assert [(report.when, report.outcome) for report in reports] == [("call", "failed")]


@pytest.mark.parametrize("outcome", ["passed", "failed", "skipped"])
def test_the_inner_result_is_the_result(outside: OutsideL1, request: pytest.FixtureRequest, outcome: str) -> None:
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


class StuckMachine(BrokenMachine):
    """A machine that says nothing any more, and would go on for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.stopped = False

    def ended(self, timeout_s: float) -> bool:
        """When it was stopped."""
        return self.stopped

    def stuck(self) -> bool:
        """It is."""
        return True

    def stop(self) -> None:
        """Pull the plug."""
        self.stopped = True


class DeadMachine(BrokenMachine):
    """A machine that has reset itself."""

    def died(self) -> bool:
        """It did."""
        return True


def restarted(
    outside: OutsideL1, monkeypatch: pytest.MonkeyPatch, machines: list[type[BrokenMachine]]
) -> list[list[str]]:
    """Give it these machines, one after the other; return what they are started for."""
    left = list(machines)
    outside.machine = left.pop(0)()
    started = []

    def start(tests: list[str]) -> None:
        started.append(tests)
        outside.machine = left.pop(0)()

    monkeypatch.setattr(outside, "_start", start)
    return started


@pytest.mark.parametrize(
    ("machines", "restarts"),
    [
        ([DeadMachine, BrokenMachine], ["it died"]),
        ([DeadMachine] * 3, ["it died"] * 2),
        ([StuckMachine, BrokenMachine], ["it was stuck"]),
        ([StuckMachine, DeadMachine, StuckMachine], ["it was stuck", "it died"]),
    ],
)
def test_a_machine_that_died_or_is_stuck_is_started_again_a_few_times(
    outside: OutsideL1,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    machines: list[type[BrokenMachine]],
    restarts: list[str],
) -> None:
    """For the tests without a result only, the one that it ended in last; and not for ever."""
    later = "tests/later.py::test_later"
    Path(outside.out, TESTS).write_text(f"tests/done.py::test_done\n{request.node.nodeid}\n{later}\n")
    done = inner_report(request.node, "teardown", "passed").replace(request.node.nodeid, "tests/done.py::test_done")
    Path(outside.out, REPORTS).write_text(done + inner_report(request.node, "setup", "passed"))
    started = restarted(outside, monkeypatch, machines)

    (report,) = outside._reports_on(request.node)

    assert report.outcome == "failed"
    assert outside.restarts == restarts
    assert started == [[later, request.node.nodeid]] * len(restarts)
    assert Path(outside.out, REPORTS).read_text() == done


@pytest.mark.parametrize("again", [False, True])
def test_a_test_whose_guest_was_broken_is_run_again(
    outside: OutsideL1, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, *, again: bool
) -> None:
    """What it says then is its result; and if guests are broken every time, that is."""
    nodeid = request.node.nodeid
    Path(outside.out, TESTS).write_text(f"{nodeid}\n")
    broken = inner_report(request.node, "call", "failed", broken=True) + inner_report(
        request.node, "teardown", "passed"
    )
    Path(outside.out, REPORTS).write_text(broken)
    started = restarted(outside, monkeypatch, [BrokenMachine] * 3)
    start = outside._start
    passed = "".join(inner_report(request.node, when, "passed") for when in ("setup", "call", "teardown"))

    def start_and_report(tests: list[str]) -> None:
        assert Path(outside.out, REPORTS).read_text() == ""
        start(tests)
        Path(outside.out, REPORTS).write_text(broken if again else passed)

    monkeypatch.setattr(outside, "_start", start_and_report)

    reports = list(outside._reports_on(request.node))

    assert "failed" in [report.outcome for report in reports] if again else len(reports) == 3
    assert started == [[nodeid]] * (2 if again else 1)
    assert outside.restarts == [f"it broke the guests of {nodeid}"] * len(started)


@pytest.mark.parametrize(
    ("returncode", "status", "died"), [(0, None, True), (0, "1", False), (124, None, False), (1, None, False)]
)
def test_only_a_machine_that_reset_itself_has_died(
    tmp_path: Path, returncode: int, status: str | None, *, died: bool
) -> None:
    """Not one whose command has ended, whose time was up, or that QEMU could not start."""
    machine = BrokenMachine()
    machine.out = tmp_path
    machine.qemu = subprocess.Popen(["sh", "-c", f"exit {returncode}"])
    machine.qemu.wait()
    if status is not None:
        (tmp_path / "status").write_text(status)

    assert Machine.died(machine) is died


def test_a_machine_without_a_sign_of_life_is_stuck(tmp_path: Path) -> None:
    """For long enough."""
    machine = BrokenMachine()
    machine.out = tmp_path
    beat = tmp_path / HEARTBEAT
    beat.touch()
    assert not Machine.stuck(machine)

    os.utime(beat, (0, time.time() - STUCK_S - 1))

    assert Machine.stuck(machine)


def test_a_silent_machine_is_sent_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the machine is a program that ends at the first character it gets."""
    monkeypatch.setattr("tests.l1.machine.WAKE_S", 0.04)
    machine = BrokenMachine()
    machine.out = tmp_path
    (tmp_path / HEARTBEAT).touch()
    os.utime(tmp_path / HEARTBEAT, (0, time.time() - 1))
    with open(tmp_path / "got", "wb") as got:
        machine.qemu = subprocess.Popen(["head", "-c1"], stdin=subprocess.PIPE, stdout=got)
    monkeypatch.setattr(machine, "ended", lambda timeout_s: Machine.ended(machine, timeout_s))

    machine._wake()

    assert (tmp_path / "got").read_bytes() == b"\0"
    assert machine.wakes >= 1
