"""Tries each confinement from inside a real process, started as vmd starts its own processes (see `insider`)."""

import contextlib
import errno
import io
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.process.insider import DATA_FD, VICTIM_FD
from tests.support.cells import HERE, PACKAGES, USER, insider_cell
from vmd.config.model import DEFAULT_FIRST_ID, IDS
from vmd.errors import HostError
from vmd.privsep import landlock, linux
from vmd.privsep.cell import Cell, LockholderCell
from vmd.privsep.cellfiles import import_path
from vmd.privsep.hostfiles import HostFiles
from vmd.privsep.spawn import DEBUG, INTERPRETER, Child, spawn

pytestmark = pytest.mark.root

ROOT = HERE.parents[1]
ENTRY = "insider:main"
DEADLINE_S = 60.0
KILLED = -signal.SIGSYS
LEAVES = (
    "LEAF", "VIOBLK", "VIONET", "VIONET_KERNEL", "IMGPROBE", "IMGBOOT", "IMGRESIZE", "IMGWRITER", "BOOTPROBE",
    "STREAMPROBE", "CONTROL",
    "LOG", "AGENTX", "CONSOLELOG", "METRICS", "SEEDER",
)  # fmt: skip
NARROWED = (*LEAVES, "VM")
REACHES_SIGNALS = landlock.abi() >= landlock.SCOPE_SINCE
# The head of tests that run in an interpreter of their own, because they are killed, enter namespaces, or run a copy
# of the code.
SCRIPT_HEAD = """
import os, select, socket, sys
sys.path[:0] = {path!r}
from vmd.privsep import linux
from vmd.privsep.cell import Cell
from vmd.privsep.privplace import PrivPlace
from vmd.privsep.spawn import spawn
def ask(place, *arguments, fds=None, import_path=None):
    ours, theirs = socket.socketpair()
    child = spawn("insider", arguments, channel=theirs, fds=fds, place=place, entry="insider:main",
                  import_path=import_path)
    theirs.close()
    with ours.makefile() as answers:
        return answers.read(), child.reap(60)
"""


@pytest.fixture(scope="module")
def cell() -> Iterator[Cell]:
    """Give a cell that contains vmd and the insider."""
    built = insider_cell()
    yield built
    built.close()


class Run:
    """The answers, the exit status and the log of a process that has ended."""

    def __init__(self, answers: str, status: int | None, log: str) -> None:
        self.lines = answers.splitlines()
        self.status = status
        self.log = log

    @property
    def answers(self) -> list[str]:
        """The answers that it gave after it was confined."""
        assert self.lines, self.log
        assert self.lines[0].endswith(" confined"), self.log
        return self.lines[1:]


class Fate(NamedTuple):
    """The answers and the exit status of a confined process."""

    answers: list[str]
    status: int


KILLED_AT_ONCE = Fate([], KILLED)


def try_each(
    place: Cell | HostFiles, kind: str, attempts: Sequence[str], paths: tuple[str, ...] | None = None
) -> dict[str, Fate]:
    """Run a process with that confinement for each attempt.  An attempt may consist of several, joined by "+"."""
    run = try_inside(place, "each", kind, *attempts, paths=paths)
    assert run.status == 0, run.log
    fates: dict[str, Fate] = {}
    answers: list[str] = []
    for line in run.lines:
        name, _, status = line.partition(" ended ")
        if status:
            assert answers[:1] == [f"{kind} confined"], run.log
            fates[name], answers = Fate(answers[1:], int(status)), []
        else:
            answers.append(line)
    return fates


def try_inside(place: Cell | HostFiles | None, kind: str, *attempts: str, paths: tuple[str, ...] | None = None) -> Run:
    """Run a process with that confinement, which makes all attempts.  It also holds a pidfd of a victim, and a file."""
    ours, theirs = socket.socketpair()
    with lines_of_a_process() as (log, writer), tempfile.TemporaryFile() as data, ours:
        data.write(b"hello")
        data.flush()
        victim = os.pidfd_open(os.getpid())
        child = spawn(
            f"insider/{kind}",
            [kind, *attempts],
            channel=theirs,
            fds={VICTIM_FD: victim, DATA_FD: data.fileno()},
            log_fd=writer.fileno(),
            place=place,
            import_path=paths,
            entry=ENTRY,
        )
        os.close(victim)
        theirs.close()
        writer.close()
        with ours.makefile() as reader:
            answers = reader.read()
        status = child.reap(DEADLINE_S)
        return Run(answers, status, log.read().decode())


