"""Networks: throughput, latency and the host's cost of a frame, compared with QEMU's virtio-net-pci.

The guest (`guests/net`) is the same program on both sides, and takes commands on its serial line.  Its peer on the host
(`peer.c`) is the same program, too.  Each side has its own tap, in a network namespace made for the benchmark.  The
frames that the guest sends are counted at the tap, and go no further.  The frames that the guest receives come from the
peer, as fast as the tap's queue accepts them.  Large frames are TCP segments of 64 KiB, which both sides pass on whole.

Both VMs run all the time.  While one works, the other sleeps.  The threads that run a guest have one processor of the
host for themselves, and all other threads of the VM have the other processors.  Without this the scheduler would put
both on one processor in some runs and not in others, which halves or doubles the throughput of either side.  No two
pieces of a large frame are adjacent in memory, as with data of real programs and files.

Each load runs twice.  In the first run the guest sleeps until an interrupt comes, as real guests do.  In the second run
it polls: the comparison is then free of the host's interrupt costs, but the guest occupies a processor that could serve
the interface.  So the peer has to share the other processors with the VM's other threads then.  The scheduler would put
it beside the guest in some runs, which doubles the latency of either side.  The cost is measured in the first run: the
processor time of all processes of that side, including the guest's own, without the peer.
"""

import contextlib
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from bench.qemu import PC, qemu
from bench.side import DEADLINE_S, Side, tsc_hertz
from bench.table import Row, turns
from tests.support.console import Console
from tests.support.hostnet import NetDaemon
from tests.support.network import Interface, Network

PEER = Path(__file__).with_name("peer.c")
ROUNDS = 11
PASS_S = 0.3  # duration of one load
PASSED = re.compile(r"done (\d+) sent (\d+) received 0 wrong in (\d+) cycles")
TIMED = re.compile(r"done \d+ median (\d+) high (\d+) cycles")
MIB, KIB = 1 << 20, 1 << 10
GSO_BYTES = 65_160 + 54  # 45 segments and their headers
SEND_PIECE, PAGE = 32 * KIB, 4 * KIB  # contiguous bytes: in a program's buffer, and in a file
LARGE_BUFFERS = 4 * KIB  # receive buffers of a driver that has seen large frames
PLAIN_BYTES = 1514
VCPUS = ("vcpu", "CPU ")  # prefixes of the names of vCPU threads, ours and QEMU's

SMALL, LARGE, SCATTERED, BOTH_WAYS = 0.9, 1.0, 0.9, 0.7  # goals: ratios of rates
ASLEEP, POLLED, HIGH = 1.5, 1.3, 1.5  # goals: ratios of times


class Load(NamedTuple):
    """A load: the kind of frames, and their directions."""

    what: str
    bytes: int
    send: bool = False
    receive: bool = False
    piece: int = SEND_PIECE

    @property
    def goal(self) -> float:
        """The wanted ratio of the rates."""
        if self.send and self.receive:
            return BOTH_WAYS
        if self.bytes <= PLAIN_BYTES:
            return SMALL
        return LARGE if self.piece == SEND_PIECE else SCATTERED

    def line(self, kcycles: int) -> str:
        """Return the command line for the guest."""
        words = ["pass", f"kcycles={kcycles}"]
        if self.send:
            words.append(f"send={self.bytes}")
        if self.bytes > PLAIN_BYTES:
            words += [f"piece={self.piece}", f"buffers={LARGE_BUFFERS}"]
        return " ".join(words + ["receive"] * self.receive)


LOADS = (
    *(
        Load(f"{what}{way}", size, send, receive)
        for what, size in (("64-byte frames", 64), ("1500-byte frames", 1500), ("TCP, 64 KiB segments", GSO_BYTES))
        for way, send, receive in ((" out", True, False), (" in", False, True), ("", True, True))
    ),
    Load("TCP, 64 KiB segments in pages out", GSO_BYTES, send=True, piece=PAGE),
)
PINGS = (
    ("64-byte frame there and back", "ping count=2000"),
    ("64-byte frame in, while others go out", "beat count=300 us=1000 send=1500"),
)


