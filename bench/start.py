"""The time from the command to the guest's first byte: `vmctl start -c` against `qemu-system-x86_64 -M microvm`.

It is measured on an idle host, and with one busy loop per processor.  It is measured for a VM without devices, and for
a VM with a disk and an interface.  The time from the start of a daemon until many configured VMs run is measured too.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.memory import VMS, configuration, make_images
from bench.program import VMCTL
from bench.qemu import qemu
from bench.table import Row, turns
from tests.support.daemon import Daemon
from tests.support.hostnet import NetDaemon
from tests.support.network import Network

ROUNDS = 15
FIRST_BYTE = b"!"
QUIET, BUSY = 0.7, 0.9  # goals
IMAGE_BYTES = 16 << 20
MANY_S = 12.0
POLL_S = 0.05
DEADLINE_S = 300.0


def measure(directory: Path, guest: Callable[[str], Path]) -> list[Row]:
    """Compare starts of single VMs.  Then measure the start of many VMs."""
    kernel = guest("hello")
    images = [directory / name for name in ("ours", "theirs")]
    for image in images:
        with image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
    conf = "".join(
        f'vm "{name}" {{\n disable\n memory 64M\n boot "{kernel}"\n{more}}}\n'
        for name, more in (("plain", ""), ("usual", f' disk "{images[0]}"\n interface\n'))
    )
    devices = (
        "-drive", f"id=disk,file={images[1]},format=raw,if=none", "-device", "virtio-blk-device,drive=disk",
        "-netdev", "tap,id=net,ifname=qemu0,script=no,downscript=no,vhost=off",
        "-device", "virtio-net-device,netdev=net",
    )  # fmt: skip
    rows = []
    with Network() as network, NetDaemon(directory, network, conf) as vmd:
        for name, what, others in (("plain", "", ()), ("usual", ", disk and interface", devices)):
            for goal, load, busy in ((QUIET, "", contextlib.nullcontext), (BUSY, ", busy host", busy_host)):
                with busy():
                    times = compare(vmd, name, kernel, network, others)
                rows.append(Row(f"start to first byte{what}{load}", "ms", *times, goal=goal))
    return [*rows, many(directory, guest("tick"))]


def compare(
    vmd: Daemon, name: str, kernel: Path, network: Network, devices: tuple[str, ...]
) -> tuple[list[float], list[float]]:
    """Return the milliseconds of both sides.  The daemon runs already, as on a real host."""
    ours: list[float] = []
    theirs: list[float] = []
    for counted, times in turns((ours, theirs), ROUNDS):
        took_ms = start_under_vmd(vmd, name) if times is ours else start_under_qemu(kernel, network, devices)
        if counted:
            times.append(took_ms)
    return ours, theirs


@contextlib.contextmanager
def busy_host() -> Iterator[None]:
    """Run one busy loop per processor."""
    with contextlib.ExitStack() as stack:
        for _ in os.sched_getaffinity(0):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(process.kill)
        yield


def start_under_vmd(vmd: Daemon, name: str) -> float:
    """Return the milliseconds until `vmctl start -c` shows the byte."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [*VMCTL, "-s", vmd.socket, "start", "-c", name],
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
    vmd.must("stop", "-fw", name)
    return took_ms


def start_under_qemu(kernel: Path, network: Network, devices: tuple[str, ...]) -> float:
    """Return the milliseconds until QEMU's output has the byte."""
    with network.inside():
        began = time.perf_counter()
        with qemu(kernel, devices=devices) as process:
            assert process.stdout is not None
            wait_for_byte(process.stdout.fileno())
            return (time.perf_counter() - began) * 1e3


def wait_for_byte(fd: int) -> None:
    """Read until the guest's byte arrives.  Messages of vmctl itself do not contain this byte."""
    while data := os.read(fd, 4096):
        if FIRST_BYTE in data:
            return
    raise RuntimeError("the console ended before the guest said anything")


def many(directory: Path, kernel: Path) -> Row:
    """Return how long it takes from the start of a daemon until all its VMs run, each with a disk and an interface."""
    place = directory / "many"
    place.mkdir()
    conf = f"staggered start parallel {VMS} delay 1\n" + configuration(kernel, make_images(place))
    began = time.monotonic()
    with Network() as network, NetDaemon(place, network, conf) as vmd:
        while sum(row["state"] == "running" for row in vmd.rows()) < VMS:
            if time.monotonic() - began > DEADLINE_S:
                raise RuntimeError(f"some of {VMS} VMs do not run")
            time.sleep(POLL_S)
        took_s = time.monotonic() - began
        vmd.must("stop", "-afw", timeout_s=DEADLINE_S)
    return Row(f"{VMS} VMs, from the start of the daemon", "s", [took_s], limit=MANY_S)
