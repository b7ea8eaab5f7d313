"""A process of the daemon that runs inside the test, on a loop that the test turns.  The test plays its peers."""

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
from vmd.ipc.messages.children import Ping, Pong, Quit
from vmd.ipc.routes import Proc
from vmd.record import Record

DEADLINE_S = 60.0


class Serves(Protocol):
    """A process of the daemon, with a channel to its parent."""

    loop: Loop
    parent: Channel
    exit_status: int


P = TypeVar("P", bound=Serves)


class End:
    """One end of a channel, on the test's side."""

    def __init__(self, loop: Loop, sock: socket.socket, me: Proc, peer: Proc) -> None:
        self.got: list[Envelope] = []  # received messages; the test owns their descriptors
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
        """Send a message.  Its descriptors are closed."""
        self.channel.send(message, peerid=peerid, fds=fds)

    def take(self) -> list[Record]:
        """Return the messages since the last call, without Pong, and close their descriptors."""
        got, self.got = self.got, []
        for envelope in got:
            for fd in envelope.untaken():
                os.close(fd)
        return [envelope.message for envelope in got if not isinstance(envelope.message, Pong)]

    def close(self) -> None:
        """Close the channel."""
        self.take()
        self.channel.close()


class InProcess(Generic[P]):
    """Runs a process of the daemon.  `parent` is its parent's end of the channel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, make: Callable[[], P], me: Proc) -> None:
        ours, theirs = socketpair()
        monkeypatch.setattr(processes, "CHANNEL_FD", theirs.detach())
        self.monotonic = time.monotonic
        self.now_s = time.monotonic()
        monkeypatch.setattr(time, "monotonic", self.clock)
        self.process = make()
        self.loop = self.process.loop
        self.unexpected: list[str] = []  # errors that the fence has caught; a test that causes errors removes them
        assert self.loop.fence is not None
        self.report = self.loop.fence.report
        monkeypatch.setattr(self.loop.fence, "report", self.note_error)
        self.parent = End(self.loop, ours, Proc.PARENT, me)
        self.ends = [self.parent]

    def clock(self) -> float:
        """The clock of the process.  Each call advances it by a nanosecond, so that timers stay in order."""
        self.now_s += 1e-9
        return self.now_s

    def note_error(self, doing: str, error: Exception) -> None:
        """Replaces `Fence.report`."""
        self.unexpected.append(f"{doing}: {error!r}")
        self.report(doing, error)

    def peer(self, sock: socket.socket, me: Proc, peer: Proc) -> End:
        """Return the test's end of a channel to another peer."""
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
        """Turn the loop `rounds` times, for processes without Ping.  The first round handles all earlier messages."""
        for _ in range(rounds):
            self.loop.call_later(0, self._stop_soon)
            self.loop.run()

    def _stop_soon(self) -> None:
        """Stop the loop when the next round begins, so that this round handles everything that is ready."""
        self.loop.call_later(0, self.loop.stop)

    def settle(self) -> None:
        """Turn the loop until all earlier messages are handled, and their consequences have arrived."""
        for _ in range(2):
            pongs = self.pongs() + 1
            self.parent.send(Ping())
            self.until(lambda: self.pongs() >= pongs)  # noqa: B023 - it is called here

    def pongs(self) -> int:
        """Return how many answers to Ping have come."""
        return sum(isinstance(envelope.message, Pong) for envelope in self.parent.got)

    def pass_time(self, seconds: float) -> None:
        """Handle all earlier messages, advance the clock, and run the timers that are due."""
        self.settle()
        self.now_s += seconds
        self.settle()

    def run_to_end(self) -> None:
        """Turn the loop until the process stops it."""
        self.loop.run()

    def end_by_parent(self, how: str) -> int:
        """Have the parent send Quit (`quit`), go (`gone`) or send `garbage`.  Return the status of the process."""
        if how == "quit":
            self.parent.send(Quit())
        elif how == "gone":
            self.parent.channel.close()
        else:
            self.parent.channel._sock.send(b"x")
        self.run_to_end()
        return self.process.exit_status

    def close(self) -> None:
        """Close everything.  Raises AssertionError if there were unexpected errors."""
        for end in self.ends[1:]:
            end.close()
        self.turn()
        self.parent.close()
        self.process.parent.close()
        self.loop.close()
        assert self.unexpected == []
