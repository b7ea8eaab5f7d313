"""vmctl resize and vmctl cdrom: what is requested, and what is said about the result."""

import errno
import json
import os
from pathlib import Path

import pytest

from tests.unit.vmctl.conftest import Vmctl
from tests.unit.vmctl.fake import FakeDaemon
from vmd.ipc.messages.clients import DiscInserted, DiscRequest, Failed, Resized, ResizeRequest

RESIZED = Resized(vmid=3, name="web", disk="disk1", path="/d/b.qcow2", size_bytes=20 << 30, running=True)
INSERTED = DiscInserted(vmid=3, name="web", path="/d/cd.iso", running=True)


@pytest.mark.parametrize(("text", "size"), [("20G", 20 << 30), ("512", 512), ("1m", 1 << 20)])
def test_a_disk_is_resized(vmctl: Vmctl, daemon: FakeDaemon, text: str, size: int) -> None:
    """The daemon says how large it is now."""
    daemon.answers(RESIZED)

    assert vmctl("resize", "web", "disk1", text) == (0, "", "vmctl: disk1 of vm 3 has 20.0G now\n")
    assert daemon.requests == [ResizeRequest(name="web", disk="disk1", size_bytes=size)]


@pytest.mark.parametrize("text", ["0", "-1G", "many"])
def test_a_size_that_is_none(vmctl: Vmctl, daemon: FakeDaemon, text: str) -> None:
    """Nothing is requested."""
    status, _, errors = vmctl("resize", "--", "web", "disk1", text)

    assert (status, daemon.requests) == (2, [])
    assert f"invalid disk size: {text}" in errors


def test_a_vm_that_does_not_run(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """Its guest learns of the change later."""
    daemon.answers(RESIZED.replace(running=False))
    assert vmctl("resize", "web", "1", "20G")[2] == "vmctl: disk1 of vm 3 has 20.0G now; it does not run\n"
    daemon.answers(INSERTED.replace(running=False))
    assert vmctl("cdrom", "web", "/d/cd.iso")[2] == (
        "vmctl: the drive of vm 3 has disc /d/cd.iso now; it does not run\n"
    )


def test_json_of_a_disk(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """It has the path, too."""
    daemon.answers(RESIZED)

    assert json.loads(vmctl("resize", "--json", "web", "disk1", "20G")[1]) == {
        "schema": 1, "id": 3, "name": "web", "disk": "disk1", "path": "/d/b.qcow2", "size_bytes": 20 << 30,
        "running": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "request_"),
    [
        (("web", "/d/cd.iso"), DiscRequest(name="web", path="/d/cd.iso")),
        (("-f", "web", "/d/cd.iso"), DiscRequest(name="web", path="/d/cd.iso", force=True)),
        (("-e", "web"), DiscRequest(name="web")),
        (("-e", "-f", "web"), DiscRequest(name="web", force=True)),
    ],
)
def test_a_disc_is_changed(
    vmctl: Vmctl, daemon: FakeDaemon, arguments: tuple[str, ...], request_: DiscRequest
) -> None:
    """The drive may be locked by the guest."""
    daemon.answers(INSERTED.replace(path=request_.path, notes=("odd length",)))
    disc = "disc /d/cd.iso" if request_.path else "no disc"

    assert vmctl("cdrom", *arguments) == (
        0, "", f"vmctl: warning: odd length\nvmctl: the drive of vm 3 has {disc} now\n",
    )  # fmt: skip
    assert daemon.requests == [request_]


def test_the_path_of_a_disc_is_absolute(
    vmctl: Vmctl, daemon: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon has another working directory.  Ours may be gone."""
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    daemon.answers(INSERTED)
    vmctl("cdrom", "web", "cd.iso")
    assert daemon.requests == [DiscRequest(name="web", path=f"{folder}/cd.iso")]

    folder.rmdir()
    status, _, errors = vmctl("cdrom", "web", "cd.iso")
    assert status == 1
    assert f"cd.iso: {os.strerror(errno.ENOENT)}" in errors


@pytest.mark.parametrize("path", ["", "/d/cd.iso"])
def test_json_of_a_disc(vmctl: Vmctl, daemon: FakeDaemon, path: str) -> None:
    """An empty drive has no disc."""
    daemon.answers(INSERTED.replace(path=path, notes=("a\nb",)))

    assert json.loads(vmctl("cdrom", "--json", "web", "x")[1]) == {
        "schema": 1, "id": 3, "name": "web", "cdrom": path or None, "running": True, "notes": ["a\\x0ab"],
    }  # fmt: skip


@pytest.mark.parametrize("command", [("resize", "web", "disk1", "20G"), ("cdrom", "web", "x")])
def test_a_refusal(vmctl: Vmctl, daemon: FakeDaemon, command: tuple[str, ...]) -> None:
    """The reason is the daemon's."""
    daemon.answers(Failed(code=errno.EBUSY, text="the drive is locked by the guest"))

    status, output, errors = vmctl(*command)

    assert (status, output) == (1, "")
    assert f"{command[0]} vm command failed: the drive is locked by the guest" in errors
