"""The questions to priv: which answers are outstanding, and how the last priv removes everything."""

import socket
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.unit.parent.timers import Timers
from vmd.ipc.imsg import MAX_MESSAGE, encode
from vmd.ipc.messages.children import Quit, Ready
from vmd.ipc.messages.priv import ConfigureNetwork, NetworkConfigured
from vmd.ipc.routes import Proc
from vmd.parent.askpriv import ANSWER_S, LAST_S, AskPriv, remove_all
from vmd.record import Record


class Rig:
    """The line, on a loop that does not run."""

    def __init__(self) -> None:
        self.timers = Timers()
        self.sent: list[tuple[Proc, Record, dict[str, list[int]]]] = []
        self.silent = 0
        peers = SimpleNamespace(send=self.send)
        self.line = AskPriv(cast("Any", SimpleNamespace(loop=self.timers, peers=peers)))
        self.line.on_silent = self.on_silent

    def send(self, peer: Proc, message: Record, *, fds: Any = None) -> None:  # noqa: ANN401 - a mapping of any kind
        """Take a message."""
        self.sent.append((peer, message, dict(fds or {})))

    def on_silent(self) -> None:
        """Count the reports of silence."""
        self.silent += 1

    def watching(self) -> int:
        """Return how many timers run."""
        return sum(timer.callback is not None for _, timer in self.timers.timers)


def test_an_answer_is_expected_while_some_are_outstanding() -> None:
    """One timer runs.  Each answer restarts it; after the last one, and after one that nobody waits for, none runs."""
    rig = Rig()
    message = ConfigureNetwork(nat=True)
    rig.line.send(message)
    assert (rig.line.outstanding, rig.watching()) == (0, 0)
    rig.line.ask(message)
    rig.line.ask(message, fds={"taps": [3]})
    assert rig.sent == [(Proc.PRIV, message, {})] * 2 + [(Proc.PRIV, message, {"taps": [3]})]
    assert [(delay_s, rig.watching()) for delay_s, _ in rig.timers.timers] == [(ANSWER_S, 1)]
    for answers, outstanding, watching in ((1, 1, 1), (2, 0, 0), (3, 0, 0)):
        rig.line.answered()
        assert (rig.line.answers, rig.line.outstanding, rig.watching()) == (answers, outstanding, watching)
    rig.timers.fire(ANSWER_S)
    assert rig.silent == 0


def test_a_priv_that_is_silent() -> None:
    """It is reported once for each question after that."""
    rig = Rig()
    for silent in (1, 2):
        rig.line.ask(ConfigureNetwork(nat=True))
        rig.timers.fire(ANSWER_S)
        assert (rig.silent, rig.watching()) == (silent, 0)


def test_a_priv_that_has_ended_owes_no_answer() -> None:
    """Nothing is asked until another one is up."""
    rig = Rig()
    rig.line.up = True
    rig.line.ask(ConfigureNetwork(nat=True))
    rig.line.lost()

    assert (rig.line.up, rig.line.outstanding, rig.watching()) == (False, 0, 0)


def test_the_last_priv_removes_everything() -> None:
    """It is told when it is ready, and ends when it has answered.  It is not waited for without end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        for message in (Ready(), NetworkConfigured()):
            theirs.send(encode(message)[0])
        remove_all(ours)
        expected = [encode(ConfigureNetwork(nat=False))[0], encode(Quit())[0]]
        assert [theirs.recv(MAX_MESSAGE) for _ in expected] == expected
        assert ours.gettimeout() == LAST_S
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):
            ours.recv(1)
