"""`vmd -n` reports problems of images with the same messages as a start, without changing the images."""

import gzip
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import DEADLINE_S, ROOT, Daemon
from tests.support.guests import guest
from tests.support.images import MIB, qemu
from tests.support.network import Network
from tests.support.systemdisk import ext4_disk
from tests.support.users import as_uid, public_folder
from vmctl.commands.start import Wanted
from vmd.config.check import load
from vmd.config.model import VmConfig
from vmd.errors import OperatorError
from vmd.files.media import Media
from vmd.files.prober import ImageProber
from vmd.images.create import create
from vmd.images.locks import lock
from vmd.parent.service import lookup_user
from vmd.privsep.cell import Cell
from vmd.vm.boot.kind import WRONG_KIND

pytestmark = pytest.mark.root
NOBODY = 65534


def check(conf: Path, user: int | None = None) -> tuple[int, list[str]]:
    """Run `vmd -n`; return its exit status and its lines."""
    command: list[str | Path] = [sys.executable, "-m", "vmd", "-n", "-f", conf]
    done = subprocess.run(
        command if user is None else as_uid(user, *command),
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=DEADLINE_S,
    )  # fmt: skip
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()


@pytest.fixture
def images() -> Iterator[Path]:
    """Yield a folder with an image of every kind of error and two good ones, readable by every user."""
    with public_folder() as folder:
        fill(folder)
        yield folder


def fill(folder: Path) -> None:
    """Make the images."""
    create(str(folder / "good.qcow2"), "qcow2", MIB)
    create(str(folder / "top.qcow2"), "qcow2", MIB, "good.qcow2", "qcow2")
    create(str(folder / "derived.img"), "qcow2", MIB, "good.qcow2", "qcow2")
    create(str(folder / "lost.qcow2"), "qcow2", MIB, "gone", "raw")
    (folder / "plain.qcow2").write_bytes(bytes(MIB))
    (folder / "odd.raw").write_bytes(bytes(MIB + 5))
    (folder / "empty").touch()
    (folder / "disk.gz").write_bytes(gzip.compress(bytes(MIB)))
    (folder / "begins.img").write_bytes(gzip.compress(bytes(MIB)).ljust(MIB, b"\0"))
    qemu("qemu-img", "create", "-q", "-f", "vmdk", folder / "a.vmdk", "1M")
    for name, mark in (("dirty.qcow2", 1), ("corrupt.qcow2", 2)):
        create(str(folder / name), "qcow2", MIB)
        with (folder / name).open("r+b") as file:
            os.pwrite(file.fileno(), mark.to_bytes(8, "big"), 72)
    os.mkfifo(folder / "fifo")
    for path in folder.iterdir():
        path.chmod(0o644)


MISTAKES = [
    "derived.img", "lost.qcow2", "plain.qcow2", "empty", "disk.gz", "a.vmdk", "corrupt.qcow2", "fifo", "missing.img",
]  # fmt: skip
ODDITIES = ["odd.raw", "begins.img", "dirty.qcow2"]
GOOD = ["good.qcow2", "top.qcow2"]


def block(number: int, options: str) -> str:
    """Return a `vm` block of four lines."""
    return f'vm "v{number}" {{\n disable\n memory 32M\n boot "{guest("demo")}"\n {options}\n}}\n'


def start_says(vm: VmConfig, prober: ImageProber) -> tuple[bool, list[str]]:
    """Return whether a start can open a VM's disks and discs, and the messages about them."""
    try:
        media = Media.open(vm.disks, vm.cdrom, prober)
    except OperatorError as error:
        return False, [str(error)]
    media.close()
    return True, media.notes


def test_check_says_what_the_start_says(images: Path) -> None:
    """The messages are equal, for VMs that cannot start, that start with a warning, and that start without one."""
    names = [*MISTAKES, *ODDITIES, *GOOD]
    text = "".join(block(number, f'disk "{images}/{name}"') for number, name in enumerate(names))
    discs = ["good.qcow2", "odd.raw", "missing.iso", "disk.gz"]
    text += "".join(block(number, f'cdrom "{images}/{name}"') for number, name in enumerate(discs, len(names)))
    conf = images / "check.conf"
    conf.write_text(text)
    warnings: list[str] = []
    config = load(str(conf), warn=warnings.append)
    cell = Cell.build(*lookup_user())
    prober = ImageProber(cell)

    status, lines = check(conf)
    started = [start_says(vm, prober) for vm in config.vms]
    cell.close()

    assert (status, lines[-1], warnings) == (0, "configuration OK", [])
    expected = [
        f'vmd: warning: {vm.origin}: vm "{vm.name}": {sentence}'
        for vm, (_, sentences) in zip(config.vms, started, strict=True)
        for sentence in sentences
    ]
    assert lines[:-1] == expected
    assert [len(sentences) for _, sentences in started] == [1] * 12 + [0] * 2 + [1] * 4
    assert [starts for starts, _ in started] == [False] * 9 + [True] * 5 + [False, True, False, False]


