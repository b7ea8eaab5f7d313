"""The time that sending a VM to a file in memory takes, and the time that receiving it from there takes.

`vmctl send -k` and `vmctl receive` are compared with a migration of the same guest by QEMU.  QEMU's machine is stopped
before, its bandwidth is not limited, and the stream passes through `cat`.  The guest has written different values to
all words of a part of its memory, so no page of that part is zero.  Both sides skip the rest, which was never touched.
"""

import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.program import VMCTL
from bench.qemu import MICROVM, qemu
from bench.table import Row
from tests.support.console import Console
from tests.support.daemon import Daemon

ROUNDS = 7
TOUCHED_MIB, TOUCHED_FEW_MIB = 1024, 64
SPARE_MIB = 512  # memory that is never touched
MIB = 1 << 20
SHARED_MEMORY = Path("/dev/shm")
BYTES_PER_S = 1 << 40  # no limit
DEADLINE_S = 120.0
SEND_GOAL, RECEIVE_GOAL, RECEIVE_FEW_GOAL = 1.3, 1.0, 1.3


def measure(directory: Path, guest: Callable[[str], Path]) -> list[Row]:
    """Measure a large and a small VM, with vmd and QEMU in turn."""
    with roomy(directory) as place:
        return [row for mib in (TOUCHED_MIB, TOUCHED_FEW_MIB) for row in compare(place, guest("fill"), mib)]


@contextlib.contextmanager
def roomy(directory: Path) -> Iterator[Path]:
    """Yield a directory in memory if the files fit there, else `directory`.  The disk is then measured, too."""
    with contextlib.ExitStack() as stack:
        place = directory
        if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 6 * TOUCHED_MIB * MIB:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmd-bench-", dir=SHARED_MEMORY)))
        yield place


def compare(place: Path, kernel: Path, mib: int) -> list[Row]:
    """Send and receive ROUNDS times, after one round that is not counted."""
    sent: tuple[list[float], list[float]] = ([], [])
    received: tuple[list[float], list[float]] = ([], [])
    ours, theirs, other = place / "vmd", place / "qemu", Qemu(place, kernel, mib)
    memory = f"memory {mib + SPARE_MIB}M"
    conf = f'vm "fill" {{\n disable\n {memory}\n boot "{kernel}" cmdline "mib={mib}"\n}}\n'
    with Daemon(place, conf) as vmd, other.running() as monitor:
        vmd.must("start", "fill")
        with vmd.console("fill") as console:
            console.expect("filled", DEADLINE_S)
        for counted in (False, *[True] * ROUNDS):
            times = (send(vmd, ours), monitor.send(theirs)), (receive(vmd, ours), other.receive(theirs))
            if counted:
                for (mine, others), (my_s, their_s) in zip((sent, received), times, strict=True):
                    mine.append(my_s * 1024 / mib)
                    others.append(their_s * 1024 / mib)
        for path in (ours, theirs):
            path.unlink()
    receive_goal = RECEIVE_GOAL if mib == TOUCHED_MIB else RECEIVE_FEW_GOAL
    return [
        Row(f"send, {mib} MiB touched, to a file", "s/GiB", *sent, goal=SEND_GOAL),
        Row(f"receive, {mib} MiB touched, from a file", "s/GiB", *received, goal=receive_goal),
    ]


# --- ours --------------------------------------------------------------------------------------------------------


def send(vmd: Daemon, path: Path) -> float:
    """Return the seconds that `vmctl send -k` takes."""
    with path.open("wb") as file:
        return run(vmd, "send", "-k", "fill", stdout=file.fileno())


def receive(vmd: Daemon, path: Path) -> float:
    """Return the seconds that `vmctl receive` takes."""
    with path.open("rb") as file:
        took_s = run(vmd, "receive", "other", stdin=file.fileno())
    vmd.must("stop", "-fw", "other")
    return took_s