@contextlib.contextmanager
def lines_of_a_process() -> Iterator[tuple[io.FileIO, io.FileIO]]:
    """Give both ends of a pipe for the log of a process, because some confinements forbid writing to a file."""
    reader, writer = os.pipe()
    with open(reader, "rb", 0) as log, open(writer, "wb", 0) as lines:
        yield log, lines


def run_script(body: str, path: list[str] | None = None, interpreter: str = INTERPRETER) -> str:
    """Run Python code that can import vmd, msgpack and the insider; return its output."""
    path = path or [str(HERE), *import_path(("vmd", "msgpack", "pyroute2"))]
    done = subprocess.run(
        [interpreter, "-I", "-S", "-c", SCRIPT_HEAD.format(path=path) + body],
        capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- the cell, before any filter ----------------------------------------------------------------------------------


def test_cell_refuses_access_to_the_host(cell: Cell) -> None:
    """Without any filter, the namespaces and the user refuse all access to the host.  No attempt is killed."""
    attempts = {
        "open_passwd": errno.ENOENT,
        "write_code": errno.EACCES,
        "create_file": errno.EROFS,
        "connect_inet": errno.ENETUNREACH,
        "connect_unix": errno.ENOENT,
        "raw_packets": errno.EPERM,
        "mount": errno.EPERM,
        "change_root": errno.EPERM,
        "become_root": errno.EPERM,
        "unshare_net": errno.EPERM,
        "kill_victim": errno.EPERM,
        "fork_by_vfork": errno.ENOENT,
    }

    run = try_inside(cell, "-", *attempts)

    assert run.answers == [f"{name} errno {code}" for name, code in attempts.items()]


def test_cell_holds_the_interpreter_and_our_code_only(cell: Cell) -> None:
    """The root has no directory of the host.  The directory of the code has only the named packages."""
    run = try_inside(cell, "-", "tree")

    top = {Path(path).parts[1] for path in (INTERPRETER, os.__file__)} | {"vmd", "dev", "etc", ".empty"}
    libraries = {"lib", "lib32", "lib64", "usr", "nix"}
    shown = eval(run.answers[0].removeprefix("tree done "))
    code = shown[-len(PACKAGES) :]
    assert set(code) == set(PACKAGES)
    assert set(shown[: -len(PACKAGES)]) <= top | libraries


def test_cell_has_what_our_processes_import(cell: Cell) -> None:
    """The compiled msgpack and the extension modules find their libraries."""
    run = try_inside(cell, "-", "compiled_msgpack", "modules")

    assert run.answers == [
        "compiled_msgpack done msgpack._cmsgpack",
        "modules done ['hashlib', 'termios', 'zlib']",
    ]


def test_identity_in_the_cell(cell: Cell) -> None:
    """All three ids are the user's, without groups of root or capabilities.  The working directory is `/`."""
    uid, gid = USER.pw_uid, USER.pw_gid
    before = os.getgroups()
    os.setgroups([0, 6])
    try:
        run = try_inside(cell, "-", "identity", "capabilities", "environment")
    finally:
        os.setgroups(before)

    assert run.answers == [
        f"identity done {(uid,) * 3} {(gid,) * 3} [] /",
        "capabilities done 0",
        "environment done ['LC_ALL', 'MALLOC_ARENA_MAX', 'PATH']",
    ]


# --- filters: calls that kill, fail or work -----------------------------------------------------------------------

KILLS = (
    "connect_inet", "connect_unix", "raw_packets", "send_elsewhere", "execute", "fork", "fork_by_vfork",
    "clone_namespace", "trace_me", "read_other_memory", "io_uring", "bpf", "userfault", "foreign_ioctl", "kvm_ioctl",
    "executable_mmap", "executable_mprotect", "mount", "change_root", "become_root", "unshare_net", "unshare_user",
    "kill_parent", "tgkill_other", "x32", "another_filter", "become_traceable", "limit_others", "more_descriptors",
    "end_appending",
)  # fmt: skip
VMM_KILLS = (
    "connect_inet", "connect_unix", "raw_packets", "clone_namespace", "trace_me", "read_other_memory", "io_uring",
    "bpf", "userfault", "foreign_ioctl", "mount", "change_root", "unshare_net", "unshare_user",
    "kill_parent", "x32", "limit_others", "end_appending",
)  # fmt: skip


NOT_RAISED = Fate([f"more_descriptors errno {errno.EPERM}"], 0)  # the kernel refuses it; the process continues


@pytest.mark.parametrize("kind", [*LEAVES[1:], "VM", "LOCKHOLDER"])
def test_forbidden_call_kills(cell: Cell, kind: str) -> None:
    """SIGSYS kills a process that makes a forbidden call.  A device may only lower its limits."""
    fates = dict.fromkeys(KILLS, KILLED_AT_ONCE)
    if kind in ("VIOBLK", "VIONET", "VIONET_KERNEL", "IMGWRITER", "IMGBOOT"):
        fates["more_descriptors"] = NOT_RAISED

    assert try_each(cell, kind, KILLS) == fates


def test_a_packet_socket_leads_to_one_interface_only(cell: Cell) -> None:
    """The filter kills for an address and for a socket option, because both could lead to another interface."""
    attempts = ("send_elsewhere", "send_with_an_address", "set_an_option")

    assert try_each(cell, "VIONET_KERNEL", attempts) == dict.fromkeys(attempts, KILLED_AT_ONCE)


def test_forbidden_call_kills_a_vm_that_is_being_built(cell: Cell) -> None:
    """Its filter differs from that of a running VM: it may narrow its requests to KVM once, and lower its limits."""
    attempts = [attempt for attempt in KILLS if attempt not in ("more_descriptors", "another_filter")]
    once = "narrow_requests+another_filter"

    fates = try_each(cell, "VM_BUILDING", [*attempts, once])

    assert fates == {**dict.fromkeys(attempts, KILLED_AT_ONCE), once: Fate(["narrow_requests done None"], KILLED)}


def test_a_vm_that_is_being_built_cannot_raise_its_limits(cell: Cell) -> None:
    """Its filter allows the call, so that it can lower them.  The kernel refuses to raise them."""
    run = try_inside(cell, "VM_BUILDING", "more_descriptors")

    assert (run.answers, run.status) == NOT_RAISED


def test_a_vm_can_signal_no_process(cell: Cell) -> None:
    """It is killed for a signal, even if it holds a pidfd of the process."""
    assert try_inside(cell, "VM_BUILDING", "kill_victim").status == KILLED


def test_forbidden_call_kills_vmm(cell: Cell) -> None:
    """The list is shorter than that of the other processes, because vmm may start processes."""
    assert try_each(cell, "VMM", VMM_KILLS) == dict.fromkeys(VMM_KILLS, KILLED_AT_ONCE)


OPENER_KILLS = (
    "connect_inet", "connect_unix", "raw_packets", "execute", "fork", "trace_me", "bpf", "foreign_ioctl", "mount",
    "change_root", "unshare_user", "kill_parent", "another_filter", "become_traceable", "remove_outside",
)  # fmt: skip


def test_an_opener_does_nothing_but_open_files() -> None:
    """A forbidden call kills it, also if it is root."""
    fates = try_each(HostFiles(-1), "OPENER", OPENER_KILLS, paths=(str(HERE), *import_path(("vmd", "msgpack"))))

    assert fates == dict.fromkeys(OPENER_KILLS, KILLED_AT_ONCE)


def test_an_opener_opens_files_and_nothing_else() -> None:
    """It can create no file, and list no directory."""
    attempts = ("open_passwd", "create_outside", "list_root")

    run = try_inside(HostFiles(-1), "OPENER", *attempts, paths=(str(HERE), *import_path(("vmd", "msgpack"))))

    assert re.match(r"open_passwd done \d+$", run.answers[0])
    refused = [f"{name} errno {errno.EACCES}" for name in ("create_outside", "list_root")] if landlock.abi() else []
    assert run.answers[1:] == refused or not refused


def test_a_logfile_does_nothing_but_open_files() -> None:
    """A forbidden call kills it, also if it is root."""
    attempts = [attempt for attempt in OPENER_KILLS if attempt != "become_traceable"]

    fates = try_each(HostFiles(-1), "LOGFILE", attempts, paths=(str(HERE), *import_path(("vmd", "msgpack"))))

    assert fates == dict.fromkeys(attempts, KILLED_AT_ONCE)


@pytest.mark.skipif(not landlock.abi(), reason="no landlock")
def test_a_logfile_has_one_directory(tmp_path: Path) -> None:
    """It can create, rename and remove files in its directory, but not outside.  It can read no file at all."""
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "old").write_bytes(b"old")
    tried = run_script(
        f"""
from vmd.logfile.main import stay_in
directory = os.open({str(inside)!r}, os.O_PATH | os.O_DIRECTORY)
stay_in(directory)
def attempt(name, call, *arguments, **more):
    try:
        call(*arguments, **more)
        print(name, "done")
    except OSError as error:
        print(name, error.errno)
there = {{"src_dir_fd": directory, "dst_dir_fd": directory}}
attempt("make", os.open, "new", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=directory)
attempt("rename", os.rename, "new", "newer", **there)
attempt("remove", os.unlink, "newer", dir_fd=directory)
attempt("read", os.open, "old", os.O_RDONLY, dir_fd=directory)
attempt("make", os.open, "../out/new", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=directory)
attempt("write", os.open, "../out/old", os.O_WRONLY, dir_fd=directory)
attempt("rename", os.rename, "old", "../out/new", **there)
attempt("remove", os.unlink, "../out/old", dir_fd=directory)
"""
    )

    here = ["make done", "rename done", "remove done", f"read {errno.EACCES}"]
    away = [f"make {errno.EACCES}", f"write {errno.EACCES}", f"rename {errno.EACCES}", f"remove {errno.EACCES}"]
    assert tried.splitlines() == here + away


