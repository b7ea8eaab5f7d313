"""The cost of a byte on the serial line.  The guest writes as fast as it can, with or without polling the line status.

The guest itself measures the time with its time stamp counter, so the speed of the reader does not matter.
"""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from bench.program import VMCTL
from bench.qemu import qemu
from bench.table import Row
from tests.support.daemon import Daemon

ROUNDS = 10
KIB = 64
RESULT = re.compile(rb"(\d+) cycles per byte")


def measure(directory: Path, guest: Callable[[str], Path]) -> list[Row]:
    """Measure both ways of writing, with vmd and QEMU in turn."""
    kernel = guest("serial")
    rows = []
    for what, options in (("polled", f"kib={KIB}"), ("not polled", f"kib={KIB} nopoll")):
        conf = f'vm "serial" {{\n disable\n memory 64M\n boot "{kernel}" cmdline "{options}"\n}}\n'
        ours, theirs = [], []
        with Daemon(directory, conf) as vmd:
            for _ in range(ROUNDS):
                ours.append(under_vmd(vmd))
                with qemu(kernel, options) as process:
                    assert process.stdout is not None
                    theirs.append(cycles_per_byte(process.stdout.fileno()))
        rows.append(Row(f"serial output, {what}", "cycles", ours, theirs, goal=1.0))
    return rows


def under_vmd(vmd: Daemon) -> float:
    """Run the guest under vmd with its console attached.  Return the cycles per byte."""
    process = subprocess.Popen(
        [*VMCTL, "-s", vmd.socket, "start", "-c", "serial"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        cycles = cycles_per_byte(process.stdout.fileno())
        assert process.stdin is not None
        process.stdin.close()
        process.stdout.read()
    vmd.wait_state("serial", "stopped")
    return cycles


def cycles_per_byte(fd: int) -> float:
    """Read the guest's output up to its result, and return the result."""
    seen = b""
    while data := os.read(fd, 65536):
        seen = seen[-200:] + data
        found = RESULT.search(seen)
        if found:
            return float(found[1])
    raise RuntimeError(f"the guest ended too early: {seen[-200:]!r}")
