"""What the parent takes of the controls, which may have been taken over."""

from collections.abc import Iterator
from typing import Any, cast

import pytest

from vmd.errors import PeerError
from vmd.ipc.channel import Channel
from vmd.ipc.loop import Loop
from vmd.ipc.messages import Caller, Failed, VmInfo
from vmd.parent.connections import MAX_UNANSWERED, TURN, Connection, Connections, Control
from vmd.record import Record

CLIENT = 7
ROW = VmInfo(
    vmid=1, name="a", pid=0, vcpus=1, memory_bytes=1, resident_bytes=0, tty="", uid=0, gid=None, owner="root",
    state="stopped",
)  # fmt: skip


class FakeChannel:
    """Takes what is sent."""

    label = "control/1000"

    def __init__(self) -> None:
        self.sent: list[Record] = []

    def send(self, message: Record, **_more: object) -> None:
        """Take a message."""
        self.sent.append(message)


class FakeChildren:
    """Starts nothing."""

    def start(self, *_arguments: object) -> tuple[Any, Any]:
        """Return what is as good as a child."""
        return None, None


@pytest.fixture
def connections() -> Iterator[Connections]:
    """Give the room with one connection, of a user's control."""
    attached: list[dict[str, Any]] = []

    def attach(*_arguments: object, **more: Any) -> Channel:  # noqa: ANN401 (as `Process.attach`)
        attached.append(more)
        return cast("Channel", FakeChannel())

    loop = Loop()
    room = Connections(loop, cast("Any", attach), lambda _number: None, lambda _channel, _error: None)
    room.start(cast("Any", FakeChildren()), cast("Any", None))
    assert [(each["in_step"], each["batch"]) for each in attached] == [(True, TURN)]
    control = Control(cast("Any", None))
    control.channel = cast("Channel", FakeChannel())
    room.known[CLIENT] = Connection(CLIENT, Caller(uid=1000, gid=1000, pid=1), control, refused=False)
    yield room
    loop.close()


def test_requests_that_are_not_answered(connections: Connections) -> None:
    """A connection has so many; a control that passes on more is not to be trusted."""
    channel = connections.known[CLIENT].control.channel
    for _ in range(MAX_UNANSWERED):
        assert connections.asker(CLIENT, channel).uid == 1000
    connections.send(ROW, peerid=CLIENT)  # a row of a list is not its end
    with pytest.raises(PeerError, match=f"more than {MAX_UNANSWERED} requests of client {CLIENT}"):
        connections.asker(CLIENT, channel)


def test_requests_that_are_answered(connections: Connections) -> None:
    """There may be any number of them, and what comes unasked does not count."""
    channel = connections.known[CLIENT].control.channel
    connections.send(Failed(code=1, text="your console is taken"), peerid=CLIENT)
    for _ in range(3 * MAX_UNANSWERED):
        connections.asker(CLIENT, channel)
        connections.send(Failed(code=1, text="no such vm"), peerid=CLIENT)
    for _ in range(MAX_UNANSWERED):
        connections.asker(CLIENT, channel)
