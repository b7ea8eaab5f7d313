"""For every mistake with disks, vmctl prints one message that names the file."""

import contextlib
import gzip
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import Daemon
from tests.support.guests import guest
from tests.support.images import MIB, qemu

pytestmark = [pytest.mark.root, pytest.mark.kvm]


@pytest.fixture
def vmd(tmp_path: Path) -> Iterator[Daemon]:
    """Yield a daemon without a configuration."""
    with Daemon(tmp_path) as daemon:
        yield daemon


def refused(vmd: Daemon, *arguments: str | Path, words: tuple[str, ...]) -> str:
    """Start a VM with these options.  It must fail with one message, and leave nothing behind."""
    done = vmd.vmctl("start", "-m", "32M", *arguments, "wrong")
    lines = done.stderr.splitlines()
    assert done.returncode in (1, 2)  # 2: vmctl already sees the error in the options
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0]
    assert vmd.rows() == []
    return lines[0]


def raw(path: Path, size: int = MIB) -> Path:
    """Make a raw image."""
    path.write_bytes(b"")
    os.truncate(path, size)
    return path


def qcow2(path: Path, *options: object, size: str = "1M") -> Path:
    """Make a qcow2 image."""
    qemu("qemu-img", "create", "-q", "-f", "qcow2", *options, path, *([size] if size else []))
    return path


def layered(directory: Path, layers: int) -> Path:
    """Make a chain of images; return the top."""
    below = qcow2(directory / "layer0")
    for number in range(1, layers):
        below = qcow2(directory / f"layer{number}", "-b", below.name, "-F", "qcow2", size="")
    return below


def test_missing(vmd: Daemon, tmp_path: Path) -> None:
    """A disk, its backing file, or a disc does not exist."""
    base = qcow2(tmp_path / "base")
    top = qcow2(tmp_path / "top", "-b", base.name, "-F", "qcow2", size="")
    base.unlink()

    refused(vmd, "-d", tmp_path / "absent", words=("invalid disk path", f"{tmp_path}/absent", "No such file"))
    refused(vmd, "-d", f"qcow2:{top}", words=(f"disk {top}", f"backing file {base}", "No such file"))
    refused(vmd, "-r", tmp_path / "absent.iso", words=("iso image", f"{tmp_path}/absent.iso", "No such file"))


def test_missing_when_a_configured_vm_starts(tmp_path: Path) -> None:
    """The files existed when the configuration was read.  A VM that cannot start stays listed, with the reason."""
    disk, disc = raw(tmp_path / "disk"), raw(tmp_path / "disc")
    conf = f'vm "a" {{\n disable\n disk "{disk}"\n}}\nvm "b" {{\n disable\n cdrom "{disc}"\n}}\n'
    with Daemon(tmp_path, conf) as vmd:
        disk.unlink()
        disc.unlink()
        for name, path in (("a", disk), ("b", disc)):
            done = vmd.vmctl("start", name)

            assert done.returncode == 1
            assert str(path) in done.stderr
            assert "No such file" in done.stderr
            assert len(done.stderr.splitlines()) == 1
            assert vmd.status(name)["state"] == "stopped"


def test_neither_file_nor_device(vmd: Daemon, tmp_path: Path) -> None:
    """A directory, a FIFO that nobody writes to, a character device."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    for path in (tmp_path, fifo, Path("/dev/null")):
        refused(vmd, "-d", path, words=(f"disk {path}", "neither a regular file nor a block device"))
        refused(vmd, "-r", path, words=(f"cdrom {path}", "neither a regular file nor a block device"))


def test_of_another_format(vmd: Daemon, tmp_path: Path) -> None:
    """A file that is no qcow2 image, a damaged image, and one with unsupported features."""
    plain = raw(tmp_path / "plain")
    damaged = tmp_path / "damaged"
    damaged.write_bytes(b"QFI\xfb\0\0\0\3" + bytes(100))
    zstd = qcow2(tmp_path / "zstd", "-o", "compression_type=zstd")

    refused(vmd, "-d", f"qcow2:{plain}", words=(f"disk {plain}", "qcow2"))
    refused(vmd, "-d", damaged, words=(f"disk {damaged}",))
    refused(vmd, "-d", f"qcow2:{zstd}", words=(f"disk {zstd}", "zstd"))


def test_format_that_is_not_ours(vmd: Daemon, tmp_path: Path) -> None:
    """A container as a disk, and a disk's image as a disc: the message names the format and the conversion."""
    vmdk, gz, disc = tmp_path / "my disk.vmdk", tmp_path / "disk.gz", qcow2(tmp_path / "disc.iso")
    qemu("qemu-img", "create", "-q", "-f", "vmdk", vmdk, "1M")
    gz.write_bytes(gzip.compress(bytes(MIB)))
    convert = f"qemu-img convert -f vmdk -O qcow2 '{vmdk}' '{vmdk}.qcow2'"

    refused(vmd, "-d", vmdk, words=(f"disk {vmdk}: is a VMDK image", convert, f"raw:'{vmdk}'"))
    refused(vmd, "-d", f"qcow2:{vmdk}", words=(f"disk {vmdk}: is a VMDK image", convert))
    refused(vmd, "-d", gz, words=(f"disk {gz}: is gzip-compressed", f"gzip -dk {gz}"))
    refused(vmd, "-r", disc, words=(f"cdrom {disc}: is a qcow2 image", f"-O raw {disc} {disc}.iso"))
    refused(vmd, "-r", gz, words=(f"cdrom {gz}: is gzip-compressed", f"gzip -dk {gz}"))


