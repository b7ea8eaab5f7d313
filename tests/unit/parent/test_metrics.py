"""The parent's side of `metrics listen`: questions that are too frequent, and existing files at the socket's path."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support.descriptors import open_descriptors
from tests.unit.parent.timers import Timers
from vmd.config.model import Config, Globals, Listen, Owner, VmConfig
from vmd.errors import HostError, OperatorError, PeerError
from vmd.ipc.channel import Channel
from vmd.ipc.imsg import Envelope
from vmd.ipc.loop import Loop
from vmd.ipc.messages.children import Quit
from vmd.ipc.messages.clients import Caller
from vmd.ipc.messages.metrics import AllFigures, AskFigures, MetricsAt
from vmd.ipc.routes import Proc
from vmd.parent import metrics
from vmd.parent.core import Core
from vmd.parent.metrics import Metrics, listen


class Figures:
    """A room that counts the questions."""

    def __init__(self) -> None:
        self.asked = 0

    def of(self, vms: "list[object]", _caller: object) -> "list[object]":
        """Return no figures."""
        assert vms == []
        self.asked += 1
        return []


class Children:
    """Starts no process, and provides a channel."""

    def __init__(self) -> None:
        self.theirs: list[socket.socket] = []

    def start(self, proc: Proc, _open_log: object) -> tuple[None, socket.socket]:
        """Return our end of a channel."""
        assert proc is Proc.METRICS
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.theirs.append(theirs)
        return None, ours

    def kill(self, proc: Proc) -> None:
        """Do nothing, because there is no process."""


class Parent:
    """The part of the parent that the room needs.  The test is the process."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.figures = Figures()
        self.children = Children()
        self.room = Metrics(Core(self.loop, Config()), cast("Any", self.figures), self.attach)
        self.room.start(cast("Any", self.children), cast("Any", None))
        self.process: Channel | None = None
        self.heard: list[object] = []

    def attach(self, sock: socket.socket, peer: Proc, label: str, **more: Any) -> Channel:  # noqa: ANN401
        """Return the channel, and open its other end for the test."""
        theirs = self.children.theirs[-1]
        self.process = Channel(
            theirs, me=peer, peer=Proc.PARENT, label="parent", loop=self.loop, on_message=self.hear,
            on_lost=lambda _channel, _error: None,
        )  # fmt: skip
        return Channel(sock, me=Proc.PARENT, peer=peer, label=label, loop=self.loop, on_message=self.serve, **more)

    def serve(self, channel: Channel, envelope: Envelope) -> None:
        """Serve a message of the process."""
        assert isinstance(envelope.message, AskFigures)
        self.room.on_asked(envelope.message, channel)

    def hear(self, _channel: Channel, envelope: Envelope) -> None:
        """Record a message to the process."""
        self.heard.append(envelope.message)
        self.loop.stop()

    def next(self) -> object:
        """Return the next message to the process."""
        count = len(self.heard)
        while len(self.heard) == count:
            self.loop.run()
        return self.heard[count]


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[Parent]:
    """Yield a parent that serves a socket."""
    made = Parent()
    made.room.configure(Globals(metrics=(Listen(path=str(tmp_path / "sock")),), socket_owner=Owner()))
    assert made.next() == MetricsAt()
    yield made
    made.room.close()
    assert not (tmp_path / "sock").exists()
    if made.process is not None:
        made.process.close()
    made.loop.close()


