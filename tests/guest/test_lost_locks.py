"""A VM that has lost the lock of its disk is paused, because another host may use the disk."""

import json
import os
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import churn
from tests.support.blkdisk import Disk
from tests.support.daemon import DEADLINE_S, Attached, Daemon
from tests.support.guests import guest
from tests.support.lostlock import stolen

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.deep, pytest.mark.timeout(600)]

LOST = "its lock is lost: somebody else has locked the image, and may have changed it"


def vioblk(vmd: Daemon) -> int:
    """Return the pid of the disk's process."""
    return next(pid for name, pid in vmd.family().items() if name.endswith("/vioblk0"))


def troubles(vmd: Daemon) -> list[str]:
    """Return the VM's reported problems."""
    (row,) = json.loads(vmd.must("status", "-v", "--json", "busy"))["vms"]
    return [trouble["text"] for trouble in row["troubles"]]


@contextmanager
def busy(tmp_path: Path) -> Iterator[tuple[Daemon, Attached, Path]]:
    """Run the guest that keeps its disk busy."""
    disk = Disk(tmp_path / "disk")
    options = ("disable", "memory 64M", f'boot "{guest("blk")}" cmdline "churn"', f'disk "{disk.path}" format raw')
    with Daemon(tmp_path, 'vm "busy" {\n' + "\n".join(options) + "\n}\n") as vmd:
        vmd.must("start", "busy")
        with vmd.console("busy") as console:
            churn.begin(console)
            yield vmd, console, Path(disk.path)


def looks(process: int) -> int:
    """Return how often a disk's process has checked its lock."""
    (task,) = (task for task in Path(f"/proc/{process}/task").iterdir() if (task / "comm").read_text() == "lock\n")
    (line,) = (line for line in (task / "status").read_text().splitlines() if line.startswith("voluntary_ctxt"))
    return int(line.split()[1])


def wait_for_looks(process: int) -> None:
    """Wait until a paused VM's disk process, whose lock is lost, has recorded the state of its image."""
    deadline_s, before = time.monotonic() + DEADLINE_S, looks(process)
    while looks(process) < before + 4:
        assert time.monotonic() < deadline_s
        select.select([], [], [], 0.1)


def test_a_guest_goes_on_when_its_lock_is_back(tmp_path: Path) -> None:
    """The guest is paused with a message, and nothing lets it go on before the lock is available again."""
    with busy(tmp_path) as (vmd, console, path):
        with stolen(vioblk(vmd), path):
            vmd.wait_log(f"vm busy: paused: disk0: {LOST}")
            assert vmd.wait_state("busy", "paused")["text"] == f"disk0: {LOST}"
            assert LOST in troubles(vmd)
            wait_for_looks(vioblk(vmd))
            before = path.read_bytes()
            refused = vmd.vmctl("unpause", "busy")
            assert refused.returncode == 1
            assert "disk0: its lock is lost; it is in use by somebody else" in refused.stderr
            assert vmd.status("busy")["state"] == "paused"
            assert path.read_bytes() == before, "the guest goes on writing"
        said = vmd.must("unpause", "busy")
        assert "disk0: its lock was lost, and is back: nobody has written to its image since this VM was paused" in said
        assert not troubles(vmd)
        assert not vmd.status("busy")["text"]
        churn.ask_until_rounds(console, 10)
        churn.finish(console)
        console.drain(DEADLINE_S)
        assert vmd.wait_state("busy", "stopped")["text"] == "powered off by the guest"


def test_a_guest_does_not_go_on_with_a_disk_that_was_written(tmp_path: Path) -> None:
    """The guest stays paused after every `unpause` without force."""
    with busy(tmp_path) as (vmd, console, path):
        disk = vioblk(vmd)
        with stolen(disk, path):
            vmd.wait_state("busy", "paused")
            wait_for_looks(disk)
            os.utime(path)  # as after a write
        for _ in range(2):
            refused = vmd.vmctl("unpause", "busy")
            assert refused.returncode == 1
            assert "disk0: its lock was lost: somebody else has written to its image" in refused.stderr
            assert vmd.status("busy")["state"] == "paused"
        assert "somebody else has written to its image" in vmd.must("unpause", "-f", "busy")
        assert vmd.must("pause", "busy").count("\n") == vmd.must("unpause", "busy").count("\n") == 1
        churn.ask_until_rounds(console, 10)
        churn.finish(console)
        console.drain(DEADLINE_S)
        assert vmd.wait_state("busy", "stopped")["text"] == "powered off by the guest"
        heard = [json.loads(line) for line in vmd.must("events", "-l", "--json", "busy").splitlines()]
        assert [event["event"] for event in heard if event["device"]] == ["trouble", "mended"]


def test_a_guest_without_its_lock_is_stopped_at_once(tmp_path: Path) -> None:
    """The guest is not asked to shut down, because it would write.  Its disk's process writes nothing either."""
    with busy(tmp_path) as (vmd, _console, path), stolen(vioblk(vmd), path):
        vmd.wait_state("busy", "paused")
        before = path.read_bytes(), path.stat().st_mtime_ns
        vmd.must("stop", "-w", "busy")
        assert "stopped by force: disk0: its lock is lost" in vmd.status("busy")["text"]
        assert (path.read_bytes(), path.stat().st_mtime_ns) == before
        vmd.wait_log("is not flushed, because its lock is lost")