@pytest.mark.parametrize("kind", [*NARROWED, "VMM"])
def test_32_bit_call_kills(cell: Cell, kind: str) -> None:
    """The calls of int 0x80 have other numbers than 64-bit calls.  The filter kills for every one of them."""
    if try_inside(cell, "-", "int80").status == -signal.SIGSEGV:
        pytest.skip("kernel without 32-bit system calls")

    assert try_inside(cell, kind, "int80").status == KILLED


@pytest.mark.parametrize("kind", NARROWED)
def test_no_file_can_be_opened_by_name(cell: Cell, kind: str) -> None:
    """The call fails instead of killing, because harmless code, such as a late import, also tries to open files."""
    run = try_inside(cell, kind, "open_passwd", "list_root", "write_code", "create_file", "load_library", "late_import")

    refused = [f"{name} errno {errno.EPERM}" for name in ("open_passwd", "list_root", "write_code", "create_file")]
    assert run.answers[:4] == refused
    assert run.answers[5:] == ["late_import done None"]
    assert run.status == 0


def test_lockholder_reads_and_has_one_capability(cell: Cell) -> None:
    """It can list directories, but open no file for writing."""
    place = LockholderCell(cell)
    run = try_inside(place, "LOCKHOLDER", "list_root", "write_code", "create_file")

    assert try_inside(place, "-", "capabilities").answers == [f"capabilities done {1 << linux.CAP_SYS_PTRACE:x}"]
    assert run.answers[0].startswith("list_root done ")
    assert run.answers[1:] == [f"write_code errno {errno.EPERM}", f"create_file errno {errno.EPERM}"]


