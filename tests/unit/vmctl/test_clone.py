"""The block that vmctl clone prints."""

import itertools
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.descriptors import open_descriptors
from tests.support.images import opened, opened_qcow2, read, write
from tests.unit.vmctl.conftest import Vmctl
from tests.unit.vmctl.fake import FakeDaemon, vm_info
from vmctl.commands import clone
from vmctl.commands.clone import Limits, block, interface
from vmd.config.check import load
from vmd.config.model import Forward, NicConfig
from vmd.images.create import convert, create
from vmd.images.rewrite import Rewrite
from vmd.ipc.figures import DiskFigures, LimitFigures, NicFigures
from vmd.ipc.messages.clients import DiskInfo, End, ListRequest, NicInfo, VmFiles, VmInfo
from vmd.ipc.messages.figures import VmFigures


@pytest.mark.parametrize(
    ("figures", "lines"),
    [
        ([], ['disk "/a" format raw', "interface", "local interface"]),
        (
            [VmFigures(
                vmid=1, name="old", uid=0, state="stopped", disks=(DiskFigures(index=0, rate_limit=65537),),
                nics=(NicFigures(index=0, rate_limit=5 << 20), NicFigures(index=1)), limit=LimitFigures(cpu_percent=50),
            )],
            ['disk "/a" format raw limit rate 65537', "interface { limit rate 5M }", "local interface",
             "limit { cpu 50% }"],
        ),
    ],
)  # fmt: skip
def test_limits_are_those_of_the_old_vm(figures: list[VmFigures], lines: list[str]) -> None:
    """Each limit stands at its device or VM, in whole units where possible."""
    nics = [
        NicInfo(index=index, tap="", switch="", lladdr=b"", up=True, locked=False, local=local)
        for index, local in enumerate((False, True))
    ]
    old = VmInfo(
        vmid=1, name="old", pid=0, memory_bytes=512 << 20, resident_bytes=0, vcpus=1, tty="", owner="", uid=0,
        gid=0, state="stopped", files=VmFiles(), nics=tuple(nics),
    )  # fmt: skip

    assert block(old, "new", [("/a", "raw")], Limits(figures)) == [
        'vm "new" {', "    memory 512M", *(f"    {line}" for line in lines), "}"
    ]  # fmt: skip


@pytest.mark.parametrize("options", list(itertools.product((False, True), repeat=5)), ids=str)
def test_printed_interfaces_can_be_loaded(tmp_path: Path, options: tuple[bool, ...]) -> None:
    """The printed line is read as the same interface, for all combinations of options."""
    local, on_switch, locked, kernel, limited = options
    nic = NicInfo(
        index=0, tap="", switch="lan" if on_switch else "", lladdr=b"", up=True, locked=locked, local=local,
        vhost=kernel,
    )  # fmt: skip
    conf = tmp_path / "vm.conf"
    line = interface(nic, "limit rate 1M" if limited else "")
    conf.write_text(f'switch "lan" {{ interface br0 }}\nvm "a" {{\ndisable\n{line}\n}}\n')

    (read,) = load(str(conf), warn=print).vms[0].nics

    wanted = NicConfig(local=local, switch=nic.switch, locked=locked, vhost=kernel, rate_limit=limited << 20)
    assert read == wanted


def test_forwards_are_not_forgotten() -> None:
    """Two VMs cannot have the same host ports, so the user must choose others for the clone."""
    local = NicInfo(index=0, tap="", switch="", lladdr=bytes(6), up=True, locked=False, local=True)
    remark = "    # forwards of old are in its block; the new VM needs other ports of the host"
    for forwards, said in (((Forward(port=8022, to=22),), True), ((), False)):
        old = vm_info("old", files=VmFiles(), nics=(local.replace(forwards=forwards),))
        assert (remark in block(old, "new", [], Limits([]))) is said


def test_a_seed_is_not_forgotten() -> None:
    """Its options are unknown to vmctl.  Without a seed the clone's guest would keep the identity of the old one."""
    old = vm_info("old", files=VmFiles(seed=True))

    assert "    # add a seed here, as in the block of old" in "\n".join(block(old, "new", [], Limits([])))


# --- the copies ---------------------------------------------------------------------------------------------------

SIZE = 1 << 20
CONTENT = bytes(range(256)) * 4


class Old:
    """A stopped VM with disks in a folder, and a daemon that knows it."""

    def __init__(self, daemon: FakeDaemon, folder: Path) -> None:
        self.daemon = daemon
        self.folder = folder
        self.disks: tuple[DiskInfo, ...] = ()

    def has(self, name: str, content: bytes | None = CONTENT, image_format: str = "raw") -> None:
        """Add a disk; without content it has no file."""
        path = self.folder / name
        if content is not None:
            path.write_bytes(content)
        self.disks += (DiskInfo(path=str(path), format=image_format),)

    def is_known(self, **more: object) -> None:
        """Let the daemon know it."""
        vms = vm_info("old", running=False, files=VmFiles(disks=self.disks)).replace(**more), vm_info("other", vmid=2)
        self.daemon.script = lambda request: (*vms, End()) if isinstance(request, ListRequest) else (End(),)

    def made(self) -> dict[str, bytes]:
        """Return the new files."""
        return {path.name: path.read_bytes() for path in sorted(self.folder.glob("new-*"))}


