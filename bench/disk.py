"""Disks: a guest's throughput and the host's cost of a request, compared with QEMU's virtio-blk-pci.

The guest (`guests/blk`) is the same program on both sides, and takes commands on its serial line.  Both VMs run all the
time.  While one works, the other sleeps.  Each load runs twice.  In the first run the guest sleeps until an interrupt
comes, as real guests do.  In the second run it polls: the comparison is then free of the host's interrupt costs, but
the guest occupies a processor that could serve the disk.  The cost is measured in the first run: the processor time of
all processes of that side, including the guest's own.

The images are in memory if the host has room for them there.  They are written completely before the measurement, so
both sides find them equally cached.
"""

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from bench.qemu import PC, qemu
from bench.side import Side, tsc_hertz
from bench.table import Row, turns
from tests.support.console import Console
from tests.support.daemon import Daemon

SHARED_MEMORY = Path("/dev/shm")
PAGE, MIB = 1 << 12, 1 << 20
DISK_MIB = 256
FORMATS = ("raw", "qcow2")
ROUNDS = 11
RESULT = re.compile(r"done (\d+) requests in (\d+) cycles")


class Load(NamedTuple):
    """A load for the guest: its command, its name in the table and its goal."""

    what: str
    command: str
    bytes: int  # of one request
    depth: int  # number of outstanding requests
    requests: int
    goal: float  # ratio of the rates
    piece: int = 0  # contiguous bytes in guest memory; 0: all.  The pages of a page cache are scattered

    @property
    def line(self) -> str:
        """The command line for the guest."""
        piece = self.piece or self.bytes
        return f"{self.command} bytes={self.bytes} depth={self.depth} count={self.requests} piece={piece}"


SEQUENTIAL, RANDOM = 1.0, 0.7
LOADS = (
    Load("sequential read, 1 MiB", "read", MIB, 4, 300, SEQUENTIAL),
    Load("sequential write, 1 MiB", "write", MIB, 4, 300, SEQUENTIAL),
    Load("sequential read, 1 MiB in pages", "read", 254 * PAGE, 4, 300, SEQUENTIAL, PAGE),
    Load("random read, 4 KiB, depth 1", "randread", PAGE, 1, 2000, RANDOM),
    Load("random read, 4 KiB, depth 32", "randread", PAGE, 32, 10000, RANDOM),
    Load("random write, 4 KiB, depth 1", "randwrite", PAGE, 1, 2000, RANDOM),
    Load("random write, 4 KiB, depth 32", "randwrite", PAGE, 32, 10000, RANDOM),
)


class DiskSide(Side):
    """A running guest that accesses its disk on command."""

    def run(self, line: str) -> tuple[float, float]:
        """Send the guest a command.  Return TSC cycles and processor time in seconds, both per request."""
        said, spent_s = self.tell(line)
        found = RESULT.search(said)
        if found is None:
            raise RuntimeError(f"{line}: the guest said {said!r}")
        requests = int(found[1])
        return int(found[2]) / requests, spent_s / requests


def measure(directory: Path, guest: Callable[[str], Path]) -> list[Row]:
    """Compare vmd and QEMU with disks of each image format."""
    hertz = tsc_hertz()
    rows = []
    with roomy(directory) as place:
        for image_format in FORMATS:
            ours, theirs = make_images(place, image_format)
            with vmd_side(directory, guest("blk"), ours, image_format) as vmd, \
                    qemu_side(guest("blk"), theirs, image_format) as qemu:  # fmt: skip
                for load in LOADS:
                    rows += compare(load, image_format, vmd, qemu, hertz)
            ours.unlink()
            theirs.unlink()
    return rows


def compare(load: Load, image_format: str, vmd: DiskSide, qemu: DiskSide, hertz: float) -> list[Row]:
    """Run both sides in turn.  The round before the first counted one is a warm-up."""
    rates: dict[DiskSide, list[float]] = {vmd: [], qemu: []}
    polled: dict[DiskSide, list[float]] = {vmd: [], qemu: []}
    costs: dict[DiskSide, list[float]] = {vmd: [], qemu: []}
    large = load.bytes > PAGE
    scale = load.bytes / MIB if large else 1e-3
    for counted, side in turns((vmd, qemu), ROUNDS):
        cycles, seconds = side.run(load.line + " asleep")
        cycles_polled, _ = side.run(load.line)
        if counted:
            rates[side].append(hertz / cycles * scale)
            polled[side].append(hertz / cycles_polled * scale)
            costs[side].append(seconds * 1e6)
    what = f"{image_format}: {load.what}"
    unit = "MiB/s" if large else "1000/s"
    return [
        Row(what, unit, rates[vmd], rates[qemu], load.goal, larger_is_better=True),
        Row(f"{what}, polled", unit, polled[vmd], polled[qemu], load.goal, larger_is_better=True),
        Row(f"{what}, cpu", "us", costs[vmd], costs[qemu]),
    ]


@contextlib.contextmanager
def roomy(directory: Path) -> Iterator[Path]:
    """Yield a directory in memory if all images fit there, else `directory`."""
    needed = 4 * DISK_MIB * MIB
    with contextlib.ExitStack() as stack:
        place = directory
        if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 2 * needed:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmd-bench-", dir=SHARED_MEMORY)))
        yield place


def make_images(place: Path, image_format: str) -> tuple[Path, Path]:
    """Make two equal images without holes."""
    first, second = place / f"ours.{image_format}", place / f"theirs.{image_format}"
    flat = place / "flat"
    with flat.open("wb") as file:
        for _ in range(DISK_MIB):
            file.write(os.urandom(MIB))
    subprocess.run(["qemu-img", "convert", "-q", "-f", "raw", "-O", image_format, flat, first], check=True)
    flat.unlink()
    shutil.copyfile(first, second)
    return first, second


@contextlib.contextmanager
def vmd_side(directory: Path, kernel: Path, image: Path, image_format: str) -> Iterator[DiskSide]:
    """Run the guest under a new daemon."""
    boot, disk = f'boot "{kernel}" cmdline "bench"', f'disk "{image}" format {image_format}'
    conf = f'vm "disk" {{\n disable\n memory 64M\n {boot}\n {disk}\n}}\n'
    with Daemon(directory, conf) as vmd:
        vmd.must("start", "disk")
        with vmd.console("disk") as console:
            pids = [pid for title, pid in vmd.processes().items() if title.startswith("vmd: vm/disk")]
            yield DiskSide(console, lambda data: os.write(console.fd, data), pids)
        vmd.must("stop", "-fw", "disk")


@contextlib.contextmanager
def qemu_side(kernel: Path, image: Path, image_format: str) -> Iterator[DiskSide]:
    """Run the guest under QEMU."""
    devices = (
        "-drive", f"if=none,id=disk,format={image_format},cache=writeback,file={image}",
        "-device", "virtio-blk-pci,drive=disk",
    )  # fmt: skip
    with qemu(kernel, "bench", machine=PC, devices=devices) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield DiskSide(Console(process.stdout.fileno()), process.stdin.write, [process.pid])