def test_vmm_reads_its_cell_and_writes_nothing(cell: Cell) -> None:
    """In its cell vmm can read files and run programs, but write nothing."""
    run = try_inside(cell, "VMM", "open_passwd", "write_code", "create_file", "become_traceable", "become_root")

    assert run.answers == [
        f"open_passwd errno {errno.ENOENT}",
        f"write_code errno {errno.EACCES}",
        f"create_file errno {errno.EROFS}",
        "become_traceable done 0",  # its children have to set this flag, so its filter allows the call
        f"become_root errno {errno.EPERM}",  # allowed for its children, too; this process lacks the capability
    ]


@pytest.mark.parametrize("kind", [*NARROWED, "VMM"])
def test_ordinary_calls_work(cell: Cell, kind: str) -> None:
    """Threads, wake-ups, timers, passing descriptors and exceptions work in every confinement."""
    attempts = ["threads", "events", "pass_descriptor", "formatted_traceback"]
    if kind == "VIONET_KERNEL":  # it passes none, and the call could name an address
        attempts.remove("pass_descriptor")

    run = try_inside(cell, kind, *attempts)

    assert run.answers == [f"{name} done None" for name in attempts]
    assert run.status == 0


@pytest.mark.parametrize(
    ("kind", "attempts"),
    [
        ("VIOBLK", ("file_data",)),
        ("VIONET", ("gather",)),
        ("VIONET_KERNEL", ("gather",)),
        ("VM", ("memfd", "gather", "signal_thread")),
        ("VMM", ("memfd", "gather", "file_data", "signal_thread", "spawn_child")),
    ],
)
def test_each_process_can_do_its_own_work(cell: Cell, kind: str, attempts: tuple[str, ...]) -> None:
    """Its filter allows the calls of its task."""
    run = try_inside(cell, kind, *attempts)

    assert run.answers == [f"{name} done None" for name in attempts]
    assert run.status == 0


