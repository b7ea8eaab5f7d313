"""Interfaces whose frames the kernel moves (`vhost`), compared with QEMU's vhost=on and with our own network process.

The host needs `/dev/vhost-net`.  The emulated machine has it:

    python -m tests.l1.machine .venv/bin/python -m bench vhost

Three VMs run all the time, each with its own tap, all in one network.  Two of them run in turn, and the third sleeps.
The guest sleeps until an interrupt by MSI-X comes, because the kernel serves no guest without MSI-X.
"""

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.net import ASLEEP, GSO_BYTES, LARGE, MIB, PEER, PLAIN_BYTES, Load, NetSide, qemu_side
from bench.side import tsc_hertz
from bench.table import Row, turns
from tests.support.hostnet import NetDaemon, load_modules
from tests.support.network import Interface, Network

ROUNDS = 5
VHOST = Path("/dev/vhost-net")
LOADS = (
    Load("64-byte frames out", 64, send=True),
    Load("64-byte frames in", 64, receive=True),
    Load("TCP, 64 KiB segments out", GSO_BYTES, send=True),
    Load("TCP, 64 KiB segments in", GSO_BYTES, receive=True),
)
PINGS = "ping count=300"
VMS = ("kernel", "process")


def measure(directory: Path, guest: Callable[[str], Path]) -> list[Row]:
    """Compare rates, then round-trip times."""
    load_modules()
    if not VHOST.exists():
        print(f"bench: vhost: this host has no {VHOST}")
        return []
    hertz = tsc_hertz()
    peer = directory / "peer"
    subprocess.run(["gcc", "-O2", "-o", peer, PEER], check=True)
    rows = []
    with Network() as network:
        for scope in ("all", "default"):  # the hosts send nothing by themselves
            network.write(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6", "1")
        with (
            vmd_sides(directory, guest("net"), network, peer) as (kernel, process),
            qemu_side(guest("net"), network, peer, vhost=True) as qemu,
        ):
            for other, name in ((qemu, "QEMU, vhost=on"), (process, "our process")):
                rows += [compare(load, kernel, other, hertz, name) for load in LOADS]
                rows.append(compare_times(f"64-byte frame there and back: {name}", kernel, other, hertz))
    return rows


def compare(load: Load, ours: NetSide, other: NetSide, hertz: float, name: str) -> Row:
    """Run both sides in turn."""
    found: dict[NetSide, list[float]] = {ours: [], other: []}
    for counted, side in turns((ours, other), ROUNDS):
        passed = side.run(load, hertz, asleep=True)
        if counted:
            found[side].append(passed.sent if load.send else passed.received)
    large = load.bytes > PLAIN_BYTES
    unit, scale = ("MiB/s", load.bytes / MIB) if large else ("1000/s", 1e-3)
    mine, others = ([rate * scale for rate in found[side]] for side in (ours, other))
    return Row(f"{load.what}: {name}", unit, mine, others, LARGE, larger_is_better=True)


def compare_times(what: str, ours: NetSide, other: NetSide, hertz: float) -> Row:
    """Run both sides in turn."""
    found: dict[NetSide, list[float]] = {ours: [], other: []}
    for counted, side in turns((ours, other), ROUNDS):
        time_us, _ = side.time(PINGS, hertz, asleep=True)
        if counted:
            found[side].append(time_us)
    return Row(what, "us", found[ours], found[other], ASLEEP)


@contextlib.contextmanager
def vmd_sides(directory: Path, image: Path, network: Network, peer: Path) -> Iterator[list[NetSide]]:
    """Run two guests under a new daemon: the kernel moves the frames of one, our process those of the other."""
    block = 'vm "{}" {{\n disable\n memory 64M\n boot "{}"\n interface {}\n}}\n'
    conf = "".join(block.format(name, image, "{ vhost }" * (name == "kernel")) for name in VMS)
    with NetDaemon(directory, network, conf) as vmd, contextlib.ExitStack() as stack:
        sides = []
        for name in VMS:
            vmd.must("start", name)
            tap = Interface(network, vmd.interfaces(name)[0]["tap"])
            console = stack.enter_context(vmd.console(name))
            pids = [pid for title, pid in vmd.processes().items() if title.startswith(f"vmd: vm/{name}")]
            sides.append(NetSide(console, lambda data, fd=console.fd: os.write(fd, data), pids, tap, peer))  # type: ignore[misc]
        yield sides
        if "process moves" in vmd.log:
            raise RuntimeError(f"the kernel did not move the frames:\n{vmd.log}")
        for name in VMS:
            vmd.must("stop", "-fw", name)
