"""The parent's side of `metrics listen`: questions that are too frequent, and existing files at the socket's path."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from vmd.config.model import Config, Globals, Listen, Owner
from vmd.errors import OperatorError
from vmd.ipc.channel import Channel
from vmd.ipc.imsg import Envelope
from vmd.ipc.loop import Loop
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
