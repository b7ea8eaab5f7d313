"""The line to vmm: when the parent sends a Ping, and what happens if there is no answer."""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import pytest

from vmd.ipc.channel import Channel
from vmd.ipc.imsg import NO_FDS
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

    def send(self, message: Record, *, peerid: int = 0, fds: Mapping[str, Sequence[int]] = NO_FDS) -> None:
        """Record a message, as the channel."""
        assert (peerid, fds) == (0, {})
        self.told.append(message)

    def call_later(self, _delay_s: float, callback: Callable[[], None]) -> "Vmm":
        """Start a timer, as the loop."""
        self.due.append(callback)
        return self

    def cancel(self) -> None:
        """Cancel the timer, as the timer."""
        self.due.pop()

    def on_silent(self) -> None:
        """Count the reports of silence."""
        self.silent += 1

    def pass_time(self, looks: int) -> None:
        """Let a number of timers expire, each of which starts the next."""
        for _ in range(looks):
            (callback,) = self.due
            self.due.clear()
            callback()

    def asked(self) -> int:
        """Return the number of Pings."""
        return sum(isinstance(message, Ping) for message in self.told)


def test_one_ping_for_many_messages() -> None:
    """Messages after the Ping get a later Ping.  When all are answered, no timer runs."""
    vmm = Vmm()
    for _ in range(100):
        vmm.line.send(KvmFd())
    assert vmm.asked() == 1
    vmm.line.on_pong()
    vmm.pass_time(1)  # 99 messages were sent after the Ping
    assert vmm.asked() == 2
    assert isinstance(vmm.told[-1], Ping)
    vmm.line.on_pong()
    assert vmm.due == []
    vmm.line.on_pong()  # a pong without a Ping
    assert vmm.due == []
    assert len(vmm.told) == 102


def test_silence_is_reported_at_each_check_and_logged_once(capfd: pytest.CaptureFixture[str]) -> None:
    """Clients that came later would also wait in vain.  vmm gets no second Ping before its answer."""
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


@pytest.mark.parametrize(("looks", "silent"), [(LOOKS_MAX - 1, 0), (LOOKS_MAX, 1)])
def test_a_late_answer(capfd: pytest.CaptureFixture[str], looks: int, silent: int) -> None:
    """The log says that vmm answers again if it has said that it does not.  The next Ping gets as much time."""
    vmm = Vmm()
    for _ in range(2):
        vmm.silent = 0
        vmm.line.send(KvmFd())
        vmm.pass_time(looks)
        vmm.line.on_pong()
        said = capfd.readouterr().err
        assert (vmm.silent, said.count(SILENT), said.count("vmm answers again")) == (silent, silent, silent)


def test_a_vmm_that_is_lost_is_not_silent() -> None:
    """The end of vmm is reported in another way."""
    vmm = Vmm()
    vmm.line.send(KvmFd())
    vmm.closed = True
    vmm.pass_time(1)
    assert vmm.due == []
    assert vmm.silent == 0
