"""The total time and the downtime of a migration to another host: `vmctl migrate` compared with QEMU.

Both hosts are this one.  The replacement for ssh runs the command locally.  The total time is from the command until
the guest runs at the target, and includes the start of QEMU's target process.  Each side measures its own downtime:
vmd from the guest's stop until the source knows that the guest runs at the target, QEMU from STOP at the source to
RESUME at the target.  Both have their default downtime limit of 300 ms.
"""

import contextlib
import json
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.program import VMCTL
from bench.table import Row
from bench.transfer import BYTES_PER_S, DEADLINE_S, SPARE_MIB, Qemu
from tests.support.daemon import Daemon

ROUNDS = 6  # half of them from the first side to the second, half of them back
DOWNTIME_MS = 300.0
LOADS = (
    (512, "touched, idle", ""),
    (64, "written at 10 Hz", "again rest=100"),
)


def measure(directory: Path, guest: Callable[[str], Path]) -> list[Row]:
    """Compare vmd and QEMU."""
    return [row for load in LOADS for row in compare(directory, guest("fill"), *load)]


def compare(directory: Path, kernel: Path, mib: int, what: str, options: str) -> list[Row]:
    """Migrate ROUNDS times on each side, after two migrations that are not counted."""
    totals: tuple[list[float], list[float]] = ([], [])
    downtimes: tuple[list[float], list[float]] = ([], [])
    with contextlib.ExitStack() as stack:
        sides: list[Ours | Theirs] = [
            stack.enter_context(Ours(directory / f"{mib}", kernel, mib, options).running()),
            stack.enter_context(Theirs(directory, kernel, mib, options).running()),
        ]
        for counted in (False, False, *[True] * ROUNDS):
            for index, side in enumerate(sides):
                total_s, downtime_s = side.migrate()
                if counted:
                    totals[index].append(total_s)
                    downtimes[index].append(downtime_s * 1000)
    name = f"migrate, {mib} MiB {what}"
    return [
        Row(f"{name}: in all", "s", *totals),
        Row(f"{name}: downtime", "ms", *downtimes, limit=DOWNTIME_MS),
    ]


class Ours:
    """Two daemons; the VM is at one of them."""

    def __init__(self, directory: Path, kernel: Path, mib: int, options: str) -> None:
        self.directory = directory
        memory = f"memory {mib + SPARE_MIB}M"
        self.conf = f'vm "fill" {{\n disable\n {memory}\n boot "{kernel}" cmdline "mib={mib} {options}"\n}}\n'

    @contextlib.contextmanager
    def running(self) -> "Iterator[Ours]":
        """Start both daemons, and the VM at the first one.  Yield when the guest has touched its memory."""
        here, there = self.directory / "here", self.directory / "there"
        for path in (here, there):
            path.mkdir(parents=True)
        with Daemon(here, self.conf) as self.source, Daemon(there) as self.target:
            for vmd in (self.source, self.target):
                vmd.client = VMCTL
            self.source.must("start", "fill")
            with self.source.console("fill") as console:
                console.expect("filled", DEADLINE_S)
            yield self

    def migrate(self) -> tuple[float, float]:
        """Migrate to the other side.  Return the total time and the downtime, in seconds."""
        shell = self.directory / "shell"
        shell.write_text(f'shift 2; exec {shlex.join([*VMCTL, "-s", str(self.target.socket)])} "$@"\n')
        began_s = time.perf_counter()
        said = self.source.must("migrate", "--json", "-e", f"sh {shell}", "fill", "there", timeout_s=DEADLINE_S)
        total_s = time.perf_counter() - began_s
        self.source, self.target = self.target, self.source
        return total_s, json.loads(said)["downtime_ms"] / 1000


class Theirs:
    """The QEMU that runs the guest, and during a migration a second one, the target."""

    def __init__(self, directory: Path, kernel: Path, mib: int, options: str) -> None:
        self.path = directory / "migration"
        self.machine = Qemu(directory, kernel, mib, options)
        self.at = "here"

    @contextlib.contextmanager
    def running(self) -> "Iterator[Theirs]":
        """Start the first QEMU.  Yield when its guest has touched its memory."""
        self.source = contextlib.ExitStack()
        try:
            self.monitor, console = self.source.enter_context(self.machine.started(self.at))
            console.expect("filled", DEADLINE_S)
            yield self
        finally:
            self.source.close()

    def migrate(self) -> tuple[float, float]:
        """Migrate to the other side.  Return the total time and the downtime, in seconds."""
        self.at = "there" if self.at == "here" else "here"
        self.path.unlink(missing_ok=True)
        with contextlib.ExitStack() as target:
            began_s = time.perf_counter()
            monitor, _ = target.enter_context(self.machine.started(self.at, "-incoming", "defer"))
            monitor.ask("migrate-incoming", uri=f"unix:{self.path}")
            self.monitor.ask("migrate-set-parameters", **{"max-bandwidth": BYTES_PER_S})
            self.monitor.ask("migrate", uri=f"unix:{self.path}")
            goes_on_s = monitor.wait("RESUME")
            total_s = time.perf_counter() - began_s
            stops_s = self.monitor.wait("STOP")
            self.source.close()
            self.source, self.monitor = target.pop_all(), monitor
        return total_s, goes_on_s - stops_s
