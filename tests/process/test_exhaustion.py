"""A host runs out of a resource (hostile 60): one start fails with a message, and nothing else happens."""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.support.bystander import Bystander, vm_block
from tests.support.clients import connect, connect_as, receive
from tests.support.daemon import DEADLINE_S, Daemon
from tests.support.guests import guest
from tests.support.transfers import ended, to_file, vmctl
from tests.support.users import public_folder
from tests.support.waiting import pause
from vmd.ipc.imsg import encode
from vmd.ipc.messages.clients import End, Failed, ListRequest, ReloadRequest, VmInfo

pytestmark = [pytest.mark.root, pytest.mark.kvm]

PROMPT = "vmd-demo> "
TASKS_ENOUGH = 8  # threads and processes of a VM, its devices and the helpers of a receive
NOBODY, OTHER = 65534, 40001
RESERVE = {"vmd: control/reserve", "vmd: opener", "vmd: imgprobe", "vmd: vm"}


@pytest.fixture
def vmd() -> Iterator[Daemon]:
    """Yield a daemon with the running VM `a` and two stopped ones; `b` has a disk.  All users may open its socket."""
    with public_folder() as directory:
        (directory / "disk").write_bytes(bytes(1 << 20))
        conf = f'images = "{directory}"\n' + "".join(
            f'vm "{name}" {{\n disable\n memory 32M\n boot "{guest("demo")}"\n{more}}}\n'
            for name, more in (("a", ""), ("b", " disk $images/disk format raw\n"), ("c", ""))
        )
        with Daemon(directory, conf) as daemon:
            daemon.must("start", "a")
            yield daemon
            assert daemon.status("a")["state"] == "running"
            with daemon.console("a") as console:
                console.answer("", PROMPT)


def descriptors(pid: int) -> int:
    """Return how many descriptors a process has."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def status(pid: int) -> dict[str, str]:
    """Return /proc/PID/status as a mapping."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def limit(pid: int, what: str, number: int | str) -> str:
    """Limit a running process, as its own user may; return the earlier limit."""
    uid, gid = (int(status(pid)[key].split()[0]) for key in ("Uid", "Gid"))
    prlimit = ["prlimit", "--pid", str(pid), f"--{what}"]
    old = subprocess.run(
        [*prlimit, "--output=SOFT", "--noheadings"], user=uid, group=gid, extra_groups=[], capture_output=True,
        text=True, check=True,
    ).stdout.strip()  # fmt: skip
    subprocess.run([*prlimit[:-1], f"--{what}={number}:"], user=uid, group=gid, extra_groups=[], check=True)
    return old


def settled(vmd: Daemon) -> int:
    """Wait until all reserves exist and no start is in progress; return the parent's number of descriptors."""
    seen = 0
    while seen < 3:
        found = vmd.processes()
        ready = found.keys() >= RESERVE and not any(title.startswith("vmd: opener/") for title in found)
        seen = seen + 1 if ready else 0
        vmd.must("status")
    return descriptors(vmd.pid)


def listed(client: socket.socket) -> None:
    """Read the answers to a ListRequest."""
    while isinstance(answer := receive(client), VmInfo):
        pass
    assert isinstance(answer, End)


def refused(vmd: Daemon, name: str, *words: str) -> None:
    """Check that a start fails, and its reason."""
    done = vmd.vmctl("start", name)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr
    assert vmd.status(name)["state"] == "stopped"


def reserve(vmd: Daemon, without: int = 0) -> int:
    """Wait for the VM process in reserve; return its pid."""
    while True:  # each look takes time, because it starts a process
        found = {pid for title, pid in vmd.processes().items() if title == "vmd: vm"} - {without}
        if found:
            return found.pop()


@pytest.mark.parametrize("spare", [8, 30, 50])
def test_descriptors_of_the_parent(vmd: Daemon, spare: int) -> None:
    """A request is refused before anything is opened.  Later, with free descriptors, it works."""
    before = settled(vmd)
    old = limit(vmd.pid, "nofile", before + spare)
    refused(vmd, "b", "no room for another vm among the ", " files that vmd may have open")
    refused(vmd, "c", "no room for another vm")
    assert settled(vmd) == before
    limit(vmd.pid, "nofile", old)
    vmd.must("start", "b")


def test_descriptors_of_vmm(vmd: Daemon) -> None:
    """The same for descriptors of vmm."""
    vmm = vmd.processes()["vmd: vmm"]
    reserve(vmd)
    old = limit(vmm, "nofile", 65)
    refused(vmd, "b", "have another vm among the 65 files that vmm may have open")
    limit(vmm, "nofile", old)
    vmd.must("start", "b")


def test_descriptors_of_a_vm(vmd: Daemon) -> None:
    """The VM's start fails, and its processes and descriptors are gone."""
    parent_before = settled(vmd)
    pid = reserve(vmd)
    limit(pid, "nofile", descriptors(pid) + 12)
    done = vmd.vmctl("start", "b")
    assert done.returncode == 1
    assert vmd.status("b")["state"] == "stopped"
    vmd.must("start", "c")
    vmd.must("stop", "-fw", "c")
    assert settled(vmd) <= parent_before + 2  # a console may be kept for a moment


