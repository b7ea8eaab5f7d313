"""The operator's terminal: its signal handlers are taken only for the time of a console."""

import os
import signal
import termios
from collections.abc import Iterator

import pytest

from vmctl.terminal import ENDING, RawTerminal

SIGNALS = (*ENDING, signal.SIGTSTP)


@pytest.fixture
def slave() -> Iterator[int]:
    """A terminal."""
    master, slave = os.openpty()
    yield slave
    os.close(slave)
    os.close(master)


def handlers() -> list[object]:
    """Return the present handlers."""
    return [signal.getsignal(signum) for signum in SIGNALS]


def test_handlers_are_given_back(slave: int) -> None:
    """At the end, the signals have their former effect."""
    before = handlers()
    with RawTerminal(slave):
        assert not set(handlers()) & set(before)

    assert handlers() == before


def test_a_terminal_that_cannot_be_made_raw(slave: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has hung up, perhaps.  The handlers are given back here, too."""
    before = handlers()

    def fail(_fd: int, _when: int) -> None:
        raise termios.error

    monkeypatch.setattr("vmctl.terminal.tty.setraw", fail)
    with pytest.raises(termios.error), RawTerminal(slave):
        pass
    assert handlers() == before
