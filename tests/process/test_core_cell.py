"""The cell of vmm and the VMs: what is below vmm ends with it, and is told apart by the host."""

import os
import pwd
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.process.insider import DATA_FD
from tests.support.bystander import vm_block
from tests.support.daemon import DEADLINE_S, Daemon
from vmd.privsep.cell import Cell, VmmCell
from vmd.privsep.spawn import spawn

pytestmark = pytest.mark.root

HERE = Path(__file__).resolve().parent
USER = pwd.getpwnam("nobody")
PACKAGES = ("vmd", "msgpack", "insider")


@pytest.fixture(scope="module")
def cell() -> Iterator[Cell]:
    """Give a cell that holds the insider besides vmd."""
    sys.path.insert(0, str(HERE))
    built = Cell.build(USER.pw_uid, USER.pw_gid, PACKAGES)
    sys.path.remove(str(HERE))
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


def states_below(pid: int) -> dict[int, str]:
    """Return the state of each child of a process."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(child): field(int(child), "State") for child in children}


def wait_for(found: Callable[[], bool]) -> None:
    """Wait until that is so."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not found():
        assert time.monotonic() < deadline_s
        select.select([], [], [], 0.02)


def test_nothing_survives_vmm(cell: Cell) -> None:
    """Not even what code in vmm has started behind everybody's back, and lets no death of a parent reach."""
    reader, writer = os.pipe()
    ours, theirs = socket.socketpair()
    with ours:
        vmm = spawn(
            "insider", ["VMM", "hide_a_process", "wait"],
            channel=theirs, fds={DATA_FD: writer}, place=VmmCell(cell), entry="insider:main",
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


@pytest.mark.kvm
def test_what_a_vm_leaves_behind_is_buried(tmp_path: Path) -> None:
    """vmm is pid 1 of its pid namespace; a VM is known to the host by the host's pid, and leaves no zombies."""
    with Daemon(tmp_path, vm_block("a") + vm_block("b")) as vmd:
        vmd.must("start", "a")
        vmd.must("start", "b")
        processes = vmd.processes()
        vmm, victim, device = (processes[f"vmd: {title}"] for title in ("vmm", "vm/a", "vm/a/viornd0"))

        assert field(vmm, "NSpid").split() == [str(vmm), "1"]
        assert vmd.status("a")["pid"] == victim
        assert field(device, "NSpid").split()[0] == str(device)
        assert len(field(device, "NSpid").split()) == 2
        os.kill(device, signal.SIGSTOP)  # so that its VM, which ends first, leaves it
        os.kill(victim, signal.SIGKILL)
        vmd.wait_state("a", "stopped")
        wait_for(lambda: not Path(f"/proc/{device}").exists())

        wait_for(lambda: all(not state.startswith("Z") for state in states_below(vmm).values()))
        assert vmd.status("b")["state"] == "running"
