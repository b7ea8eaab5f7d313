"""What one byte on the serial line costs: a guest that writes as fast as it can, polling the line status or not."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from bench.qemu import qemu
from bench.table import Row
from tests.support.daemon import Daemon

ROUNDS = 10
KIB = 32
BEGIN, END = b"serial: begin", b"serial: end"


def measure(directory: Path, guest: Callable[[str], Path]) -> list[Row]:
    """Measure both ways of writing, alternating sides."""
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
                    theirs.append(microseconds_per_byte(process.stdout.fileno()))
        rows.append(Row(f"serial output, {what}", "us/byte", ours, theirs, goal=1.0))
    return rows


def under_vmd(vmd: Daemon) -> float:
    """Start the guest and read its pty."""
    vmd.must("start", "serial")
    with vmd.console("serial") as console:
        took = microseconds_per_byte(console.fd)
    vmd.must("stop", "-fw", "serial") if vmd.status("serial")["pid"] else None
    return took


def microseconds_per_byte(fd: int) -> float:
    """Return the time between the guest's two lines, per byte between them."""
    seen = b""
    began = 0.0
    while data := os.read(fd, 65536):
        seen += data
        if not began and BEGIN in seen:
            began = time.perf_counter()
        if END in seen:
            return (time.perf_counter() - began) / (KIB * 1024) * 1e6
    raise RuntimeError(f"the guest ended too early: {seen[-200:]!r}")
