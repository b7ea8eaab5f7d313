"""Clients of the control socket, from accept(2) to their end: who serves them, and what a lost control takes along."""

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from tests.support.descriptors import open_descriptors
from tests.unit.parent.timers import Timers
from vmd.errors import HostError, PeerError
from vmd.ipc.messages.children import Ping, Quit
from vmd.ipc.messages.clients import Caller, Ok
from vmd.ipc.messages.control import NO_CLIENT, NewClient, ServeUser
from vmd.parent import connections as module
from vmd.parent.connections import (
    ACCEPT_PAUSE_S,
    AGAIN_S,
    END_S,
    IDLE_S,
    LOOK_S,
    MAX_REFUSED,
    QUICK_S,
    RESERVE_DELAY_S,
    SILENT_AT_START_MAX,
    SILENT_MAX,
    Connections,
)
from vmd.record import Record

OURS = os.getuid()
USER = 4000  # a user who is not root


class Channel:
    """A channel to a control.  It notes messages, and closes their descriptors."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.sent: list[tuple[Record, int]] = []
        self.clients: list[str] = []  # what each descriptor was
        self.closed, self.waiting = False, 0

    def send(self, message: Record, *, peerid: int = 0, fds: dict[str, list[int]] | None = None) -> None:
        """Note a message."""
        self.sent.append((message, peerid))
        for fd in (fds or {}).get("client", []):
            self.clients.append(os.readlink(f"/proc/self/fd/{fd}").split(":")[0])
            os.close(fd)

    def of(self, kind: type[Record]) -> list[tuple[Any, int]]:
        """Return the messages of a kind."""
        return [(message, peerid) for message, peerid in self.sent if isinstance(message, kind)]

    def close(self) -> None:
        """Note it."""
        self.closed = True


class Child:
    """A control process."""

    def __init__(self) -> None:
        self.killed = False
        self.pidfd = 9

    def kill(self) -> None:
        """Note it."""
        self.killed = True


class Rig(Timers):
    """The room with a real socket, on a loop that the test turns."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.files: dict[int, Any] = {}
        self.children: list[Child] = []
        self.channels: list[Channel] = []
        self.gone: list[int] = []
        self.hopeless: list[object] = []
        self.cannot_start: HostError | None = None
        self.ours = False
        self.room = Connections(
            cast("Any", self), cast("Any", self.attach), self.gone.append,
            lambda channel, _error: self.hopeless.append(channel),
        )  # fmt: skip
        self.path = str(directory / "vmd.sock")
        self.clients: list[socket.socket] = []
        self.room.start(cast("Any", self), cast("Any", None))

    # The loop, and the parent's children.

    def add(self, fd: int, on_ready: Any) -> None:  # noqa: ANN401
        """Replaces the loop's."""
        self.files[fd] = on_ready

    def remove(self, fd: int) -> None:
        """Replaces the loop's."""
        del self.files[fd]

    def start(self, *_words: object) -> tuple[Child, None]:
        """Replaces `Children.start`."""
        if self.cannot_start is not None:
            raise self.cannot_start
        self.children.append(Child())
        return self.children[-1], None

    def attach(self, _sock: object, _proc: object, label: str, **_more: object) -> Channel:
        """Replaces `Process.attach`."""
        self.channels.append(Channel(label))
        return self.channels[-1]

    def are_ours(self, _caller: Caller) -> bool:
        """Replaces `Children.are_ours`."""
        return self.ours

    def bury(self) -> None:
        """Replaces `Children.bury`."""

    # What tests do.

    def listen(self) -> None:
        """Serve the socket."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(self.path)
        listener.listen()
        self.room.listen(listener)

    def connect(self) -> socket.socket:
        """Return a client that was accepted."""
        client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        client.settimeout(60)
        client.connect(self.path)
        self.clients.append(client)
        self.accept()
        return client

    def accept(self) -> None:
        """Let the room look at its socket."""
        for on_ready in list(self.files.values()):
            on_ready(1)

    def take(self, uid: int) -> None:
        """Let a user connect."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.clients.append(theirs)
        self.room._take(ours, Caller(uid=uid, gid=uid, pid=77))

    def pending(self, delay_s: float) -> int:
        """Return how many timers of this delay run."""
        return sum(each == delay_s and timer.callback is not None for each, timer in self.timers)

    def lose(self, channel: Channel, error: PeerError | None = None) -> None:
        """Let a control end."""
        channel.closed = True
        self.room._on_lost(cast("Any", channel), error)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """Give the room.  No descriptor is left."""
    before = open_descriptors()
    rig = Rig(tmp_path)
    yield rig
    for client in rig.clients:
        client.close()
    rig.room.close()
    assert open_descriptors() == before