@pytest.mark.parametrize("kind", ["LEAF", "VIONET", "VIONET_KERNEL", "VIOSCSI"])
def test_a_device_without_a_disk_writes_no_file(cell: Cell, kind: str) -> None:
    """A writable descriptor does not help: its limit of file sizes is 0."""
    run = try_inside(cell, kind, "write_data")

    assert run.answers == [f"write_data errno {errno.EFBIG}"]
    assert run.status == 0


@pytest.mark.parametrize("kind", NARROWED)
def test_uncaught_exception_is_logged(cell: Cell, kind: str) -> None:
    """A bug of ours ends a confined process with a traceback, not with SIGSYS."""
    run = try_inside(cell, kind, "uncaught")

    assert run.status == 1
    assert "ValueError: nobody catches this" in run.log


def test_a_device_process_makes_no_memfd(cell: Cell) -> None:
    """vmm and VMs may create memory to share with other processes, but devices may not."""
    assert try_inside(cell, "VIOBLK", "memfd").status == KILLED


@pytest.mark.skipif(not REACHES_SIGNALS, reason="kernel's landlock has no signal scope")
def test_vmm_cannot_signal_a_process_outside_its_cell(cell: Cell) -> None:
    """vmm cannot signal a process outside its cell, even with a pidfd.  control, for example, runs as the same user."""
    run = try_inside(cell, "VMM", "kill_victim")

    assert run.answers == [f"kill_victim errno {errno.EPERM}"]


@pytest.mark.parametrize(
    ("kind", "attempt", "call"),
    [("VIOBLK", "connect_inet", "socket(0x2, "), ("VM", "execute", "execve("), ("LEAF", "foreign_ioctl", "ioctl(")],
)
def test_a_forbidden_call_is_logged_for_developers(
    cell: Cell, monkeypatch: pytest.MonkeyPatch, kind: str, attempt: str, call: str
) -> None:
    """With VMD_DEBUG_SECCOMP a process logs the name, arguments and place of a forbidden call before it is killed."""
    quiet = try_inside(cell, kind, attempt)
    monkeypatch.setenv(DEBUG, "1")
    run = try_inside(cell, kind, attempt)

    assert (quiet.status, quiet.log) == (KILLED, "")
    assert run.status == KILLED
    (said,) = run.log.splitlines()
    assert f"system call {call}" in said
    assert f"insider.{attempt}:" in said


def test_confinement_requires_a_single_thread(cell: Cell) -> None:
    """Landlock would not confine the other threads.  So the call refuses to run beside them."""
    body = """
import threading
from vmd.privsep.confine import LEAF, confine
stop = threading.Event()
thread = threading.Thread(target=stop.wait)
thread.start()
try:
    confine(LEAF)
except RuntimeError as error:
    print(error)
stop.set()
"""
    assert run_script(body) == "confine must be called before the first thread is started\n"


# --- priv ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def priv() -> list[str]:
    """Give the answers of a process with priv's confinement, in a network namespace of its own."""
    attempts = (
        "run_nft", "run_ip", "forward", "tap_from_descriptor", "identity", "capabilities", "own_directory",
        "open_passwd", "write_etc", "give_away", "open_tun", "become_root", "connect_unix", "raw_packets",
        "foreign_ioctl", "clone_namespace", "see_run",
    )  # fmt: skip
    output = run_script(f"""
import tempfile
linux.unshare(linux.CLONE_NEWNET)
place = PrivPlace(-1)
place.import_path = tuple(sys.path[:4])
with tempfile.TemporaryFile() as data:
    tun = os.open("/dev/net/tun", os.O_RDWR)
    answers, status = ask(place, "PRIV", *{attempts!r}, fds={{{DATA_FD}: data.fileno(), {VICTIM_FD}: tun}})
print(answers, status, sep="")
""")
    lines = output.splitlines()
    assert lines[-1] == "0"
    return lines[1:-1]


