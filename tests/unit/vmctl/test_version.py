"""vmctl version: the versions of both programs, also of daemons that do not know the question."""

import json
from pathlib import Path

import pytest

from tests.unit.vmctl.conftest import Vmctl
from tests.unit.vmctl.fake import FakeDaemon
from vmctl.__main__ import main
from vmd.ipc.messages.clients import End, Failed, GenerationInfo
from vmd.version import VERSION

OLD, NEW = GenerationInfo(number=1, version="0.1", vms=1), GenerationInfo(number=2, version="9.9", vms=2)


def test_both_versions(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """One generation has the version of the daemon, and is not shown."""
    daemon.answers(NEW, End())

    assert vmctl("version") == (0, f"vmctl {VERSION}\nvmd 9.9\n", "")


def test_vms_of_an_earlier_version(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """Each generation has its VMs."""
    daemon.answers(OLD, NEW, End())

    assert vmctl("version")[1].splitlines()[2:] == ["generation 1: vmd 0.1, 1 VM", "generation 2: vmd 9.9, 2 VMs"]


def test_json(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """It has all generations."""
    daemon.answers(NEW, End())

    assert json.loads(vmctl("version", "--json")[1]) == {
        "schema": 1, "vmctl": VERSION, "vmd": "9.9", "generations": [{"number": 2, "version": "9.9", "vms": 2}],
    }  # fmt: skip


def test_a_daemon_that_refuses_the_list(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """Its version is shown."""
    daemon.answers(Failed(code=1, text="no"))

    assert vmctl("version") == (0, f"vmctl {VERSION}\nvmd 9.9\n", "")


def test_no_daemon(vmctl: Vmctl, tmp_path: Path) -> None:
    """The version of vmctl is shown in any case."""
    status, output, errors = vmctl("version", socket=str(tmp_path / "none"))

    assert (status, output) == (3, f"vmctl {VERSION}\n")
    assert errors


def test_an_older_daemon(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It cannot tell its version, and is not asked for more."""
    daemon = FakeDaemon(tmp_path / "old.sock", older=True)
    try:
        status = main(["-s", str(daemon.path), "version"])
    finally:
        daemon.close()

    assert status == 0
    assert capfd.readouterr().out == f"vmctl {VERSION}\nvmd older than 0.2.0\n"
    assert daemon.requests == []