def test_a_client_reaches_the_control_of_its_user(rig: Rig) -> None:
    """The kernel names the user.  Each connection has a number, by which it is answered."""
    rig.listen()
    for _ in range(2):
        rig.connect()
    channel = cast("Any", rig.room.controls[OURS].channel)
    new = [(message.uid, message.code, peerid) for message, peerid in channel.of(NewClient)]
    assert new == [(OURS, 0, 1), (OURS, 0, 2)]
    assert channel.clients == ["socket", "socket"]
    caller = rig.room.caller(2, channel)
    assert (caller.uid, caller.gid, caller.pid) == (OURS, os.getgid(), os.getpid())
    rig.room.send(Ok(), peerid=2)
    assert channel.sent[-1] == (Ok(), 2)


def test_each_user_has_a_control(rig: Rig) -> None:
    """It is told its name.  The one in reserve is used first, and replaced soon."""
    rig.fire(RESERVE_DELAY_S)
    assert [each.of(ServeUser) != [] for each in rig.channels] == [True, False]
    rig.take(USER)
    rig.take(USER)
    assert rig.room.controls[USER].channel is cast("Any", rig.channels[1])
    assert [message.title for message, _ in rig.channels[1].of(ServeUser)] == [f"control/{USER}"]
    assert len(rig.channels) == 2
    rig.take(USER + 1)
    rig.fire(RESERVE_DELAY_S)
    rig.fire(RESERVE_DELAY_S)
    assert len(rig.channels) == 4


def test_a_control_speaks_for_its_own_clients_only(rig: Rig) -> None:
    """Another number breaks the protocol, and so does the end of another's client."""
    rig.take(0)
    rig.take(USER)
    roots, users = (cast("Any", rig.room.controls[uid].channel) for uid in (0, USER))
    for ask in (rig.room.caller, rig.room.asker, rig.room.on_client_gone):
        with pytest.raises(PeerError, match="speaks for client 1, which it does not have"):
            ask(1, users)
        with pytest.raises(PeerError, match="speaks for client 9"):
            ask(9, users)
    assert rig.room.caller(1, roots).uid == 0
    rig.room.on_client_gone(2, users)
    assert rig.gone == [2]
    with pytest.raises(PeerError):
        rig.room.caller(2, users)
    reader, writer = os.pipe()
    rig.room.send(Ok(), peerid=2, fds={"courier": [writer]})  # the client has left: the descriptor is closed
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_a_control_without_clients_ends(rig: Rig) -> None:
    """After some time, and not if its user connects again meanwhile.  Root's control never ends."""
    rig.take(0)
    rig.take(USER)
    users, roots = rig.room.controls[USER], rig.room.controls[0]
    rig.room.on_client_gone(2, users.channel)
    rig.room.on_client_gone(1, roots.channel)
    assert rig.pending(IDLE_S) == 1
    rig.take(USER)
    assert rig.pending(IDLE_S) == 0
    rig.room.on_client_gone(3, users.channel)
    rig.fire(IDLE_S)
    channel = cast("Any", users.channel)
    assert channel.of(Quit) == [(Quit(), 0)]
    assert cast("Any", roots.channel).of(Quit) == []
    rig.lose(channel)
    rig.fire(END_S)
    rig.take(USER)
    assert rig.room.controls[USER] is not users


def test_a_lost_control_takes_the_connections_of_its_user_along(
    rig: Rig, capfd: pytest.CaptureFixture[str]
) -> None:
    """Those of other users stay.  The user may connect again."""
    for uid in (0, USER, USER):
        rig.take(uid)
    control = rig.room.controls[USER]
    rig.lose(cast("Any", control.channel))

    assert (rig.gone, [*rig.room.known]) == ([2, 3], [1])
    assert cast("Any", control.child).killed
    assert f"lost control/{USER}; its user may connect again" in capfd.readouterr().err
    rig.take(USER)
    assert len(rig.room.known) == 2
    assert rig.hopeless == []


@pytest.mark.parametrize("quick", [False, True])
def test_roots_control_is_started_again(rig: Rig, monkeypatch: pytest.MonkeyPatch, quick: bool) -> None:
    """At once, unless it has died soon after its start.  Before clients are served the daemon cannot start."""
    first = rig.room.controls[0]
    rig.lose(cast("Any", first.channel))
    assert rig.hopeless == [first.channel]
    rig.room._assign(0)
    rig.listen()
    second = rig.room.controls[0]
    monkeypatch.setattr("time.monotonic", lambda: second.started_s + (QUICK_S / 2 if quick else QUICK_S))
    rig.lose(cast("Any", second.channel), PeerError("control", "is mad"))
    rig.fire(0 if quick else AGAIN_S)
    assert 0 not in rig.room.controls
    rig.fire(AGAIN_S if quick else 0)
    assert 0 in rig.room.controls
    assert len(rig.hopeless) == 1


