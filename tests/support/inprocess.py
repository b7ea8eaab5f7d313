"""A process of the daemon that runs here, on a loop that is turned by hand; the test is its parent and its peers."""

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import pytest

from vmd.errors import PeerError
from vmd.ipc import process as processes
from vmd.ipc.channel import Channel, socketpair
from vmd.ipc.imsg import NO_FDS, Envelope
from vmd.ipc.loop import Loop
from vmd.ipc.messages.children import Ping, Pong
from vmd.ipc.routes import Proc
from vmd.record import Record

DEADLINE_S = 60.0


class Serves(Protocol):
    """A process that has a parent."""

    loop: Loop
    parent: Channel
    exit_status: int


P = TypeVar("P", bound=Serves)


class End:
    """One end of a channel, on the test's side."""

    def __init__(self, loop: Loop, sock: socket.socket, me: Proc, peer: Proc) -> None:
        self.got: list[Envelope] = []  # what has come, with descriptors that are the test's
        self.lost = False
        self.error: PeerError | None = None
        self.channel = Channel(
            sock, me=me, peer=peer, label=peer.name.lower(), loop=loop,
            on_message=self._on_message, on_lost=self._on_lost,
        )  # fmt: skip

    def _on_message(self, _channel: Channel, envelope: Envelope) -> None:
        self.got.append(Envelope(envelope.message, envelope.peerid, envelope.pid, envelope.fds))
        envelope.fds = {}

    def _on_lost(self, _channel: Channel, error: PeerError | None) -> None:
        self.lost, self.error = True, error

    def send(self, message: Record, *, peerid: int = 0, fds: Mapping[str, Sequence[int]] = NO_FDS) -> None:
        """Send a message; descriptors are gone then."""
        self.channel.send(message, peerid=peerid, fds=fds)

    def take(self) -> list[Record]:
        """Return the messages that have come since the last call, but for Pong; descriptors with them are closed."""
        got, self.got = self.got, []
        for envelope in got:
            for fd in envelope.untaken():
                os.close(fd)
        return [envelope.message for envelope in got if not isinstance(envelope.message, Pong)]

    def close(self) -> None:
        """Be gone."""
        self.take()
        self.channel.close()


class InProcess(Generic[P]):
    """Has a process: `parent` is where its parent would be."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, make: Callable[[], P], me: Proc) -> None:
        ours, theirs = socketpair()
        monkeypatch.setattr(processes, "CHANNEL_FD", theirs.detach())
        self.monotonic = time.monotonic
        self.now_s = time.monotonic()
        monkeypatch.setattr(time, "monotonic", self.clock)
        self.process = make()
        self.loop = self.process.loop
        self.unexpected: list[str] = []  # errors that the fence has caught; a test that causes some removes them
        assert self.loop.fence is not None
        self.report = self.loop.fence.report
        monkeypatch.setattr(self.loop.fence, "report", self.note_error)
        self.parent = End(self.loop, ours, Proc.PARENT, me)
        self.ends = [self.parent]

    def clock(self) -> float:
        """Be the clock of the process.  Each call takes a nanosecond, so that timers stay in order."""
        self.now_s += 1e-9
        return self.now_s

    def note_error(self, doing: str, error: Exception) -> None:
        """Be `Fence.report`."""
        self.unexpected.append(f"{doing}: {error!r}")
        self.report(doing, error)

    def peer(self, sock: socket.socket, me: Proc, peer: Proc) -> End:
        """Be another peer, at the other end of its channel."""
        self.ends.append(End(self.loop, sock, me, peer))
        return self.ends[-1]

    def until(self, condition: Callable[[], bool]) -> None:
        """Turn the loop until a condition holds."""
        deadline_s = self.monotonic() + DEADLINE_S

        def look() -> None:
            if condition() or self.monotonic() > deadline_s:
                self.loop.stop()
            else:
                self.loop.call_later(0, look)

        self.loop.call_later(0, look)
        self.loop.run()
        assert condition(), "the process has ended its loop, or it takes too long"

    def turn(self, rounds: int = 8) -> None:
        """Turn the loop so often, where no Ping is answered: what was sent before is served in the first round."""
        for _ in range(rounds):
            self.loop.call_later(0, self._stop_soon)
            self.loop.run()

    def _stop_soon(self) -> None:
        """Stop when the next round begins: whatever is ready in this one is served."""
        self.loop.call_later(0, self.loop.stop)

    def settle(self) -> None:
        """Turn the loop until all that was sent so far is served, and what follows from that has come."""
        for _ in range(2):
            pongs = self.pongs() + 1
            self.parent.send(Ping())
            self.until(lambda: self.pongs() >= pongs)  # noqa: B023 - it is called here

    def pongs(self) -> int:
        """Return how many answers to Ping have come."""
        return sum(isinstance(envelope.message, Pong) for envelope in self.parent.got)

    def pass_time(self, seconds: float) -> None:
        """Have so much time gone by after what was sent so far is served, and what is due then done."""
        self.settle()
        self.now_s += seconds
        self.settle()

    def run_to_end(self) -> None:
        """Turn the loop until the process ends it."""
        self.loop.run()

    def close(self) -> None:
        """Let go of everything."""
        for end in self.ends[1:]:
            end.close()
        self.turn()
        self.parent.close()
        self.process.parent.close()
        self.loop.close()
        assert self.unexpected == []