def test_format_by_name(tmp_path: Path) -> None:
    """A derived image named *.qcow2 starts.  For a configured VM the advice is a change of vm.conf."""
    base = qcow2(tmp_path / "base.qcow2")
    top = qcow2(tmp_path / "top.qcow2", "-b", base.name, "-F", "qcow2", size="")
    plain = raw(tmp_path / "plain.qcow2")
    conf = f'vm "a" {{\n disable\n boot "{guest("demo")}"\n memory 32M\n disk "{plain}"\n}}\n'
    with Daemon(tmp_path, conf) as vmd:
        vmd.must("start", "-m", "32M", "-b", guest("demo"), "-d", top, "b")

        done = vmd.vmctl("start", "a")

        assert done.returncode == 1
        words = f"disk {plain}: not a qcow2 image, as its name says; if it is raw, say `format raw`"
        assert words in done.stderr
        assert vmd.status("a")["state"] == "stopped"
        vmd.must("stop", "-fw", "b")


def test_what_is_odd_is_said(tmp_path: Path) -> None:
    """vmctl and the log warn once, with the line of the configuration, of a disk and a disc of odd lengths."""
    disk, disc, archive = raw(tmp_path / "disk", MIB + 5), raw(tmp_path / "disc", MIB + 5), tmp_path / "archive"
    archive.write_bytes(gzip.compress(bytes(MIB)).ljust(MIB, b"\0"))
    conf = (
        f'vm "a" {{\n disable\n boot "{guest("demo")}"\n memory 32M\n'
        f' disk "{disk}" format raw\n disk "{archive}"\n cdrom "{disc}"\n}}\n'
    )
    notes = [
        f"disk {disk}: its 1048581 bytes are no multiple of 512; its last sector is padded with zeroes",
        f"disk {archive}: seems to be gzip-compressed, and is used as raw; use `format raw` to confirm this",
        f"cdrom {disc}: its 1048581 bytes are no multiple of 2048; its last block is padded with zeroes",
    ]
    with Daemon(tmp_path, conf) as vmd:
        said = vmd.must("start", "a")

        for note in notes:
            assert said.count(f"vmctl: warning: {note}\n") == 1
            assert vmd.log.count(f"{vmd.conf}:1: vm a: {note}\n") == 1
        vmd.must("stop", "-fw", "a")


def test_too_small_for_a_disk(vmd: Daemon, tmp_path: Path) -> None:
    """An empty file, which would be a disk without sectors."""
    empty = raw(tmp_path / "empty", 0)

    refused(vmd, "-d", f"raw:{empty}", words=(str(empty),))


def test_too_many(vmd: Daemon, tmp_path: Path) -> None:
    """Five disks, given by options and by a configuration."""
    disks = [raw(tmp_path / f"disk{number}") for number in range(5)]
    options = [word for disk in disks for word in ("-d", str(disk))]
    more = tmp_path / "more.conf"
    more.write_text('vm "many" {\n' + "".join(f' disk "{disk}"\n' for disk in disks) + "}\n")

    refused(vmd, *options, words=("too many disks: 5 (limit is 4)",))
    loaded = vmd.vmctl("load", more)
    assert loaded.returncode == 1
    assert f"{more}:6: too many disks" in loaded.stderr


def test_chain_too_long(vmd: Daemon, tmp_path: Path) -> None:
    """A chain of five images, and a chain that is a cycle."""
    refused(vmd, "-d", f"qcow2:{layered(tmp_path, 5)}", words=(f"disk {tmp_path}/layer4", "longer than 4 images"))
    one = qcow2(tmp_path / "one", "-u", "-b", "two", "-F", "qcow2")
    qcow2(tmp_path / "two", "-u", "-b", "one", "-F", "qcow2")
    refused(vmd, "-d", f"qcow2:{one}", words=(f"disk {one}", f"comes back to {one}"))


def test_format_guessed(vmd: Daemon, tmp_path: Path) -> None:
    """A disk without a stated format is used, but its backing file is refused."""
    top = layered(tmp_path, 2)

    refused(vmd, "-d", top, words=(f"disk {top}", "has backing file layer0", f"give it as qcow2:{top}"))