@pytest.mark.parametrize(("ready", "most"), [(True, SILENT_MAX), (False, SILENT_AT_START_MAX)])
def test_a_control_that_does_not_answer_is_given_up(rig: Rig, ready: bool, most: int) -> None:
    """Any word of it counts.  One without clients is not asked."""
    rig.take(USER)
    control = rig.room.controls[USER]
    channel = cast("Any", control.channel)
    if ready:
        assert not rig.room.on_ready(channel)
        with pytest.raises(PeerError, match="is ready twice"):
            rig.room.on_ready(channel)
    for _ in range(most):
        rig.fire(LOOK_S)
    rig.room.on_pong(channel)
    for _ in range(most):
        rig.fire(LOOK_S)
    rig.room.caller(1, channel)
    for _ in range(most):
        rig.fire(LOOK_S)
    assert (channel.closed, len(channel.of(Ping))) == (False, 3 * most)
    rig.fire(LOOK_S)

    assert (channel.closed, rig.gone, rig.room._count_stuck(USER)) == (True, [1], 1)
    rig.children[-1].pidfd = control.child.pidfd = -1
    assert rig.room._count_stuck(USER) == 0
    assert rig.pending(LOOK_S) == 0


def test_processes_of_the_daemon_are_no_clients(rig: Rig, capfd: pytest.CaptureFixture[str]) -> None:
    """A taken-over VM could open the socket.  The refusal is sent by a control without rights, to so many at a time."""
    rig.ours = True
    for _ in range(MAX_REFUSED + 1):
        rig.take(USER)
    refused = rig.room.controls[module.REFUSED].channel
    told = cast("Any", refused).of(NewClient)
    assert (len(told), {message.code for message, _ in told}) == (MAX_REFUSED, {errno.EPERM})
    assert "process 77 is one of vmd's own: it may not use the control socket" in told[0][0].text
    assert USER not in rig.room.controls
    assert rig.clients[-1].recv(1) == b""  # closed without a word
    assert "refused a client: process 77" in capfd.readouterr().err


def test_a_user_whose_control_cannot_be_started_is_told(rig: Rig, capfd: pytest.CaptureFixture[str]) -> None:
    """By the parent itself.  The log has it, too."""
    rig.cannot_start = HostError("start control", errno.EAGAIN)
    rig.take(USER)
    told = rig.clients[-1].recv(1 << 16)
    assert b"start control: Resource temporarily unavailable" in told
    assert "refused a client: start control: Resource temporarily unavailable" in capfd.readouterr().err
    assert rig.clients[-1].recv(1) == b""
    assert rig.room.known == {}


