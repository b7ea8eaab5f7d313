"""The cell of vmm and the VMs: processes below vmm end with it, and have ids of their own on the host."""

import ast
import errno
import os
import pwd
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.process.insider import DATA_FD
from tests.support.bystander import DRIVE, Bystander, vm_block
from tests.support.cells import insider_cell
from tests.support.daemon import DEADLINE_S, Daemon
from tests.support.descriptors import open_files
from tests.support.program import changed_program
from vmd.config.model import DEFAULT_FIRST_ID, IDS
from vmd.errors import HostError
from vmd.parent import groups
from vmd.privsep import linux
from vmd.privsep.cell import Cell, VmmCell
from vmd.privsep.confine import OPENER, PARENT_CAPABILITIES
from vmd.privsep.ids import TASKS_MAX, Ids, ids_in_use, user_namespace
from vmd.privsep.spawn import spawn

pytestmark = pytest.mark.root

SYS_UNSHARE = 272
APART = ("ipc", "mnt", "net", "uts")  # namespaces of the cell
FIRST_ID = DEFAULT_FIRST_ID - 2 * IDS  # far from the default
FILTERED = "2"  # SECCOMP_MODE_FILTER
SPARES = {"vmd: vioblk", "vmd: vionet"}


def can_have_groups() -> bool:
    """Return whether a daemon on this host can use control groups."""
    try:
        return os.access(groups.directory_of(os.getpid()), os.W_OK)
    except HostError:
        return False


needs_groups = pytest.mark.skipif(not can_have_groups(), reason="no control groups of version 2 here")

NO_USER_NAMESPACES = f"""
import errno, os, sys
from vmd.privsep.linux import CLONE_NEWUSER
from vmd.privsep.seccomp import (
    JEQ, LD_ABS, OFFSET_ARGS, OFFSET_NR, RET, RET_ALLOW, RET_ERRNO, install, instruction
)
install(b"".join([
    instruction(LD_ABS, OFFSET_NR), instruction(JEQ, {SYS_UNSHARE}, 0, 3),
    instruction(LD_ABS, OFFSET_ARGS), instruction(JEQ, CLONE_NEWUSER, 0, 1),
    instruction(RET, RET_ERRNO | errno.ENOSPC), instruction(RET, RET_ALLOW),
]))
os.execvp(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture(scope="module")
def cell() -> Iterator[Cell]:
    """Give a cell that holds the insider besides vmd."""
    built = insider_cell()
    yield built
    built.close()


def hangs_up(reader: int) -> bool:
    """Return whether every writer of a pipe goes away in time."""
    poller = select.poll()
    poller.register(reader, select.POLLHUP)
    return bool(poller.poll(DEADLINE_S * 1000))


def field(pid: int, name: str) -> str:
    """Return a field of /proc/PID/status."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith(f"{name}:"))
    return line.partition(":")[2].strip()


def score(pid: int) -> int:
    """Return a process's oom_score_adj."""
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def namespaces_of(pid: int) -> set[str]:
    """Return the namespaces that a process is in, of those that the cell has of its own."""
    return {os.readlink(f"/proc/{pid}/ns/{kind}") for kind in APART}


