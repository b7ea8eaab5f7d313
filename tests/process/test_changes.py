"""vmctl enlarges disks and changes discs of running and of stopped VMs.

`tests/l1/test_storage.py` tests the view of guests, `test_vioblk_resize.py` and `test_vioscsi.py` that of drivers.
"""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.test_daemon import PROMPT, demo
from tests.support.clients import connect_as, receive
from tests.support.daemon import DEADLINE_S, Daemon
from tests.support.images import MIB, problems, qemu, same
from tests.support.keeper import KeptDaemon
from tests.support.transfers import Stream, from_file, to_file
from tests.support.users import public_folder
from vmd.ipc.imsg import Form, encode
from vmd.ipc.messages.clients import (
    PROTOCOL,
    DiscInserted,
    DiscRequest,
    Failed,
    Hello,
    Resized,
    ResizeRequest,
    StartRequest,
    VmStarted,
)
from vmd.record import Record

pytestmark = [pytest.mark.root, pytest.mark.kvm]

EVE = 65534  # nobody


class Place:
    """A daemon whose VM `demo` has a raw disk, an overlay and a disc; `hers` is Eve's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.raw, self.top, self.base = folder / "disk.raw", folder / "top.qcow2", folder / "base.qcow2"
        self.disc, self.other, self.hers = folder / "disc.iso", folder / "other.iso", folder / "hers.raw"
        self.raw.write_bytes(b"r" * MIB)
        qemu("qemu-img", "create", "-qf", "qcow2", self.base, MIB)
        qemu("qemu-img", "create", "-qf", "qcow2", "-F", "qcow2", "-b", self.base, self.top)
        self.disc.write_bytes(bytes(1 << 16))
        self.other.write_bytes(bytes(1 << 17))
        self.hers.write_bytes(bytes(MIB))
        disks = f'disk "{self.raw}" format raw', f'disk "{self.top}" format qcow2'
        self.conf = 'socket owner "nobody"\n' + demo("demo", *disks, f'cdrom "{self.disc}"')
        self.conf += demo("hers", f'disk "{self.hers}" format raw', f'cdrom "{self.disc}"', "owner nobody")
        self.vmd: Daemon

    def image_of(self, name: str) -> str:
        """Return the ISO image that the process with a title has open, or ""."""
        pid = self.vmd.processes()[name]
        links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        return next((Path(link).name for link in links if link.endswith(".iso")), "")

    def fails(self, *words: "str | Path") -> str:
        """Run vmctl, which must fail; return its message."""
        done = self.vmd.vmctl(*words)
        assert (done.returncode, done.stdout) == (1, "")
        return done.stderr.removeprefix("vmctl: ").partition(" failed: ")[2].rstrip("\n")


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """Yield the daemon."""
    with public_folder() as folder:
        made = Place(folder)
        with Daemon(folder, made.conf) as made.vmd:
            yield made


@pytest.fixture
def running(place: Place) -> Iterator[Place]:
    """Yield the daemon with `demo` running."""
    place.vmd.must("start", "demo")
    yield place
    if place.vmd.status("demo")["state"] != "stopped":
        place.vmd.must("stop", "-fw", "demo")


@pytest.fixture(params=[False, True], ids=["stopped", "running"])
def either(place: Place, request: pytest.FixtureRequest) -> Iterator[tuple[Place, bool]]:
    """Yield the daemon and whether `demo` runs; both cases."""
    if request.param:
        place.vmd.must("start", "demo")
    yield place, request.param
    if request.param:
        place.vmd.must("stop", "-fw", "demo")


def test_disks_of_a_vm_that_does_not_run(place: Place) -> None:
    """Resize each kind of disk by each of its names.  No lock remains when vmctl has ended."""
    assert place.vmd.must("resize", "demo", "0", "2M") == "vmctl: disk0 of vm 1 has 2.0M now; it does not run\n"
    place.vmd.must("resize", "demo", place.top, "3M")
    document = json.loads(place.vmd.vmctl("resize", "--json", "1", "disk1", "4M").stdout)

    assert place.raw.read_bytes() == b"r" * MIB + bytes(MIB)
    assert problems(place.top) == {}
    same(place.top, bytes(4 * MIB), place.folder)
    assert (document["disk"], document["path"], document["size_bytes"]) == ("disk1", str(place.top), 4 * MIB)
    assert document["running"] is False
    place.vmd.must("start", "demo")
    place.vmd.must("stop", "-fw", "demo")


def test_disks_of_a_vm_that_runs(running: Place) -> None:
    """The disk's own process resizes it, also while the VM is paused."""
    assert running.vmd.must("resize", "demo", "0", "5M") == "vmctl: disk0 of vm 1 has 5.0M now\n"
    running.vmd.must("pause", "demo")
    running.vmd.must("resize", "demo", "1", "6M")
    running.vmd.must("unpause", "demo")
    running.vmd.must("resize", "demo", "1", "6M")

    assert running.raw.stat().st_size == 5 * MIB
    assert "demo: disk0 has 5242880 bytes now" in running.vmd.log
    running.vmd.must("stop", "-fw", "demo")
    same(running.top, bytes(6 * MIB), running.folder)
    assert problems(running.top) == {}