def test_priv_can_do_its_work(priv: list[str]) -> None:
    """Programs that need the network capabilities run, and sysctls of the network are set."""
    assert priv[:4] == ["run_nft done True", "run_ip done True", "forward done 1", "tap_from_descriptor done None"]


def test_priv_can_do_nothing_else(priv: list[str]) -> None:
    """It has a user of its own, two capabilities and a limited view of files.  It can connect to no named socket."""
    ids = (DEFAULT_FIRST_ID + IDS,) * 3
    denied, refused = errno.EACCES, errno.EPERM

    assert priv[4:] == [
        f"identity done {ids} {ids} [] /",
        "capabilities done 3000",
        "own_directory done None",
        f"open_passwd errno {denied}",
        f"write_etc errno {denied}",
        f"give_away errno {refused}",
        f"open_tun errno {denied}",
        f"become_root errno {refused}",
        f"connect_unix errno {refused}",
        f"raw_packets errno {refused}",
        f"foreign_ioctl errno {refused}",
        f"clone_namespace errno {refused}",
        "see_run done ['vmd', 'vmd/priv']",
    ]


@pytest.mark.parametrize(
    "attempt",
    ["mount", "change_root", "unshare_net", "unshare_user", "bpf", "trace_me", "read_other_memory", "io_uring",
     "userfault"],
)  # fmt: skip
def test_forbidden_call_kills_priv(attempt: str) -> None:
    """Most calls that the filter refuses only fail.  These calls kill, because no program of priv's needs them."""
    output = run_script(f"""
linux.unshare(linux.CLONE_NEWNET)
place = PrivPlace(-1)
place.import_path = tuple(sys.path[:4])
print(ask(place, "PRIV", {attempt!r}, "threads"))
""")

    assert output == repr(("PRIV confined\n", int(KILLED))) + "\n"


# --- how processes start ------------------------------------------------------------------------------------------


def open_descriptors(pid: int) -> dict[int, str]:
    """Return the open descriptors of a process, and what they refer to."""
    directory = Path(f"/proc/{pid}/fd")
    return {int(entry.name): os.readlink(entry) for entry in directory.iterdir()}


@contextlib.contextmanager
def waiting_process(place: Cell, title: str, kind: str = "-", fds: dict[int, int] | None = None) -> Iterator[Child]:
    """Give a process that has confined itself and waits."""
    ours, theirs = socket.socketpair()
    with ours:
        child = spawn(title, [kind, "wait"], channel=theirs, place=place, entry=ENTRY, fds=fds)
        theirs.close()
        try:
            assert ours.recv(100) == f"{kind} confined\n".encode()
            yield child
        finally:
            child.kill()
            child.reap(DEADLINE_S)


def test_a_process_has_only_the_named_descriptors(cell: Cell) -> None:
    """It does not get a descriptor that a library has left inheritable."""
    with tempfile.TemporaryFile() as wanted, tempfile.TemporaryFile() as leaked:
        os.set_inheritable(leaked.fileno(), True)
        with waiting_process(cell, "insider", fds={5: wanted.fileno(), 9: wanted.fileno()}) as child:
            found = open_descriptors(child.pid)

        assert sorted(found) == [0, 1, 2, 3, 5, 9]
        assert found[0] == found[1] == "/dev/null"
        assert found[5] == found[9] == os.readlink(f"/proc/self/fd/{wanted.fileno()}")


def test_descriptors_can_be_exchanged(cell: Cell) -> None:
    """Two descriptors can be exchanged, although the number of each target is the number of the other's source."""
    with tempfile.TemporaryFile() as first, tempfile.TemporaryFile() as second:
        one, two = first.fileno(), second.fileno()
        names = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in (one, two)}
        with waiting_process(cell, "insider", fds={one: two, two: one}) as child:
            found = open_descriptors(child.pid)

    assert (found[one], found[two]) == (names[two], names[one])