def states_below(pid: int) -> dict[int, str]:
    """Return the state of each child of a process."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(child): field(int(child), "State") for child in children}


def wait_for(found: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not found():
        assert time.monotonic() < deadline_s
        select.select([], [], [], 0.02)


def test_nothing_survives_vmm(cell: Cell) -> None:
    """When vmm ends, its hidden child processes end, too, even if they ignore the death of their parent."""
    reader, writer = os.pipe()
    ours, theirs = socket.socketpair()
    with ours:
        vmm = spawn(
            "insider", ["VMM", "hide_a_process", "wait"],
            channel=theirs, fds={DATA_FD: writer}, place=VmmCell(cell, None, own_pids=True), entry="insider:main",
        )  # fmt: skip
        theirs.close()
        os.close(writer)
        with ours.makefile("rb") as said:
            assert [said.readline() for _ in range(2)] == [b"VMM confined\n", b"hide_a_process done None\n"]
        assert os.read(reader, 1) == b"!"
        vmm.kill()
        assert vmm.reap(DEADLINE_S) == -signal.SIGKILL

    assert hangs_up(reader)
    os.close(reader)


def test_a_vm_can_do_nothing_to_another(cell: Cell) -> None:
    """Each VM has an id of its own, so it can neither signal another VM, nor become it, nor use up its tasks."""
    place = VmmCell(cell, user_namespace(), own_pids=True)
    place.ids = Ids(DEFAULT_FIRST_ID + 1000, 1)
    ours, theirs = socket.socketpair()
    with ours:
        vmm = spawn("insider", ["VMM", "vms_of_one_vmm"], channel=theirs, place=place, entry="insider:main")
        theirs.close()
        with ours.makefile() as answers:
            confined, result = answers.read().splitlines()
        vmm.reap(DEADLINE_S)

    said, lived, status = ast.literal_eval(result.removeprefix("vms_of_one_vmm done "))
    assert confined == "VMM confined"
    assert said[:2] == [f"kill_victim errno {errno.EPERM}", f"become_other errno {errno.EPERM}"]
    assert int(said[2].removeprefix("many_threads done ")) < TASKS_MAX
    assert said[3:] == ["capabilities done 0"]
    assert lived
    assert status == -signal.SIGKILL  # vmm may signal it


def test_each_process_of_the_cell_has_an_id_of_its_own(cell: Cell) -> None:
    """Processes that run one after another, such as probes, also get different ids."""
    ids = Ids(DEFAULT_FIRST_ID + 3000, 10)
    place = Cell(cell.uid, cell.gid, cell.namespace_fd, cell.root_fd, ids)
    found = []
    for _ in range(2):
        ours, theirs = socket.socketpair()
        with ours:
            probe = spawn("insider", ["-", "identity"], channel=theirs, place=place, entry="insider:main")
            theirs.close()
            with ours.makefile() as answers:
                found.append(answers.read().splitlines()[1])
            assert probe.reap(DEADLINE_S) == 0

    for number, said in enumerate(found):
        uid = DEFAULT_FIRST_ID + 3000 + number
        assert said == f"identity done {(uid,) * 3} {(uid,) * 3} [] /"


def test_an_id_that_has_a_process_is_not_given_again() -> None:
    """After the last id the first is used again, except ids whose processes still exist, such as stuck ones."""
    ours, theirs = socket.socketpair()
    ids = Ids(DEFAULT_FIRST_ID + 2000, 4)
    first = ids.take()
    with ours:
        pid = os.fork()
        if pid == 0:
            ours.close()
            os.setresuid(first, first, first)
            theirs.send(b"!")
            theirs.recv(1)
            os._exit(0)
        theirs.close()
        ours.recv(1)
        assert first in ids_in_use()

        assert [ids.take() - first for _ in range(5)] == [1, 2, 3, 1, 2]

    os.waitpid(pid, 0)


@pytest.mark.kvm
def test_who_is_who_on_the_host(tmp_path: Path) -> None:
    """Every VM has an id of its own, shared with its devices.  Permanent root processes are only parent and opener."""
    conf = f"ids {FIRST_ID}\n" + vm_block("a", DRIVE) + vm_block("b", DRIVE)
    # priv keeps settings to be restored in /run/vmd, for all daemons.  With those of other tests it has another id.
    own_run = ("unshare", "--mount", "sh", "-ec", 'mkdir -p /run/vmd; mount -t tmpfs run /run/vmd; exec "$@"', "sh")
    with Daemon(tmp_path, conf, prefix=own_run) as vmd:
        vmd.must("start", "a")
        vmd.must("start", "b")
        wait_for(lambda: {"vmd: vm", "vmd: opener"} <= vmd.processes().keys())
        wait_for(lambda: field(vmd.processes()["vmd: opener"], "Seccomp") == FILTERED)  # it has just been started
        processes = {title.removeprefix("vmd: "): pid for title, pid in vmd.processes().items()}
        users = {title: {*field(pid, "Uid").split(), *field(pid, "Gid").split()} for title, pid in processes.items()}
        capabilities = {title: int(field(pid, "CapPrm"), 16) for title, pid in processes.items()}
        namespaces = {title: os.readlink(f"/proc/{pid}/ns/user") for title, pid in processes.items()}
        apart = {title: namespaces_of(pid) - namespaces_of(vmd.pid) for title, pid in processes.items()}
        limits = Path(f"/proc/{processes['vm/a/vioscsi0']}/limits").read_text()
        filters = {title: field(pid, "Seccomp") for title, pid in processes.items()}
        parent = [int(field(vmd.pid, name), 16) for name in ("CapEff", "CapPrm", "CapBnd")]
        log = vmd.log

    ids = {title: int(user) for title, (user,) in ((title, tuple(found)) for title, found in users.items())}
    assert set(ids) >= {"priv", "control", "vmm", "vm", "vm/a", "vm/b", "vm/a/vioscsi0", "vm/b/vioscsi0"}
    assert ids.pop("priv") == FIRST_ID + IDS
    assert ids.pop("opener") == 0  # in reserve; test_core_opener.py says what it can do
    assert all(FIRST_ID <= uid < FIRST_ID + IDS for uid in ids.values())
    assert len({ids[title] for title in ("control", "vmm", "vm", "vm/a", "vm/b")}) == 5
    for name in ("a", "b"):
        assert ids[f"vm/{name}"] == ids[f"vm/{name}/vioscsi0"]
    assert capabilities.pop("vmm") == 1 << linux.CAP_KILL | 1 << linux.CAP_SETUID | 1 << linux.CAP_SETGID
    assert capabilities.pop("priv") == 1 << linux.CAP_NET_ADMIN | 1 << linux.CAP_NET_RAW
    assert capabilities.pop("opener") == OPENER.capabilities
    assert not any(capabilities.values())
    assert namespaces["vmm"] == namespaces["vm/a"] != os.readlink("/proc/self/ns/user")
    assert len(apart.pop("priv")) == 1  # it sees no /run
    assert not apart.pop("opener")
    assert {len(own) for own in apart.values()} == {len(APART)}
    assert any(line.split()[:4] == ["Max", "processes", str(TASKS_MAX), str(TASKS_MAX)] for line in limits.splitlines())
    assert "user namespace" not in log
    assert set(filters.values()) == {FILTERED}
    own = linux.permitted_capabilities()
    assert parent == [sum(1 << capability for capability in PARENT_CAPABILITIES) & own] * 3


@pytest.mark.kvm
@pytest.mark.deep
def test_who_is_ended_first_when_memory_runs_out(tmp_path: Path) -> None:
    """VMs are killed first, then processes that can be started again, and last those that all VMs depend on.

    The scores here differ from the program's, because these need no capability.
    """
    more = {"vmd/parent/oom.py": "CORE_SCORE = 100\n", "vmd/privsep/spawn.py": "LEAF_SCORE = 300\n"}
    high = "echo 500 >/proc/self/oom_score_adj; exec \"$@\""
    code = changed_program(tmp_path / "code", more)
    with Daemon(tmp_path, vm_block("a", DRIVE), code=code, prefix=("sh", "-c", high, "sh")) as vmd:
        vmd.must("start", "a")
        # The spare processes of devices that the VM does not need end a moment after its start.
        wait_for(lambda: {"vmd: vm", "vmd: opener"} <= (found := vmd.processes()).keys() and not SPARES & found.keys())
        scores = {title.removeprefix("vmd: "): score(pid) for title, pid in vmd.processes().items()}
        assert score(vmd.pid) == 100

    assert {title for title, found in scores.items() if found == 100} == {"vmm", "priv", "vm"}
    assert {title for title, found in scores.items() if found == 500} == {"vm/a", "vm/a/vioscsi0"}
    assert {found for found in scores.values() if found not in (100, 500)} == {300}
    assert {title for title, found in scores.items() if found == 300} >= {"control", "log", "opener"}


@pytest.mark.kvm
def test_a_host_without_user_namespaces(tmp_path: Path) -> None:
    """vmd logs one warning, and all VMs run as `_vmd`."""
    with Daemon(tmp_path, vm_block("a", DRIVE), prefix=(sys.executable, "-c", NO_USER_NAMESPACES)) as vmd:
        vmd.must("start", "a")
        processes = vmd.processes()
        user = pwd.getpwnam("_vmd").pw_uid

        assert vmd.log.count("make a user namespace: ") == 1
        for title in ("vmm", "vm/a", "vm/a/vioscsi0", "control"):
            assert field(processes[f"vmd: {title}"], "Uid").split() == [str(user)] * 4


@pytest.mark.kvm
def test_what_a_vm_leaves_behind_is_buried(tmp_path: Path) -> None:
    """vmm is pid 1 of its pid namespace and reaps what a VM leaves.  Status shows the host's pids."""
    with Daemon(tmp_path, vm_block("a", DRIVE) + vm_block("b", DRIVE)) as vmd, Bystander(vmd, "b"):
        vmd.must("start", "a")
        processes = vmd.processes()
        vmm, victim, device = (processes[f"vmd: {title}"] for title in ("vmm", "vm/a", "vm/a/vioscsi0"))

        assert field(vmm, "NSpid").split() == [str(vmm), "1"]
        assert vmd.status("a")["pid"] == victim
        assert field(device, "NSpid").split()[0] == str(device)
        assert len(field(device, "NSpid").split()) == 2
        os.kill(device, signal.SIGSTOP)  # so that it outlives its VM
        os.kill(victim, signal.SIGKILL)
        vmd.wait_state("a", "stopped")
        wait_for(lambda: not Path(f"/proc/{device}").exists())

        wait_for(lambda: all(not state.startswith("Z") for state in states_below(vmm).values()))


