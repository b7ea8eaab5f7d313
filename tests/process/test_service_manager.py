"""The daemon under a service manager: its end for a restart, its watchdog, and its exit status."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import DEADLINE_S, ROOT
from tests.support.guests import guest
from tests.support.keeper import Keeper, KeptDaemon
from vmd.parent.startup import EX_CONFIG, EX_FAILED
from vmd.parent.store import Store

pytestmark = [pytest.mark.root, pytest.mark.kvm]


@pytest.fixture
def vmd(tmp_path: Path) -> Iterator[KeptDaemon]:
    """Give a daemon with a service manager."""
    with KeptDaemon(tmp_path) as daemon:
        yield daemon


def test_daemon_ends_for_a_restart(vmd: KeptDaemon) -> None:
    """It ends with status 0, and leaves its socket, on which the next daemon serves."""
    before = vmd.socket.stat().st_ino

    assert vmd.hand_over() == 0

    assert vmd.socket.stat().st_ino == before
    vmd.start()
    assert "vmd " in vmd.must("version")
    assert vmd.log.count("handing over to the next daemon") == 1


def test_the_daemon_notifies_its_watchdog(vmd: KeptDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """It notifies repeatedly if WATCHDOG_USEC is set.  A daemon that hangs does not."""
    assert "WATCHDOG=1" not in vmd.keeper.said
    vmd.kill()
    monkeypatch.setenv("WATCHDOG_USEC", "300000")

    vmd.start()

    for _ in range(3):
        said = len(vmd.keeper.said)
        assert vmd.keeper.wait_said("WATCHDOG=1", after=said)
    os.kill(vmd.pid, signal.SIGABRT)  # systemd does this to a daemon that does not notify
    assert vmd.process is not None
    assert vmd.process.wait(DEADLINE_S) == -signal.SIGABRT
    assert "in run" in vmd.log  # the stack trace of the moment


@pytest.mark.deep
def test_the_next_daemon_starts_lost_guests(tmp_path: Path) -> None:
    """All guests are lost with vmm and the daemon.  The next daemon starts those of vm.conf, as the first one did."""
    with KeptDaemon(tmp_path, f'vm "demo" {{\nmemory 32M\nboot "{guest("demo")}"\n}}\n') as vmd:
        before = vmd.wait_state("demo", "running")
        vmm = vmd.processes()["vmd: vmm"]
        os.kill(vmd.pid, signal.SIGSTOP)
        os.kill(vmm, signal.SIGKILL)
        vmd.kill()
        vmd.keeper.wait_names("listener", "state")

        vmd.start()

        assert vmd.wait_state("demo", "running")["pid"] != before["pid"]
        vmd.keeper.wait_names("listener", "state", "vmm-1")
        assert "VMs of vm.conf start again" in vmd.log


@pytest.mark.parametrize(("stored", "status"), [((), EX_CONFIG), (("state",), EX_CONFIG), (("vmm-1",), EX_FAILED)])
def test_mistake_in_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: tuple[str, ...], status: int
) -> None:
    """The status ends the unit for good only if no VM would be lost."""
    conf, log = tmp_path / "vm.conf", tmp_path / "log"
    conf.write_text("vm lots {\n")
    with Keeper(tmp_path / "notify") as keeper:
        monkeypatch.setenv("NOTIFY_SOCKET", str(keeper.path))
        store = Store()
        for name in stored:
            store.put(name, 0, poll=False)
        keeper.wait_names(*stored)

        command = [*KeptDaemon.vmd, "-d", "-s", tmp_path / "vmd.sock", "-f", conf]
        process = keeper.spawn(command, log=log, cwd=ROOT, environment=os.environ)

        assert process.wait(DEADLINE_S) == status
    assert f"{conf}:" in log.read_text()
