"""`make run` waits for the daemon's own word, notices when it will not come, and leaves no daemon behind."""

import signal
import sys
from pathlib import Path

import pytest

from tools import run

SERVES = """
import os, signal, socket, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
    notify.sendto(b"STATUS=nearly", os.environ["NOTIFY_SOCKET"])
    notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
signal.sigwait([signal.SIGTERM])
print("told to stop", sys.argv[1:])
"""
REFUSES = 'print("vm.conf:1: syntax error"); raise SystemExit(1)'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the log goes instead of the checkout."""
    monkeypatch.setattr(run, "LOG", tmp_path / "vmd.log")
    return tmp_path


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Put a program in vmd's place."""
    path = folder / "vmd"
    path.write_text(f"#!{sys.executable}\n{program}")
    path.chmod(0o755)
    monkeypatch.setattr(run, "VMD", path)


def test_daemon_that_is_ready_is_used_and_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other notices are not the one; at the end the daemon is told, not killed."""
    stand_in(folder, monkeypatch, SERVES)

    with run.daemon(folder / "vm.conf") as vmctl:
        control = vmctl[2]

    said = (folder / "vmd.log").read_text()
    assert vmctl[1] == "-s"
    assert said == f"told to stop ['-d', '-f', '{folder}/vm.conf', '-s', '{control}']\n"
    assert not Path(control).parent.exists()


def test_daemon_that_exits_first_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its exit is noticed at once, and its own words are in the log."""
    stand_in(folder, monkeypatch, REFUSES)

    with pytest.raises(run.RunError, match="vmd exited with status 1"), run.daemon(folder / "vm.conf"):
        pass

    assert (folder / "vmd.log").read_text() == "vm.conf:1: syntax error\n"


def test_daemon_that_says_nothing_is_not_waited_for_long(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is gone afterwards."""
    stand_in(folder, monkeypatch, "import signal; signal.pause()")
    monkeypatch.setattr(run, "START_S", 0.1)

    with pytest.raises(run.RunError, match=r"not ready after 0\.1 s"), run.daemon(folder / "vm.conf"):
        pass


def test_signals_end_it_in_order() -> None:
    """A terminal that goes away leaves no daemon behind."""
    with pytest.raises(KeyboardInterrupt):
        run.interrupted(signal.SIGHUP, None)


def test_software_kvm_without_its_guest_says_how_to_build_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence has the command."""
    monkeypatch.setattr(run, "SOFTWARE_KVM", tmp_path)
    monkeypatch.setattr(run, "DEMO", tmp_path / "demo.elf")

    with pytest.raises(run.RunError, match="make -C guests"):
        run.virtual_machine()