@pytest.mark.deep
def test_what_cannot_be_resized(either: tuple[Place, bool]) -> None:
    """Messages name the object and its kind, and nothing changes."""
    place, runs = either
    size = place.raw.stat().st_size
    have = f"it has disk0 ({place.raw}), disk1 ({place.top})"
    told = "" if runs else "disk "

    assert place.fails("resize", "demo", "0", "512K") == (
        f"vm demo: {told}{place.raw}: has {size} bytes, and a disk is never made smaller"
    )
    assert place.fails("resize", "demo", "1", "512K").endswith("and a disk is never made smaller")
    assert place.fails("resize", "demo", "2", "9M") == f"vm demo has no disk 2: {have}"
    assert place.fails("resize", "demo", "/x", "9M") == f"vm demo has no disk /x: {have}"
    assert place.fails("resize", "demo", "0", "1000") == (
        "vm demo: 1000 bytes: the size of a disk is a multiple of its sectors of 512 bytes"
    )
    assert place.fails("resize", "demo", "1", "7E").endswith("bytes are too many for its clusters of 65536")
    done = place.vmd.vmctl("resize", "demo", "0", "much")
    assert (done.returncode, done.stderr) == (2, "vmctl: invalid disk size: much\n")
    assert place.vmd.vmctl("resize", "nobody", "0", "9M").returncode == 4

    assert place.raw.stat().st_size == size
    if not runs:
        assert problems(place.top) == {}


@pytest.mark.deep
def test_a_disk_that_was_replaced_is_not_resized(running: Place) -> None:
    """Neither the file that the guest uses nor the one that its next start would use is resized."""
    kept = running.folder / "kept.raw"
    size = running.raw.stat().st_size
    running.raw.rename(kept)
    running.raw.write_bytes(bytes(size))
    try:
        assert running.fails("resize", "demo", "0", "9M") == (
            f"vm demo: disk {running.raw} is not the file that its guest uses: it was replaced meanwhile"
        )
        assert (running.raw.stat().st_size, kept.stat().st_size) == (size, size)
    finally:
        kept.rename(running.raw)


def test_the_disc_of_a_vm_that_runs(running: Place) -> None:
    """The drive's process gets another disc or none, and this stays after a reset and after a move of the guest."""
    drive = "vmd: vm/demo/vioscsi0"
    with running.vmd.console("demo") as console:
        console.expect(PROMPT, DEADLINE_S)
        assert running.image_of(drive) == "disc.iso"
        assert running.vmd.must("cdrom", "demo", running.other) == (
            f"vmctl: the drive of vm 1 has disc {running.other} now\n"
        )
        assert running.image_of(drive) == "other.iso"
        console.answer("reset", PROMPT)
        assert running.image_of(drive) == "other.iso"
        assert "is not the file that its guest had" not in running.vmd.log

        assert running.vmd.must("cdrom", "-e", "demo") == "vmctl: the drive of vm 1 has no disc now\n"
        assert running.image_of(drive) == ""
        console.answer("reset", PROMPT)
        assert running.image_of(drive) == ""
    assert running.vmd.status("demo")["cdrom"] is None

    stream = running.folder / "stream"
    to_file(running.vmd, "demo", stream)
    assert from_file(running.vmd, "demo", stream)[0] == 0
    assert running.image_of(drive) == ""
    running.vmd.must("cdrom", "demo", running.disc)
    to_file(running.vmd, "demo", stream)
    assert Stream(stream.read_bytes()).header.config.cdrom == str(running.disc)
    assert from_file(running.vmd, "demo", stream)[0] == 0
    assert running.image_of(drive) == "disc.iso"


@pytest.mark.deep
def test_the_disc_of_a_vm_that_does_not_run(place: Place) -> None:
    """Later starts use the new disc until vm.conf is read again.  The drive stays without one."""
    assert place.vmd.must("cdrom", "demo", place.other).endswith(f"{place.other} now; it does not run\n")
    assert place.vmd.status("demo")["cdrom"] == str(place.other)
    place.vmd.must("cdrom", "-e", "demo")
    place.vmd.must("start", "demo")
    assert place.image_of("vmd: vm/demo/vioscsi0") == ""
    notes = place.vmd.must("reload")
    place.vmd.must("stop", "-fw", "demo")

    assert notes == "vmctl: vm demo: cdrom changed; that waits for its next start\n"
    assert place.vmd.status("demo")["cdrom"] == str(place.disc)


