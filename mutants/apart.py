"""A copy of the checkout in which a module is changed, and isolated processes that run its tests.

A changed program may kill, mount and remove the wrong things.  So, as root, the tests run in their own process, mount
and network namespaces, and everything that they leave behind ends with these.
"""

import contextlib
import ctypes
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.util import cache_from_source
from pathlib import Path
from types import TracebackType

LEFT_OUT = {".git", ".venv", "build", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"}
LINKS = (".venv", "build")  # symbolic links from the copy to the checkout
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = 1 << 17, 1 << 26, 1 << 27, 1 << 29, 1 << 30
MS_REC, MS_PRIVATE = 1 << 14, 1 << 18
PR_SET_PDEATHSIG = 1
MEMORY_MAX = 8 << 30  # bytes; a change may make a loop endless
FAILED = 113  # no status of pytest, and none with which vmd's own code ends a process
libc = ctypes.CDLL(None, use_errno=True)


class Copy:
    """A copy of the checkout in the folder `top`."""

    def __init__(self, top: Path) -> None:
        self.source = top
        self.folder = Path(tempfile.mkdtemp(prefix="vmd-mutants-"))
        self.folder.chmod(0o755)  # processes without privileges read it
        self.top = self.folder / "vmd"

    def __enter__(self) -> "Copy":
        """Make the copy, including byte code."""
        shutil.copytree(self.source, self.top, symlinks=True, ignore=lambda _folder, names: LEFT_OUT & set(names))
        for name in LINKS:
            if (self.source / name).exists():
                (self.top / name).symlink_to((self.source / name).resolve())
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        """Remove the copy."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, module: str, source: bytes) -> None:
        """Write a module's source.  Remove its byte code, because the modification times may be equal."""
        Path(cache_from_source(str(self.top / module))).unlink(missing_ok=True)
        (self.top / module).write_bytes(source)


def run(work: Callable[[], int], top: Path, output: Path, deadline_s: float) -> int | None:
    """Run `work` in a new process in the folder `top`.  Return its result, or None if the deadline passes.

    Its output goes to the file `output`.  A busy machine makes the deadline later: time in which the processes were
    ready to run, but others ran, does not count.
    """
    child = os.fork()
    if child == 0:
        _be(lambda: _first(work, top, output))
    begun = time.monotonic()
    pidfd = os.pidfd_open(child)
    left_s, ended = deadline_s, False
    try:
        while not ended and left_s > 0:
            ended = bool(select.select([pidfd], [], [], left_s)[0])
            left_s = deadline_s - (time.monotonic() - begun - _delay_s(child))
    finally:
        os.close(pidfd)
        if not ended:
            os.killpg(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if ended else None


def _delay_s(group: int) -> float:
    """Return the longest time that a process of the group has waited for a processor, in seconds."""
    found = 0.0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((process / "stat").read_text().rpartition(") ")[2].split()[2]) == group:
                found = max(found, int((process / "schedstat").read_text().split()[1]) / 1e9)
    return found


def _be(work: Callable[[], int]) -> None:
    """Run `work`, and end this process with its result as the exit status."""
    status = FAILED
    try:
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _fork(work: Callable[[], int]) -> int:
    child = os.fork()
    if child == 0:
        _be(work)
    return child


def _status(raw: int) -> int:
    """Return an exit status as a shell does: a signal is 128 and its number."""
    status = os.waitstatus_to_exitcode(raw)
    return status if status >= 0 else 128 - status


def _first(work: Callable[[], int], top: Path, output: Path) -> int:
    """Be the leader of the process group, which is killed when the deadline passes."""
    os.setsid()
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_MAX, MEMORY_MAX))
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(written, 1)
    os.dup2(written, 2)
    os.chdir(top)
    sys.path[0] = str(top)
    if os.geteuid() != 0:
        return work()
    _call("unshare", CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET)
    return _status(os.waitpid(_fork(lambda: _second(work)), 0)[1])


def _second(work: Callable[[], int]) -> int:
    """Be the first process of the namespace, which adopts and reaps orphans."""
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    _call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    _call("mount", b"proc", b"/proc", b"proc", 0, None)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    child = _fork(work)
    while True:
        pid, raw = os.wait()
        if pid == child:
            return _status(raw)


def _call(name: str, *arguments: int | bytes | None) -> None:
    if getattr(libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
