"""vmctl migrate between two daemons of this host: what stands in for ssh, and cuts when it is told to.

Run as a program it is the remote shell, `migration.py PLAN HOST vmctl receive ...`: it runs that vmctl against the
socket that the plan names, passes on what the two ends say, and, at the place that the plan names, ends one of them.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.support.daemon import Daemon

PIECE = 1 << 16
COMMIT = b'"at": "commit"'
# Where it can be cut: in the stream, and before and after each word of either side has been passed on.
BEFORE_COMMIT = ("stream", "before asked", "after asked", "before complete")
AROUND_COMMIT = ("after complete", "before commit", "after commit", "later", "before running", "after running")
NOWHERE = "nowhere"
PLACES = (*BEFORE_COMMIT, *AROUND_COMMIT, *[NOWHERE] * 3)
SHELL, TARGET, SOURCE, GUEST, OPERATOR, HERE, THERE = (
    "shell", "target", "source", "guest", "operator", "daemon here", "daemon there"
)  # fmt: skip
# The connection; one of the two vmctl; the VM's process at the target; nobody, but somebody types ^C; or a daemon, of
# which the next one goes on with its VMs.
VICTIMS = (SHELL, TARGET, SOURCE, GUEST, OPERATOR, HERE, THERE)
# The target's daemon is killed, but its vmctl has said that it has everything: the source goes on to the commit.
ONLY_SEEN_LATER = ("before complete", THERE)


class Plan:
    """The file that tells the shell what to do, and the command that runs it."""

    def __init__(self, path: Path, into: "Daemon", *, out_of: "Daemon | None" = None, **cut: object) -> None:
        """`cut`: `place`, `victim`, `bytes` of the stream, `later_ms` after the commit."""
        cut["source"] = out_of.pid if out_of is not None else 0
        self.path = path
        plan = {"socket": str(into.socket), "code": str(into.code), "parent": into.pid, **cut}
        path.write_text(json.dumps(plan))

    @property
    def command(self) -> str:
        """What -e takes."""
        return f"{sys.executable} {Path(__file__).resolve()} {self.path}"


def descendants(pid: int) -> dict[int, str]:
    """Return the processes below one, with their titles."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                parents.setdefault(int(fields[1]), []).append(int(entry))
    found, family = {}, [pid]
    while family:
        for child in parents.get(family.pop(), []):
            with contextlib.suppress(OSError):
                found[child] = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
            family.append(child)
    return found


class Shell:
    """The program."""

    def __init__(self, plan: dict[str, Any], arguments: list[str]) -> None:
        self.plan = plan
        self.name = arguments[-1]
        environment = {**os.environ, "PYTHONPATH": plan["code"]}
        command = [sys.executable, "-m", "vmctl", "-s", plan["socket"], *arguments[2:]]
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=plan["code"]
        )
        self.passed_bytes = 0

    def cut(self, place: str) -> bool:
        """End somebody, if this is the place; return whether that was who has spoken."""
        if self.plan.get("place") != place:
            return False
        self.plan["place"] = ""
        victim = self.plan["victim"]
        if victim == SHELL:
            os._exit(255)  # its child finds that out by its descriptors
        elif victim == TARGET:
            self.child.kill()
        elif victim == SOURCE:
            os.kill(os.getppid(), signal.SIGKILL)
        elif victim == OPERATOR:
            os.kill(os.getppid(), signal.SIGINT)
        elif victim in (HERE, THERE):
            os.kill(self.plan["source" if victim == HERE else "parent"], signal.SIGKILL)
        else:
            for pid, title in descendants(self.plan["parent"]).items():
                if title == f"vmd: vm/{self.name}":
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        return bool(victim == TARGET)

    def run(self) -> int:
        """Pass on; returns the exit status of the other side."""
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        there, back = self.child.stdin.fileno(), self.child.stdout.fileno()
        poll = select.poll()
        poll.register(0, select.POLLIN)
        poll.register(back, select.POLLIN)
        timeout: float | None = None
        while True:
            ready = [fd for fd, _ in poll.poll(timeout)]
            if not ready:
                self.cut("later")
                timeout = None
            if back in ready:
                data = os.read(back, PIECE)
                if not data:
                    return self.child.wait()
                self._back(data)
            elif 0 in ready:
                data = os.read(0, PIECE)
                if not data:
                    poll.unregister(0)
                    self.child.stdin.close()
                    continue
                if COMMIT in data:
                    self.cut("before commit")
                    timeout = self.plan.get("later_ms", 0)
                with contextlib.suppress(OSError):
                    self._there(there, back, data)
                if COMMIT in data:
                    self.cut("after commit")

    def _there(self, fd: int, back: int, data: bytes) -> None:
        """Pass on a piece of the stream; whoever is to read it may have ended, and have left it open to others."""
        os.set_blocking(fd, False)
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        poll.register(back, select.POLLIN)
        view = memoryview(data)
        while view:
            ready = [each for each, _ in poll.poll()]
            if back in ready:
                said = os.read(back, PIECE)
                if not said:
                    os._exit(self.child.wait())
                self._back(said)
            else:
                view = view[os.write(fd, view) :]
        self.passed_bytes += len(data)
        if self.passed_bytes >= self.plan.get("bytes", 0):
            self.cut("stream")

    def _back(self, data: bytes) -> None:
        for line in data.splitlines(keepends=True):
            at = json.loads(line)["at"]
            if self.cut(f"before {at}"):
                return  # it has not said that, either
            with contextlib.suppress(BrokenPipeError):
                os.write(1, line)
            self.cut(f"after {at}")


if __name__ == "__main__":
    sys.exit(Shell(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2:]).run())