def test_grandchildren_do_not_inherit_descriptors(cell: Cell) -> None:
    """A process that vmm starts does not get the descriptors of vmm."""
    reader, writer = os.pipe()
    ours, theirs = socket.socketpair()
    with ours:
        vmm = spawn(
            "insider", ["VMM", "spawn_orphan", "wait"],
            channel=theirs, fds={DATA_FD: writer, 11: writer}, place=cell, entry=ENTRY,
        )  # fmt: skip
        theirs.close()
        os.close(writer)
        with ours.makefile("rb") as said:
            assert said.readline() == b"VMM confined\n"
            assert said.readline() == b"spawn_orphan done None\n"
        assert os.read(reader, 1) == b"!"
        children = Path(f"/proc/{vmm.pid}/task/{vmm.pid}/children").read_text().split()
        found = {pid: open_descriptors(int(pid)) for pid in children}
        vmm.kill()
        vmm.reap(DEADLINE_S)
    os.close(reader)

    assert [sorted(fds) for fds in found.values()] == [[0, 1, 2, 3, DATA_FD]]


@pytest.mark.parametrize("title", ["vm/db1", "vm/a-rather-long-name-for-a-machine/vionet0"])
def test_title(cell: Cell, title: str) -> None:
    """ps shows the title instead of the command line.  The short name is the end of the title."""
    with waiting_process(cell, title) as child:
        cmdline = Path(f"/proc/{child.pid}/cmdline").read_bytes()
        comm = Path(f"/proc/{child.pid}/comm").read_text().strip()

    assert cmdline == f"vmd: {title}\0".encode()
    assert comm == title[-15:]


def test_process_state_is_clean(cell: Cell) -> None:
    """A child has its own session and no inherited signal settings.  It cannot gain privileges or dump core."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        with waiting_process(cell, "insider", "CONTROL") as child:
            status = dict(line.split(":\t", 1) for line in Path(f"/proc/{child.pid}/status").read_text().splitlines())
            limits = Path(f"/proc/{child.pid}/limits").read_text()
            session = os.getsid(child.pid)
            owner = Path(f"/proc/{child.pid}/fd").stat().st_uid
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})

    python_ignores = 1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1
    assert session == child.pid
    assert int(status["SigBlk"], 16) == 0
    libc_own = 3 << 31  # signals 32 and 33: inherited, and glibc lets no program change them
    assert int(status["SigIgn"], 16) & ~(python_ignores | libc_own) == 0
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)
    assert owner == 0  # the files in /proc of a process that is not dumpable belong to root


def test_failure_before_exec_is_reported(cell: Cell) -> None:
    """The caller gets the reason, and no process is left."""
    broken = Cell(USER.pw_uid, USER.pw_gid, cell.root_fd, cell.root_fd)  # no namespace
    before = children()

    with pytest.raises(HostError, match=r"^start insider: enter a namespace: Bad file descriptor$"):
        spawn("insider", place=broken)
    assert children() == before


def children() -> set[str]:
    """Return the pids of the children of this process, the unreaped ones included."""
    lists = Path("/proc/self/task").glob("*/children")
    return {pid for path in lists for pid in path.read_text().split()}


def test_bug_before_exec_is_reported() -> None:
    """After an unexpected exception in the child, the child ends and the caller gets the exception's text."""

    class Broken:
        import_path: tuple[str, ...] = ("/",)
        code_fd = -1
        own_pids = False
        vital = False

        def prepare(self) -> None:
            """Do nothing."""

        def enter(self) -> None:
            raise ZeroDivisionError("no such number")

    with pytest.raises(Exception, match=r"start insider: ZeroDivisionError\('no such number'\)"):
        spawn("insider", place=Broken())


def test_closed_descriptor_is_reported(cell: Cell) -> None:
    """A descriptor that is not open is an error."""
    with pytest.raises(HostError, match="prepare descriptors for insider: Bad file descriptor"):
        spawn("insider", fds={5: 987654}, place=cell)


def all_writers_close(reader: int, timeout_s: float = DEADLINE_S) -> bool:
    """Return whether all writers of a pipe close it in time."""
    poller = select.poll()
    poller.register(reader, select.POLLHUP)
    return bool(poller.poll(timeout_s * 1000))