def test_the_parent_is_not_kept_busy(parent: Parent, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that asks without end is answered at intervals.  Between them nothing is read from it."""
    monkeypatch.setattr(metrics, "REST_S", 3600.0)
    assert parent.process is not None
    for _ in range(20):
        parent.process.send(AskFigures())
    assert parent.next() == AllFigures()
    parent.loop.call_later(0.2, parent.loop.stop)
    parent.loop.run()

    assert (parent.figures.asked, parent.heard) == (1, [MetricsAt(), AllFigures()])


def test_an_existing_file_at_the_socket_s_path(tmp_path: Path) -> None:
    """A socket that no process serves is replaced.  Any other file is an error that names it."""
    path = tmp_path / "m"
    with listen(Listen(path=str(path)), Owner()) as first:
        with pytest.raises(OperatorError, match=f"another vmd is already serving {path}$") as refused:
            listen(Listen(path=str(path)), Owner())
        assert refused.value.number == errno.EADDRINUSE
        assert first.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_STREAM
    with listen(Listen(path=str(path)), Owner()):
        assert os.stat(path).st_mode & 0o777 == 0o660
    path.unlink()
    path.write_text("mine")
    with pytest.raises(OperatorError, match=f"socket {path}: "), contextlib.ExitStack():
        listen(Listen(path=str(path)), Owner())
    assert path.read_text() == "mine"


# --- sockets that cannot be opened, and a process that ends -----------------------------------------------------


PLACES = tuple(Listen(address="127.0.0.1", port=port) for port in (1, 2))


class Rig:
    """The room on a loop that does not run.  Sockets and processes are not real."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.timers = Timers()
        self.said: list[str] = []
        self.trouble: dict[Listen, OSError] = {}  # why a socket cannot be opened
        self.no_process: HostError | None = None
        self.channels: list[Rig.Channel] = []
        self.killed = 0
        self.rows: list[list[str]] = []  # names of the VMs whose figures were asked for together
        figures = SimpleNamespace(of=self.of)
        self.core = Core(cast("Any", self.timers), Config())
        self.room = Metrics(self.core, cast("Any", figures), self.attach)
        self.room.start(cast("Any", self), cast("Any", None))
        self.room._delay = cast("Any", SimpleNamespace(next_s=lambda: 7.0))
        monkeypatch.setattr(metrics, "listen", self.listen)
        for level in ("info", "warn", "error"):
            monkeypatch.setattr(f"vmd.parent.metrics.log.{level}", self.said.append)

    class Channel:
        """The channel to the process."""

        def __init__(self) -> None:
            self.sent: list[object] = []
            self.fds: list[int] = []  # the number of sockets in each message
            self.finished = False
            self.held: list[bool] = []

        def send(self, message: object, fds: dict[str, list[int]] | None = None) -> None:
            """Take a message."""
            self.sent.append(message)
            sockets = (fds or {}).get("sockets", [])
            self.fds.append(len(sockets))
            for fd in sockets:
                os.close(fd)

        def finish(self) -> None:
            """Be closed when all is sent."""
            self.finished = True

        def hold(self, *, held: bool) -> None:
            """Do not read."""
            self.held.append(held)

    def listen(self, place: Listen, _owner: Owner | None) -> socket.socket:
        """Replaces `listen`."""
        if place in self.trouble:
            raise self.trouble[place]
        return socket.socket()

    def start(self, _proc: Proc, _open_log: object) -> tuple[None, None]:
        """Replaces `Children.start`."""
        if self.no_process is not None:
            raise self.no_process
        return None, None

    def kill(self, proc: Proc) -> None:
        """Replaces `Children.kill`."""
        assert proc is Proc.METRICS
        self.killed += 1

    def attach(self, _sock: object, _proc: Proc, _label: str, **more: object) -> Any:  # noqa: ANN401
        """Replaces `Process.attach`."""
        assert (more["in_step"], more["batch"]) == (True, 1)
        self.on_lost = cast("Any", more["on_lost"])
        self.channels.append(Rig.Channel())
        return self.channels[-1]

    def of(self, vms: list[Any], caller: object) -> list[str]:
        """Return a figure for each VM."""
        assert caller == metrics.NOBODY
        self.rows.append([vm.name for vm in vms])
        return [f"figures of {vm.name}" for vm in vms]

    def configure(self, *places: Listen) -> None:
        """Read vm.conf."""
        self.room.configure(Globals(metrics=places))

    def delays(self) -> list[float]:
        """Return the delays of the timers that run."""
        return [delay_s for delay_s, timer in self.timers.timers if timer.callback is not None]

    def close(self) -> None:
        """Close all."""
        self.room.close()


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """Yield the room.  No descriptor is left."""
    before = open_descriptors()
    rig = Rig(monkeypatch)
    yield rig
    rig.close()
    assert open_descriptors() == before


def test_figures_are_for_everybody() -> None:
    """The process is asked by clients that nobody knows, so no user owns what they may see."""
    assert Caller(uid=0xFFFF_FFFE, gid=0xFFFF_FFFE, pid=0) == metrics.NOBODY


def test_a_process_serves_all_sockets(rig: Rig) -> None:
    """It is started with the first, is told of each change, and ends with the last."""
    rig.configure()
    assert rig.delays() == []
    rig.configure(*PLACES)
    rig.configure(*PLACES)
    assert rig.delays() == [7.0]
    rig.timers.fire(7.0)
    (channel,) = rig.channels
    assert (channel.sent, channel.fds) == ([MetricsAt()], [2])
    assert rig.said == [f"metrics are served at {place}" for place in PLACES]
    rig.configure(PLACES[1])
    assert channel.fds[1:] == [1]
    rig.configure()
    assert (channel.sent[2:], channel.finished) == ([Quit()], True)
    rig.on_lost(channel, None)
    assert (rig.delays(), rig.killed) == ([], 0)
    rig.configure(PLACES[0])
    rig.configure()
    rig.timers.fire(7.0)  # not needed any more
    assert len(rig.channels) == 1


@pytest.mark.parametrize(("number", "said_at"), [(errno.EADDRINUSE, metrics.QUIET + 1), (errno.EADDRNOTAVAIL, 1)])
def test_a_socket_that_cannot_be_opened(rig: Rig, number: int, said_at: int) -> None:
    """It is tried again and again, more and more seldom.  The log says so once.  The other socket is served."""
    rig.trouble = {PLACES[0]: OSError(number, "no")}
    rig.configure(*PLACES)
    rig.timers.fire(7.0)
    words = f"metrics listen {PLACES[0]}: no: trying again"
    delays = [*metrics.AGAIN_S, metrics.AGAIN_S[-1], metrics.AGAIN_S[-1]]
    for tries, delay_s in enumerate(delays, 1):
        assert rig.said.count(words) == (tries >= said_at)
        assert rig.delays() == [delay_s]
        rig.timers.fire(delay_s)
    assert set(rig.channels[0].fds) == {1}
    rig.trouble = {}
    rig.timers.fire(metrics.AGAIN_S[-1])
    assert (rig.channels[0].fds[-1], rig.delays()) == (2, [])


def test_the_soonest_try_counts(rig: Rig) -> None:
    """A socket that vm.conf names anew is not delayed by one that has failed for long."""
    rig.trouble = {place: OSError(errno.EADDRNOTAVAIL, "no") for place in PLACES}
    rig.configure(PLACES[0])
    for delay_s in metrics.AGAIN_S:
        rig.timers.fire(delay_s)
    rig.configure(*PLACES)
    assert rig.delays() == [metrics.AGAIN_S[0]]


def test_no_free_descriptor_for_the_process(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy is left, and the log says it."""
    rig.configure(*PLACES)
    rig.timers.fire(7.0)
    dup, copies = os.dup, [0]

    def second_fails(fd: int) -> int:
        copies[0] += 1
        if copies[0] == 2:
            raise OSError(errno.EMFILE, "Too many open files")
        return dup(fd)

    before = open_descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(os, "dup", second_fails)
        rig.configure(*PLACES)
    assert open_descriptors() == before
    assert rig.said[-1] == "metrics: cannot pass on its sockets: Too many open files"
    assert len(rig.channels[0].sent) == 1


@pytest.mark.parametrize("error", [None, PeerError("metrics", "is mad")])
def test_a_process_that_ends_is_started_again(rig: Rig, error: PeerError | None) -> None:
    """It is killed, in case it has only broken the protocol.  A start that fails is tried again."""
    rig.configure(PLACES[0])
    rig.timers.fire(7.0)
    rig.on_lost(rig.channels[0], error)
    assert rig.killed == 1
    assert rig.said[-1] == f"{error or 'lost child: metrics'}: it is started again"
    rig.no_process = HostError("fork", errno.EAGAIN)
    rig.timers.fire(7.0)
    assert rig.said[-1].startswith("metrics cannot be started: fork: ")
    rig.no_process = None
    rig.timers.fire(7.0)
    assert [channel.fds for channel in rig.channels] == [[1], [1]]
    rig.on_lost(rig.channels[0], None)  # late: the next one is not lost by that
    assert (rig.killed, rig.delays()) == (1, [])


def test_figures_are_sent_in_batches(rig: Rig) -> None:
    """Other messages are served between two of them.  A VM that has ended meanwhile is left out."""
    names = [f"n{number}" for number in range(2 * metrics.BATCH + 1)]
    for name in names:
        rig.core.vms.add(VmConfig(name=name), from_config=True)
    channel = Rig.Channel()
    rig.room.on_asked(AskFigures(), cast("Any", channel))
    assert rig.delays() == [0]
    rig.core.vms.remove(rig.core.vms.get(0, names[-1]))
    for batch in (1, 2):
        assert len(rig.rows) == batch
        assert AllFigures() not in channel.sent
        rig.timers.fire(0)
    assert rig.rows == [names[: metrics.BATCH], names[metrics.BATCH : -1], []]
    assert channel.sent == [*(f"figures of {name}" for name in names[:-1]), AllFigures()]
    assert channel.held == [True]
    rig.timers.fire(metrics.REST_S)
    assert channel.held == [True, False]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_socket_of_tcp(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """The next daemon can use the port at once.  A socket that cannot be used is closed."""
    made: list[Any] = []

    class Socket:
        """Notes what is done with a socket."""

        def __init__(self, family: int, kind: int) -> None:
            self.done: list[tuple[object, ...]] = [(family, kind)]
            made.append(self)

        def setsockopt(self, *words: int) -> None:
            """Set an option."""
            self.done.append(words)

        def bind(self, where: tuple[str, int]) -> None:
            """Bind it."""
            self.done.append(where)

        def listen(self, count: int) -> None:
            """Fail at the second socket."""
            self.done.append(("listen", count))
            if len(made) == 2:
                raise OSError(errno.EADDRINUSE, "in use")

        def close(self) -> None:
            """Close it."""
            self.done.append(("close",))

    monkeypatch.setattr(socket, "socket", Socket)
    place = Listen(address=address, port=9)
    listen(place, None)
    with pytest.raises(OSError, match="in use"):
        listen(place, None)

    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    steps = [
        (family, socket.SOCK_STREAM), (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1), (address, 9),
        ("listen", metrics.BACKLOG),
    ]  # fmt: skip
    assert [each.done for each in made] == [steps, [*steps, ("close",)]]
