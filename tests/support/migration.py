"""vmctl migrate between two daemons of this host, with a replacement of ssh that can interrupt the migration.

As a program it is the remote shell, `migration.py PLAN HOST vmctl receive ...`.  It runs that vmctl with the socket in
the plan and passes on the data of both ends.  At the place in the plan it kills the plan's victim.
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
# Places of an interruption: in the stream, and before and after each message of either side is passed on.
BEFORE_COMMIT = ("stream", "before asked", "after asked", "before complete")
AROUND_COMMIT = ("after complete", "before commit", "after commit", "later", "before running", "after running")
NOWHERE = "nowhere"
PLACES = (*BEFORE_COMMIT, *AROUND_COMMIT, *[NOWHERE] * 3)
SHELL, TARGET, SOURCE, GUEST, OPERATOR, HERE, THERE = (
    "shell", "target", "source", "guest", "operator", "daemon here", "daemon there"
)  # fmt: skip
# The connection; one of the two vmctl; the VM's process at the target; the source's vmctl by a typed ^C; or a daemon,
# whose successor takes over its VMs.
VICTIMS = (SHELL, TARGET, SOURCE, GUEST, OPERATOR, HERE, THERE)
# The target's daemon is killed, but its vmctl has said that it has everything: the source goes on to the commit.
ONLY_SEEN_LATER = ("before complete", THERE)


class Plan:
    """The file with the shell's orders, and the command that runs the shell."""

    def __init__(self, path: Path, into: "Daemon", *, out_of: "Daemon | None" = None, **cut: object) -> None:
        """`cut`: `place`, `victim`, `bytes` of the stream, `later_ms` after the commit."""
        cut["source"] = out_of.pid if out_of is not None else 0
        self.path = path
        plan = {"socket": str(into.socket), "code": str(into.code), "parent": into.pid, **cut}
        path.write_text(json.dumps(plan))

    @property
    def command(self) -> str:
        """The argument of `vmctl migrate -e`."""
        return f"{sys.executable} {Path(__file__).resolve()} {self.path}"


def descendants(pid: int) -> dict[int, str]:
    """Return the descendants of a process with their titles."""
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
    """The remote shell."""

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
        """Kill the victim if this is the plan's place; return whether the victim was the target's vmctl."""
        if self.plan.get("place") != place:
            return False
        self.plan["place"] = ""
        victim = self.plan["victim"]
        if victim == SHELL:
            os._exit(255)  # the child sees the end of its descriptors
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
        """Pass on data in both directions; return the exit status of the target's vmctl."""
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
        """Pass on a piece of the stream.  Its reader may have ended while other processes still hold the pipe open."""
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
                return  # the killed target did not send this message
            with contextlib.suppress(BrokenPipeError):
                os.write(1, line)
            self.cut(f"after {at}")


if __name__ == "__main__":
    sys.exit(Shell(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2:]).run())
