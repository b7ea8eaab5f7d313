"""One of two guests that do the same work in turn, as they are told on their serial lines."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from tests.support.console import Console
from vmd.kvmapi.system import System

DEADLINE_S = 120.0  # a watchdog


class Side:
    """A running guest that takes commands, and the processes that are its VM."""

    def __init__(self, console: Console, send: Callable[[bytes], object], pids: list[int]) -> None:
        self.console = console
        self.send = send
        self.pids = pids
        console.expect("ready", DEADLINE_S)

    def tell(self, line: str) -> tuple[str, float]:
        """Have the guest do something; return what it says, and all processor time meanwhile in seconds."""
        before_ns = self.cpu_ns()
        self.send(line.encode() + b"\n")
        said = self.console.expect("ready", DEADLINE_S)
        return said, (self.cpu_ns() - before_ns) / 1e9

    def cpu_ns(self) -> int:
        """Return how long all threads have run; utime and stime count in ticks, too coarse for this."""
        total = 0
        for pid in self.pids:
            for thread in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # one that has just ended
                    total += int((thread / "schedstat").read_text().split()[0])
        return total


def tsc_hertz() -> float:
    """Return the frequency of a guest's time stamp counter, which is the host's."""
    fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    with System(fd) as system, system.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        return vcpu.get_tsc_khz() * 1e3
