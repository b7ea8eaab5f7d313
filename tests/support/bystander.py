"""A guest that attacks on other guests must not affect, while the daemon keeps answering root."""

import json
import select
import subprocess
import sys
from types import TracebackType
from typing import ClassVar, Self

from tests.support.daemon import DEADLINE_S, ROOT, Daemon
from tests.support.guests import guest
from tests.support.watcher import Longest

PROMPT = "vmd-demo> "
NAME = "bystander"
GUEST_S = 30.0


DRIVE = f'cdrom "{guest("demo")}"'  # a statement that gives a VM a device process; any file will do


def vm_block(name: str, *more: str) -> str:
    """Return a `vm` block that runs the demo guest, with the statements `more`."""
    statements = ["disable", "memory 32M", f'boot "{guest("demo")}"', *more]
    return "\n".join((f'vm "{name}" {{', *(f"  {statement}" for statement in statements), "}\n"))


class Bystander:
    """A context manager that runs the guest and asks the daemon as root during a whole test.

    Another process (`watcher`) repeatedly asks vmd for the status and the guest for its prompt.  No status may take
    longer than `status_s`, not counting time for which the daemon is not responsible.
    """

    status_s: ClassVar[float] = 30.0  # 1 s where the long rounds run, see tests/process/conftest.py

    def __init__(self, vmd: Daemon, name: str = NAME) -> None:
        """Start the guest."""
        self.vmd = vmd
        self.name = name
        vmd.must("start", name)
        row = vmd.status(name)
        self.pid = row["pid"]
        self.core = self.core_now()
        self._watcher = subprocess.Popen(
            [sys.executable, "-m", "tests.support.watcher", vmd.socket, row["tty"], str(vmd.pid)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        try:
            self.ask_watcher()  # the watcher has seen the guest's first output
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.check()
        finally:
            self.end()

    def end(self) -> None:
        """End the watcher."""
        self._watcher.kill()
        self._watcher.communicate()

    def core_now(self) -> dict[str, int]:
        """Return titles and pids of the processes that all guests depend on."""
        return {title: pid for title, pid in self.vmd.processes().items() if "/" not in title and title != "vmd: vm"}

    def check(self) -> None:
        """Check that the guest runs in the same process and answers, and that the same daemon processes answer root."""
        longest = self.ask_watcher()
        assert longest.status_s <= self.status_s, f"root has waited for a status: {longest}\n{self.vmd.log}"
        assert longest.guest_s <= GUEST_S, f"the guest said nothing: {longest}\n{self.vmd.log}"
        row = self.vmd.status(self.name)
        assert (row["state"], row["pid"]) == ("running", self.pid), self.vmd.log
        now = self.core_now()
        for title in ("vmd: control", "vmd: vmm", "vmd: priv"):
            assert now.get(title) == self.core.get(title), self.vmd.log

    def ask_watcher(self) -> Longest:
        """Wait until vmd and the guest have answered again.  Return the longest times so far."""
        watcher = self._watcher
        assert watcher.stdin is not None
        assert watcher.stdout is not None
        watcher.stdin.write("?\n")
        watcher.stdin.flush()
        answered = select.select([watcher.stdout], [], [], DEADLINE_S)[0]
        assert answered, f"root or the guest is not answered for {DEADLINE_S} s\n{self.vmd.log}"
        line = watcher.stdout.readline()
        assert line, f"the guest or the daemon has gone\n{self.vmd.log}"
        return Longest(*json.loads(line))
