"""What a started process finds: its name, its descriptors, its signals; and the end of its starter."""

import errno
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmd import signals
from vmd.errors import HostError, VmdError
from vmd.privsep import linux, spawn, start
from vmd.privsep.cellfiles import import_path

DEADLINE_S = 60.0
TITLE = "vm/a-rather-long-name/vioblk0"
PROBE = '''
import ctypes, json, os, socket, sys

def asked(option):
    value = ctypes.c_int()
    returned = ctypes.CDLL(None).prctl(option, ctypes.byref(value))
    return value.value if option == 2 else returned

def main():
    def read(name):
        with open(f"/proc/self/{name}") as file:
            return file.read()
    fds = {}
    for fd in range(0, 1000):
        try:
            fds[fd] = os.get_inheritable(fd)
        except OSError:
            pass
    status = dict(line.split(":\\t", 1) for line in read("status").splitlines() if ":\\t" in line)
    answer = {
        "comm": read("comm").rstrip("\\n"), "cmdline": read("cmdline"), "fds": fds, "argv": sys.argv,
        "death": asked(2), "dumpable": asked(3), "ignored": status["SigIgn"], "blocked": status["SigBlk"],
        "session": os.getsid(0) == os.getpid(), "path": sys.path,
    }
    with socket.socket(fileno=3) as channel:
        channel.sendall(json.dumps(answer).encode())
    return 7

def wait():
    sys.stdin.read()
    os.read(3, 1)
'''


@pytest.fixture
def paths(tmp_path: Path) -> tuple[str, ...]:
    """The path of a module that says what it finds."""
    (tmp_path / "probe.py").write_text(PROBE)
    return (str(tmp_path), *import_path(("vmd",)))


def probed(paths: tuple[str, ...], title: str = TITLE, fds: dict[int, int] | None = None) -> dict[str, Any]:
    """Start the module, and return what it has found."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            child = spawn.spawn(
                title, ["one", "two"], channel=theirs, fds=fds, import_path=paths, entry="probe:main"
            )
        with ours.makefile() as reader:
            found: dict[str, Any] = json.loads(reader.read() or "{}")
        assert child.reap(DEADLINE_S) == 7
    return found


def test_a_process_has_its_name(paths: tuple[str, ...]) -> None:
    """The short name of the kernel has the end, which tells more.  No arguments and no padding are left."""
    found = probed(paths)

    assert found["cmdline"].rstrip("\0") == "vmd: vm/a-rather-long-name/vioblk0"
    assert found["comm"] == "ng-name/vioblk0"
    assert found["argv"] == ["vmd", "one", "two"]
    assert probed(paths, "x" * 9000)["cmdline"].startswith("vmd: xxx")


def is_inheritable(fd: int) -> bool:
    """Return whether a descriptor is open and passed on to programs."""
    try:
        return os.get_inheritable(fd)
    except OSError:
        return False


def test_a_process_has_the_named_descriptors_only(paths: tuple[str, ...], tmp_path: Path) -> None:
    """Those from 3 on are not passed on to programs that it starts."""
    passed_on = {fd for fd in range(1000) if is_inheritable(fd)}  # of the program that has started the tests
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        found = {int(fd): inheritable for fd, inheritable in probed(paths, fds={5: folder, 8: 1})["fds"].items()}
    finally:
        os.close(folder)

    assert {3, 5, 8} <= found.keys() <= {0, 1, 2, 3, 5, 8} | passed_on
    assert {fd for fd, inheritable in found.items() if inheritable} == {0, 1, 2}


def test_a_process_is_in_order(paths: tuple[str, ...]) -> None:
    """Signals have their usual effect; it dies with its starter, cannot be traced, and leads a session."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        found = probed(paths)
    finally:
        signal.signal(signal.SIGUSR1, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    ignored = {number for number in range(1, 32) if int(found["ignored"], 16) >> number - 1 & 1}
    assert ignored == {signal.SIGPIPE, signal.SIGXFSZ}  # by Python
    assert int(found["blocked"], 16) == 0
    assert (found["death"], found["dumpable"], found["session"]) == (signal.SIGKILL, 0, True)
    assert found["path"][-len(paths):] == list(paths)


# --- its owner ----------------------------------------------------------------------------------------------------


def waiting(paths: tuple[str, ...]) -> tuple[spawn.Child, socket.socket]:
    """Start a process that waits until a socket is closed."""
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            return spawn.spawn("waiting", channel=theirs, import_path=paths, entry="probe:wait"), ours
    except HostError:
        ours.close()
        raise


def test_a_child_is_killed_and_reaped(paths: tuple[str, ...]) -> None:
    """The status says by which signal.  Its descriptor is closed, and another signal has no effect."""
    child, channel = waiting(paths)
    with channel:
        assert child.reap() is None
        assert child.fileno() == child.pidfd >= 0
        child.kill()
        assert child.reap(DEADLINE_S) == -signal.SIGKILL

    assert (child.killed, child.fileno()) == (True, -1)
    child.kill()


def test_a_child_that_has_ended_is_not_killed(paths: tuple[str, ...]) -> None:
    """It may not be reaped yet."""
    child, channel = waiting(paths)
    child.kill(signal.SIGCONT)
    assert not child.killed
    channel.close()
    os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOWAIT)
    child.kill(signal.SIGTERM)

    assert child.reap(DEADLINE_S) == 0
    assert not child.killed


