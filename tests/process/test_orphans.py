"""Guests whose daemon was killed, where no service manager starts another one with what it had stored."""

import os
import signal
import threading
from pathlib import Path

import pytest

from tests.process.test_daemon import demo, wait_gone
from tests.support.daemon import DEADLINE_S, Daemon
from tests.support.descriptors import open_files
from tests.support.guests import guest
from vmd.parent.lifelock import LifeLock

pytestmark = [pytest.mark.root, pytest.mark.kvm]

LINGERS = f'vm "mci" {{\n disable\n memory 32M\n boot "{guest("vmmci")}" cmdline "linger"\n}}\n'


def kill(vmd: Daemon) -> None:
    """Kill the parent; what it has started goes on or not."""
    assert vmd.process is not None
    process, vmd.process = vmd.process, None
    process.kill()
    process.wait(DEADLINE_S)


def test_guests_of_a_killed_daemon_are_asked_to_shut_down(tmp_path: Path) -> None:
    """By their power buttons, as by `vmctl stop`; vmm ends with the last one, and the next daemon finds nothing."""
    with Daemon(tmp_path, demo("a") + demo("b")) as vmd:
        for name in "ab":
            vmd.must("start", name)
            with vmd.console(name) as console:
                console.expect("vmd-demo> ", DEADLINE_S)  # it knows what a power button is
        pids = list(vmd.processes().values())
        kill(vmd)
        wait_gone(pids)  # long before they would be killed

        vmd.start()
        assert [row["state"] for row in vmd.rows()] == ["stopped", "stopped"]
        assert "still shutting down" not in vmd.log
        lock = Path(LifeLock(str(vmd.socket)).path)
        assert lock.exists()
        vmd.stop()
        assert not lock.exists()


@pytest.mark.deep
def test_a_daemon_waits_for_the_guests_of_one_that_was_killed(tmp_path: Path) -> None:
    """Until they have ended it starts and removes nothing, and serves nobody; it says what it waits for."""
    with Daemon(tmp_path, LINGERS) as vmd:
        vmd.must("start", "mci")
        vmm = vmd.processes()["vmd: vmm"]
        with vmd.console("mci") as console:
            console.expect("rtc", DEADLINE_S)
            kill(vmd)
            console.expect("acknowledged", DEADLINE_S)  # and does no more

            starter = threading.Thread(target=vmd.start)
            starter.start()
            vmd.wait_log("guests of an earlier vmd are still shutting down: waiting for their end")
            assert vmd.vmctl("status").returncode != 0
            assert vmd.log.count("startup") == 1
            os.kill(vmm, signal.SIGKILL)  # two minutes later it would end by itself
            starter.join(DEADLINE_S)
        assert not starter.is_alive()
        vmd.wait_log("the guests of an earlier vmd have ended")
        vmd.must("start", "mci")
        vmd.must("stop", "-fw", "mci")


@pytest.mark.deep
@pytest.mark.timeout(400)
def test_a_guest_that_does_not_shut_down_is_ended(tmp_path: Path) -> None:
    """Two minutes after it has noticed, as everywhere, and vmm with it."""
    with Daemon(tmp_path, LINGERS) as vmd:
        vmd.must("start", "mci")
        pids = list(vmd.processes().values())
        with vmd.console("mci") as console:
            console.expect("rtc", DEADLINE_S)
            kill(vmd)
            console.expect("acknowledged", DEADLINE_S)
            console.drain(2 * DEADLINE_S)  # until nobody has the pty any more
        wait_gone(pids)


@pytest.mark.deep
def test_a_daemon_of_another_socket_does_not_wait(tmp_path: Path) -> None:
    """Daemons of one host are told apart by their control sockets."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with Daemon(tmp_path / "one", LINGERS) as one, Daemon(tmp_path / "two") as two:
        one.must("start", "mci")
        two.stop()
        two.start()
        assert "still shutting down" not in two.log
        assert one.status("mci")["state"] == "running"
        one.must("stop", "-fw", "mci")


@pytest.mark.deep
def test_a_lock_that_cannot_be_had_is_said(tmp_path: Path) -> None:
    """Where /run/vmd cannot be written the daemon runs, without it."""
    hide = 'mkdir -p /run/vmd && mount -t tmpfs -o ro tmpfs /run/vmd && exec "$@"'
    with Daemon(tmp_path, prefix=("unshare", "--mount", "sh", "-c", hide, "sh")) as vmd:
        assert "if this vmd is killed, the next one will not wait for its guests" in vmd.log


@pytest.mark.deep
def test_only_vmm_has_the_lock(tmp_path: Path) -> None:
    """A process that it starts would keep the next daemon waiting."""
    with Daemon(tmp_path, demo()) as vmd:
        vmd.must("start", "demo")
        for title, pid in vmd.processes().items():
            links = open_files(pid).values()
            assert any("/run/vmd/guests-" in link for link in links) == (title == "vmd: vmm"), title