def run(vmd: Daemon, *arguments: str, stdin: int = subprocess.DEVNULL, stdout: int = subprocess.DEVNULL) -> float:
    """Run vmctl; return the seconds it took."""
    began_s = time.perf_counter()
    subprocess.run(
        [*VMCTL, "-s", vmd.socket, *arguments], stdin=stdin, stdout=stdout, stderr=subprocess.DEVNULL, check=True
    )
    return time.perf_counter() - began_s


# --- QEMU's ------------------------------------------------------------------------------------------------------


class Monitor:
    """QEMU's machine protocol (QMP)."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + DEADLINE_S
        while True:  # QEMU needs a moment to create the socket
            try:
                self.sock.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                assert time.monotonic() < deadline
        self.sock.settimeout(DEADLINE_S)
        self.lines = self.sock.makefile("rb")
        self.events: list[dict[str, Any]] = []
        json.loads(self.lines.readline())  # the greeting of QMP
        self.ask("qmp_capabilities")
        self.ask("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])

    def ask(self, command: str, **arguments: object) -> None:
        """Run a command.  Raises RuntimeError if QEMU refuses it."""
        self.sock.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while "event" in (answer := json.loads(self.lines.readline())):
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{command}: {answer['error']}")

    def wait(self, event: str, **data: object) -> float:
        """Wait for an event with this data.  Return its time in seconds."""
        while True:
            found = self.events.pop(0) if self.events else json.loads(self.lines.readline())
            if found.get("event") == event and data.items() <= found.get("data", {}).items():
                return float(found["timestamp"]["seconds"] + found["timestamp"]["microseconds"] / 1e6)

    def send(self, path: Path) -> float:
        """Stop the machine, write it to a file, and continue it.  Return the seconds that the writing takes."""
        self.ask("migrate-set-parameters", **{"max-bandwidth": BYTES_PER_S})
        self.ask("stop")
        began_s = time.perf_counter()
        self.ask("migrate", uri=f"exec:cat > {path}")
        self.wait("MIGRATION", status="completed")
        took_s = time.perf_counter() - began_s
        deadline = time.monotonic() + DEADLINE_S
        while True:  # QEMU refuses "cont" for a moment after it has reported the end
            try:
                self.ask("cont")
            except RuntimeError:
                assert time.monotonic() < deadline
            else:
                return took_s

    def close(self) -> None:
        """Close the connection."""
        self.lines.close()
        self.sock.close()


class Qemu:
    """The guest under QEMU."""

    def __init__(self, place: Path, kernel: Path, mib: int, options: str = "") -> None:
        self.place = place
        self.kernel = kernel
        self.mib = mib
        self.options = options

    @contextlib.contextmanager
    def started(self, name: str, *options: str) -> Iterator[tuple[Monitor, Console]]:
        """Start QEMU, with a monitor socket of this name.  Yield the monitor and the console."""
        path = self.place / name
        path.unlink(missing_ok=True)
        devices = ("-qmp", f"unix:{path},server=on,wait=off", *options)
        words, memory_mib = f"mib={self.mib} {self.options}", self.mib + SPARE_MIB
        with qemu(self.kernel, words, memory_mib=memory_mib, machine=MICROVM, devices=devices) as process:
            assert process.stdout is not None
            monitor = Monitor(path)
            try:
                yield monitor, Console(process.stdout.fileno())
            finally:
                monitor.close()

    @contextlib.contextmanager
    def running(self) -> Iterator[Monitor]:
        """Start QEMU.  Yield when the guest has touched its memory."""
        with self.started("sender") as (monitor, console):
            console.expect("filled", DEADLINE_S)
            yield monitor

    def receive(self, path: Path) -> float:
        """Return the seconds from the start of QEMU until the received guest runs."""
        began_s = time.perf_counter()
        with self.started("receiver", "-incoming", "defer") as (monitor, _):
            monitor.ask("migrate-incoming", uri=f"exec:cat {path}")
            monitor.wait("MIGRATION", status="completed")
            monitor.ask("cont")
            return time.perf_counter() - began_s
