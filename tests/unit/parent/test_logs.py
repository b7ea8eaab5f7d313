"""Warnings of the parent about logs that end (docs/security.md)."""

import socket
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from vmd.config.model import Config, VmConfig
from vmd.ipc.imsg import Envelope
from vmd.ipc.messages.vmm import VmLog
from vmd.parent.core import Core
from vmd.parent.logs import SHUT_S, Logs
from vmd.parent.vm import Vm

SHUT = "vm a: one of its processes has shut down its log: nothing is logged till its next start"


class Loop:
    """The test calls the callbacks of files and timers."""

    def __init__(self) -> None:
        self.files: dict[int, Callable[[int], object]] = {}
        self.timers: list[tuple[float, Callable[[], object]]] = []

    def add(self, fd: int, on_ready: Callable[[int], object], _events: int = 0) -> None:
        """Add a file."""
        self.files[fd] = on_ready

    def remove(self, fd: int) -> None:
        """Remove a file."""
        del self.files[fd]

    def call_later(self, delay_s: float, call: Callable[[], object]) -> None:
        """Start a timer."""
        self.timers.append((delay_s, call))


class Rig:
    """A VM whose process has a log that ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loop = Loop()
        self.core = Core(cast("Any", self.loop), Config())
        self.logs = Logs(self.core, cast("Any", None))
        self.vm: Vm = self.core.vms.add(VmConfig(name="a"), from_config=True)
        self.said: list[str] = []
        monkeypatch.setattr("vmd.parent.logs.log.warn", self.said.append)
        self.vm.begin_start(0)
        ours, theirs = socket.socketpair()
        theirs.close()
        message = VmLog(vmid=self.vm.vmid)
        self.logs.on_vm_log(message, Envelope(message, 0, 0, {"log": [ours.detach()]}))
        self.vm.begin_run(4711)

    def hang_up(self) -> None:
        """Report the end of the log."""
        (on_ready,) = self.loop.files.values()
        on_ready(0)

    def look(self) -> list[str]:
        """Run the timer; return the warnings."""
        ((delay_s, look),) = self.loop.timers
        assert delay_s == SHUT_S
        look()
        return self.said


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """Yield a rig."""
    made = Rig(monkeypatch)
    yield made
    for source in made.logs._ended:  # kept for the next process "log", which never comes
        source.sock.close()


def test_a_running_vm_without_its_log_is_named(rig: Rig) -> None:
    """One of its processes has shut down the log."""
    rig.hang_up()

    assert rig.look() == [SHUT]


def test_a_vm_that_has_ended_is_not_named(rig: Rig) -> None:
    """Its log has ended with it."""
    rig.hang_up()
    rig.vm.ended("stopped")

    assert rig.look() == []


def test_a_vm_that_is_slow_to_start_again_is_not_named(rig: Rig) -> None:
    """Its files are still being opened.  The log that ended belongs to its last run."""
    rig.hang_up()
    rig.vm.ended("stopped")
    rig.vm.begin_start(0)

    assert rig.look() == []
