"""vmctl snapshot of stopped VMs, with a real daemon and real disks, whose content QEMU confirms."""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import schema
from tests.support.daemon import DEADLINE_S, Daemon
from tests.support.descriptors import open_files
from tests.support.images import MIB, opened_qcow2, problems, qemu
from tests.support.imgwriters import caught
from vmd.images.rewrite import Rewrite

pytestmark = pytest.mark.root

CONF = """
vm "web" {{
    disable
    disk "{0}/root.qcow2" limit iops 300 rate 10000K
    disk "{0}/data" format qcow2 limit rate 1.5G
    limit {{ memory 3G, cpu 150%, weight 200 }}
}}
vm "bare" {{
    disable
    disk "{0}/plain.raw" format raw
}}
vm "none" {{
    disable
}}
"""


@pytest.fixture
def vmd(tmp_path: Path) -> Iterator[Daemon]:
    """Give a daemon with a VM with two qcow2 disks, one with a raw disk, and one without disks."""
    for name in ("root.qcow2", "data"):
        qemu("qemu-img", "create", "-qf", "qcow2", tmp_path / name, 4 * MIB)
    (tmp_path / "plain.raw").write_bytes(bytes(MIB))
    with Daemon(tmp_path, CONF.format(tmp_path)) as daemon:
        yield daemon


def fill(vmd: Daemon, byte: int) -> None:
    """Write to both disks."""
    for name in ("root.qcow2", "data"):
        qemu("qemu-io", "-f", "qcow2", "-c", f"write -P {byte} 0 1M", vmd.directory / name)


def filled(vmd: Daemon) -> list[int]:
    """Return each disk's fill byte, from QEMU."""
    found = []
    for name in ("root.qcow2", "data"):
        raw = vmd.directory / "content"
        qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", vmd.directory / name, raw)
        content = raw.read_bytes()
        assert content == content[:1] * MIB + bytes(3 * MIB)
        found.append(content[0])
        assert problems(vmd.directory / name) == {}
    return found


def listed(vmd: Daemon) -> list[tuple[str, bool]]:
    """Return the tags, and whether all disks have them."""
    document = schema.check(vmd.vmctl("snapshot", "-l", "web", "--json").stdout, "snapshot")
    return [(one["tag"], one["complete"]) for one in document["snapshots"]]


def test_snapshots_of_a_stopped_vm(vmd: Daemon) -> None:
    """Snapshots of all disks are made, listed and deleted, and the disks go back to them, also to those of QEMU."""
    fill(vmd, 1)
    made = vmd.vmctl("snapshot", "web", "one")
    assert (made.returncode, made.stderr) == (0, "vmctl: made snapshot one of vm web\n")
    fill(vmd, 2)
    named = json.loads(vmd.vmctl("snapshot", "web", "--json").stdout)["tag"]
    fill(vmd, 3)
    assert sorted(listed(vmd)) == sorted([("one", True), (named, True)])
    for name in ("root.qcow2", "data"):
        qemu("qemu-img", "snapshot", "-c", "theirs", vmd.directory / name)
        assert "one" in qemu("qemu-img", "snapshot", "-l", vmd.directory / name)

    for tag, byte in ((named, 2), ("one", 1), ("theirs", 3)):
        vmd.must("snapshot", "-r", "web", tag)
        assert filled(vmd) == [byte, byte]
    vmd.must("snapshot", "-d", "web", "one")
    vmd.must("snapshot", "-d", "web", named)

    assert listed(vmd) == [("theirs", True)]
    assert filled(vmd) == [3, 3]
    table = vmd.must("snapshot", "-l", "web").splitlines()
    assert table[0].split() == ["TAG", "MADE", "MEMORY"]
    assert table[1].startswith("theirs ")
    assert "imgwriter" not in " ".join(vmd.processes())