def test_processes_of_vmm(vmd: Daemon) -> None:
    """vmm cannot start more processes: one VM can use the process in reserve, and the next one fails."""
    vmm = vmd.processes()["vmd: vmm"]
    reserve(vmd)
    old = limit(vmm, "nproc", 1)
    vmd.must("start", "c")
    vmd.wait_log("start vm: Resource temporarily unavailable")
    refused(vmd, "b", "start vm: Resource temporarily unavailable")
    limit(vmm, "nproc", old)
    vmd.must("start", "b")


def test_processes_of_a_vm(vmd: Daemon) -> None:
    """A VM whose device process cannot start does not run."""
    limit(reserve(vmd), "nproc", 1)
    refused(vmd, "b", "start vio", "Resource temporarily unavailable")
    vmd.must("start", "b")


@pytest.mark.deep
def test_tasks_run_out_anywhere(vmd: Daemon, tmp_path: Path) -> None:
    """Tasks run out while a VM is started, received or sent: the request fails with one message, and leaves nothing."""
    last, ends, failures = 0, set(), set()
    vmd.must("start", "b")
    to_file(vmd, "b", tmp_path / "stream")
    for most in range(1, TASKS_ENOUGH):
        for arguments, stream in ((("start", "b"), None), (("receive", "b"), tmp_path / "stream")):
            last = reserve(vmd, without=last)
            limit(last, "nproc", most)
            with open(stream or os.devnull, "rb") as file:
                status, errors = ended(vmctl(vmd, *arguments, stdin=file.fileno()))
            ends.add((arguments[0], status))
            if status:
                failures.add(errors)
                assert len(errors.strip().splitlines()) == 1, errors
                assert "Resource temporarily unavailable" in errors, errors
                vmd.wait_state("b", "stopped")
            else:
                vmd.must("stop", "-fw", "b")
    assert ends == {("start", 0), ("start", 1), ("receive", 0), ("receive", 1)}, failures

    vmd.must("start", "b")
    limit(vmd.status("b")["pid"], "nproc", 1)
    with (tmp_path / "again").open("wb") as file:
        status, errors = ended(vmctl(vmd, "send", "b", stdout=file.fileno()))
    assert (status, "start thread send: Resource temporarily unavailable" in errors) == (1, True), errors
    assert vmd.status("b")["state"] == "running"
    for words in ("Traceback", "unexpected", "internal error"):
        assert words not in vmd.log


