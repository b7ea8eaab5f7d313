"""vmctl upgrade."""

import errno
from pathlib import Path

import pytest

from tests.support import schema
from tests.unit.vmctl.conftest import Vmctl
from tests.unit.vmctl.fake import Answers, FakeDaemon
from vmd.ipc.messages.clients import End, Failed, GenerationInfo, GenerationsRequest, Ok, UpgradeRequest
from vmd.record import Record
from vmd.version import VERSION

GENERATION = GenerationInfo(number=1, version="9.9", vms=1)


def taken_over(request: Record) -> Answers:
    """Close the connection on an upgrade, and answer with the generations afterwards."""
    return (GENERATION, End()) if isinstance(request, GenerationsRequest) else None


def test_other_version_takes_over(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """The end of the connection means success.  On a new connection vmctl asks for the new version."""
    daemon.script = taken_over

    assert vmctl("upgrade") == (0, f"vmctl {VERSION}\nvmd 9.9\n", "")
    assert schema.document(vmctl("upgrade", "--json"), "upgrade")["vmd"] == "9.9"
    assert daemon.requests == [UpgradeRequest(), GenerationsRequest()] * 2


def test_rehearsal(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """It changes nothing."""
    daemon.script = lambda request: (Ok(),) if isinstance(request, UpgradeRequest) else (GENERATION, End())

    assert vmctl("upgrade", "-n") == (0, "", "vmctl: the installed version can take over\n")
    assert schema.document(vmctl("upgrade", "-n", "--json"), "upgrade")["vmd"] == "9.9"
    assert daemon.requests[0] == UpgradeRequest(rehearse_only=True)


@pytest.mark.parametrize("options", [(), ("-n",)])
def test_refused(vmctl: Vmctl, daemon: FakeDaemon, options: tuple[str, ...]) -> None:
    """Each line of the answer gets the prefix of vmctl."""
    daemon.answers(Failed(code=errno.EINVAL, text="it cannot take over:\n/etc/vm.conf:3: syntax error"))

    said = "vmctl: it cannot take over:\nvmctl: /etc/vm.conf:3: syntax error\n"
    assert vmctl("upgrade", *options) == (1, "", said)


def test_daemon_that_ends_in_the_rehearsal(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """No other daemon takes over in a rehearsal, so vmctl fails."""
    daemon.answers()
    daemon.script = lambda _request: None

    status, output, errors = vmctl("upgrade", "-n")

    assert (status, output) == (3, "")
    assert "pipe closed" in errors


def test_no_daemon(vmctl: Vmctl, tmp_path: Path) -> None:
    """There is no daemon to take over from."""
    assert vmctl("upgrade", socket=str(tmp_path / "none"))[0] == 3
