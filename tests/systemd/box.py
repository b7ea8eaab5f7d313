"""A host with its own systemd, without a machine: Debian's systemd runs as pid 1 in new namespaces.

The root file system is an overlay, so no change in it reaches this host.  The box also has its own network, processes,
mounts, control groups, devices and host name.  It shares the kernel and KVM with this host.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

INSIDE = Path(__file__).with_name("inside")
ROOT = Path("/")
DEADLINE_S = 100.0  # a watchdog; a box is up in a second
POLL_S = 0.02
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NODES = ("null", "zero", "full", "random", "urandom", "tty", "net/tun", "kvm")
NO_FILES: Mapping[str, str] = MappingProxyType({})
# Units that would change the whole host, or look for devices that do not exist here.
MASKED = (
    "e2scrub_reap.service", "proc-sys-fs-binfmt_misc.automount", "systemd-binfmt.service",
    "systemd-modules-load.service",
    "systemd-journald-audit.socket", "systemd-pstore.service", "systemd-sysctl.service", "systemd-timesyncd.service",
    "systemd-udevd.service", "systemd-udev-trigger.service",
    "systemd-udevd-control.socket", "systemd-udevd-kernel.socket",
)  # fmt: skip
TARGET = """[Unit]
AllowIsolate=yes
Requires=sysinit.target
After=sysinit.target
"""


# Holds the files that remain over several boots of a box.  Each line is the path of a control group, and boots the box.
KEEPER = """
scratch=$1; shift
mount -t tmpfs -o mode=755 box "$scratch/layer"
while read -r group; do
    sh -c 'echo 0 >"$0/cgroup.procs" && exec "$@"' "$group" setpriv --pdeathsig KILL \\
        unshare --fork --kill-child --pid --mount --net --uts --ipc --cgroup --propagation private "$@" </dev/null || :