def test_a_process_that_cannot_be_watched_is_killed(monkeypatch: pytest.MonkeyPatch, paths: tuple[str, ...]) -> None:
    """Nothing is left of it, and the error names the call."""
    started: list[int] = []

    def refuse(pid: int) -> int:
        started.append(pid)
        raise OSError(38, "not implemented")

    monkeypatch.setattr(os, "pidfd_open", refuse)

    with pytest.raises(HostError, match=r"watch waiting by pidfd_open\(2\)"):
        waiting(paths)

    with pytest.raises(ChildProcessError):
        os.waitpid(started[0], 0)


def test_failed_starts_are_named(monkeypatch: pytest.MonkeyPatch, paths: tuple[str, ...]) -> None:
    """No descriptor stays open."""
    before = os.listdir("/proc/self/fd")

    with pytest.raises(HostError, match="prepare descriptors for probe"):
        spawn.spawn("probe", fds={5: 999}, import_path=paths)
    monkeypatch.setattr(spawn, "INTERPRETER", "/no/such/program")
    with pytest.raises(HostError, match="start probe"):
        spawn.spawn("probe", import_path=paths)

    assert os.listdir("/proc/self/fd") == before


# --- the first code of a process ----------------------------------------------------------------------------------


class Steps:
    """The steps of `begin`, without effect."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: list[tuple[object, ...]] = []
        for name in ("become_user", "close_on_exec_from", "prctl", "die_with_parent"):
            monkeypatch.setattr(linux, name, self._step(name))
        monkeypatch.setattr(start, "set_title", self._step("title"))
        monkeypatch.setattr(sys, "argv", ["-c"])

    def _step(self, name: str) -> Callable[..., None]:
        return lambda *arguments: self.taken.append((name, *arguments))

    def names(self) -> list[object]:
        """Return the names of the steps."""
        return [name for name, *_ in self.taken]


def test_the_user_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user has no parent death signal and may be traced, until both are set again."""
    steps = Steps(monkeypatch)

    start.begin("vm/a", os.getppid(), uid=5)

    assert steps.taken[0] == ("become_user", 5, 5, 0)
    assert ("die_with_parent", signals.SIGKILL) in steps.taken
    assert ("close_on_exec_from", 3) in steps.taken
    assert steps.taken[-1] == ("title", "vm/a")


def test_a_process_without_a_user_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was given one between fork and exec."""
    steps = Steps(monkeypatch)

    start.begin("vm/a", os.getppid())

    assert "become_user" not in steps.names()


def test_a_process_whose_starter_has_ended_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal would not come any more."""
    Steps(monkeypatch)

    with pytest.raises(SystemExit) as ended:
        start.begin("vm/a", os.getppid() + 1)

    assert ended.value.code == 1