@pytest.mark.deep
def test_what_is_no_disc(either: tuple[Place, bool]) -> None:
    """The drive keeps its disc."""
    place, runs = either
    qcow2 = place.folder / "image.iso"
    qemu("qemu-img", "create", "-qf", "qcow2", qcow2, MIB)

    assert place.fails("cdrom", "demo", "/none.iso") == "vm demo: cdrom /none.iso: No such file or directory"
    assert place.fails("cdrom", "demo", place.folder).endswith("neither a regular file nor a block device")
    assert place.fails("cdrom", "demo", qcow2).startswith(f"vm demo: cdrom {qcow2}: ")
    if runs:
        assert place.fails("cdrom", "demo", place.raw) == (
            f"vm demo: cdrom {place.raw}: is in use by vm demo, which writes to it"
        )
        assert place.image_of("vmd: vm/demo/vioscsi0") == "disc.iso"
    assert place.vmd.status("demo")["cdrom"] == str(place.disc)


def test_whose_files_are_changed(place: Place) -> None:
    """Only users who control the VM can change it; they must be able to write to the disk, or to read the disc."""
    place.hers.chmod(0o600)
    place.other.chmod(0o600)

    def ask(message: Record) -> Record | None:
        with connect_as(place.vmd.socket, EVE, EVE) as client:
            for each in (Hello(version=PROTOCOL), message):
                client.send(encode(each, form=Form.NAMED)[0])
                answer = receive(client)
            return answer

    larger = ResizeRequest(name="hers", disk="0", size_bytes=2 * MIB)
    for runs in (False, True):
        if runs:
            assert isinstance(ask(StartRequest(name="hers")), VmStarted)
            larger = larger.replace(size_bytes=3 * MIB)
        os.chown(place.hers, 0, 0)
        place.other.chmod(0o600)
        answer = ask(larger)
        assert isinstance(answer, Failed)
        assert answer.text.startswith(
            f"vm hers: disk {place.hers}: cannot be opened for writing: uid {EVE} has no permission"
        )
        answer = ask(DiscRequest(name="hers", path=str(place.other)))
        assert isinstance(answer, Failed)
        assert answer.text.startswith(f"vm hers: cdrom {place.other}: uid {EVE} has no permission")
        os.chown(place.hers, EVE, EVE)
        place.other.chmod(0o644)
        for message in (larger.replace(name="demo"), DiscRequest(name="demo")):
            answer = ask(message)
            assert isinstance(answer, Failed)
            assert (answer.code, answer.text.endswith("its owner is root")) == (errno.EPERM, True)
        assert isinstance(ask(larger), Resized)
        assert isinstance(ask(DiscRequest(name="hers", path=str(place.other))), DiscInserted)

    assert place.hers.stat().st_size == 3 * MIB
    place.other.chmod(0o600)
    with place.vmd.console("hers") as console:
        console.expect(PROMPT, DEADLINE_S)
        console.type("reset\r")
        place.vmd.wait_log("hers: terminated vm 2: cannot reboot: cdrom")
    place.vmd.must("reload")


def discs_of(pid: int) -> set[str]:
    """Return the ISO images that the device processes of a VM have open."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    links = [os.readlink(f"/proc/{child}/fd/{fd}") for child in children for fd in os.listdir(f"/proc/{child}/fd")]
    return {Path(link).name for link in links if link.endswith(".iso")}


@pytest.mark.deep
def test_changes_outlive_the_daemon(tmp_path: Path) -> None:
    """The next daemon knows the disc in the drive, keeps it over a reset of the guest, and can change it."""
    disk, disc, other = tmp_path / "disk.raw", tmp_path / "disc.iso", tmp_path / "other.iso"
    for path in (disk, disc, other):
        path.write_bytes(bytes(MIB))
    with KeptDaemon(tmp_path, demo("demo", f'disk "{disk}" format raw', f'cdrom "{disc}"')) as vmd:
        vmd.must("start", "demo")
        with vmd.console("demo") as console:
            console.expect(PROMPT, DEADLINE_S)
            vmd.must("cdrom", "demo", other)
            vmd.must("resize", "demo", "0", "2M")
            vmd.kill()
            vmd.start()
            assert vmd.status("demo")["cdrom"] == str(other)
            console.answer("reset", PROMPT)
            assert discs_of(vmd.wait_state("demo", "running")["pid"]) == {"other.iso"}
            vmd.kill()
            vmd.start()
            vmd.must("cdrom", "-e", "demo")
            vmd.must("resize", "demo", "0", "3M")
            vmd.kill()
            vmd.start()
            console.answer("reset", PROMPT)
            assert discs_of(vmd.wait_state("demo", "running")["pid"]) == set()
            vmd.must("cdrom", "demo", disc)
        vmd.must("stop", "-fw", "demo")

    assert disk.stat().st_size == 3 * MIB