@needs_groups
@pytest.mark.kvm
def test_every_vm_has_a_control_group(tmp_path: Path) -> None:
    """The group holds only the VM and its devices.  When the VM ends, the rest of the group and the group end too."""
    with Daemon(tmp_path, vm_block("a", DRIVE) + vm_block("b", DRIVE)) as vmd:
        vmd.must("start", "a")
        vmd.must("start", "b")
        wait_for(lambda: {"vmd: vm"} <= vmd.processes().keys())
        processes = {title.removeprefix("vmd: "): pid for title, pid in vmd.processes().items()}
        group = {title: Path(groups.directory_of(pid)) for title, pid in processes.items()}
        top = group["vmm"].parent
        assert len({group["vmm"], group["vm/a"], group["vm/b"], group["control"]}) == 4
        assert group["vm/a/vioscsi0"] == group["vm/a"]
        assert group["vm/a"].parent == top
        for title in ("vmm", "vm/a", "vm/a/vioscsi0", "vm"):  # vmm holds only the descriptor of the reserve's group
            files = open_files(processes[title]).values()
            assert len([file for file in files if "cgroup" in file]) == (title == "vmm")
        assert groups.CONTROLLER not in (top / "cgroup.controllers").read_text() or (
            (group["vm/a"] / "pids.max").read_text() == f"{TASKS_MAX}\n"
        )

        for title in ("vm", "vm/a", "vm/a/vioscsi0"):  # the process in reserve has not read anything yet
            assert not any("cgroup" in file for file in open_files(processes[title]).values())

        with subprocess.Popen(["sleep", "infinity"]) as left:
            groups.move(left.pid, str(group["vm/a"]))
            vmd.must("stop", "-f", "-w", "a")
            assert left.wait(DEADLINE_S) == -signal.SIGKILL
        wait_for(lambda: not group["vm/a"].exists())
        assert group["vm/b"].exists()
        assert vmd.status("b")["state"] == "running"

    assert not top.exists()


@pytest.mark.kvm
@pytest.mark.deep
def test_a_host_without_control_groups(tmp_path: Path) -> None:
    """vmd logs one warning, and VMs still run."""
    hidden = "umount -a -t cgroup2; exec \"$@\""
    with Daemon(tmp_path, vm_block("a"), prefix=("unshare", "-m", "sh", "-c", hidden, "sh")) as vmd:
        vmd.must("start", "a")
        vmd.must("stop", "-f", "-w", "a")
        vmd.must("start", "a")

        assert vmd.log.count("VMs have no control groups of their own") == 1


@needs_groups
@pytest.mark.kvm
@pytest.mark.deep
def test_control_groups_of_a_killed_daemon(tmp_path: Path) -> None:
    """The next daemon removes them when they are empty."""
    with Daemon(tmp_path, vm_block("a")) as vmd:
        vmd.must("start", "a")
        lost = vmd.processes()["vmd: vm/a"]
        top = Path(groups.directory_of(lost)).parent
        os.kill(vmd.pid, signal.SIGKILL)
        wait_for(lambda: "populated 0" in (top / "cgroup.events").read_text())
        (top / "left").mkdir()
        vmd.stop()
        vmd.start()
        assert not (top / "left").exists()