@pytest.fixture
def old(daemon: FakeDaemon, tmp_path: Path) -> Old:
    """A stopped VM without disks yet."""
    (tmp_path / "disks").mkdir()
    return Old(daemon, tmp_path / "disks")


def test_the_disks_of_a_stopped_vm_are_copied(vmctl: Vmctl, old: Old) -> None:
    """Each beside the old one, with its format."""
    old.has("a")
    old.has("b", CONTENT[::-1])
    old.is_known()

    status, output, errors = vmctl("clone", "old", "new")

    assert (status, errors) == (0, "vmctl: cloned vm old as new: add this to vm.conf, and run vmctl reload\n")
    assert old.made() == {"new-disk0": CONTENT, "new-disk1": CONTENT[::-1]}
    assert [line.strip() for line in output.splitlines() if "disk" in line] == [
        f'disk "{old.folder}/new-disk{index}" format raw' for index in range(2)
    ]


def test_json_of_a_clone(vmctl: Vmctl, old: Old) -> None:
    """It has the block, too."""
    old.has("a")
    old.is_known()

    document = json.loads(vmctl("clone", "--json", "old", "new")[1])

    assert (document["name"], document["disks"]) == (
        "new", [{"path": f"{old.folder}/new-disk0", "format": "raw"}],
    )  # fmt: skip
    assert document["conf"].startswith('vm "new" {\n')


@pytest.mark.parametrize(
    ("arguments", "more", "status", "words"),
    [
        (("gone", "new"), {}, 4, "vm gone not found"),
        (("old@", "new"), {}, 2, "no tag after the @: old@"),
        (("old", "a/b"), {}, 2, "invalid VM name: a/b"),
        (("old", "other"), {}, 1, "vm other already exists"),
        (("old", "old"), {}, 1, "vm old already exists"),
        (("old", "new"), {"files": None}, 1, "vm old: only its owner may see its disks"),
        (("old", "new"), {"files": VmFiles()}, 1, "vm old has no disks"),
        (("old", "new"), {"state": "running"}, 1, "vm old is running: stop it, or make a snapshot and clone old@TAG"),
        (("old", "new"), {"state": "paused"}, 1, "vm old is paused: stop it"),
        (("old@base", "new"), {}, 1, "is raw: only qcow2 images have snapshots"),
    ],
)
def test_what_cannot_be_cloned(
    vmctl: Vmctl, old: Old, arguments: tuple[str, ...], more: dict[str, object], status: int, words: str
) -> None:
    """No file is made."""
    old.has("a")
    old.is_known(**more)

    done, output, errors = vmctl("clone", *arguments)

    assert (done, output, old.made()) == (status, "", {})
    assert words in errors


def test_a_vm_that_waits_can_be_cloned(vmctl: Vmctl, old: Old) -> None:
    """It does not run either."""
    old.has("a")
    old.is_known(state="waiting")

    assert vmctl("clone", "old", "new")[0] == 0


def test_a_failed_copy_removes_the_others(vmctl: Vmctl, old: Old) -> None:
    """A part of a clone is of no use, and would be in the way of the next one."""
    old.has("a")
    old.has("gone", None)
    old.is_known()

    status, output, errors = vmctl("clone", "old", "new")

    assert (status, output, old.made()) == (1, "", {})
    assert f"disk {old.folder}/gone: " in errors


def test_no_file_is_overwritten(vmctl: Vmctl, old: Old) -> None:
    """It may be another VM's disk.  It stays when the other copies are removed."""
    old.has("a")
    old.has("b")
    old.is_known()
    (old.folder / "new-disk1").write_bytes(b"precious")

    assert vmctl("clone", "old", "new")[0] == 1
    assert old.made() == {"new-disk1": b"precious"}


