"""Processes are killed while a VM starts or stops: afterwards states are correct, and nothing is left.

`test_pause.py` and `test_transfer.py` do the same while a VM is paused, sent or received.
"""

import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.daemon import DEADLINE_S, Daemon
from tests.support.guests import guest
from tests.support.logreader import borrowed
from tests.support.transfers import Footprint, ended, vmctl
from vmd.privsep.start import CHANNEL_FD

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.timeout(240)]

Client = subprocess.Popen[str]


def wait_gone(pids: list[int]) -> None:
    """Wait until all these processes have ended."""
    deadline = time.monotonic() + DEADLINE_S
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        select.select([], [], [], 0.02)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Yield an empty image."""
    disk = tmp_path / "disk"
    disk.touch()
    os.truncate(disk, 1 << 20)
    return disk


def configuration(disk: Path) -> str:
    """Return a VM whose guest acknowledges the power button, but does not shut down."""
    boot = f'boot "{guest("vmmci")}" cmdline "linger"'
    return f'vm "a" {{\n disable\n memory 32M\n {boot}\n disk "{disk}"\n}}\n'


@pytest.fixture
def vmd(tmp_path: Path, disk: Path) -> Iterator[Daemon]:
    """Yield a daemon with such a VM."""
    with Daemon(tmp_path, configuration(disk)) as made:
        yield made


@contextmanager
def starting(vmd: Daemon, held: str = "vm") -> Iterator[tuple[Client, int]]:
    """Start a VM that stays in the state "starting", because a process that it needs is stopped."""
    Footprint(vmd)  # wait for the processes in reserve
    deadline = time.monotonic() + DEADLINE_S
    while (pid := vmd.processes().get(f"vmd: {held}", 0)) == 0:
        assert time.monotonic() < deadline
        select.select([], [], [], 0.02)
    os.kill(pid, signal.SIGSTOP)
    client = vmctl(vmd, "start", "a")
    vmd.wait_state("a", "starting")
    with borrowed(pid, CHANNEL_FD) as channel:  # the VM has taken this process once a message is in its channel
        assert select.select([channel], [], [], DEADLINE_S)[0]
    try:
        yield client, pid
    finally:
        client.kill()
        client.communicate()


@contextmanager
def stopping(vmd: Daemon) -> Iterator[tuple[Client, int]]:
    """Yield a client that waits for the end of a stopping VM."""
    vmd.must("start", "a")
    with vmd.console("a") as console:
        console.expect("ready", DEADLINE_S)
        client = vmctl(vmd, "stop", "-w", "a")
        console.expect("acknowledged", DEADLINE_S)
    try:
        yield client, vmd.status("a")["pid"]
    finally:
        client.kill()
        client.communicate()


def check_usable(vmd: Daemon, before: Footprint) -> None:
    """Raise AssertionError unless the VM can be started and ended, and the footprint is as before."""
    vmd.must("start", "a")
    vmd.must("stop", "-fw", "a")
    before.check(vmd)


@pytest.mark.parametrize("victim", ["vm", "vioblk"])
def test_death_while_starting(vmd: Daemon, victim: str) -> None:
    """The VM's process or a device's is killed: the start fails, and the message tells how the process ended."""
    before = Footprint(vmd)
    with starting(vmd, victim) as (client, pid):
        os.kill(pid, signal.SIGKILL)
        status, errors = ended(client)
    print(errors)
    assert status == 1
    assert "SIGKILL" in errors
    assert "SIGKILL" in vmd.wait_state("a", "stopped")["text"]
    check_usable(vmd, before)


def test_death_in_reserve(vmd: Daemon) -> None:
    """A process in reserve is killed: the next start takes another one."""
    before = Footprint(vmd)
    pidfd = os.pidfd_open(vmd.processes()["vmd: vm"])
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    select.select([pidfd], [], [])
    os.close(pidfd)
    check_usable(vmd, before)


def test_death_of_vmctl_while_starting(vmd: Daemon) -> None:
    """The VM still starts, because the request stays valid."""
    before = Footprint(vmd)
    with starting(vmd) as (client, pid):
        client.kill()
        client.wait(DEADLINE_S)
        os.kill(pid, signal.SIGCONT)
        vmd.wait_state("a", "running")
    vmd.must("stop", "-fw", "a")
    check_usable(vmd, before)


def test_stop_while_starting(vmd: Daemon) -> None:
    """The VM is stopped by force, and the client that started it is told."""
    before = Footprint(vmd)
    with starting(vmd) as (client, pid):
        stopper = vmctl(vmd, "stop", "-fw", "a")
        vmd.wait_state("a", "stopping")
        os.kill(pid, signal.SIGCONT)
        assert ended(stopper)[0] == 0
        print(ended(client))
    check_usable(vmd, before)


@pytest.mark.parametrize("victim", ["vm/a", "vm/a/vioblk0"])
def test_death_while_stopping(vmd: Daemon, victim: str) -> None:
    """The VM has ended, as requested, and the answer tells how."""
    before = Footprint(vmd)
    with stopping(vmd) as (client, _):
        os.kill(vmd.processes()[f"vmd: {victim}"], signal.SIGKILL)
        assert ended(client) == (0, "stopping vm a: terminated vm 1\n")
    assert "SIGKILL" in vmd.wait_state("a", "stopped")["text"]
    check_usable(vmd, before)


def test_death_of_vmctl_while_stopping(vmd: Daemon) -> None:
    """No client waits any more, but the VM still stops."""
    before = Footprint(vmd)
    with stopping(vmd) as (client, _):
        client.kill()
        client.wait(DEADLINE_S)
        assert vmd.status("a")["state"] == "stopping"
        vmd.must("stop", "-fw", "a")
    check_usable(vmd, before)


@pytest.mark.parametrize("state", ["starting", "paused", "stopping"])
def test_death_of_vmm(vmd: Daemon, state: str) -> None:
    """The death of vmm ends the daemon, with a failure, a reason and no orphans, in every state of its VMs."""
    if state == "paused":
        vmd.must("start", "a")
        vmd.must("pause", "a")
        end_by_vmm(vmd)
        return
    with starting(vmd) if state == "starting" else stopping(vmd) as (client, _):
        end_by_vmm(vmd)
        assert ended(client)[0] == 3


def end_by_vmm(vmd: Daemon) -> None:
    """Kill vmm, and wait for the end of all other processes."""
    processes = vmd.processes()
    os.kill(processes["vmd: vmm"], signal.SIGKILL)
    assert vmd.process is not None
    assert vmd.process.wait(DEADLINE_S) == 1
    assert "lost child: vmm" in vmd.log
    for pid in processes.values():
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGCONT)  # a stopped process could not notice
    wait_gone(list(processes.values()))