def test_children_die_with_their_parent() -> None:
    """When the parent is killed, the kernel also kills the processes in the cell, even one that reads no channel."""
    reader, writer = os.pipe()
    body = f"""
cell = Cell.build({USER.pw_uid}, {USER.pw_gid}, {PACKAGES!r})
ours, theirs = socket.socketpair()
child = spawn("insider", ["VMM", "spawn_orphan", "wait"], channel=theirs, fds={{{DATA_FD}: {writer}}}, place=cell,
              entry="insider:main")
answers = ours.makefile()
while answers.readline() != "spawn_orphan done None\\n":
    pass
print("ready", flush=True)
select.select([], [], [])
"""
    path = [str(HERE), *import_path(("vmd", "msgpack"))]
    with subprocess.Popen(
        [INTERPRETER, "-I", "-S", "-c", SCRIPT_HEAD.format(path=path) + body],
        stdout=subprocess.PIPE, pass_fds=[writer],
    ) as parent:  # fmt: skip
        os.close(writer)
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        assert os.read(reader, 1) == b"!"  # the orphan runs, and only waits
        assert not all_writers_close(reader, 0)
        parent.kill()

    assert all_writers_close(reader)
    os.close(reader)


# --- where the code is --------------------------------------------------------------------------------------------


def private_copy(directory: Path) -> Path:
    """Copy vmd and the insider into a directory that only root can read."""
    top = directory / "home" / "checkout"
    for source in (ROOT / "vmd", HERE / "insider"):
        shutil.copytree(source, top / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (directory / "home").rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    (directory / "home").chmod(0o700)
    return top


def test_private_checkout_and_upgrade(tmp_path: Path) -> None:
    """Processes run the cell's copy of the code.  `_vmd` need not be able to read the original, and it may change."""
    top = private_copy(tmp_path)
    output = run_script(
        f"""
cell = Cell.build({USER.pw_uid}, {USER.pw_gid}, {PACKAGES!r})
print(ask(cell, "LEAF", "threads"))
print(ask(cell, "-", "version"))
with open({str(top / "insider/version.py")!r}, "w") as file:
    file.write("VERSION = 'new'\\n")
print(ask(cell, "-", "version"))
""",
        [str(top), *import_path(("msgpack",))],
    )

    assert output.splitlines() == [
        repr(("LEAF confined\nthreads done None\n", 0)),
        repr(("- confined\nversion done old\n", 0)),
        repr(("- confined\nversion done old\n", 0)),
    ]


def test_checkout_of_another_user_serves_priv(tmp_path: Path) -> None:
    """A confined priv has no capability to read files of other users, but it imports all code before."""
    top = private_copy(tmp_path)
    for path in (tmp_path / "home", *(tmp_path / "home").rglob("*")):
        os.chown(path, USER.pw_uid, USER.pw_gid)
    output = run_script(
        """
place = PrivPlace(-1)
place.import_path = tuple(sys.path[:3])
print(ask(place, "PRIV", "capabilities"))
""",
        [str(top), *import_path(("msgpack", "pyroute2"))],
    )

    assert output == repr(("PRIV confined\ncapabilities done 3000\n", 0)) + "\n"


def test_private_interpreter(tmp_path: Path) -> None:
    """The cell runs an interpreter from a home directory of mode 0700, because it has directories of its own."""
    home = tmp_path / "home"
    prefix = home / "python"
    (prefix / "bin").mkdir(parents=True)
    (prefix / "lib").mkdir()
    interpreter = prefix / "bin" / Path(INTERPRETER).name
    shutil.copy(INTERPRETER, interpreter)
    library = Path(os.__file__).parent
    (prefix / "lib" / library.name).symlink_to(library)
    home.chmod(0o700)

    output = run_script(
        f"""
cell = Cell.build({USER.pw_uid}, {USER.pw_gid}, {PACKAGES!r})
print(sys.executable)
print(ask(cell, "CONTROL", "threads"))
""",
        interpreter=str(interpreter),
    )

    assert output.splitlines() == [str(interpreter), repr(("CONTROL confined\nthreads done None\n", 0))]


def test_host_does_not_see_the_cell(cell: Cell) -> None:
    """Building a cell leaves no mount behind."""
    assert cell.namespace_fd >= 0
    assert "vmd" not in {line.split()[0] for line in Path("/proc/self/mounts").read_text().splitlines()}
    assert not Path("/run/vmd/vmd").exists()
    assert not Path("/.empty").exists()
