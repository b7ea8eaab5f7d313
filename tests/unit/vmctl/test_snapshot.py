"""vmctl snapshot: which action is requested, and what is shown about it."""

import errno
import json
import re
import time

import pytest

from tests.unit.vmctl.conftest import Vmctl
from tests.unit.vmctl.fake import FakeDaemon
from vmd.ipc.messages.clients import Failed, SnapshotRequest, SnapshotsDone
from vmd.ipc.messages.shared import SnapshotAction, SnapshotInfo, TransferProgress

FIRST = SnapshotInfo(tag="first", date_s=1_700_000_000, clock_ns=5, state_bytes=0, disks=2, of_disks=2)
LATER = FIRST.replace(tag="a-longer-name", date_s=1_700_000_001, state_bytes=64 << 20, disks=1)


@pytest.mark.parametrize(
    ("options", "action", "said"),
    [
        ((), SnapshotAction.CREATE, "made snapshot base of vm web"),
        (("-d",), SnapshotAction.DELETE, "deleted snapshot base of vm web"),
        (("-r",), SnapshotAction.GO_BACK, "went back to snapshot base of vm web"),
    ],
)
def test_a_snapshot_is_changed(
    vmctl: Vmctl, daemon: FakeDaemon, options: tuple[str, ...], action: SnapshotAction, said: str
) -> None:
    """The request has the action of the option, and no other."""
    daemon.answers(SnapshotsDone(vmid=3, name="web", tag="base"))

    assert vmctl("snapshot", *options, "web", "base") == (0, "", f"vmctl: {said}\n")
    assert daemon.requests == [SnapshotRequest(name="web", action=action, tag="base")]


def test_a_snapshot_is_called_by_the_time(vmctl: Vmctl, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it has a name."""
    monkeypatch.setattr(time, "strftime", lambda form, *_: re.sub("%[YmdHMS]", "1", form))
    daemon.answers(SnapshotsDone(vmid=3, name="web", tag="1-1-1_1:1:1"))

    vmctl("snapshot", "web")

    assert daemon.requests == [SnapshotRequest(name="web", action=SnapshotAction.CREATE, tag="1-1-1_1:1:1")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-l", "web", "base"), "unexpected argument: base"),
        (("-d", "web"), "missing argument: tag"),
        (("-r", "web"), "missing argument: tag"),
        (("web", "17"), "name of a snapshot must begin with a letter or digit and must not be a number: 17"),
        (("web", "a b"), "name of a snapshot must have letters, digits and"),
    ],
)
def test_a_snapshot_needs_a_name(vmctl: Vmctl, daemon: FakeDaemon, arguments: tuple[str, ...], words: str) -> None:
    """Nothing is requested otherwise."""
    status, _, errors = vmctl("snapshot", *arguments)

    assert (status, daemon.requests) == (2, [])
    assert words in errors


@pytest.mark.parametrize("action", ["-d", "-r"])
def test_an_old_snapshot_may_have_any_name(vmctl: Vmctl, daemon: FakeDaemon, action: str) -> None:
    """Another program may have made it."""
    daemon.answers(SnapshotsDone(vmid=3, name="web", tag="17"))

    assert vmctl("snapshot", action, "web", "17")[0] == 0


def test_snapshots_are_listed_by_their_age(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """A snapshot that some disks lack is marked."""
    daemon.answers(LATER, FIRST, SnapshotsDone(vmid=3, name="web"))
    made = [time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.date_s)) for each in (FIRST, LATER)]

    status, output, errors = vmctl("snapshot", "-l", "web")

    assert (status, errors) == (0, "")
    assert output.splitlines() == [
        "TAG            MADE                  MEMORY",
        f"first          {made[0]}        -",
        f"a-longer-name  {made[1]}    64.0M  incomplete: 1 of 2 disks have it",
    ]
    assert daemon.requests == [SnapshotRequest(name="web")]


def test_json_of_snapshots(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """The list has no tag of its own, and a change has no list."""
    daemon.answers(LATER, FIRST, SnapshotsDone(vmid=3, name="web"))
    listed = json.loads(vmctl("snapshot", "-l", "--json", "web")[1])
    daemon.answers(SnapshotsDone(vmid=3, name="web", tag="base"))
    made = json.loads(vmctl("snapshot", "--json", "web", "base")[1])

    assert listed == {
        "schema": 1,
        "id": 3,
        "name": "web",
        "tag": None,
        "snapshots": [
            {"tag": "first", "made": FIRST.date_s, "memory_bytes": 0, "complete": True},
            {"tag": "a-longer-name", "made": LATER.date_s, "memory_bytes": 64 << 20, "complete": False},
        ],
    }
    assert (made["tag"], made["snapshots"]) == ("base", None)


def test_progress_is_no_snapshot(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """It is shown at a terminal only."""
    daemon.answers(TransferProgress(done_bytes=1, total_bytes=2), SnapshotsDone(vmid=3, name="web", tag="base"))

    assert vmctl("snapshot", "web", "base") == (0, "", "vmctl: made snapshot base of vm web\n")


def test_a_refusal_of_snapshots(vmctl: Vmctl, daemon: FakeDaemon) -> None:
    """The reason is the daemon's."""
    daemon.answers(Failed(code=errno.EEXIST, text="vm web has a snapshot base already"))

    status, output, errors = vmctl("snapshot", "web", "base")

    assert (status, output) == (1, "")
    assert "snapshot vm command failed: vm web has a snapshot base already" in errors