def test_check_leaves_images_in_use_alone(images: Path) -> None:
    """A check neither locks nor writes images, and images of running VMs are no error."""
    disk = images / "good.qcow2"
    (images / "check.conf").write_text(block(0, f'disk "{disk}"') + block(1, f'disk "{disk}"'))
    before = (disk.read_bytes(), disk.stat().st_mtime_ns)
    with disk.open("r+b") as file:
        lock(file.fileno(), "disk", writable=True)

        assert check(images / "check.conf") == (0, ["configuration OK"])

    assert (disk.read_bytes(), disk.stat().st_mtime_ns) == before


def test_check_by_a_user(images: Path) -> None:
    """A user who may read an image is told its content; a user who may not is told that."""
    (images / "disk.gz").chmod(0o600)
    names = ("a.vmdk", "disk.gz", "good.qcow2")
    text = "".join(block(number, f'disk "{images}/{name}"') for number, name in enumerate(names))
    (images / "check.conf").write_text(text)
    (images / "check.conf").chmod(0o644)

    status, lines = check(images / "check.conf", user=NOBODY)

    assert (status, lines[-1]) == (0, "configuration OK")
    assert [line.partition(": vm ")[2][:60] for line in lines[:2]] == [
        f'"v0": disk {images}/a.vmdk: is a VMDK image; convert it: qemu-'[:60],
        f'"v1": disk {images}/disk.gz: uid {NOBODY} has no permission'[:60],
    ]
    assert lines[1].endswith(f"disk.gz: uid {NOBODY} has no permission")
    assert lines[2:] == ["configuration OK"]


def test_missing_disk_stops_nobody_else(images: Path) -> None:
    """The daemon starts and the other VMs run.  The VM can be started once its disk exists."""
    late = images / "late/disk.raw"
    conf = block(0, f'disk "{late}"').replace("disable", "enable") + block(1, "vcpus 1").replace("disable", "enable")
    with Daemon(images, conf) as vmd:
        vmd.wait_state("v1", "running")
        vmd.wait_state("v0", "stopped")
        assert f"disk {late}: No such file or directory" in vmd.log
        assert f"disk {late}: No such file or directory" in vmd.vmctl("start", "v0").stderr
        late.parent.mkdir()
        create(str(late), "raw", MIB)

        vmd.must("reload")
        vmd.wait_state("v0", "running")


def test_link_that_is_called_qcow2_states_the_format(images: Path) -> None:
    """The link's own name states the format, not its target's, in vm.conf and on a command line."""
    (images / "link.qcow2").symlink_to("derived.img")
    (images / "link.img").symlink_to("top.qcow2")
    (images / "wrong.qcow2").symlink_to("odd.raw")
    names = ("link.qcow2", "link.img", "wrong.qcow2")
    text = "".join(block(number, f'disk "{images}/{name}"') for number, name in enumerate(names))
    (images / "check.conf").write_text(text)

    _, lines = check(images / "check.conf")
    wanted = Wanted()
    for name in names:
        wanted.add_disk(f"{images}/{name}")

    assert lines == [
        f'vmd: warning: {images}/check.conf:13: vm "v2": disk {images}/odd.raw: not a qcow2 image', "configuration OK",
    ]  # fmt: skip
    config = load(str(images / "check.conf"), warn=lambda _text: None)
    assert wanted.disks == [disk for vm in config.vms for disk in vm.disks]
    assert [disk.format for disk in wanted.disks] == ["qcow2", "", "qcow2"]


# --- what keeps a VM from starting, besides its images --------------------------------------------------------

NO_NOTE = "it has no PVH note, which tells where an ELF kernel is entered"
DEMO = f'boot "{guest("demo")}"'
SAID: list[tuple[str, list[str]]] = [
    ("interface", ["no kernel, disk or cdrom to boot from"]),
    (f"{DEMO}\nsev", ["encrypted memory (sev): not supported by this version of vmd"]),
    (f"{DEMO}\nboot device cdrom", ["boot device cdrom: the vm has no cdrom"]),
    ("boot /nowhere/kernel", ["kernel /nowhere/kernel: No such file or directory"]),
    ("boot kernel", ["kernel {here}/kernel: No such file or directory"]),
    (f"{DEMO} initrd /dev/null", ["initrd /dev/null: not a regular file"]),
    (
        "boot device disk\nboot /nowhere",
        ["boot device disk: the vm has no disk", "kernel /nowhere: No such file or directory"],
    ),
    (f"{DEMO}\ndisk good.raw\ndisk good.raw", ["disk {here}/good.raw is given twice"]),
    ("boot text", ["{here}/text: " + WRONG_KIND]),
    ("boot program", ["{here}/program: is a user program, not a kernel: " + NO_NOTE]),
    ("boot program.gz", ["{here}/program.gz: is a user program, not a kernel: " + NO_NOTE]),
    ("disk good.raw", ["nothing to boot from: no boot sector on disk {here}/good.raw"]),
    ("boot kernel.gz cmdline quiet", []),
    (DEMO, []),
]


