"""Chooses the tests that run on this host, and where they run, and reports those that do not run."""

import compileall
import gc
import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import two
from tests.l1.sessions import InsideL1, OutsideL1
from tests.support.linux import LinuxGuest, linux_guest

KVM = Path("/dev/kvm")
SOFTWARE_KVM = Path("/sys/module/kvm_pvm")  # this KVM interprets guest kernels, and cannot boot stock kernels
SHOWN_LINES = 60
MACHINE = "test_host.py"  # its machine is emulated, and has deadlines of its own

REAL = pytest.StashKey[frozenset[str]]()  # the tests marked `l1`
DONE = "done"  # name of a test's property: the text that is shown if the test has passed
NOT_RUN = pytest.StashKey[dict[str, int]]()  # reason -> number of tests


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add our options."""
    parser.addoption("--deep", action="store_true", help="also run the long rounds")
    parser.addoption("--soak", action="store_true", help="run only the tests that have no end of their own")
    parser.addoption("--sequences", type=int, metavar="N", default=10000, help="sequences of each test with --soak")
    parser.addoption("--snapshot-rounds", type=int, metavar="N", default=12, help="how often a snapshot is interrupted")
    parser.addoption("--seed", type=int, metavar="N", default=1 << 20, help="the seed of the first sequence")
    parser.addoption("--inside-l1", metavar="FILE", help="this is the emulated machine: run its tests, report to FILE")
    two.add_options(parser)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Decide where the tests marked `l1` run: here if KVM uses hardware, else in the emulated machine."""
    # No time is asserted.  The fast tier runs the same examples each time; only the deep tier tries random ones.
    deep = bool(config.getoption("--deep"))
    settings.register_profile("vmd", deadline=None, derandomize=not deep, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("vmd")
    config.stash[REAL] = frozenset()
    config.stash[NOT_RUN] = {}
    # A run in the background may ignore these signals, and the programs under test would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    inside = config.getoption("--inside-l1")
    if inside:
        config.pluginmanager.register(InsideL1(config, inside))
        return
    if emulated() and not config.option.second:
        config.pluginmanager.register(OutsideL1(config), "outside-l1")
    two.configure(config)
    if config.option.two and not config.option.second:
        # Tests in one process copy our sources, while programs of the other process would write byte code there.
        for program in ("vmd", "vmctl", "tools"):
            compileall.compile_dir(config.rootpath / program, quiet=2)


def emulated() -> bool:
    """Return whether the tests marked `l1` run in the emulated machine."""
    return SOFTWARE_KVM.exists() or not KVM.exists()


@pytest.fixture(autouse=True, scope="session")
def _state_directory(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Give the tests' daemons another state directory than that of this host's daemon."""
    os.environ["STATE_DIRECTORY"] = str(tmp_path_factory.mktemp("state"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests that were not asked for, skip tests that cannot run here, and put the real guests last."""
    soak, deep = config.getoption("--soak"), config.getoption("--deep")
    apart = emulated() and config.option.second  # the first process reports for the emulated machine
    left_out = []
    for item in list(items):
        marks = {mark.name for mark in item.iter_markers()}
        if ("soak" in marks) != soak or ("deep" in marks and not deep) or ("l1" in marks and apart):
            items.remove(item)
            left_out.append(item)
    config.hook.pytest_deselected(items=left_out)
    real = frozenset(item.nodeid for item in items if item.get_closest_marker("l1"))
    config.stash[REAL] = real
    outside = config.pluginmanager.has_plugin("outside-l1")
    missing = {}
    if not os.access(KVM, os.R_OK | os.W_OK):
        missing["kvm"] = f"{KVM} is missing or may not be opened"
    if os.geteuid() != 0:
        missing["root"] = "not root"
    for item in items:
        if outside and item.nodeid in real:
            continue  # the same check runs inside that machine
        reason = next((why for marker, why in missing.items() if item.get_closest_marker(marker)), None)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
            config.stash[NOT_RUN][reason] = config.stash[NOT_RUN].get(reason, 0) + 1
    # Two processes begin with tests that mostly wait, since the emulated machine uses a processor for some minutes.
    mixed = config.option.two
    # A machine that is emulated as a whole comes when there is little other work.
    items.sort(
        key=lambda item: (item.nodeid in real, item.path.name == MACHINE, mixed and item.path.parent.name != "process")
    )


def pytest_collection_finish() -> None:
    """Exclude the collected tests, a million objects, from garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """After each file, exclude reports and caches, too: many tests collect garbage, which would take ever longer."""
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Show the output of real guests and, in red, the tests that did not run."""
    real = [report for report in terminalreporter.getreports("passed") if report.nodeid in config.stash[REAL]]
    if real:
        where = "inside the emulated machine" if config.pluginmanager.has_plugin("outside-l1") else "here"
        terminalreporter.section(f"real guests, {where}")
    for report in real:
        terminalreporter.write_line(f"{report.nodeid} passed in {report.duration:.1f} s", bold=True)
        for line in report.capstdout.splitlines()[-SHOWN_LINES:]:
            terminalreporter.write_line(f"    {line}")
    said = [
        (report.nodeid, text) for report in terminalreporter.getreports("passed")
        for name, text in report.user_properties if name == DONE
    ]  # fmt: skip
    if said:
        terminalreporter.section("done")
    for nodeid, text in said:
        terminalreporter.write_line(f"{nodeid}: {text}")
    for reason, count in config.stash[NOT_RUN].items():
        terminalreporter.section(f"{count} TESTS WERE NOT RUN: {reason}", sep="!", red=True, bold=True)


@pytest.fixture(scope="session")
def linux() -> LinuxGuest:
    """A stock Linux guest.  `tools/guest-init` describes its commands."""
    return linux_guest()