class Passed(NamedTuple):
    """The result of one run: frames per second, and processor seconds per frame."""

    sent: float
    received: float
    cost_s: float


class NetSide(Side):
    """A running guest with its tap."""

    def __init__(
        self, console: Console, send: Callable[[bytes], object], pids: list[int], tap: Interface, peer: Path
    ) -> None:
        super().__init__(console, send, pids)
        self.place()
        self.tap = tap
        self.peer = peer

    def place(self) -> None:
        """Put the vCPU threads on the last processor, and all other threads on the other processors."""
        *others, last = sorted(os.sched_getaffinity(0))
        self.others = others or [last]
        for pid in self.pids:
            for thread in Path(f"/proc/{pid}/task").iterdir():
                runs_guest = (thread / "comm").read_text().startswith(VCPUS)
                os.sched_setaffinity(int(thread.name), [last] if runs_guest else self.others)

    def run(self, load: Load, hertz: float, *, asleep: bool) -> Passed:
        """Run a load.  Raises RuntimeError if frames were lost or changed."""
        line = load.line(int(PASS_S * hertz / 1000)) + " asleep" * asleep
        before = self.arrived()
        with self.peering(asleep, "flood", str(load.bytes)) if load.receive else contextlib.nullcontext():
            said, spent_s = self.tell(line)
        found = PASSED.search(said)
        if found is None:
            raise RuntimeError(f"{line}: the guest said {said!r}")
        sent, received, cycles = map(int, found.groups())
        if self.arrived() - before < sent:
            raise RuntimeError(f"{line}: {sent} frames were sent, and {self.arrived() - before} arrived")
        seconds = cycles / hertz
        return Passed(sent / seconds, received / seconds, spent_s / max(1, sent + received))

    def time(self, line: str, hertz: float, *, asleep: bool) -> tuple[float, float]:
        """Have the guest measure a time.  Return the median and the 90th percentile, in microseconds."""
        line += " asleep" * asleep
        with self.peering(asleep, "echo"):
            said, _ = self.tell(line)
        found = TIMED.search(said)
        if found is None:
            raise RuntimeError(f"{line}: the guest said {said!r}")
        return int(found[1]) / hertz * 1e6, int(found[2]) / hertz * 1e6

    def arrived(self) -> int:
        """Return the number of frames that the host has received from the guest."""
        with self.tap.network.inside():
            rows = Path("/proc/thread-self/net/dev").read_text().splitlines()
        (row,) = (row.split(":")[1].split() for row in rows if row.strip().startswith(f"{self.tap.name}:"))
        return int(row[1])

    @contextlib.contextmanager
    def peering(self, asleep: bool, *words: str) -> Iterator[None]:
        """Run the peer on the tap."""
        with self.tap.network.inside():
            process = subprocess.Popen([self.peer, self.tap.name, *words], stdout=subprocess.PIPE)
        with process:
            assert process.stdout is not None
            try:
                if not asleep:
                    os.sched_setaffinity(process.pid, self.others)
                Console(process.stdout.fileno()).expect("ready", DEADLINE_S)
                yield
            finally:
                process.kill()


