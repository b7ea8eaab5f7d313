"""vmctl snapshot of running VMs under load: disks and machine at the same moment."""

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import churn, schema
from tests.support.blkdisk import Disk
from tests.support.daemon import DEADLINE_S, Daemon
from tests.support.guests import guest
from tests.support.images import opened_qcow2, problems, qemu, small_file_system
from tests.support.imgwriters import caught, imgwriter
from tests.support.waiting import pause
from vmd.images.rewrite import Rewrite

pytestmark = [pytest.mark.root, pytest.mark.kvm, pytest.mark.timeout(240)]

ROUNDS = 10


def churning(tmp_path: Path, name: str, disks: tuple[str, str], vcpus: int = 2) -> str:
    """Return the block of a VM that keeps the first of two disks busy."""
    lines = (f'disk "{tmp_path}/{disk}" format qcow2\n' for disk in disks)
    options = f'disable\nmemory 64M\nvcpus {vcpus}\nboot "{guest("blk")}" cmdline "churn smp"\n'
    return f'vm "{name}" {{\n{options}{"".join(lines)}}}\n'


@contextmanager
def busy(tmp_path: Path) -> Iterator[Daemon]:
    """Run a guest that keeps its qcow2 disk busy as VM `a`."""
    raw = Disk(tmp_path / "raw")
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw.path, tmp_path / "disk")
    qemu("qemu-img", "create", "-qf", "qcow2", tmp_path / "second", "1M")
    with Daemon(tmp_path, churning(tmp_path, "a", ("disk", "second"))) as vmd:
        vmd.must("start", "a")
        with vmd.console("a") as console:
            churn.begin(console)
        yield vmd


def works(vmd: Daemon, more: int = ROUNDS) -> churn.Report:
    """Raise AssertionError unless the guest, which checks its memory and disk, goes on without loss."""
    with vmd.console("a") as console:
        return churn.ask_until_rounds(console, more)


def listed(vmd: Daemon, *, cut: str = "") -> dict[str, int]:
    """Return the snapshots, and the size of each one's machine state.

    All are complete, except possibly the snapshot `cut`, which was interrupted between two disks.
    """
    document = schema.check(vmd.vmctl("snapshot", "-l", "a", "--json").stdout, "snapshot")
    assert {one["tag"] for one in document["snapshots"] if not one["complete"]} <= {cut}
    return {one["tag"]: one["memory_bytes"] for one in document["snapshots"]}


def test_snapshot_of_a_vm_that_runs(tmp_path: Path) -> None:
    """The VM goes on without loss, and QEMU finds the snapshot with the machine's state."""
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


def test_going_back_with_the_machine(tmp_path: Path) -> None:
    """Disks and memory have their earlier content.  The guest goes on from there without loss, on the same console."""
    with busy(tmp_path) as vmd:
        works(vmd)
        vmd.must("snapshot", "a", "then")
        before = vmd.status("a")
        later = works(vmd, 50)

        done = vmd.vmctl("snapshot", "-r", "a", "then")
        assert done.returncode == 0, done.stderr
        assert done.stderr.endswith("vmctl: went back to snapshot then of vm a\n")
        now = works(vmd, 1)
        assert now.rounds < later.rounds
        after = vmd.status("a")
        assert (after["state"], after["tty"], after["id"]) == ("running", before["tty"], before["id"])
        works(vmd)
        vmd.must("pause", "a")
        vmd.must("snapshot", "-r", "a", "then")
        assert vmd.status("a")["state"] == "paused"
        vmd.must("unpause", "a")
        works(vmd)
        with vmd.console("a") as console:
            churn.finish(console)
        vmd.wait_state("a", "stopped")
        for name in ("disk", "second"):
            assert problems(tmp_path / name) == {}
        assert set(listed(vmd)) == {"then"}


@pytest.mark.deep
def test_going_back_is_refused_and_the_vm_goes_on(tmp_path: Path) -> None:
    """Going back to a snapshot that does not exist, or that has no machine state, is refused."""
    with busy(tmp_path) as vmd:
        vmd.must("stop", "-fw", "a")
        vmd.must("snapshot", "a", "cold")
        image = opened_qcow2(tmp_path / "disk")
        change = Rewrite(image)
        change.add_state([memoryview(b"QEVM" * 100)], 400)
        change.create("theirs")
        change.commit()
        image.close()
        qemu("qemu-img", "snapshot", "-c", "theirs", tmp_path / "second")
        vmd.must("start", "a")
        with vmd.console("a") as console:
            churn.begin(console)
        for tag, sentence in (
            ("cold", "vm a: snapshot cold has the disks only: stop the VM to go back to it"),
            ("theirs", "vm a: snapshot theirs has the machine as another program has written it: stop the VM"),
            ("gone", f"vm a: disk {tmp_path}/disk: has no snapshot gone"),
        ):
            assert sentence in vmd.vmctl("snapshot", "-r", "a", tag).stderr
            assert vmd.status("a")["state"] == "running"
            works(vmd)


