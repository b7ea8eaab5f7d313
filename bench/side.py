"""One of two guests that do the same work in turn, on commands that they get on their serial lines."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from tests.support.console import Console
from vmd.kvmapi.system import System

DEADLINE_S = 120.0  # watchdog


class Side:
    """A running guest that takes commands, and the processes of its VM."""

    def __init__(self, console: Console, send: Callable[[bytes], object], pids: list[int]) -> None:
        self.console = console
        self.send = send
        self.pids = pids
        console.expect("ready", DEADLINE_S)

    def tell(self, line: str) -> tuple[str, float]:
        """Send the guest a command.  Return its answer and the processor time of the VM's processes, in seconds."""
        before_ns = self.cpu_ns()
        self.send(line.encode() + b"\n")
        said = self.console.expect("ready", DEADLINE_S)
        return said, (self.cpu_ns() - before_ns) / 1e9

    def cpu_ns(self) -> int:
        """Return the processor time of all threads.  It is from schedstat: utime and stime count whole ticks."""
        total = 0
        for pid in self.pids:
            for thread in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has just ended
                    total += int((thread / "schedstat").read_text().split()[0])
        return total


def tsc_hertz() -> float:
    """Return the frequency of the guests' time stamp counters, which is the same as the host's."""
    fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    with System(fd) as system, system.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        return vcpu.get_tsc_khz() * 1e3
