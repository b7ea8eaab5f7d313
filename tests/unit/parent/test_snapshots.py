"""The room of snapshots, where a whole daemon would take too long to come to it."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmd.errors import PeerError
from vmd.ipc.loop import Loop
from vmd.ipc.messages.clients import SnapshotRequest
from vmd.ipc.messages.imgwriter import SnapshotsChanged, SnapshotWord
from vmd.ipc.messages.shared import SnapshotAction
from vmd.parent.snapshots import Job, Snapshots


class FakeChannel:
    """What of a channel is looked at."""

    label = "imgwriter/web"


def test_imgwriter_that_gives_the_state_for_long_is_not_given_up() -> None:
    """It has answered, and says now and then that it goes on; to answer twice is another matter."""
    core = SimpleNamespace(loop=Loop(), clients=None)
    room = Snapshots(cast("Any", core), cast("Any", None), cast("Any", None))
    channel, vm = cast("Any", FakeChannel()), SimpleNamespace(name="web", alive=True)
    job = Job(cast("Any", vm), SnapshotRequest(action=SnapshotAction.GO_BACK, tag="one"), 0)
    job.answered = True
    room.jobs[channel] = job

    room.on_message(SnapshotWord(), channel)
    assert job.deadline is not None
    with pytest.raises(PeerError, match="a request that was not made"):
        room.on_message(SnapshotsChanged(), channel)