def test_a_boot_image_and_its_initrd(tmp_path: Path) -> None:
    """A check examines both together, for root and for other users, and each pair only once."""
    (tmp_path / "empty").touch()
    conf = tmp_path / "vm.conf"
    vms = "".join(f"vm v{number} {{\n{DEMO} initrd empty\n}}\n" for number in range(2))
    conf.write_text(vms + f"vm v2 {{\n{DEMO} initrd vm.conf\n}}\n")

    assert check(conf) == (0, [
        *(
            f'vmd: warning: {conf}:{line}: vm "v{number}": {guest("demo")}: initrd is empty'
            for number, line in ((0, 1), (1, 4))
        ),
        "configuration OK",
    ])  # fmt: skip


def test_a_boot_image_on_a_disk(tmp_path: Path) -> None:
    """A check finds and examines it as a start does.  A missing disk is reported once."""
    files = {"demo": guest("demo").read_bytes(), "text": b"text", "empty": b""}
    disk = ext4_disk(tmp_path / "disk.img", files)
    conf = tmp_path / "vm.conf"
    boots = ("disk0:/demo", "disk0:/nope", "disk0:/text", "disk0:/demo initrd disk0:/empty", "disk1:/demo")
    block = "vm v%d { disable; disk disk.img format raw; boot %s; }\n".replace(";", "\n")
    gone = block.replace("disk.img", "gone.img") % (5, "disk0:/demo")
    conf.write_text("".join(block % row for row in enumerate(boots)) + gone)

    status, lines = check(conf)

    assert (status, lines.pop()) == (0, "configuration OK")
    said = [line.removeprefix(f"vmd: warning: {conf}:") for line in lines]
    assert said == [
        f'5: vm "v1": disk0:/nope: disk {disk}: the whole disk (ext4): /nope: there is no /nope',
        f'9: vm "v2": disk0:/text: {WRONG_KIND}',
        '13: vm "v3": disk0:/demo: initrd is empty',
        '17: vm "v4": boot disk1:/demo: there is no disk1: the vm has disk0 only',
        f'21: vm "v5": disk {tmp_path}/gone.img: No such file or directory',
    ]


@pytest.mark.deep
def test_what_a_check_accepts_starts_or_was_warned_of(tmp_path: Path) -> None:
    """Warnings have file and line.  The start of each VM fails with the first of its messages."""
    (tmp_path / "good.raw").write_bytes(bytes(MIB))
    (tmp_path / "text").write_text("hello\n")
    (tmp_path / "program").write_bytes(Path("/bin/true").read_bytes())
    (tmp_path / "program.gz").write_bytes(gzip.compress(Path("/bin/true").read_bytes()))
    (tmp_path / "kernel.gz").write_bytes(gzip.compress(Path(guest("demo")).read_bytes()))
    blocks = [f"vm v{number} {{\ndisable\nmemory 32M\n{options}\n}}\n" for number, (options, _) in enumerate(SAID)]
    conf = tmp_path / "vm.conf"
    conf.write_text("".join(blocks))
    lines = [1 + sum(block.count("\n") for block in blocks[:number]) for number in range(len(blocks))]
    expected = [
        f'vmd: warning: {conf}:{lines[number]}: vm "v{number}": {sentence.format(here=tmp_path)}'
        for number, (_, sentences) in enumerate(SAID)
        for sentence in sentences
    ]

    assert check(conf) == (0, [*expected, "configuration OK"])

    with Daemon(tmp_path, conf.read_text()) as vmd:
        for number, (_, sentences) in enumerate(SAID):
            started = vmd.vmctl("start", f"v{number}")
            assert (started.returncode != 0) == bool(sentences), started.stderr
            assert any(sentence.format(here=tmp_path) in started.stderr for sentence in sentences) == bool(sentences)