MISTAKES = (
    (("web", "7"), 2, "name of a snapshot must begin with a letter or digit and must not be a number: 7"),
    (("web", "a b"), 2, "name of a snapshot must have letters, digits and ._-+: only: a b"),
    (("-r", "web", "gone"), 1, "vm web: disk {0}/root.qcow2: has no snapshot gone"),
    (("-d", "web", "gone"), 1, "vm web: disk {0}/root.qcow2: has no snapshot gone"),
    (("web", "twice"), 1, "vm web: disk {0}/root.qcow2: has a snapshot twice already"),
    (("bare", "x"), 1, "vm bare: disk {0}/plain.raw: is raw: only qcow2 images have snapshots"),
    (("-l", "bare"), 1, "vm bare: disk {0}/plain.raw: is raw: only qcow2 images have snapshots"),
    (("none", "x"), 1, "vm none has no disks"),
    (("nobody", "x"), 4, "vm nobody not found"),
    (("-r", "web"), 2, "missing argument: tag"),
    (("-l", "web", "x"), 2, "unexpected argument: x"),
    (("-d", "-l", "web"), 2, "conflicting -d and -l arguments"),
)


def test_mistakes_are_named(vmd: Daemon) -> None:
    """Each gets one sentence with the file or the word, and the disks are unchanged."""
    fill(vmd, 1)
    vmd.must("snapshot", "web", "twice")

    for words, status, sentence in MISTAKES:
        done = vmd.vmctl("snapshot", *words)
        assert (words, done.returncode) == (words, status)
        assert sentence.format(vmd.directory) in done.stderr.splitlines()[0]
    assert filled(vmd) == [1, 1]
    assert listed(vmd) == [("twice", True)]


@pytest.mark.deep
def test_incomplete_snapshot_is_shown_and_can_only_be_deleted(vmd: Daemon) -> None:
    """Disks cannot go back to a snapshot that only some of them have."""
    fill(vmd, 1)
    qemu("qemu-img", "snapshot", "-c", "half", vmd.directory / "data")
    fill(vmd, 2)

    assert "incomplete: 1 of 2 disks have it" in vmd.must("snapshot", "-l", "web")
    done = vmd.vmctl("snapshot", "-r", "web", "half")
    assert done.returncode == 1
    assert f"{vmd.directory}/root.qcow2: has no snapshot half, unlike another disk" in done.stderr
    assert "has a snapshot half already" in vmd.vmctl("snapshot", "web", "half").stderr
    assert filled(vmd) == [2, 2]
    vmd.must("snapshot", "-d", "web", "half")
    assert listed(vmd) == []
    assert filled(vmd) == [2, 2]


@pytest.mark.deep
def test_disks_in_use_by_another_program_are_refused(vmd: Daemon) -> None:
    """The disks are locked as for a start."""
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(vmd.directory / "data")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdin.write(b"write 0 4k\n")
        other.stdin.flush()
        other.stdout.readline()
        done = vmd.vmctl("snapshot", "web", "x")
        other.communicate(b"quit\n", DEADLINE_S)
    assert done.returncode == 1
    assert f"disk {vmd.directory}/data: is in use by" in done.stderr
    vmd.must("snapshot", "web", "x")


def test_going_back_was_interrupted_between_two_disks(vmd: Daemon) -> None:
    """The VM does not start with disks of different times.  A second command to go back completes the first."""
    fill(vmd, 1)
    vmd.must("snapshot", "web", "one")
    fill(vmd, 2)
    images = [opened_qcow2(vmd.directory / name) for name in ("root.qcow2", "data")]
    changes = [Rewrite(image) for image in images]
    for change in changes:
        change.go_back("one")
    for change in changes:
        change.announce()
    changes[0].commit()
    for image in images:
        image.close()
    assert filled(vmd) == [1, 2]

    for words in (("start", "web"), ("snapshot", "web", "two"), ("snapshot", "-d", "web", "one")):
        done = vmd.vmctl(*words)
        assert done.returncode == 1
        assert f"disk {vmd.directory}/data: going back to a snapshot with other disks was interrupted" in done.stderr
    assert listed(vmd) == [("one", True)]
    vmd.must("snapshot", "-r", "web", "one")
    assert filled(vmd) == [1, 1]
    vmd.must("snapshot", "web", "two")


def raw_of(path: Path) -> bytes:
    """Return the content of a disk, from QEMU."""
    raw = path.with_name("raw-content")
    qemu("qemu-img", "convert", "-O", "raw", path, raw)
    return raw.read_bytes()