def test_a_snapshot_of_a_running_vm_is_copied(vmctl: Vmctl, old: Old) -> None:
    """The disk has gone on since."""
    path = old.folder / "a.qcow2"
    for command in (
        ("qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE)),
        ("qemu-io", "-f", "qcow2", "-c", "write -q -P 7 0 64k", path),
        ("qemu-img", "snapshot", "-c", "base", path),
        ("qemu-io", "-f", "qcow2", "-c", "write -q -P 9 0 64k", path),
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    old.has("a.qcow2", path.read_bytes(), "qcow2")
    old.is_known(state="running")

    assert vmctl("clone", "old@gone", "new")[0] == 1
    assert old.made() == {}
    status, output, _ = vmctl("clone", "old@base", "new")

    assert status == 0
    assert 'new-disk0" format qcow2' in output
    copy = old.folder / "new-disk0"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", copy, f"{copy}.raw"], check=True)
    assert Path(f"{copy}.raw").read_bytes() == bytes([7]) * 65536 + bytes(SIZE - 65536)
    listed = subprocess.run(["qemu-img", "snapshot", "-l", copy], check=True, capture_output=True, text=True).stdout
    assert "base" not in listed


def test_a_disk_with_a_base_is_copied_alone(vmctl: Vmctl, old: Old) -> None:
    """The copy has the same base, which is in the same folder."""
    create(str(old.folder / "base"), "qcow2", SIZE)
    create(str(old.folder / "top"), "qcow2", SIZE, "base", "qcow2")
    old.has("top", (old.folder / "top").read_bytes(), "qcow2")
    old.is_known()
    before = open_descriptors()

    assert vmctl("clone", "old", "new")[0] == 0
    assert old.made() == {"new-disk0": (old.folder / "top").read_bytes()}
    old.daemon.wait_left()
    assert open_descriptors() == before


def snapshot(path: Path, *arguments: str) -> None:
    """Let qemu-img change the snapshots of an image."""
    subprocess.run(["qemu-img", "snapshot", *arguments, path], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(("name", "image_format", "refused"), [
    ("top", "", True), ("top", "qcow2", False), ("top.qcow2", "", False),
])  # fmt: skip
def test_a_base_that_only_the_image_names(
    vmctl: Vmctl, old: Old, name: str, image_format: str, refused: bool
) -> None:
    """A guest with a raw disk may have written these bytes, to read a file of the host."""
    create(str(old.folder / "base"), "qcow2", SIZE)
    create(str(old.folder / name), "qcow2", SIZE, "base", "qcow2")
    snapshot(old.folder / name, "-c", "first")
    old.has(name, (old.folder / name).read_bytes(), image_format)
    old.is_known()

    status, _, errors = vmctl("clone", "old@first", "new")

    assert (status, list(old.made())) == ((1, []) if refused else (0, ["new-disk0"]))
    assert ("has backing file base, but only its first bytes say so" in errors) is refused


def test_a_snapshot_that_is_deleted_meanwhile(vmctl: Vmctl, old: Old, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clusters may have been overwritten while they were read, so there is no copy."""
    path = old.folder / "a.qcow2"
    create(str(path), "qcow2", SIZE)
    snapshot(path, "-c", "first")
    old.has("a.qcow2", path.read_bytes(), "qcow2")
    old.is_known()

    def copy(*arguments: Any) -> None:  # noqa: ANN401 - those of convert
        convert(*arguments)
        snapshot(path, "-d", "first")

    monkeypatch.setattr(clone, "convert", copy)
    status, output, errors = vmctl("clone", "old@first", "new")

    assert (status, output, old.made()) == (1, "", {})
    assert errors == f"vmctl: disk {path}: snapshot first was deleted while it was read\n"


def test_a_snapshot_with_the_state_of_its_machine(vmctl: Vmctl, old: Old) -> None:
    """Only its disk is copied."""
    path = old.folder / "a.qcow2"
    create(str(path), "qcow2", SIZE)
    image = opened_qcow2(path)
    write(image, 0, b"x" * 512)
    change = Rewrite(image)
    change.add_state([memoryview(b"state" * 1000)], 5000)
    change.create("first", 0, 0)
    change.commit()
    image.close()
    old.has("a.qcow2", path.read_bytes(), "qcow2")
    old.is_known(state="running")

    assert vmctl("clone", "old@first", "new")[0] == 0
    copy = opened(old.folder / "new-disk0", formats=("qcow2",))
    assert (copy.size, read(copy, 0, 1024)) == (SIZE, b"x" * 512 + bytes(512))
    copy.close()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_removes_the_copies(
    vmctl: Vmctl, old: Old, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    """As a failure does."""
    old.has("a")
    old.has("b")
    old.is_known()
    copied: list[int] = []

    def copy(_source: int, _target: int, _show: object) -> None:
        copied.append(1)
        if len(copied) == 2:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(clone, "copy_file", copy)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        status = vmctl("clone", "old", "new")[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

    assert status != 0
    assert (len(copied), old.made()) == (2, {})


def test_disks_and_boot_files_are_in_the_block() -> None:
    """With the characters that vm.conf needs to have escaped."""
    files = VmFiles(boot_image='/k "1"', initrd="/i\\", cdrom="/c.iso")
    lines = block(vm_info("old", vcpus=2, files=files), "new", [("/a", "qcow2")], Limits([]))

    assert lines == [
        'vm "new" {', "    memory 512M", "    vcpus 2", '    boot "/k \\"1\\""',
        "    # its command line, if it has one, is in the block of old", '    initrd "/i\\\\"',
        '    disk "/a" format qcow2', '    cdrom "/c.iso"', "}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1, "1"), (1023, "1023"), (1024, "1K"), (1025, "1025"), (3 << 20, "3M"), (5 << 30, "5G"), (1 << 40, "1T"),
        (1 << 50, "1024T"),
    ],
)  # fmt: skip
def test_sizes_in_whole_units(value: int, text: str) -> None:
    """A limit of the clone is exactly the old one."""
    assert clone.size(value) == text
