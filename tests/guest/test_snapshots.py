"""vmctl snapshot of VMs that run: the disks and the machine at one moment, under load."""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import churn, schema
from tests.support.blkdisk import Disk
from tests.support.daemon import DEADLINE_S, Daemon
from tests.support.guests import guest
from tests.support.images import problems, qemu

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.timeout(240)]

ROUNDS = 10


@contextmanager
def busy(tmp_path: Path) -> Iterator[Daemon]:
    """Run a guest that keeps its qcow2 disk busy as VM `a`."""
    raw = Disk(tmp_path / "raw")
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw.path, tmp_path / "disk")
    qemu("qemu-img", "create", "-qf", "qcow2", tmp_path / "second", "1M")
    conf = (
        f'vm "a" {{\ndisable\nmemory 64M\nvcpus 2\nboot "{guest("blk")}" cmdline "churn smp"\n'
        f'disk "{tmp_path}/disk" format qcow2\ndisk "{tmp_path}/second" format qcow2\n}}\n'
    )
    with Daemon(tmp_path, conf) as vmd:
        vmd.must("start", "a")
        with vmd.console("a") as console:
            churn.begin(console)
        yield vmd


def works(vmd: Daemon, more: int = ROUNDS) -> churn.Report:
    """Raise AssertionError unless the guest goes on, with nothing lost; it checks its memory and its disk."""
    with vmd.console("a") as console:
        return churn.ask_until_rounds(console, more)


def listed(vmd: Daemon) -> dict[str, int]:
    """Return the snapshots, and how large the state of the machine is that each has."""
    document = schema.check(vmd.vmctl("snapshot", "-l", "a", "--json").stdout, "snapshot")
    assert all(one["complete"] for one in document["snapshots"])
    return {one["tag"]: one["memory_bytes"] for one in document["snapshots"]}


def test_snapshot_of_a_vm_that_runs(tmp_path: Path) -> None:
    """It goes on, has lost nothing, and QEMU finds the snapshot with the state of the machine."""
    with busy(tmp_path) as vmd:
        works(vmd)
        made = vmd.vmctl("snapshot", "a", "one")
        assert made.returncode == 0, made.stderr
        assert made.stderr.endswith("vmctl: made snapshot one of vm a\n")
        assert vmd.status("a")["state"] == "running"
        works(vmd)
        vmd.must("pause", "a")
        vmd.must("snapshot", "a", "two")
        assert vmd.status("a")["state"] == "paused"
        found = listed(vmd)
        assert set(found) == {"one", "two"}
        assert all(size > 1 << 20 for size in found.values())
        vmd.must("unpause", "a")
        works(vmd)
        vmd.must("snapshot", "-d", "a", "one")
        works(vmd)
        assert set(listed(vmd)) == {"two"}
        with vmd.console("a") as console:
            churn.finish(console)
        vmd.wait_state("a", "stopped")
        for name in ("disk", "second"):
            assert problems(tmp_path / name) == {}
        assert "two" in qemu("qemu-img", "snapshot", "-l", tmp_path / "disk")


def imgwriter(vmd: Daemon) -> int:
    """Return the pid of the imgwriter, or 0."""
    return next((pid for title, pid in vmd.family().items() if "imgwriter" in title), 0)


@contextmanager
def under_way(vmd: Daemon, *words: str) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """Run `vmctl snapshot` until its imgwriter is seen; give both.  The pid is 0 if it was too fast."""
    with subprocess.Popen(
        [*vmd.client, "-s", vmd.socket, "snapshot", *words], stderr=subprocess.PIPE, text=True, cwd=vmd.code
    ) as client:
        deadline = time.monotonic() + DEADLINE_S
        while not (pid := imgwriter(vmd)) and client.poll() is None:
            assert time.monotonic() < deadline
        yield client, pid


@pytest.mark.deep
def test_snapshot_that_is_cut_off(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Its imgwriter or its client is killed: the guest goes on with nothing lost, and there is all of it or nothing."""
    rounds = pytestconfig.getoption("--snapshot-rounds")
    choice = random.Random(rounds)
    cut = 0
    with busy(tmp_path) as vmd:
        for number in range(rounds):
            tag = f"s{number}"
            with under_way(vmd, "a", tag) as (client, pid):
                time.sleep(choice.random())
                if choice.random() < 0.5:
                    client.send_signal(signal.SIGINT)
                elif pid:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                client.communicate(timeout=DEADLINE_S)
            vmd.wait_state("a", "running")
            cut += client.returncode != 0
            works(vmd, 1)
            deadline = time.monotonic() + DEADLINE_S
            while imgwriter(vmd):
                assert time.monotonic() < deadline
            found = listed(vmd)
            if client.returncode == 0:
                assert tag in found
            if tag in found:
                vmd.must("snapshot", "-d", "a", tag)
        works(vmd)
        with vmd.console("a") as console:
            churn.finish(console)
        vmd.wait_state("a", "stopped")
        for name in ("disk", "second"):
            assert problems(tmp_path / name) == {}
    print(f"{rounds} rounds, {cut} cut off")
    assert cut


@pytest.mark.deep
def test_vm_that_is_killed_while_it_is_saved(tmp_path: Path) -> None:
    """`stop -f` ends it and the snapshot; the disks are whole, and it starts again."""
    with busy(tmp_path) as vmd:
        for _ in range(20):
            with under_way(vmd, "a", "x") as (client, pid):
                if pid:
                    os.kill(pid, signal.SIGSTOP)
                    assert "by force" in vmd.vmctl("stop", "a").stderr
                    assert vmd.status("a")["state"] == "saving"
                    vmd.must("stop", "-fw", "a")
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
                _, errors = client.communicate(timeout=DEADLINE_S)
            if pid:
                break
            vmd.must("snapshot", "-d", "a", "x")
        assert client.returncode == 1, errors
        deadline = time.monotonic() + DEADLINE_S
        while imgwriter(vmd):
            assert time.monotonic() < deadline
        assert listed(vmd) == {}
        assert set(problems(tmp_path / "disk")) <= {"leaks"}  # of what its guest had not flushed
        vmd.must("start", "a")
        works(vmd)