def measure(directory: Path, guest: Callable[[str], Path]) -> list[Row]:
    """Compare rates, then times."""
    hertz = tsc_hertz()
    peer = directory / "peer"
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", peer, PEER], check=True)
    rows = []
    with Network() as network:
        for scope in ("all", "default"):  # the hosts send nothing by themselves
            network.write(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6", "1")
        with vmd_side(directory, guest("net"), network, peer) as vmd, qemu_side(guest("net"), network, peer) as other:
            for load in LOADS:
                rows += compare(load, vmd, other, hertz)
            for what, line in PINGS:
                rows += compare_times(what, line, vmd, other, hertz)
    return rows


def compare(load: Load, vmd: NetSide, qemu: NetSide, hertz: float) -> list[Row]:
    """Run both sides in turn.  The round before the first counted one is a warm-up."""
    asleep: dict[NetSide, list[Passed]] = {vmd: [], qemu: []}
    polled: dict[NetSide, list[Passed]] = {vmd: [], qemu: []}
    for counted, side in turns((vmd, qemu), ROUNDS):
        found, found_polled = side.run(load, hertz, asleep=True), side.run(load, hertz, asleep=False)
        if counted:
            asleep[side].append(found)
            polled[side].append(found_polled)
    large = load.bytes > PLAIN_BYTES
    unit, scale = ("MiB/s", load.bytes / MIB) if large else ("1000/s", 1e-3)
    ways = [("out", 0)] * load.send + [("in", 1)] * load.receive
    rows = []
    for way, index in ways:
        what = f"{load.what}: both ways, {way}" if len(ways) > 1 else load.what
        for name, runs in (("", asleep), (", polled", polled)):
            ours, theirs = ([run[index] * scale for run in runs[side]] for side in (vmd, qemu))
            rows.append(Row(what + name, unit, ours, theirs, load.goal, larger_is_better=True))
    ours, theirs = ([run.cost_s * 1e6 for run in asleep[side]] for side in (vmd, qemu))
    name = f"{load.what}: both ways, cpu" if len(ways) > 1 else f"{load.what}, cpu"
    return [*rows, Row(name, "us", ours, theirs)]


def compare_times(what: str, line: str, vmd: NetSide, qemu: NetSide, hertz: float) -> list[Row]:
    """Compare times instead of rates, with both sides in turn as in `compare`."""
    rows = []
    for name, asleep, goal in (("", True, ASLEEP), (", polled", False, POLLED)):
        times: dict[NetSide, list[tuple[float, float]]] = {vmd: [], qemu: []}
        for counted, side in turns((vmd, qemu), ROUNDS):
            found = side.time(line, hertz, asleep=asleep)
            if counted:
                times[side].append(found)
        for high, index, aim in (("", 0, goal), (", 9 of 10 below", 1, HIGH)):
            ours, theirs = ([run[index] for run in times[side]] for side in (vmd, qemu))
            rows.append(Row(what + name + high, "us", ours, theirs, aim))
    return rows


@contextlib.contextmanager
def vmd_side(directory: Path, kernel: Path, network: Network, peer: Path) -> Iterator[NetSide]:
    """Run the guest under a new daemon."""
    conf = f'vm "net" {{\n disable\n memory 64M\n boot "{kernel}"\n interface\n}}\n'
    with NetDaemon(directory, network, conf) as vmd:
        vmd.must("start", "net")
        tap = Interface(network, vmd.interfaces("net")[0]["tap"])
        with vmd.console("net") as console:
            pids = [pid for title, pid in vmd.processes().items() if title.startswith("vmd: vm/net")]
            yield NetSide(console, lambda data: os.write(console.fd, data), pids, tap, peer)
        vmd.must("stop", "-fw", "net")


@contextlib.contextmanager
def qemu_side(kernel: Path, network: Network, peer: Path, *, vhost: bool = False) -> Iterator[NetSide]:
    """Run the guest under QEMU.  With `vhost` the kernel moves its frames."""
    tap = Interface(network, "qemu0")
    devices = (
        "-name", "net,debug-threads=on",
        "-netdev", f"tap,id=net,ifname={tap.name},script=no,downscript=no,vhost={'on' if vhost else 'off'}",
        "-device", "virtio-net-pci,netdev=net,romfile=",
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        with network.inside():
            process = stack.enter_context(qemu(kernel, machine=PC, devices=devices))
        assert process.stdin is not None
        assert process.stdout is not None
        side = NetSide(Console(process.stdout.fileno()), process.stdin.write, [process.pid], tap, peer)
        tap.set("up")
        yield side
