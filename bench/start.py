"""From the command to the first byte of the guest: `vmctl start -c` against `qemu-system-x86_64 -M microvm`."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from bench.program import VMCTL
from bench.qemu import qemu
from bench.table import Row
from tests.support.daemon import Daemon

ROUNDS = 15
FIRST_BYTE = b"!"


def measure(directory: Path, guest: Callable[[str], Path]) -> list[Row]:
    """Alternate both sides; the daemon runs before, as it does on a host."""
    kernel = guest("hello")
    ours, theirs = [], []
    conf = f'vm "hello" {{\n disable\n memory 64M\n boot "{kernel}"\n}}\n'
    with Daemon(directory, conf) as vmd:
        for _ in range(ROUNDS):
            ours.append(start_under_vmd(vmd))
            theirs.append(start_under_qemu(kernel))
    return [Row("start, command to first guest byte", "ms", ours, theirs, goal=1.0)]


def start_under_vmd(vmd: Daemon) -> float:
    """Return the milliseconds until `vmctl start -c` shows the byte."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [*VMCTL, "-s", vmd.socket, "start", "-c", "hello"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    wait_for_byte(process.stdout.fileno())
    took_ms = (time.perf_counter() - began) * 1e3
    process.stdin.write(b"\r~.")
    process.stdin.close()
    process.stdout.close()
    process.wait()
    vmd.must("stop", "-fw", "hello")
    return took_ms


def start_under_qemu(kernel: Path) -> float:
    """Return the milliseconds until QEMU's output has the byte."""
    began = time.perf_counter()
    with qemu(kernel) as process:
        assert process.stdout is not None
        wait_for_byte(process.stdout.fileno())
        return (time.perf_counter() - began) * 1e3


def wait_for_byte(fd: int) -> None:
    """Read until the guest's byte has come; a line of vmctl's own has none."""
    while data := os.read(fd, 4096):
        if FIRST_BYTE in data:
            return
    raise RuntimeError("the console ended before the guest said anything")
