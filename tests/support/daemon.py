"""A vmd for one test.  Its configuration, socket and log are in a directory that is deleted with the test."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.console import Console
from tests.support.waiting import PAUSE_S, pause
from vmctl.commands.status import as_json
from vmd.client import Client, ClientError
from vmd.privsep.spawn import INTERPRETER

ROOT = Path(__file__).resolve().parents[2]
START_DEADLINE_S = 300.0  # long enough for an emulated machine that has other work
STOP_DEADLINE_S = 300.0  # longer than the daemon waits for its guests
DEADLINE_S = 100.0  # a watchdog: only a busy host takes this long


class Daemon:
    """A running `vmd -d`.  A context manager that ends the daemon and checks that it leaves nothing behind."""

    vmd: Sequence[str | Path] = (sys.executable, "-m", "vmd")
    client: Sequence[str | Path] = (sys.executable, "-m", "vmctl")

    def __init__(self, directory: Path, conf: str = "", *, code: Path = ROOT, prefix: Sequence[str] = ()) -> None:
        """`prefix` is a command that the daemon's command line is appended to, such as one that enters namespaces."""
        self.directory = directory
        self.code = code
        self.prefix = list(prefix)
        self.conf = directory / "vm.conf"
        self.socket = directory / "vmd.sock"
        self.log_path = directory / "vmd.log"
        self.state = directory / "state"
        self.notices = directory / "vmctl-console.log"  # vmctl's own messages, without the guest's output
        self.process: subprocess.Popen[bytes] | None = None
        self.asked = 0.0  # time of its last list of VMs
        self.conf.write_text(conf)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            print(f"--- log of vmd\n{self.log}--- its threads\n{self.threads()}---")
            if self.notices.exists():
                print(f"--- vmctl console\n{self.notices.read_text(errors='replace')}---")
        self.stop()

    def start(self) -> None:
        """Start the daemon and wait until it logs that it serves."""
        notify_path = self.directory / "notify.sock"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            with contextlib.suppress(FileNotFoundError):
                notify_path.unlink()
            notify.bind(str(notify_path))
            notify.settimeout(0.2)
            with self.log_path.open("ab") as log:
                self.process = subprocess.Popen(
                    [*self.prefix, *self.vmd, "-d", "-s", self.socket, "-f", self.conf],
                    cwd=self.code, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    env={**os.environ, "NOTIFY_SOCKET": str(notify_path), "STATE_DIRECTORY": str(self.state)},
                )  # fmt: skip
            deadline = time.monotonic() + START_DEADLINE_S
            while True:
                with contextlib.suppress(TimeoutError):
                    if notify.recv(100) == b"READY=1":
                        return
                if self.process.poll() is not None:
                    raise AssertionError(f"vmd did not start:\n{self.log}")
                if time.monotonic() > deadline:
                    self.process.kill()
                    raise AssertionError(f"vmd is not ready after {START_DEADLINE_S} s:\n{self.log}")

    def stop(self) -> int:
        """End the daemon as init does; return its exit status."""
        if self.process is None:
            return 0
        process, self.process = self.process, None
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            return process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"vmd did not stop:\n{self.log}") from None

    @property
    def log(self) -> str:
        """Everything logged so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    @property
    def pid(self) -> int:
        """The parent's pid."""
        assert self.process is not None
        return self.process.pid

    def processes(self) -> dict[str, int]:
        """Wait until all descendants of the daemon have titles of their own; return titles and pids."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            found = self.family()
            if not any(title.startswith(INTERPRETER) for title in found) or time.monotonic() > deadline:
                return found
            pause()

    def family(self) -> dict[str, int]:
        """Return the current titles and pids of all descendants of the daemon."""
        listing = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
        # A zombie, which will be reaped soon, does not count.
        rows = [line.split(None, 2) for line in listing.splitlines() if not line.endswith("<defunct>")]
        children: dict[int, list[tuple[int, str]]] = {}
        for pid, ppid, args in rows:
            children.setdefault(int(ppid), []).append((int(pid), args.strip()))
        found: dict[str, int] = {}
        family = [self.pid]  # a child may have a lower pid than its parent, because pids wrap around
        while family:
            for number, title in children.get(family.pop(), []):
                family.append(number)
                found.setdefault(title, number)  # a child has its parent's title until it executes its own program
        return found

    def threads(self) -> str:
        """Return, as text for people, what each thread of the daemon's descendants is doing."""
        if self.process is None or self.process.poll() is not None:
            return ""
        pids = ",".join(str(pid) for pid in (self.pid, *self.family().values()))
        columns = "lwp,stat,time,wchan:24,args"
        listing = subprocess.run(["ps", "-L", "-o", columns, "-p", pids], capture_output=True, text=True, check=False)
        return listing.stdout

    def vmctl(self, *arguments: str | Path, timeout_s: float = DEADLINE_S) -> subprocess.CompletedProcess[str]:
        """Run vmctl to its end."""
        return subprocess.run(
            [*self.client, "-s", self.socket, *arguments],
            cwd=self.code, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip

    def must(self, *arguments: str | Path, timeout_s: float = DEADLINE_S) -> str:
        """Run a vmctl that must succeed; return its output."""
        done = self.vmctl(*arguments, timeout_s=timeout_s)
        assert done.returncode == 0, f"vmctl {arguments}: {done.stderr}\n--- log of vmd\n{self.log}"
        return done.stdout + done.stderr

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of `vmctl status --json` for every VM.

        vmctl's own code makes them, but in this process: starting vmctl takes thirty times as long, and tests ask
        thousands of times.  A second call right after the first sleeps a little, to leave the processor to vmd.
        """
        rows: list[dict[str, Any]]
        if self.code != ROOT or self.client is not Daemon.client:  # this daemon is used with another vmctl
            rows = json.loads(self.must("status", "--json"))["vms"]
            return rows
        select.select([], [], [], max(0.0, self.asked + PAUSE_S - time.monotonic()))
        try:
            with Client(str(self.socket), timeout_s=DEADLINE_S) as client:
                rows = json.loads(json.dumps([as_json(vm) for vm in client.list_vms()]))
        except ClientError as error:
            raise AssertionError(f"vmctl status: {error}\n--- log of vmd\n{self.log}") from error
        self.asked = time.monotonic()
        return rows

    def status(self, name: str) -> dict[str, Any]:
        """Return the row of `vmctl status --json` for one VM."""
        rows = self.rows()
        for row in rows:
            if row["name"] == name:
                found: dict[str, Any] = row
                return found
        raise AssertionError(f"no vm {name} in {rows}")

    def wait_state(self, name: str, state: str) -> dict[str, Any]:
        """Wait until a VM is in a state."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            row = self.status(name)
            if row["state"] == state:
                return row
            assert time.monotonic() < deadline, f"vm {name} is {row['state']}, not {state}\n{self.log}"

    def wait_log(self, text: str, timeout_s: float = DEADLINE_S, *, times: int = 1) -> None:
        """Wait until the log has a text."""
        deadline = time.monotonic() + timeout_s
        while self.log.count(text) < times:
            assert time.monotonic() < deadline, f"no {text!r} in the log:\n{self.log}"
            pause()

    def run_to_end(self, name: str) -> str:
        """Start a VM with its console attached; return its output when it has ended by itself."""
        with subprocess.Popen(
            [*self.client, "-s", self.socket, "start", "-c", name],
            cwd=self.code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            said = Console(process.stdout.fileno())
            said.drain(DEADLINE_S)
        return said.text()

    @contextlib.contextmanager
    def attached(self, name: str) -> Iterator["Attached"]:
        """Attach with `vmctl console`; earlier output comes first."""
        with self.notices.open("ab") as notices, subprocess.Popen(
            [*self.client, "-s", self.socket, "console", name],
            cwd=self.code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=notices,
        ) as process:  # fmt: skip
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                yield Attached(process.stdout.fileno(), process.stdin.fileno())
                process.stdin.close()  # end of input detaches
                process.wait(DEADLINE_S)
            finally:
                process.kill()

    def console(self, name: str) -> "Terminal":
        """Open the pty of a running VM, as cu does."""
        return Terminal(self.status(name)["tty"])


class Attached(Console):
    """The viewer's side of a console, for tests that read and type.  The owner of both descriptors closes them."""

    def __init__(self, output: int, keyboard: int) -> None:
        super().__init__(output)
        self.keyboard = keyboard

    def type(self, text: str) -> None:
        """Send a user's input."""
        os.write(self.keyboard, text.encode())

    def answer(self, text: str, wanted: str, timeout_s: float = DEADLINE_S) -> str:
        """Type a line; return the output up to the wanted text."""
        self.type(text + "\r")
        return self.expect(wanted, timeout_s)


class Terminal(Attached):
    """A viewer who opens the pty, as cu does."""

    def __init__(self, path: str) -> None:
        fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
        super().__init__(fd, fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