done
"""


class Box:
    """A running systemd, as a context manager, which ends it and all that it has started."""

    def __init__(self, *, root: Path = ROOT, files: Mapping[str, str] = NO_FILES, target: str = "box.target") -> None:
        """`files` (path: text) replace files of the system in `root`.  systemd starts `target`."""
        self.root = root
        self.files = {
            "etc/machine-id": "0123456789abcdef0123456789abcdef\n",
            "etc/systemd/system/box.target": TARGET,
            **files,
        }
        self.target = target
        self.pid = 0  # of its pid 1, on this host

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmd-box-")))
            self._lay_out()
            self.keeper = stack.enter_context(self._keeper())
            stack.callback(self.keeper.kill)
            self.group: Path | None = None
            stack.callback(self._end)
            self.boot()
            self._leave = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            print(f"--- journal of the box\n{self.run('journalctl', '--no-pager', '-o', 'short-monotonic').stdout}---")
        self._leave.close()

    def _lay_out(self) -> None:
        for name in ("layer", "files", "notify"):
            (self.scratch / name).mkdir()
        for name, text in self.files.items():
            path = self.scratch / "files" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        for unit in MASKED:
            (self.scratch / "files/etc/systemd/system" / unit).symlink_to("/dev/null")

    def _keeper(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                "unshare", "--mount", "--propagation", "private", "sh", "-e", "-c", KEEPER, "keeper", self.scratch,
                INSIDE, self.scratch, self.root, self.target, *NODES,
            ],
            stdin=subprocess.PIPE, text=True,
        )  # fmt: skip

    def _end(self) -> None:
        """End the box at once, as when the power fails."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self.pid = 0
        if self.group is not None:
            remove_control_group(self.group)
        self.group = None

    # --- from outside --------------------------------------------------------------------------------------

    def boot(self) -> None:
        """Boot the box, and wait until it is up."""
        self.group = make_control_group(self.scratch.name)
        path = self.scratch / "notify/socket"
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(str(path))
            notify.settimeout(0.2)
            assert self.keeper.stdin is not None
            self.keeper.stdin.write(f"{self.group}\n")
            self.keeper.stdin.flush()
            deadline = time.monotonic() + DEADLINE_S
            up = False
            while not up:
                with contextlib.suppress(TimeoutError):
                    up = b"READY=1" in notify.recv(4096).splitlines()
                assert self.keeper.poll() is None, "the box ended while it started"
                assert time.monotonic() < deadline, f"the box is not up after {DEADLINE_S} s"
        (unshare,) = children(self.keeper.pid)
        (self.pid,) = children(unshare)

    def power_off(self) -> None:
        """Let the box power itself off, and wait for that."""
        pidfd = os.pidfd_open(self.pid)
        try:
            self.must("systemctl", "poweroff")
            assert select.select([pidfd], [], [], DEADLINE_S)[0], "the box does not switch itself off"
        finally:
            os.close(pidfd)
        self._end()

    def path(self, name: str | Path) -> Path:
        """Return the path on this host of a file of the box."""
        return Path(f"/proc/{self.pid}/root", str(name).removeprefix("/"))

    def copy(self, source: Path, name: str) -> str:
        """Copy a file into the box.  Return its name there."""
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, self.path(name))
        return name

    def plug_in_kvm(self) -> None:
        """Let /dev/kvm appear, as when its module has been loaded."""
        status = os.stat("/dev/kvm")
        os.mknod(self.path("/dev/kvm"), status.st_mode, status.st_rdev)

    def unplug_kvm(self) -> None:
        """Remove /dev/kvm.  Processes that have it open keep it."""
        self.path("/dev/kvm").unlink()

    # --- inside --------------------------------------------------------------------------------------------

    def command(self, *command: str | Path) -> list[str | Path]:
        """Return a command that runs a program in the box."""
        enter = ["nsenter", "--target", str(self.pid), "--all", "--root", "--wd"]
        return [*enter, "env", "-i", f"PATH={PATH}", "LC_ALL=C.UTF-8", "SYSTEMD_PAGER=", *command]

    def run(
        self, *command: str | Path, timeout_s: float = DEADLINE_S, under: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in the box to its end.  `under` is a program of this host that runs it, such as strace."""
        return subprocess.run(
            [*under, *self.command(*command)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip

    def must(self, *command: str | Path) -> str:
        """Run a program that must succeed.  Return its output."""
        done = self.run(*command)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.unit_log()}"
        return done.stdout

    def wait_for(self, condition: Callable[[], bool], otherwise: str) -> None:
        """Wait until a condition holds.  `otherwise` is the failure message."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, f"{otherwise}\n{self.unit_log()}"
            pause()

    def properties(self, unit: str) -> dict[str, str]:
        """Return the properties of a unit from `systemctl show`."""
        lines = self.must("systemctl", "show", unit).splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def wait_property(self, unit: str, name: str, value: str) -> dict[str, str]:
        """Wait until a property of a unit has a value.  Return all properties."""
        self.wait_for(lambda: self.properties(unit)[name] == value, f"{name} of {unit} does not become {value}")
        return self.properties(unit)

    def journal(self, unit: str = "vmd.service") -> list[dict[str, Any]]:
        """Return the entries of a unit in the journal."""
        self.must("journalctl", "--sync")
        lines = self.must("journalctl", "--no-pager", "-o", "json", "-u", unit).splitlines()
        return [json.loads(line) for line in lines]

    def unit_log(self, unit: str = "vmd.service") -> str:
        """Return the journal of a unit as readable text."""
        return self.run("journalctl", "--no-pager", "-o", "short-monotonic", "-u", unit).stdout


def pause() -> None:
    """Wait a moment before the next look."""
    select.select([], [], [], POLL_S)


def children(pid: int) -> list[int]:
    """Return the children of a process."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def make_control_group(name: str) -> Path:
    """Make a control group (version 2) below our own."""
    mounts = [line.split(" - ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    above = next(Path(before.split()[4]) for before, after in mounts if after.startswith("cgroup2 "))
    own = next(
        line.removeprefix("0::/") for line in Path("/proc/self/cgroup").read_text().splitlines() if line[0] == "0"
    )
    group = above / own / name
    group.mkdir()
    return group


def remove_control_group(group: Path) -> None:
    """Wait for the last process of a group to end, and remove the group with all groups below it."""
    deadline = time.monotonic() + DEADLINE_S
    while "populated 1" in (group / "cgroup.events").read_text():
        assert time.monotonic() < deadline, f"processes are left in {group}"
        pause()
    for folder, _, _ in os.walk(group, topdown=False):
        os.rmdir(folder)