def threads_of(vmd: Daemon, title: str) -> set[str]:
    """Return the names of a process's threads, as in ps -L."""
    tasks = Path(f"/proc/{vmd.processes()[f'vmd: {title}']}/task")
    names = {(task / "comm").read_text().rstrip("\n") for task in tasks.iterdir()}
    return {name for name in names if not name.startswith("kvm-")}  # a thread of the kernel for the VM


def test_in_use(vmd: Daemon, tmp_path: Path) -> None:
    """The disk is used by another VM, twice by the same VM, or by QEMU, or its base is another VM's disk."""
    disk, kernel = raw(tmp_path / "disk"), guest("demo")
    base = qcow2(tmp_path / "base")
    top = qcow2(tmp_path / "top", "-b", base.name, "-F", "qcow2", size="")
    vmd.must("start", "-m", "32M", "-b", kernel, "-d", f"raw:{disk}", "-d", f"qcow2:{base}", "first")
    for option, path in ((f"raw:{disk}", disk), (f"qcow2:{top}", base)):
        done = vmd.vmctl("start", "-m", "32M", "-d", option, "second")
        assert done.returncode == 1
        assert f"{path}: is in use by vm first, which writes to it" in done.stderr
    twin = raw(tmp_path / "twin")
    done = vmd.vmctl("start", "-m", "32M", "-d", f"raw:{twin}", "-d", f"raw:{twin}", "third")
    assert done.returncode == 1
    assert f"disk {twin} is given twice" in done.stderr
    vmd.must("stop", "-fw", "first")
    with writer(disk):
        refused(vmd, "-d", f"raw:{disk}", words=('is in use by "qemu-io" (pid ', "), which writes to it"))
    vmd.must("start", "-m", "32M", "-b", kernel, "-d", f"raw:{disk}", "first")
    vmd.must("stop", "-fw", "first")


@contextlib.contextmanager
def writer(disk: Path) -> Iterator[None]:
    """Let QEMU hold a disk open for writing."""
    with subprocess.Popen(
        ["qemu-io", "-f", "raw", disk], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"length\n")
        process.stdin.flush()
        process.stdout.readline()  # QEMU has opened the file
        try:
            yield
        finally:
            process.stdin.close()


def test_read_only(vmd: Daemon, tmp_path: Path) -> None:
    """A read-only file is refused as a disk, and accepted as a disc."""
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    disk = raw(mounted / "disk")
    subprocess.run(["mount", "--bind", mounted, mounted], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", mounted], check=True)
    try:
        refused(vmd, "-d", disk, words=(f"disk {disk}", "cannot be opened for writing", "Read-only file system"))
        vmd.must("start", "-m", "32M", "-b", guest("demo"), "-r", disk, "reader")
        vmd.must("stop", "-fw", "reader")
    finally:
        subprocess.run(["umount", mounted], check=True)


def test_killed_device_ends_its_vm_only(vmd: Daemon, tmp_path: Path) -> None:
    """`vmctl status` shows the reason.  The daemon and the other VM go on, and the disk can be used again."""
    disk, kernel = raw(tmp_path / "disk"), guest("demo")
    vmd.must("start", "-m", "32M", "-b", kernel, "other")
    more = tmp_path / "more.conf"
    more.write_text(f'vm "victim" {{\n disable\n memory 32M\n boot "{kernel}"\n disk "{disk}" format raw\n}}\n')
    vmd.must("load", more)
    vmd.must("start", "victim")
    os.kill(vmd.processes()["vmd: vm/victim/vioblk0"], signal.SIGKILL)

    row = vmd.wait_state("victim", "stopped")
    assert row["text"] == "vm/victim/vioblk0: was killed by SIGKILL"
    assert vmd.status("other")["state"] == "running"
    os.kill(vmd.status("other")["pid"], signal.SIGKILL)
    vmd.must("start", "victim")
    os.kill(vmd.status("victim")["pid"], signal.SIGKILL)  # its device processes go with it, and their locks
    vmd.wait_state("victim", "stopped")
    vmd.must("start", "victim")
    vmd.must("stop", "-fw", "victim")
    assert not [title for title in vmd.processes() if "/vio" in title]


def test_status_tells_of_disks(vmd: Daemon, tmp_path: Path) -> None:
    """Device processes are named after their devices, and threads after their work."""
    disk = raw(tmp_path / "disk")
    disc = raw(tmp_path / "disc")
    vmd.must("start", "-m", "32M", "-b", guest("demo"), "-d", disk, "-r", disc, "full")

    names = {title for title in vmd.processes() if "vm/full/" in title}
    assert names == {f"vmd: vm/full/{device}" for device in ("vioblk0", "vioscsi0")}
    assert json.loads(vmd.must("status", "--json", "full"))["vms"][0]["state"] == "running"
    assert threads_of(vmd, "vm/full") == {"event", "vcpu0"}
    assert threads_of(vmd, "vm/full/vioblk0") == {"event", "io", "lock"}
    assert threads_of(vmd, "vm/full/vioscsi0") == {"vm/full/vioscsi0"[-15:]}
    vmd.must("stop", "-fw", "full")