def test_clone_of_a_vm_and_of_a_snapshot(vmd: Daemon) -> None:
    """Its disks have the present content, or that of the snapshot.  vmctl prints a valid block for vm.conf."""
    fill(vmd, 1)
    vmd.must("snapshot", "web", "one")
    fill(vmd, 2)

    blocks = []
    for word, new, byte in (("web", "same", 2), ("web@one", "before", 1)):
        done = vmd.vmctl("clone", word, new)
        assert done.returncode == 0, done.stderr
        assert f"vmctl: cloned vm {word} as {new}: add this to vm.conf" in done.stderr
        blocks.append(done.stdout)
        for number in range(2):
            copy = vmd.directory / f"{new}-disk{number}"
            assert f'disk "{copy}" format qcow2' in done.stdout
            assert raw_of(copy) == bytes([byte]) * MIB + bytes(3 * MIB)
            assert problems(copy) == {}
            assert copy.stat().st_mode & 0o777 == 0o600
    more = vmd.directory / "more.conf"
    more.write_text("".join(blocks).replace("{\n", "{\n    disable\n"))
    vmd.must("load", more)
    assert {"same", "before"} <= {row["name"] for row in vmd.rows()}
    limits = [limits_of(vmd, name) for name in ("web", "same", "before")]
    assert limits == limits[:1] * 3
    assert limits[0] == ([300, 0], [10_000 << 10, 1536 << 20], (3 << 30, 150, 200))
    assert [tag for tag, _ in listed(vmd)] == ["one"]
    document = schema.check(vmd.vmctl("clone", "bare", "plain", "--json").stdout, "clone")
    assert document["disks"] == [{"path": f"{vmd.directory}/plain-disk0", "format": "raw"}]
    assert (vmd.directory / "plain-disk0").read_bytes() == (vmd.directory / "plain.raw").read_bytes()


def limits_of(vmd: Daemon, name: str) -> tuple[list[int], list[int], tuple[int, ...]]:
    """Return the limits of a VM: requests and bytes of each disk, and those of the whole VM."""
    (vm,) = json.loads(vmd.must("metrics", name, "--json"))["vms"]
    disks, whole = vm["disks"], vm["limit"]
    return (
        [disk["iops_limit"] for disk in disks],
        [disk["rate_limit"] for disk in disks],
        (whole["memory_bytes"], whole["cpu_percent"], whole["weight"]),
    )


CLONING_MISTAKES = (
    (("web@gone", "new"), 1, "disk {0}/root.qcow2: has no snapshot gone"),
    (("web@", "new"), 2, "no tag after the @: web@"),
    (("bare@one", "new"), 1, "disk {0}/plain.raw: is raw: only qcow2 images have snapshots"),
    (("none", "new"), 1, "vm none has no disks"),
    (("nobody", "new"), 4, "vm nobody not found"),
    (("web", "bare"), 1, "vm bare already exists"),
    (("web", "a/b"), 2, "invalid VM name: a/b"),
    (("web", "taken"), 1, "could not create {0}/taken-disk1: File exists"),
)


@pytest.mark.deep
def test_mistakes_of_cloning_leave_nothing_behind(vmd: Daemon) -> None:
    """Each gets one sentence, and makes no file."""
    fill(vmd, 1)
    (vmd.directory / "taken-disk1").write_bytes(b"")
    before = sorted(os.listdir(vmd.directory))

    for words, status, sentence in CLONING_MISTAKES:
        done = vmd.vmctl("clone", *words)
        assert (words, done.returncode) == (words, status), done.stderr
        assert sentence.format(vmd.directory) in done.stderr.splitlines()[0]
    assert sorted(os.listdir(vmd.directory)) == before


@pytest.mark.deep
def test_clone_of_a_disk_with_a_backing_file(vmd: Daemon) -> None:
    """The clone of a snapshot has the content of the backing file, and no backing file itself."""
    base = vmd.directory / "base.qcow2"
    qemu("qemu-img", "create", "-qf", "qcow2", base, 4 * MIB)
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 4M", base)
    for name in ("root.qcow2", "data"):
        (vmd.directory / name).unlink()
        qemu("qemu-img", "create", "-qf", "qcow2", "-F", "qcow2", "-b", "base.qcow2", vmd.directory / name)
    fill(vmd, 1)
    vmd.must("snapshot", "web", "one")
    fill(vmd, 2)

    vmd.must("clone", "web@one", "new")
    for number in range(2):
        copy = vmd.directory / f"new-disk{number}"
        assert raw_of(copy) == b"\1" * MIB + b"\x09" * (3 * MIB)
        assert "backing" not in qemu("qemu-img", "info", copy)


