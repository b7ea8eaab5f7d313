"""Starting processes: what they find, how they end, and what is told about those that cannot be started."""

import errno
import importlib
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from vmd.errors import HostError, VmdError
from vmd.privsep import cellfiles, spawn, start

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
        "session": os.getsid(0) == os.getpid(), "path": sys.path, "umask": status["Umask"],
        "no_new_privs": status["NoNewPrivs"],
    }
    with socket.socket(fileno=3) as channel:
        channel.sendall(json.dumps(answer).encode())
    return 7

def wait():
    sys.stdin.read()
    os.read(3, 1)
'''


@pytest.mark.parametrize(
    ("used", "between"),
    [
        ([0, 1, 2], [(3, 0x7FFFFFFF)]),
        ([0, 1, 2, 3, 7], [(4, 6), (8, 0x7FFFFFFF)]),
        ([0, 2], [(1, 1), (3, 0x7FFFFFFF)]),
    ],
)
def test_gaps_between_descriptors(used: list[int], between: list[tuple[int, int]]) -> None:
    """Each descriptor that is not used is in one of the ranges."""
    assert spawn.gaps(used) == between


def test_interpreter_is_the_real_one() -> None:
    """The link of a virtual environment is not started, because the cell has none."""
    assert os.path.realpath(spawn.INTERPRETER) == spawn.INTERPRETER
    assert os.access(spawn.INTERPRETER, os.X_OK)


def test_missing_package_is_named() -> None:
    """The error names a dependency that is not installed."""
    with pytest.raises(VmdError, match="python package nosuchpackage is not installed"):
        cellfiles.import_path(("vmd", "nosuchpackage"))


def test_import_path_names_each_directory_once() -> None:
    """Packages in the same directory need one entry."""
    assert cellfiles.import_path(("vmd", "vmctl")) == (
        os.path.dirname(os.path.dirname(cellfiles.package_directory("vmd.privsep"))),
    )


def test_cell_code_has_byte_code_for_every_module() -> None:
    """Processes in the cell neither compile nor write: each source has unchecked byte code."""
    files = dict(cellfiles.package_files("vmd"))
    sources = {path for path in files if path.endswith(".py")}

    assert "/vmd/vmd/privsep/cell.py" in sources
    for path in sources:
        directory, name = os.path.split(path)
        pyc = files[f"{directory}/__pycache__/{name[:-3]}.cpython-{sys.version_info[0]}{sys.version_info[1]}.pyc"]
        assert pyc[4:8] == b"\1\0\0\0"


def test_libraries_have_the_names_the_loader_asks_for() -> None:
    """The C library and the dynamic loader are among them.  Our extension modules are not."""
    names = cellfiles.loaded_libraries([cellfiles.package_directory("msgpack")])

    assert any(os.path.basename(name).startswith("ld-") for name in names)
    assert any(os.path.basename(name).startswith("libc.") for name in names)
    assert not any("msgpack" in name for name in names)


def test_extensions_of_other_interpreters_are_left_out() -> None:
    """They are neither loaded nor copied.  An extension for any version is."""
    ours = f"_c.cpython-{sys.version_info[0]}{sys.version_info[1]}-x86_64-linux-gnu.so"

    assert [cellfiles.is_extension(name) for name in (ours, "_c.abi3.so", "_c.so")] == [True, True, True]
    assert not cellfiles.is_extension("_c.cpython-36m-x86_64-linux-gnu.so")
    assert not cellfiles.is_extension("libc.so.6")


def test_modules_beside_our_packages_do_not_hide_the_standard_library(tmp_path: Path) -> None:
    """Our path may be a directory of the distribution that contains any module, such as a back-port."""
    (tmp_path / "bisect.py").write_text("import os\nos._exit(3)\n")
    (tmp_path / "probe.py").write_text("import bisect\n\n\ndef main():\n    return bisect.bisect([1, 2], 3)\n")

    child = spawn.spawn("probe", import_path=(str(tmp_path), *cellfiles.import_path(("vmd",))), entry="probe:main")

    assert child.reap(60) == 2


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("vmd.privsep.start", "CHANNEL_FD CODE_FD"),
        ("vmd.ipc.logpair", "JOURNAL_FD"),
        ("vmd.ipc.holdermsg", "FD_ANSWER FD_PROC"),
        ("vmd.vm.streamprobe", "FD_ANSWER FD_STREAM"),
        ("vmd.parent.children", "LOCK_FD"),
    ],
)
def test_places_of_descriptors(module: str, names: str) -> None:
    """No descriptor of a process takes the place of standard input, output or error, or of another one."""
    numbers = [getattr(importlib.import_module(module), name) for name in names.split()]
    assert min(numbers) >= 3
    assert len(set(numbers) | {start.CHANNEL_FD}) == len(numbers) + (start.CHANNEL_FD not in numbers)
    assert max(numbers) < spawn.FD_TARGETS


# --- what a process finds ----------------------------------------------------------------------------------------


@pytest.fixture
def paths(tmp_path: Path) -> tuple[str, ...]:
    """The path of a module that says what it finds."""
    (tmp_path / "probe.py").write_text(PROBE)
    return (str(tmp_path), *cellfiles.import_path(("vmd",)))


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
    shown = probed(paths, "x" * 9000)["cmdline"]  # nothing of the environment follows
    assert (shown[:5], set(shown[5:].rstrip("\0"))) == ("vmd: ", {"x"})


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
    assert (found["umask"], found["no_new_privs"]) == ("0077", "1")
    assert place.prepared == 1


@pytest.mark.parametrize(("before", "after"), [("-500", "0"), ("-1", "0"), ("0", "0"), ("300", "300")])
def test_a_process_that_is_not_vital_is_not_protected(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before: str, after: str
) -> None:
    """When memory runs out, the kernel ends it before the parent.  Its score is only raised."""
    score = tmp_path / "score"
    score.write_text(f"{before}\n")
    monkeypatch.setattr(spawn, "open", lambda _path, mode, encoding: score.open(mode, encoding=encoding), raising=False)
    spawn.raise_oom_score()
    assert score.read_text().startswith(after)
    score.unlink()
    spawn.raise_oom_score()


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