def test_root_can_connect_when_no_descriptor_is_free(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spare one is closed for that, and opened again."""
    rig.listen()
    spare = rig.room._spare
    assert os.readlink(f"/proc/self/fd/{spare}") == os.devnull
    accept = rig.room._accept

    def full() -> None:
        if rig.room._spare >= 0:
            raise OSError(errno.EMFILE, "Too many open files")
        accept()

    monkeypatch.setattr(rig.room, "_accept", full)
    rig.connect()
    assert [*rig.room.known] == [1]
    assert rig.room._spare >= 0
    assert len(rig.files) == 1


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS])
def test_nobody_is_accepted_for_a_moment_when_the_host_has_run_out(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    """Otherwise the daemon would spin.  Then clients are served again."""
    rig.listen()

    def full() -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(rig.room, "_accept", full)
        rig.connect()
    assert rig.files == {}
    assert f"no new clients for {ACCEPT_PAUSE_S:.0f} s: {os.strerror(number)}" in capfd.readouterr().err
    rig.fire(ACCEPT_PAUSE_S)
    rig.accept()
    assert [*rig.room.known] == [1]
    monkeypatch.setattr(rig.room, "_accept", lambda: os.close(-1))
    with pytest.raises(OSError, match="Bad file"):
        rig.accept()


def test_a_client_that_has_left_before_it_was_accepted(rig: Rig) -> None:
    """Nothing happens."""
    rig.listen()
    rig.accept()
    assert (rig.room.known, len(rig.files)) == ({}, 1)


def test_numbers_of_connections_that_are_in_use_are_not_used_again(rig: Rig) -> None:
    """Also after four billion connections."""
    rig.take(0)
    rig.room._next = NO_CLIENT - 1
    rig.take(0)
    rig.take(0)
    assert [*rig.room.known] == [1, NO_CLIENT - 1, 2]


def test_the_end_of_the_daemon(rig: Rig) -> None:
    """All controls are told.  One that ends is not replaced."""
    rig.listen()
    rig.take(USER)
    rig.room.send(Quit())
    assert all(channel.of(Quit) for channel in rig.channels)
    rig.room.close()
    assert rig.files == {}
    for channel in rig.channels:
        rig.lose(channel)
    started = len(rig.channels)
    for delay_s in (0, AGAIN_S, RESERVE_DELAY_S):
        rig.fire(delay_s)
    assert (len(rig.channels), rig.hopeless) == (started, [])


def test_a_user_does_not_wait_for_a_control_that_ends(rig: Rig) -> None:
    """They get another one, which stays when the first has ended.  One that hangs is given up, and counted."""
    rig.take(USER)
    first = rig.room.controls[USER]
    rig.room.on_client_gone(1, first.channel)
    rig.fire(IDLE_S)
    rig.take(USER)
    second = rig.room.controls[USER]
    assert second is not first
    rig.fire(END_S)
    assert (cast("Any", first.channel).closed, cast("Any", first.child).killed) == (True, True)
    assert rig.room.controls[USER] is second
    assert (rig.room._count_stuck(USER), rig.room._count_stuck(USER + 1)) == (1, 0)
    assert [*rig.room.known] == [2]


def test_a_control_that_ends_as_it_was_told(rig: Rig, capfd: pytest.CaptureFixture[str]) -> None:
    """That is no loss, unless it breaks the protocol."""
    for error in (None, PeerError("control", "is mad")):
        rig.take(USER)
        control = rig.room.controls[USER]
        (number,) = control.numbers
        rig.room.on_client_gone(number, control.channel)
        rig.fire(IDLE_S)
        rig.lose(cast("Any", control.channel), error)
        assert ("is mad" in capfd.readouterr().err) == bool(error)
        rig.fire(END_S)
        assert rig.room._count_stuck(USER) == 0


def test_a_lost_control_is_not_told_to_end_later(rig: Rig) -> None:
    """Its time without a client does not run any more."""
    rig.take(USER)
    control = rig.room.controls[USER]
    rig.room.on_client_gone(1, control.channel)
    assert rig.pending(IDLE_S) == 1
    rig.lose(cast("Any", control.channel))
    assert rig.pending(IDLE_S) == 0


def test_a_control_in_reserve_that_ends(rig: Rig) -> None:
    """Another one takes its place after a while.  While none can be started, users get theirs when they connect."""
    rig.fire(RESERVE_DELAY_S)
    rig.lose(rig.channels[1])
    assert rig.room.reserve is None
    rig.fire(RESERVE_DELAY_S)
    assert len(rig.channels) == 2
    rig.cannot_start = HostError("start control", errno.EAGAIN)
    rig.fire(AGAIN_S)
    assert rig.room.reserve is None
    rig.cannot_start = None
    rig.take(USER)
    assert len(rig.room.known) == 1


def test_root_s_control_that_cannot_be_started_again(rig: Rig, capfd: pytest.CaptureFixture[str]) -> None:
    """The next connection of root tries again."""
    rig.listen()
    rig.cannot_start = HostError("start control", errno.EAGAIN)
    rig.room.reserve = None
    rig.lose(cast("Any", rig.room.controls[0].channel))
    rig.fire(AGAIN_S)
    assert "no control for root: start control: Resource temporarily unavailable" in capfd.readouterr().err
    rig.cannot_start = None
    rig.take(0)
    assert 0 in rig.room.controls


def test_the_last_descriptor_is_not_kept_in_a_queue(rig: Rig) -> None:
    """A control that does not read would keep it.  Its user is told, and others are served."""
    rig.take(USER)
    channel = cast("Any", rig.room.controls[USER].channel)
    spare = rig.room._spare
    for waiting, none_left, told in ((1, False, 2), (0, True, 3), (1, True, 3)):
        channel.waiting = waiting
        rig.room._spare = module.NONE if none_left else spare
        rig.take(USER)
        assert len(channel.of(NewClient)) == told
    assert b"Too many open files" in rig.clients[-1].recv(1 << 16)
    rig.room._spare = spare


def test_controls_write_their_answers_at_the_end(rig: Rig) -> None:
    """Each of them is waited for."""
    flushed: list[float] = []
    rig.take(USER)
    for channel in rig.channels:
        cast("Any", channel).flush_blocking = flushed.append
    rig.room.flush_blocking(2.0)
    assert flushed == [2.0] * len(rig.channels)