@pytest.mark.deep
def test_going_back_takes_only_the_machine_from_the_disks(tmp_path: Path) -> None:
    """`c` goes back with its own disks, although the saved machine names those of `a`.  `d` is refused."""
    with busy(tmp_path) as vmd:
        works(vmd)
        vmd.must("snapshot", "a", "then")
        vmd.must("stop", "-fw", "a")
        for name in ("disk", "second"):
            for copy in ("c", "d"):
                shutil.copy(tmp_path / name, tmp_path / f"{copy}-{name}")
        more = tmp_path / "more.conf"
        more.write_text(
            churning(tmp_path, "c", ("c-disk", "c-second")) + churning(tmp_path, "d", ("d-disk", "d-second"), vcpus=1)
        )
        vmd.must("load", more)
        for name in ("a", "c", "d"):
            vmd.must("start", name)
            with vmd.console(name) as console:
                churn.begin(console)

        vmd.must("snapshot", "-r", "c", "then")
        with vmd.console("c") as console:
            churn.ask_until_rounds(console, ROUNDS)
        done = vmd.vmctl("snapshot", "-r", "d", "then")
        assert done.returncode == 1
        assert "the snapshot is of a machine with 2 virtual CPUs, and this one has 1" in done.stderr
        assert vmd.status("d")["state"] == "stopped"
        works(vmd)


@pytest.mark.deep
def test_snapshot_that_finds_no_room(tmp_path: Path) -> None:
    """The message names the disk.  The guest goes on, and its disk is not larger than before."""
    with small_file_system(tmp_path / "small") as folder:
        qemu("qemu-img", "create", "-qf", "qcow2", folder / "tiny", "1M")
        (tmp_path / "more.conf").write_text(
            f'vm "b" {{\ndisable\nmemory 64M\nboot "{guest("demo")}"\ndisk "{folder}/tiny" format qcow2\n}}\n'
        )
        with busy(tmp_path) as vmd:
            vmd.must("load", tmp_path / "more.conf")
            vmd.must("start", "b")
            with vmd.console("b") as console:
                console.expect("vmd-demo> ", DEADLINE_S)
            with (folder / "filler").open("wb") as file:
                left = os.statvfs(folder)
                os.posix_fallocate(file.fileno(), 0, left.f_bavail * left.f_bsize)
            done = vmd.vmctl("snapshot", "b", "full")
            assert done.returncode == 1
            assert f"vm b: disk {folder}/tiny: No space left on device" in done.stderr
            assert vmd.status("b")["state"] == "running"
            with vmd.console("b") as console:
                console.answer("echo a" "live", "alive\r\nalive\r\n")
            (folder / "filler").unlink()
            vmd.must("stop", "-fw", "b")
            assert problems(folder / "tiny") == {}
            works(vmd)


def begun(vmd: Daemon) -> None:
    """Start the VM, and wait until its guest works."""
    vmd.must("start", "a")
    with vmd.console("a") as console:
        churn.begin(console)


def settled(vmd: Daemon) -> str:
    """Wait until no snapshot is in progress; return the VM's state."""
    deadline = time.monotonic() + DEADLINE_S
    while (state := vmd.status("a")["state"]) not in ("running", "stopped") or imgwriter(vmd):
        assert time.monotonic() < deadline, state
    return str(state)


def cut_off(vmd: Daemon, choice: random.Random, *words: str) -> bool:
    """Run `vmctl snapshot`, and perhaps kill it or its imgwriter at a random moment; return whether it succeeded."""
    with caught(vmd, *words) as (client, pid):
        how = choice.randrange(3)
        time.sleep(choice.random())
        if how == 1:
            client.send_signal(signal.SIGINT)
        elif how and pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        client.communicate(timeout=DEADLINE_S)
    return client.returncode == 0


@pytest.mark.deep
@pytest.mark.timeout(3600)
def test_snapshot_that_is_cut_off(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Making, going back and cloning are interrupted anywhere: each is done completely or not at all, without loss."""
    rounds = pytestconfig.getoption("--snapshot-rounds")
    choice = random.Random(rounds)
    cut = {"make": 0, "go back": 0, "clone": 0}
    ended = 0
    with busy(tmp_path) as vmd:
        vmd.must("snapshot", "a", "base")
        for number in range(rounds):
            what, tag, partial = choice.choice(list(cut)), f"s{number}", ""
            if what == "make":
                partial = "" if cut_off(vmd, choice, "a", tag) else tag
                cut[what] += bool(partial)
            elif what == "go back":
                cut[what] += not cut_off(vmd, choice, "-r", "a", "base")
            else:
                vmd.must("clone", "a@base", tag)
                for path in tmp_path.glob(f"{tag}-disk*"):
                    assert problems(path) == {}
                    path.unlink()
            if settled(vmd) == "stopped":  # interrupted after the disks had gone back, but before the machine
                assert what == "go back"
                ended += 1
                begun(vmd)
            works(vmd, 1)
            if tag in listed(vmd, cut=partial):
                vmd.must("snapshot", "-d", "a", tag)
            if number % 5 == 4:
                vmd.must("stop", "-fw", "a")
                for name in ("disk", "second"):
                    assert set(problems(tmp_path / name)) <= {"leaks"}  # of what its guest had not flushed
                begun(vmd)
            assert set(listed(vmd)) == {"base"}
        vmd.must("snapshot", "-r", "a", "base")
        works(vmd)
        with vmd.console("a") as console:
            churn.finish(console)
        vmd.wait_state("a", "stopped")
        for name in ("disk", "second"):
            assert set(problems(tmp_path / name)) <= {"leaks"}
    print(f"{rounds} rounds, cut off: {cut}, {ended} machines ended by that")
    assert cut["make"] + cut["go back"]


@pytest.mark.deep
def test_vm_that_is_killed_while_it_is_saved(tmp_path: Path) -> None:
    """`stop -f` ends the VM and the snapshot.  The disks are consistent, and the VM starts again."""
    with busy(tmp_path) as vmd:
        for _ in range(20):
            with caught(vmd, "a", "x") as (client, pid):
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
            pause()
        assert listed(vmd) == {}
        assert set(problems(tmp_path / "disk")) <= {"leaks"}  # of what its guest had not flushed
        vmd.must("start", "a")
        works(vmd)