@pytest.mark.deep
def test_imgwriter_has_the_disks_of_one_vm(vmd: Daemon) -> None:
    """It has no other file, no capability, its own id, and a seccomp filter."""
    root = vmd.directory / "root.qcow2"
    root.unlink()
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", "preallocation=metadata", root, 100 << 30)  # slow to snapshot
    for number in range(20):
        with caught(vmd, "web", f"s{number}") as (client, pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                while pid and look_at(pid)["Seccomp"] == "0":
                    pass
                os.kill(pid or (1 << 22), signal.SIGSTOP)
                inside = look_at(pid)
                os.kill(pid, signal.SIGKILL)
            client.communicate(timeout=DEADLINE_S)
        if client.returncode:
            break
    files = {name for name in inside["files"].split("\n") if name.startswith("/") and name != "/dev/null"}
    assert inside["Seccomp"] == "2"
    assert inside["CapEff"] == inside["CapPrm"] == "0" * 16
    assert int(inside["Uid"].split()[0]) >= 1 << 16
    assert files <= {str(root), str(vmd.directory / "data")}


def look_at(pid: int) -> dict[str, str]:
    """Return /proc/PID/status of a process as a mapping, and its open files."""
    found = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    found["files"] = "\n".join(open_files(pid).values())
    return found


@pytest.mark.deep
def test_vm_is_not_started_while_its_disks_change(vmd: Daemon) -> None:
    """The sentence has the reason.  When imgwriter is killed, the client is told, and the disks are unchanged."""
    fill(vmd, 1)
    for _ in range(20):
        with caught(vmd, "web", "x") as (client, pid):
            if not pid:
                vmd.must("snapshot", "-d", "web", "x")
                continue
            os.kill(pid, signal.SIGSTOP)
            started = vmd.vmctl("start", "web")
            again = vmd.vmctl("snapshot", "web", "y")
            os.kill(pid, signal.SIGKILL)
            _, errors = client.communicate(timeout=DEADLINE_S)
            break

    for done in (started, again):
        assert "vm web: its snapshots are in use by another command" in done.stderr
    assert client.returncode == 1
    assert "vm web: imgwriter has ended" in errors
    assert filled(vmd) == [1, 1]
    assert listed(vmd) == []
    vmd.must("snapshot", "web", "x")


@pytest.mark.deep
def test_kills_in_the_middle_leave_no_error_and_no_leak(vmd: Daemon, pytestconfig: pytest.Config) -> None:
    """imgwriter is killed at random while it makes, deletes or goes back to snapshots.  QEMU finds no error."""
    rounds = pytestconfig.getoption("--snapshot-rounds")
    choice = random.Random(rounds)
    fill(vmd, 1)
    began = time.monotonic()
    vmd.must("snapshot", "web", "base")
    usual_s = time.monotonic() - began
    killed = 0
    for number in itertools.count():
        if number >= rounds and killed:  # a fast imgwriter may have ended each time before it was to be killed
            break
        fill(vmd, 2 + number % 200)
        words = choice.choice((("web", f"s{number}"), ("-r", "web", "base"), ("-d", "web", f"s{number}")))
        if words[0] == "-d":
            vmd.must("snapshot", "web", f"s{number}")
        with caught(vmd, *words) as (client, pid):
            if pid:
                time.sleep(choice.random() * usual_s)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            client.communicate(timeout=DEADLINE_S)
        killed += client.returncode != 0
        for name in ("root.qcow2", "data"):
            assert problems(vmd.directory / name) == {}
        for tag, complete in listed(vmd):
            if tag != "base" or not complete:
                vmd.must("snapshot", "-d", "web", tag)
        vmd.must("snapshot", "-r", "web", "base")
        assert filled(vmd) == [1, 1]
    print(f"{number} rounds, {killed} killed")