class Tasks:
    """A control group that limits the tasks of some processes and their descendants together."""

    def __init__(self) -> None:
        """Skips the test on a host without the controller."""
        above = Path("/sys/fs/cgroup/pids")
        self.path = above / f"vmd-test-{os.getpid()}"
        if not above.is_dir():
            pytest.skip("no control groups of version 1 with the controller pids")
        self.path.mkdir()

    def take(self, pids: Iterable[int]) -> None:
        """Move processes into the group."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                (self.path / "cgroup.procs").write_text(str(pid))

    def limit(self, more: int | None) -> None:
        """Allow `more` additional tasks.  None removes the limit."""
        now = int((self.path / "pids.current").read_text())
        (self.path / "pids.max").write_text("max" if more is None else str(now + more))

    def close(self) -> None:
        """Wait for the last process of the group to end, and remove the group."""
        deadline_s = time.monotonic() + DEADLINE_S
        while (self.path / "cgroup.procs").read_text():
            assert time.monotonic() < deadline_s
            pause()
        self.path.rmdir()


@pytest.mark.deep
def test_tasks_of_the_daemon(tmp_path: Path) -> None:
    """The daemon starts with a message or not at all.  When it runs, it reports what it cannot do, and goes on."""
    with contextlib.ExitStack() as stack:
        tasks = Tasks()
        stack.callback(tasks.close)
        vmd = stack.enter_context(Daemon(stack.enter_context(public_folder()), vm_block("a") + vm_block("b")))
        vmd.socket.chmod(0o666)
        bystander = stack.enter_context(Bystander(vmd, "a"))
        while not {"vmd: vm", "vmd: control/reserve"} <= vmd.processes().keys():
            vmd.must("status")
        for _ in range(2):  # the second time for processes that were started meanwhile
            tasks.take([vmd.pid, *vmd.processes().values()])
        failures = set()
        for more in range(8):
            tasks.limit(more)
            done = vmd.vmctl("start", "b")
            tasks.limit(None)
            if done.returncode:
                failures.add(done.stderr)
                assert len(done.stderr.strip().splitlines()) == 1, done.stderr
                assert "Resource temporarily unavailable" in done.stderr
            vmd.vmctl("stop", "-fw", "b")
        assert failures
        tasks.limit(0)
        os.kill(vmd.processes()["vmd: priv"], signal.SIGKILL)
        vmd.wait_log("priv: it is started again")
        answers = []
        for uid in range(OTHER, OTHER + 4):
            client = stack.enter_context(connect_as(vmd.socket, uid, uid))
            with contextlib.suppress(BrokenPipeError):
                client.send(encode(ListRequest())[0])
            answers.append(receive(client) or receive(client))  # the first may say that the connection ended
        vmd.must("status")
        tasks.limit(None)
        assert any(isinstance(each, Failed) and each.code == errno.EAGAIN for each in answers), answers
        vmd.must("start", "b")
        while "vmd: priv" not in vmd.processes():
            vmd.must("status")
        bystander.core = bystander.core_now()
        for words in ("Traceback", "unexpected", "internal error"):
            assert words not in vmd.log
    (tmp_path / "conf").touch(0o600)
    for most in (1, 2, 3):
        tasks = Tasks()
        tasks.limit(most)
        with subprocess.Popen(
            ["sh", "-c", f'echo $$ > {tasks.path}/cgroup.procs; exec "$0" "$@"', sys.executable, "-m", "vmd", "-d",
             "-s", tmp_path / "socket", "-f", tmp_path / "conf"],
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            said = process.communicate(timeout=DEADLINE_S)[1]
        assert process.returncode == 1
        assert "Resource temporarily unavailable" in said
        assert "Traceback" not in said
        tasks.close()


def test_memory_of_a_guest(vmd: Daemon) -> None:
    """A VM whose memory cannot be mapped reports the size."""
    pid = reserve(vmd)
    limit(pid, "as", (int(status(pid)["VmSize"].split()[0]) << 10) + (16 << 20))
    refused(vmd, "c", "Cannot allocate memory")
    vmd.must("start", "c")


def test_descriptors_for_clients(vmd: Daemon) -> None:
    """Clients wait until descriptors are free, also without the one in reserve; no client is disconnected."""
    old = limit(vmd.pid, "nofile", 3)
    clients = []
    try:
        for _ in range(8):
            client = connect(vmd.socket)
            client.send(encode(ListRequest())[0])
            clients.append(client)
        vmd.wait_log("no new clients for 1 s: Too many open files")
        limit(vmd.pid, "nofile", old)
        for client in clients:
            listed(client)
    finally:
        for client in clients:
            client.close()


def test_no_descriptors_left() -> None:
    """Root is still served, any number of times, but can start nothing.  A user without a control is told why.

    The daemon has started nothing yet, so all numbers below that of the descriptor in reserve are in use, as when a
    limit is really reached.
    """
    conf = f'vm "b" {{\n disable\n memory 32M\n boot "{guest("demo")}"\n}}\n'
    with public_folder() as directory, Daemon(directory, conf) as vmd:
        vmd.socket.chmod(0o666)
        settled(vmd)
        with connect(vmd.socket) as waiting:
            waiting.send(encode(ListRequest())[0])
            listed(waiting)
            used = {int(name) for name in os.listdir(f"/proc/{vmd.pid}/fd")}
            old = limit(vmd.pid, "nofile", min(set(range(max(used) + 2)) - used))
            for _ in range(3):
                with connect(vmd.socket) as client:
                    client.send(encode(ListRequest())[0])
                    listed(client)
            refused(vmd, "b")
            with connect_as(vmd.socket, NOBODY, NOBODY) as first, connect_as(vmd.socket, OTHER, OTHER) as second:
                first.send(encode(ListRequest())[0])
                listed(first)  # by the control in reserve
                answer = receive(second)
                assert isinstance(answer, Failed)
                assert answer.code == errno.EMFILE
                assert receive(second) is None
            limit(vmd.pid, "nofile", old)
        with connect_as(vmd.socket, OTHER, OTHER) as client:
            client.send(encode(ListRequest())[0])
            listed(client)
        vmd.must("start", "b")


def test_descriptors_for_a_reload(vmd: Daemon) -> None:
    """A reload that cannot open the file, because no descriptor is free, changes nothing."""
    with connect(vmd.socket) as client:
        client.send(encode(ListRequest())[0])
        listed(client)  # the connection is accepted now, which also takes a descriptor
        old = limit(vmd.pid, "nofile", 3)
        client.send(encode(ReloadRequest())[0])
        answer = receive(client)
        limit(vmd.pid, "nofile", old)
    assert isinstance(answer, Failed)
    assert "Too many open files" in answer.text
    assert len(vmd.rows()) == 3
    vmd.must("reload")


def test_the_daemon_ends_without_descriptors(tmp_path: Path) -> None:
    """A daemon without a descriptor for systemd's socket still ends its guests and itself."""
    with Daemon(tmp_path, f'vm "a" {{\n memory 32M\n boot "{guest("demo")}"\n}}\n') as daemon:
        daemon.wait_state("a", "running")
        limit(daemon.pid, "nofile", 3)
        assert daemon.stop() == 0
    assert "Traceback" not in daemon.log