def test_a_process_may_outlive_its_starter(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not look for it either."""
    steps = Steps(monkeypatch)

    start.begin("vmm", None)

    assert "die_with_parent" not in steps.names()


def test_a_process_joins_its_control_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 means the writing process.  The descriptor is closed, because it lets its owner move others."""
    steps = Steps(monkeypatch)
    reading, writing = os.pipe()

    start.begin("vm/a", os.getppid(), group_fd=writing)

    assert os.read(reading, 10) == b"0"
    assert os.read(reading, 10) == b""
    assert steps.names()
    os.close(reading)


# --- processes in a place -----------------------------------------------------------------------------------------


class Here:
    """A place that takes nothing away."""

    code_fd = -1
    own_pids = False

    def __init__(self, paths: tuple[str, ...], error: BaseException | None = None, *, vital: bool = True) -> None:
        self.import_path = paths
        self.vital = vital
        self.error = error
        self.prepared = 0

    def prepare(self) -> None:
        """Count the calls."""
        self.prepared += 1

    def enter(self) -> None:
        """Fail, if the test says so."""
        if self.error is not None:
            raise self.error


def probed_in(place: Here, *, outlives: bool = False) -> dict[str, Any]:
    """Start the module in a place, and return what it has found."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            child = spawn.spawn(TITLE, ["one"], channel=theirs, place=place, entry="probe:main", outlives=outlives)
        with ours.makefile() as reader:
            found: dict[str, Any] = json.loads(reader.read() or "{}")
        assert child.reap(DEADLINE_S) == 7
    return found


@pytest.mark.parametrize("vital", [False, True])
def test_a_process_in_a_place_is_in_order(paths: tuple[str, ...], vital: bool) -> None:
    """As one that is started without a fork of Python.  It gets no other descriptors, even inheritable ones."""
    place = Here(paths, vital=vital)
    other = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(other, True)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        found = probed_in(place)
    finally:
        os.close(other)
        signal.signal(signal.SIGUSR1, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    assert found["fds"] == {"0": True, "1": True, "2": True, "3": False}
    assert int(found["blocked"], 16) == 0
    assert (found["death"], found["dumpable"], found["session"]) == (signal.SIGKILL, 0, True)
    assert found["path"][-len(paths) :] == list(paths)
    assert place.prepared == 1


def test_a_process_in_a_place_may_outlive_its_starter(paths: tuple[str, ...]) -> None:
    """vmm does, for its guests."""
    assert probed_in(Here(paths), outlives=True)["death"] == 0


@pytest.mark.parametrize(
    ("error", "kind", "words", "number"),
    [
        (HostError("enter the cell", errno.EACCES), HostError, "enter the cell", errno.EACCES),
        (OSError(errno.ENOENT, "no", "/the/file"), HostError, "/the/file", errno.ENOENT),
        (OSError(errno.EPERM, "no"), HostError, "prepare the process", errno.EPERM),
        (ValueError("a bug"), VmdError, "ValueError", errno.EINVAL),
        (SystemExit(0), VmdError, "SystemExit", errno.EINVAL),
    ],
)
def test_a_place_that_cannot_be_entered(
    monkeypatch: pytest.MonkeyPatch, paths: tuple[str, ...], error: BaseException, kind: type[VmdError], words: str,
    number: int,
) -> None:  # fmt: skip
    """The starter gets the reason.  No process and no descriptor is left."""
    before, pids, fork = os.listdir("/proc/self/fd"), [], os.fork

    def forked() -> int:
        pids.append(fork())
        return pids[-1]

    monkeypatch.setattr(os, "fork", forked)

    with pytest.raises(kind, match=f"start {TITLE}: {words}") as failed:
        spawn.spawn(TITLE, place=Here(paths, error))

    assert failed.value.number == number
    assert os.listdir("/proc/self/fd") == before
    with pytest.raises(ChildProcessError):
        os.waitpid(pids[0], os.WNOHANG)