def test_vms_that_cannot_run_together(tmp_path: Path) -> None:
    """A check finds conflicts of VMs that start with the daemon: a disk of two VMs, and limits."""
    (tmp_path / "disk.raw").write_bytes(bytes(MIB))
    conf = tmp_path / "vm.conf"
    conf.write_text(
        f"limit vcpus 4\nswitch s {{ interface lo1 }}\n"
        f"vm a {{\n{DEMO}\ndisk disk.raw\n}}\nvm b {{\n{DEMO}\ndisk disk.raw\nvcpus 3\n}}\n"
        f"vm c {{\n{DEMO}\nvcpus 1\n}}\nvm d {{\ndisable\n{DEMO}\ndisk disk.raw\n}}\n"
    )

    status, lines = check(conf)

    assert (status, lines[-1]) == (0, "configuration OK")
    assert lines[:-1] == [
        f'vmd: warning: {conf}:7: vm "b": disk {tmp_path}/disk.raw is also used by vm a: only one of them can run',
        f'vmd: warning: {conf}:12: vm "c": not started with those before it: with its 1 there would be 5 vcpus, and '
        "there is a limit of 4 (limit vcpus)",
    ]


def test_a_switch_that_is_no_bridge(tmp_path: Path) -> None:
    """A check reports it before the first VM of the switch starts."""
    with Network() as network:
        check_switches(network, tmp_path)


def check_switches(network: Network, tmp_path: Path) -> None:
    """Check three switches, one of which is no bridge."""
    network.run("ip", "link", "add", "wire", "type", "veth", "peer", "name", "other")
    network.run("ip", "link", "add", "br5", "type", "bridge")
    conf = tmp_path / "vm.conf"
    conf.write_text("switch a { interface br5 }\nswitch b { interface wire }\nswitch c { interface br6 }\n")

    with network.inside():
        status, lines = check(conf)

    assert (status, lines) == (0, [
        f'vmd: warning: {conf}:2: switch "b": interface wire is not a bridge: switches need one', "configuration OK",
    ])  # fmt: skip


def test_what_a_host_has_itself_of_a_local_interface(network: Network, tmp_path: Path) -> None:
    """A check reports ports that programs of the host use, and networks that the host reaches itself."""
    network.run("ip", "link", "add", "wire", "type", "veth", "peer", "name", "other")
    network.run("ip", "address", "add", "10.9.0.1/24", "dev", "wire")
    network.run("ip", "link", "set", "wire", "up")
    conf = tmp_path / "vm.conf"
    options = "forward port 8022 to port 22, forward udp port 8022 to port 22"
    conf.write_text(f"vm a {{\n{DEMO}\nlocal interface {{ {options}, address 10.9.0.77 }}\n}}\n")
    with network.socket(socket.AF_INET, socket.SOCK_STREAM) as program, network.inside():
        program.bind(("0.0.0.0", 8022))
        program.listen()
        status, lines = check(conf)

    start = f'vmd: warning: {conf}:1: vm "a": interface 0:'
    assert (status, lines) == (0, [
        f"{start} forward tcp port 8022 to port 22: a program of this host has tcp port 8022: `ss -ltnp` shows it",
        f"{start} address 10.9.0.77/31: this host reaches 10.9.0.0/24 by wire", "configuration OK",
    ])  # fmt: skip


@pytest.mark.deep
def test_what_a_host_does_not_have_stops_nobody_else(tmp_path: Path) -> None:
    """The daemon and the other VMs start, and failing VMs report why.  A check and a reload report an error."""
    late = tmp_path / "late"
    conf = f"socket owner nobody-here\ninclude more.conf\nvm lost {{\n memory 32M\n {DEMO}\n owner nobody-here\n}}\n"
    conf += f"vm late {{\n memory 32M\n boot late\n}}\nvm good {{\n memory 32M\n {DEMO}\n}}\n"
    conf += "staggered start parallel 8 delay 0\n"
    with Daemon(tmp_path, conf) as vmd:
        vmd.wait_state("good", "running")
        assert vmd.wait_state("lost", "stopped")["text"] == "failed to get user: nobody-here"
        assert f"kernel {late}: No such file or directory" in vmd.wait_state("late", "stopped")["text"]
        assert "failed to get user: nobody-here" in vmd.vmctl("start", "lost").stderr
        for line, what in [
            (1, "failed to get user: nobody-here: only root may use the control socket"),
            (2, "failed to include file more.conf: No such file or directory: going on without it"),
            (3, 'vm "lost": failed to get user: nobody-here: this vm cannot start'),
        ]:
            assert f"vmd: warning: {vmd.conf}:{line}: {what}\n" in vmd.log
        status, lines = check(vmd.conf)
        refused = vmd.vmctl("reload")
        assert (status, len(lines)) == (1, 3)
        assert [line.removeprefix("vmctl: ") for line in refused.stderr.splitlines()[:-1]] == [
            line.removeprefix("vmd: ") for line in lines
        ]
        assert vmd.status("good")["state"] == "running"

        late.write_bytes(Path(guest("demo")).read_bytes())
        (tmp_path / "more.conf").touch()
        vmd.conf.write_text(conf.replace("nobody-here", "daemon"))
        vmd.must("reload")
        for name in ("lost", "late"):
            vmd.wait_state(name, "running")
