"""`make run` waits until the daemon is ready, notices its failure, and leaves no daemon running."""

import signal
import sys
from pathlib import Path

import pytest

from tools import debian_image, run
from tools.debian_image import ImageError
from vmd.config.check import load

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
    """A folder for the log, instead of the checkout."""
    monkeypatch.setattr(run, "LOG", tmp_path / "vmd.log")
    return tmp_path


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Replace vmd by a program."""
    path = folder / "vmd"
    path.write_text(f"#!{sys.executable}\n{program}")
    path.chmod(0o755)
    monkeypatch.setattr(run, "VMD", path)


def test_daemon_that_is_ready_is_used_and_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other notifications do not count.  At the end the daemon gets SIGTERM and is not killed."""
    stand_in(folder, monkeypatch, SERVES)

    with run.daemon(folder / "vm.conf") as vmctl:
        control = vmctl[2]

    said = (folder / "vmd.log").read_text()
    assert vmctl[1] == "-s"
    assert said == f"told to stop ['-d', '-f', '{folder}/vm.conf', '-s', '{control}']\n"
    assert not Path(control).parent.exists()


def test_daemon_that_exits_first_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its exit is noticed at once, and its output is in the log."""
    stand_in(folder, monkeypatch, REFUSES)

    with pytest.raises(run.RunError, match="vmd exited with status 1"), run.daemon(folder / "vm.conf"):
        pass

    assert (folder / "vmd.log").read_text() == "vm.conf:1: syntax error\n"


def test_daemon_that_does_not_get_ready(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait is limited, and the daemon is ended."""
    stand_in(folder, monkeypatch, "import signal; signal.pause()")
    monkeypatch.setattr(run, "START_S", 0.1)

    with pytest.raises(run.RunError, match=r"not ready after 0\.1 s"), run.daemon(folder / "vm.conf"):
        pass


def test_signals_end_it_in_order() -> None:
    """A closed terminal leaves no daemon running."""
    with pytest.raises(KeyboardInterrupt):
        run.interrupted(signal.SIGHUP, None)


def test_software_kvm_without_its_guest_says_how_to_build_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the command."""
    monkeypatch.setattr(run, "SOFTWARE_KVM", tmp_path)
    monkeypatch.setattr(run, "DEMO", tmp_path / "demo.elf")

    with pytest.raises(run.RunError, match="make -C guests"):
        run.chosen()


def test_without_an_image_the_guest_is_a_small_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """An example is a host without a network.  The reason is shown."""

    def fails() -> Path:
        raise ImageError("debootstrap: status 1\nE: no such host")

    monkeypatch.setattr(run, "SOFTWARE_KVM", tmp_path / "none")
    monkeypatch.setattr(debian_image, "cached", fails)
    monkeypatch.setattr(run, "small", lambda: run.Guest(("memory 1G",), run.console))

    assert run.chosen().conf == 'vm "demo" {\n\tdisable\n\tmemory 1G\n}\n'
    assert "E: no such host\nrun: running a small guest instead\n" in capfd.readouterr().err


@pytest.fixture
def vmctl(folder: Path) -> list[str]:
    """A vmctl that prints its arguments, and exits with the status in a file."""
    path = folder / "vmctl"
    path.write_text(f'#!/bin/sh\necho "$*"\nexit $(cat {folder}/status)\n')
    path.chmod(0o755)
    return [str(path)]


def test_a_guest_is_waited_for_and_entered(
    folder: Path, vmctl: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The login is by ssh, or at the console if ssh is impossible."""
    monkeypatch.setattr(run, "FOLDER", folder)
    login = f"ssh -i {folder}/key -o IdentitiesOnly=yes -o UserKnownHostsFile={folder}/known_hosts demo"
    for status, entered in (("0", login), ("1", "console demo")):
        (folder / "status").write_text(status)
        assert run.ssh(vmctl) == int(status)
        said = [line for line in capfd.readouterr().out.splitlines() if not line.startswith("run: ")]
        assert said == [f"{login} -- true", entered]


def test_configuration_of_the_debian_guest(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its disk is a grown copy, and its seed has the user and the key of the login."""
    (folder / "root").mkdir()
    debian_image.make_disk(folder / "image.raw", folder / "root", 8)
    monkeypatch.setattr(debian_image, "cached", lambda: folder / "image.raw")
    monkeypatch.setattr(run, "FOLDER", folder)
    monkeypatch.setattr(run, "SOFTWARE_KVM", folder / "none")

    guest = run.chosen()
    guest = run.chosen()  # again, as after a killed run

    (folder / "vm.conf").write_text(guest.conf)
    warnings: list[str] = []
    (vm,) = load(str(folder / "vm.conf"), warn=warnings.append).vms
    assert (warnings, vm.name, vm.enabled) == ([], run.NAME, False)
    assert [nic.local for nic in vm.nics] == [True]
    assert vm.seed is not None
    assert (vm.seed.user, vm.seed.ssh_keys) == (run.USER, (f"{folder}/key.pub",))
    assert (vm.kernel, vm.initrd) == ("disk0:/vmlinuz", "disk0:/initrd.img")
    assert int.from_bytes(Path(vm.disks[0].path).read_bytes()[24:32]) == 10 << 30  # the size in qcow2's header
    assert (folder / "key").stat().st_mode & 0o777 == 0o600
    assert capfd.readouterr().out.count("create -i") == 2
