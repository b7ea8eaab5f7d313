"""The line to vmm: when it is asked whether it is there, and what comes of no answer."""

from collections.abc import Callable
from typing import cast

import pytest

from vmd.ipc.channel import Channel
from vmd.ipc.loop import Loop
from vmd.ipc.messages.children import Ping
from vmd.ipc.messages.vmm import KvmFd
from vmd.parent.askvmm import LOOKS_MAX, SILENT, LineToVmm
from vmd.record import Record


class Vmm:
    """Stands in for the channel, the loop and its timers."""

    def __init__(self) -> None:
        self.closed = False
        self.told: list[Record] = []
        self.due: list[Callable[[], None]] = []
        self.silent = 0
        self.line = LineToVmm(cast("Loop", self), cast("Channel", self), self.on_silent)

    def send(self, message: Record, **_with: object) -> None:
        """Be the channel."""
        self.told.append(message)

    def call_later(self, _delay_s: float, callback: Callable[[], None]) -> "Vmm":
        """Be the loop."""
        self.due.append(callback)
        return self

    def cancel(self) -> None:
        """Be the timer."""
        self.due.pop()

    def on_silent(self) -> None:
        """Count."""
        self.silent += 1

    def pass_time(self, looks: int) -> None:
        """Have so many timers run off, each set by the one before it."""
        for _ in range(looks):
            (callback,) = self.due
            self.due.clear()
            callback()

    def asked(self) -> int:
        """Return how often it was asked."""
        return sum(isinstance(message, Ping) for message in self.told)


def test_one_question_for_all_that_was_sent() -> None:
    """A later message is asked about later, and once there is nothing to find out no timer runs."""
    vmm = Vmm()
    for _ in range(100):
        vmm.line.send(KvmFd())
    assert vmm.asked() == 1
    vmm.line.on_pong()
    vmm.pass_time(1)  # there were 99 behind it
    assert vmm.asked() == 2
    assert isinstance(vmm.told[-1], Ping)
    vmm.line.on_pong()
    assert vmm.due == []
    vmm.line.on_pong()  # which nobody has asked for
    assert vmm.due == []
    assert len(vmm.told) == 102


def test_silence_is_told_again_and_again_and_logged_once(capfd: pytest.CaptureFixture[str]) -> None:
    """Whoever has come meanwhile waits in vain, too; vmm itself gets no more questions than it has answered."""
    vmm = Vmm()
    vmm.line.send(KvmFd())
    vmm.pass_time(LOOKS_MAX - 1)
    assert vmm.silent == 0
    vmm.pass_time(3)
    vmm.line.send(KvmFd())
    assert vmm.silent == 3
    assert vmm.asked() == 1
    vmm.line.on_pong()
    assert vmm.silent == 3
    logged = capfd.readouterr().err
    assert (logged.count(SILENT), logged.count("vmm answers again")) == (1, 1)


def test_a_vmm_that_is_lost_is_not_silent() -> None:
    """Its end is told in another way."""
    vmm = Vmm()
    vmm.line.send(KvmFd())
    vmm.closed = True
    vmm.pass_time(1)
    assert vmm.due == []
    assert vmm.silent == 0
