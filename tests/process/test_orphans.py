"""Guests whose daemon was killed, without a service manager that restarts it with the stored descriptors."""

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
    """Kill the parent only."""
    assert vmd.process is not None
    process, vmd.process = vmd.process, None
    process.kill()
    process.wait(DEADLINE_S)


def test_guests_of_a_killed_daemon_are_asked_to_shut_down(tmp_path: Path) -> None:
    """vmm presses their power buttons, as for `vmctl stop`, and ends after the last guest.  The next daemon serves."""
    with Daemon(tmp_path, demo("a") + demo("b")) as vmd:
        for name in "ab":
            vmd.must("start", name)
            with vmd.console(name) as console:
                console.expect("vmd-demo> ", DEADLINE_S)  # its driver of the power button has started
        pids = list(vmd.processes().values())
        kill(vmd)
        wait_gone(pids)  # they end much earlier than the time after which vmm kills them

        vmd.start()
        assert [row["state"] for row in vmd.rows()] == ["stopped", "stopped"]
        assert "still shutting down" not in vmd.log
        lock = Path(LifeLock(str(vmd.socket)).path)
        assert lock.exists()
        vmd.stop()
        assert not lock.exists()


@pytest.mark.deep
def test_a_daemon_waits_for_the_guests_of_one_that_was_killed(tmp_path: Path) -> None:
    """Until they have ended, it serves no client and starts no process.  The log says what it waits for."""
    with Daemon(tmp_path, LINGERS) as vmd:
        vmd.must("start", "mci")
        vmm = vmd.processes()["vmd: vmm"]
        with vmd.console("mci") as console:
            console.expect("rtc", DEADLINE_S)
            kill(vmd)
            console.expect("acknowledged", DEADLINE_S)  # the guest does not power off

            starter = threading.Thread(target=vmd.start)
            starter.start()
            vmd.wait_log("guests of an earlier vmd are still shutting down: waiting for their end")
            assert vmd.vmctl("status").returncode != 0
            assert vmd.log.count("startup") == 1
            os.kill(vmm, signal.SIGKILL)  # it would end by itself after two minutes
            starter.join(DEADLINE_S)
        assert not starter.is_alive()
        vmd.wait_log("the guests of an earlier vmd have ended")
        vmd.must("start", "mci")
        vmd.must("stop", "-fw", "mci")


@pytest.mark.deep
@pytest.mark.timeout(400)
def test_a_guest_that_does_not_shut_down_is_killed(tmp_path: Path) -> None:
    """vmm kills it two minutes after it has acknowledged the power button, and ends, too."""
    with Daemon(tmp_path, LINGERS) as vmd:
        vmd.must("start", "mci")
        pids = list(vmd.processes().values())
        with vmd.console("mci") as console:
            console.expect("rtc", DEADLINE_S)
            kill(vmd)
            console.expect("acknowledged", DEADLINE_S)
            console.drain(2 * DEADLINE_S)  # until all processes have closed the pty
        wait_gone(pids)


@pytest.mark.deep
def test_a_daemon_of_another_socket_does_not_wait(tmp_path: Path) -> None:
    """Daemons with different control sockets are independent of each other."""
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
def test_a_lock_that_cannot_be_made_is_logged(tmp_path: Path) -> None:
    """If /run/vmd cannot be written, the daemon runs without the lock."""
    hide = 'mkdir -p /run/vmd && mount -t tmpfs -o ro tmpfs /run/vmd && exec "$@"'
    with Daemon(tmp_path, prefix=("unshare", "--mount", "sh", "-c", hide, "sh")) as vmd:
        assert "if this vmd is killed, the next one will not wait for its guests" in vmd.log


@pytest.mark.deep
def test_only_vmm_has_the_lock(tmp_path: Path) -> None:
    """If another process had it, the next daemon would wait for that process, too."""
    with Daemon(tmp_path, demo()) as vmd:
        vmd.must("start", "demo")
        for title, pid in vmd.processes().items():
            links = open_files(pid).values()
            assert any("/run/vmd/guests-" in link for link in links) == (title == "vmd: vmm"), title
