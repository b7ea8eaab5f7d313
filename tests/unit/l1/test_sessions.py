"""A test in the emulated machine passes only if the machine has reported this."""

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
    """A machine that ended before its command."""

    def __init__(self) -> None:
        self.looked = 0
        self.wakes = 0

    def ended(self, timeout_s: float) -> bool:
        """The machine has ended."""
        self.looked += 1
        return True

    def status(self) -> int:
        """The command wrote no status."""
        raise L1Error("the emulated machine ended before its command did\n--- console\nKernel panic")

    def died(self) -> bool:
        """It did not reset itself."""
        return False

    def stop(self) -> None:
        """It has ended already."""


@pytest.fixture
def outside(pytestconfig: pytest.Config, tmp_path: Path) -> Iterator[OutsideL1]:
    """The outer half, with a broken machine."""
    half = OutsideL1(pytestconfig)
    half.out = tmp_path
    half.machine = BrokenMachine()
    Path(tmp_path, TESTS).write_text("")
    yield half
    half.pytest_unconfigure()


def inner_report(item: pytest.Item, when: str, outcome: str, *, broken: bool = False) -> str:
    """Return a line in the form of the inner half."""
    report = pytest.TestReport.from_item_and_call(item, pytest.CallInfo.from_call(lambda: None, "call"))
    report.when = when  # type: ignore[assignment]
    report.outcome = outcome  # type: ignore[assignment]
    data = item.config.hook.pytest_report_to_serializable(config=item.config, report=report)
    return json.dumps(data | {BROKEN: broken}) + "\n"


def test_without_a_report_a_test_has_failed(outside: OutsideL1, request: pytest.FixtureRequest) -> None:
    """The first failure has the machine's console, and later ones do not repeat it."""
    first, second = [next(outside._reports_on(request.node)) for _ in range(2)]

    assert (first.outcome, second.outcome) == ("failed", "failed")
    assert "Kernel panic" in str(first.longrepr)
    assert str(second.longrepr) == "the emulated machine ended before its command did"


def test_the_test_that_the_machine_died_in_has_failed(outside: OutsideL1, request: pytest.FixtureRequest) -> None:
    """A set-up that passed and an unfinished line are no result."""
    Path(outside.out, REPORTS).write_text(
        inner_report(request.node, "setup", "passed") + inner_report(request.node, "call", "passed")[:-10]
    )

    reports = list(outside._reports_on(request.node))

    assert [(report.when, report.outcome) for report in reports] == [("call", "failed")]


@pytest.mark.parametrize("outcome", ["passed", "failed", "skipped"])
def test_the_inner_result_is_the_result(outside: OutsideL1, request: pytest.FixtureRequest, outcome: str) -> None:
    """All three phases are as reported."""
    phases = [("setup", "passed"), ("call", outcome), ("teardown", "passed")]
    Path(outside.out, REPORTS).write_text("".join(inner_report(request.node, *phase) for phase in phases))

    reports = list(outside._reports_on(request.node))

    assert [(report.when, report.outcome) for report in reports] == phases
    assert all(report.nodeid == request.node.nodeid for report in reports)


def test_a_machine_that_could_not_be_started_fails_its_tests(
    outside: OutsideL1, request: pytest.FixtureRequest
) -> None:
    """The message says why the start failed."""
    outside.machine = None
    outside.failure = "the emulated machine was not started: apt-get: no network"

    (report,) = outside._reports_on(request.node)

    assert report.outcome == "failed"
    assert "no network" in str(report.longrepr)


class StuckMachine(BrokenMachine):
    """A machine that is stuck, and would never end."""

    def __init__(self) -> None:
        super().__init__()
        self.stopped = False

    def ended(self, timeout_s: float) -> bool:
        """It ends only when it is stopped."""
        return self.stopped

    def stuck(self) -> bool:
        """It is stuck."""
        return True

    def stop(self) -> None:
        """End the machine."""
        self.stopped = True


class DeadMachine(BrokenMachine):
    """A machine that has reset itself."""

    def died(self) -> bool:
        """It has reset itself."""
        return True


def restarted(
    outside: OutsideL1, monkeypatch: pytest.MonkeyPatch, machines: list[type[BrokenMachine]]
) -> list[list[str]]:
    """Give the outer half these machines in turn.  Return the lists of tests for which they are started."""
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
    """It runs the tests without a result, and last the one during which it ended.

    The number of restarts is limited.
    """
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
    """The second result counts, also if guests are broken again."""
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
    """A machine has not died if its command ended, its time was up, or QEMU could not start it."""
    machine = BrokenMachine()
    machine.out = tmp_path
    machine.qemu = subprocess.Popen(["sh", "-c", f"exit {returncode}"])
    machine.qemu.wait()
    if status is not None:
        (tmp_path / "status").write_text(status)

    assert Machine.died(machine) is died


def test_a_machine_without_a_heartbeat_is_stuck(tmp_path: Path) -> None:
    """The heartbeat must be old enough."""
    machine = BrokenMachine()
    machine.out = tmp_path
    beat = tmp_path / HEARTBEAT
    beat.touch()
    assert not Machine.stuck(machine)

    os.utime(beat, (0, time.time() - STUCK_S - 1))

    assert Machine.stuck(machine)


def test_a_silent_machine_is_sent_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is here a program that ends at its first input character."""
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
