"""The limits for controls, each of which may have been taken over by an attacker."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from vmd.config.model import ROOT
from vmd.errors import PeerError
from vmd.ipc.channel import Channel
from vmd.ipc.loop import Loop
from vmd.ipc.messages.children import Quit
from vmd.ipc.messages.clients import Caller, Failed, VmInfo
from vmd.parent import connections as rooms
from vmd.parent.connections import (
    MAX_CLIENTS,
    MAX_CLIENTS_OF_ROOT,
    MAX_CLIENTS_PER_USER,
    MAX_UNANSWERED,
    MAX_USERS,
    REFUSED,
    STUCK_MAX,
    TURN,
    Connection,
    Connections,
    Control,
)
from vmd.record import Record

CLIENT = 7
LOOP_S = 0.05
ROW = VmInfo(
    vmid=1, name="a", pid=0, vcpus=1, memory_bytes=1, resident_bytes=0, tty="", uid=0, gid=None, owner="root",
    state="stopped",
)  # fmt: skip


class FakeChannel:
    """A channel that records messages."""

    label = "control/1000"

    def __init__(self) -> None:
        self.sent: list[Record] = []
        self.closed = False

    def close(self) -> None:
        """Note that it was closed."""
        self.closed = True

    def send(self, message: Record, **_more: object) -> None:
        """Record a message."""
        self.sent.append(message)


class FakeChildren:
    """Starts no processes."""

    def start(self, *_arguments: object) -> tuple[Any, Any]:
        """Return stand-ins for a child and its channel."""
        return None, None

    def are_ours(self, _caller: Caller) -> bool:
        """Return False for every caller."""
        return False

    def bury(self) -> None:
        """Reap nothing."""


@pytest.fixture
def connections() -> Iterator[Connections]:
    """Yield the room with one connection, of the control of a user."""
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


def test_a_connection_has_a_limit_of_unanswered_requests(connections: Connections) -> None:
    """A control that passes on more is not trusted any more."""
    channel = connections.known[CLIENT].control.channel
    for _ in range(MAX_UNANSWERED):
        assert connections.asker(CLIENT, channel).uid == 1000
    connections.send(ROW, peerid=CLIENT)  # a row of a list is not its end
    with pytest.raises(PeerError, match=f"more than {MAX_UNANSWERED} requests of client {CLIENT}"):
        connections.asker(CLIENT, channel)


def test_any_number_of_requests_may_be_answered(connections: Connections) -> None:
    """A message without a request does not count as an answer."""
    channel = connections.known[CLIENT].control.channel
    connections.send(Failed(code=1, text="your console is taken"), peerid=CLIENT)
    for _ in range(3 * MAX_UNANSWERED):
        connections.asker(CLIENT, channel)
        connections.send(Failed(code=1, text="no such vm"), peerid=CLIENT)
    for _ in range(MAX_UNANSWERED):
        connections.asker(CLIENT, channel)


class StuckChild:
    """A process that does not end."""

    pidfd = 9

    def kill(self) -> None:
        """Do not end."""


def test_a_control_that_does_not_end_is_counted(connections: Connections, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file blocks it after its user's last connection has ended.  It counts towards the limit STUCK_MAX."""
    monkeypatch.setattr(rooms, "IDLE_S", 0.0)
    monkeypatch.setattr(rooms, "END_S", 0.0)
    monkeypatch.setattr(FakeChildren, "start", lambda *_arguments: (StuckChild(), None))
    connections.reserve = None
    for _ in range(STUCK_MAX):
        assert refused(connections, 1000) == ""
        channel = connections._assign(1000).channel  # its only connection has ended
        connections.loop.call_later(LOOP_S, connections.loop.stop)
        connections.loop.run()
        assert isinstance(channel, FakeChannel)
        assert channel.closed
        assert any(isinstance(message, Quit) for message in channel.sent)
        connections.reserve = None
    assert refused(connections, 1000).startswith(f"{STUCK_MAX} processes for uid 1000 hang in files")


def refused(connections: Connections, uid: int) -> str:
    """Return why a user gets no connection now, or ""."""
    refusal = connections._refusal(Caller(uid=uid, gid=uid, pid=1))
    return refusal[1] if refusal is not None else ""


def fill(connections: Connections, uid: int, count: int) -> None:
    """Give a user a number of connections."""
    for number in range(len(connections.known) + 100, len(connections.known) + 100 + count):
        known = connections.known[CLIENT]
        connections.known[number] = Connection(number, Caller(uid=uid, gid=uid, pid=1), known.control, refused=False)


def test_the_limits_of_each_user_and_of_all_users(connections: Connections) -> None:
    """There is a limit for one user and one for all users.  Root's connections have their own."""
    fill(connections, 2000, MAX_CLIENTS_PER_USER)
    assert refused(connections, 2000) == f"too many connections of uid 2000 ({MAX_CLIENTS_PER_USER})"
    fill(connections, 2500, MAX_CLIENTS_PER_USER - 1)
    assert refused(connections, 2500) == ""
    for uid in range(3000, 3000 + MAX_CLIENTS // MAX_CLIENTS_PER_USER - 2):
        fill(connections, uid, MAX_CLIENTS_PER_USER - 1)
    fill(connections, 3999, MAX_CLIENTS - 1 - len(connections.known))
    assert refused(connections, 4000) == ""
    fill(connections, 3999, 1)
    assert refused(connections, 4000) == f"too many connections to vmd ({MAX_CLIENTS})"
    assert refused(connections, ROOT) == ""
    fill(connections, ROOT, MAX_CLIENTS_OF_ROOT - 1)
    assert refused(connections, ROOT) == ""
    fill(connections, ROOT, 1)
    assert refused(connections, ROOT) == f"too many connections of uid 0 ({MAX_CLIENTS_OF_ROOT})"


def test_the_limits_are_those_of_the_manual() -> None:
    """It says how many clients of a user, clients and users there may be."""
    assert (MAX_CLIENTS_PER_USER, MAX_CLIENTS, MAX_USERS) == (64, 256, 32)
    manual = (Path(__file__).parents[3] / "man/vmd.8").read_text()
    words = f"A user has {MAX_CLIENTS_PER_USER} connections at most, and at most {MAX_USERS} users besides root"
    assert words in manual


def test_the_limit_of_users(connections: Connections) -> None:
    """Each user costs a process, so their number is limited.  Root and the refused are not counted."""
    control = connections.known[CLIENT].control
    connections.controls |= dict.fromkeys((ROOT, REFUSED, *range(2000, 2000 + MAX_USERS - 1)), control)
    assert refused(connections, 5000) == ""
    connections.controls[5000] = control
    assert refused(connections, 5001) == f"too many users are connected to vmd ({MAX_USERS})"
    assert refused(connections, 5000) == ""
    assert refused(connections, ROOT) == ""
