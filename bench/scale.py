"""The daemon's own processor time per idle VM, with few and with many VMs.  It should not grow with their number.

Processor time counts, not elapsed time: of the parent, control, vmm, priv, log, and of processes that they start and
reap, such as nft.  Each VM has a disk and a `local` interface, the kind of interface with the highest cost.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.memory import make_images
from bench.table import Row
from tests.support.hostnet import NetDaemon
from tests.support.network import Network
from vmd.client import Client

STEPS = (100, 200, 500)
MEMORY_MIB = 16
NEEDED_MIB = 28  # host memory for each VM, including its processes
SAME = 1.25  # largest ratio to the cost with the fewest VMs that does not count as growth
DEADLINE_S = 500.0
PARALLEL = 16  # VMs that start together, each second
SETTLE_S = 1.5  # for deferred work, such as the check of the network configuration
TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
OF_VMS, VMM = "vmd: vm/", "vmd: vmm"
MORE = "more"  # the additional VM that is started while the others run


def measure(directory: Path, guest: Callable[[str], Path]) -> list[Row]:
    """Measure with each number of VMs in STEPS that fits into the memory of this host."""
    steps = [count for count in STEPS if count * NEEDED_MIB <= available_mib()]
    found = {}
    for count in steps:
        place = directory / str(count)
        place.mkdir()
        found[count] = costs(place, guest("tick"), count)
        print(f"{count}: {found[count]}", file=sys.stderr)
    first, last = steps[0], steps[-1]
    rows = []
    for what in found[first]:
        each = [found[count][what] for count in steps]
        ratio = each[-1] / each[0]
        rows.append(Row(f"{what}, {last} VMs", "ms", each[-1:]))
        rows.append(Row(f"{what}, {last} / {first} VMs", "times", [ratio], limit=SAME))
    return rows


def available_mib() -> int:
    """Return the available memory of this host, in MiB."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("MemAvailable:"))


def configuration(kernel: Path, images: list[Path]) -> str:
    """Return a vm.conf with a VM for each image.  All but the last VM start with the daemon."""
    names = [*(f"n{number}" for number in range(len(images) - 1)), MORE]
    return f"staggered start parallel {PARALLEL} delay 1\nlimit vms 4000\nlimit vcpus 4000\n" + "".join(
        f'vm "{name}" {{\n{" disable" if name == MORE else ""} memory {MEMORY_MIB}M\n'
        f' boot "{kernel}" cmdline "idle"\n disk "{image}"\n local interface\n}}\n'
        for name, image in zip(names, images, strict=True)
    )


def costs(directory: Path, kernel: Path, count: int) -> dict[str, float]:
    """Return the processor time of each operation in milliseconds, per VM or for one VM, while `count` VMs run."""
    conf = configuration(kernel, make_images(directory, count + 1))
    found: dict[str, float] = {}
    with Network() as network, NetDaemon(directory, network, conf) as vmd:
        began_ns = cpu_ns(vmd)

        def note(what: str, times: int, call: Callable[[], object]) -> None:
            before_ns = cpu_ns(vmd)
            call()
            time.sleep(SETTLE_S)
            found[what] = (cpu_ns(vmd) - before_ns) / 1e6 / times

        while sum(row["state"] == "running" for row in vmd.rows()) < count:
            time.sleep(SETTLE_S)
        time.sleep(SETTLE_S)
        found["start of all, each"] = (cpu_ns(vmd) - began_ns) / 1e6 / count
        with Client(str(vmd.socket), timeout_s=DEADLINE_S) as client:

            def look_closely() -> None:
                for vm in client.list_vms():
                    client.list_devices(vm.vmid)
                client.figures()

            note("status, each", count, client.list_vms)
            note("status -v, each", count, look_closely)
            note("metrics, each", count, client.figures)
        note("reload, each", count, lambda: vmd.must("reload", timeout_s=DEADLINE_S))
        note("six seconds of nothing, each", count, lambda: time.sleep(6 - SETTLE_S))
        note("start of one more", 1, lambda: vmd.must("start", MORE))
        note("end of one", 1, lambda: vmd.must("stop", "-fw", MORE))
        note("restart of the daemon, each", count, lambda: upgraded(vmd, count))
        note("stop of all, each", count, lambda: vmd.must("stop", "-afw", timeout_s=DEADLINE_S))
    return found


def upgraded(vmd: NetDaemon, count: int) -> None:
    """Upgrade the daemon to the same program, which takes over all VMs."""
    vmd.must("upgrade", timeout_s=DEADLINE_S)
    assert sum(row["state"] == "running" for row in vmd.rows()) == count


def cpu_ns(vmd: NetDaemon) -> int:
    """Return the processor time of the daemon's own processes and of those they have reaped, VMs excluded."""
    return sum(each_ns(vmd).values())


def each_ns(vmd: NetDaemon) -> dict[str, int]:
    """Return the processor time of each of the daemon's own processes."""
    found: dict[str, int] = {}
    for title, pid in {"vmd": vmd.pid, **vmd.processes()}.items():
        if title.startswith(OF_VMS):
            continue
        total = 0
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the process has just ended
            for thread in Path(f"/proc/{pid}/task").iterdir():
                total += int((thread / "schedstat").read_text().split()[0])
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(words[13]) + int(words[14])) * TICK_NS if title != VMM else 0
        found[title] = total
    return found
