"""The real imgboot process: it runs in the cell as another user, only while it copies a kernel from a disk."""

import os
import pwd
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.process.test_imgprobe import blocked
from tests.support.filesystems import MIB
from tests.support.images import qemu
from tests.support.systemdisk import Files, ext4_disk, ffs_disk
from vmd.config.model import DiskConfig, DiskFile
from vmd.errors import OperatorError
from vmd.files.diskboot import FromDisks, look
from vmd.files.images import open_disk
from vmd.files.prober import ImageProber, start_probe
from vmd.memfile import bounded_file, is_constant
from vmd.parent.opening import IMGBOOT_ENTRY
from vmd.privsep.cell import Cell
from vmd.privsep.spawn import Child

pytestmark = pytest.mark.root

USER = pwd.getpwnam("nobody")  # any user will do
DEADLINE_S = 60.0
KERNEL = bytes(range(256)) * 4096 + bytes(2 * MIB) + b"end"  # with a hole
FILES: Files = {
    "boot/vmlinuz-6.1": KERNEL, "vmlinuz": "boot/vmlinuz-6.1", "initrd.img": b"initrd!", "etc/hostname": b"web\n"
}  # fmt: skip


@pytest.fixture(scope="module")
def cell() -> Iterator[Cell]:
    """Give a cell."""
    built = Cell.build(USER.pw_uid, USER.pw_gid)
    yield built
    built.close()


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a raw disk with its file system on the second partition."""
    return ext4_disk(tmp_path_factory.mktemp("disks") / "disk.img", FILES, divided=True)


@pytest.fixture
def imgboot(cell: Cell) -> "Iterator[Reader]":
    """Give an imgboot process."""
    child, sock = start_probe(cell, entry=IMGBOOT_ENTRY, title="imgboot")
    with sock:
        yield Reader(cell, child, sock)
    assert child.reap(DEADLINE_S) == 0


class Reader:
    """A process that reads from disks, and the requests of an opener to it."""

    def __init__(self, cell: Cell, child: Child, sock: socket.socket) -> None:
        self.cell = cell
        self.child = child
        self.sock = sock
        self.options = ""

    def read(self, config: DiskConfig, file: DiskFile, most: int = 8 * MIB) -> tuple[str, bytes]:
        """Return the place of a file, and its content."""
        found = FromDisks()
        disk = open_disk(config, ImageProber(self.cell))
        with closing(disk), closing(found):
            found.read(self.sock, "kernel", file, disk, bounded_file("kernel", most), lambda: None)
            (fd,) = found.kernel
            self.options = found.options
            assert is_constant(fd)
            return found.kernel_name, os.pread(fd, 2 * len(KERNEL), 0)

    def look(self, path: Path) -> str:
        """Return the description of a disk, as the second one of its VM."""
        with closing(open_disk(DiskConfig(path=str(path), format="raw"), ImageProber(self.cell))) as disk:
            return look(self.sock, 1, disk, lambda: None).removeprefix(f"disk {path}: ")

    def refusal(self, config: DiskConfig, file: DiskFile, most: int = 8 * MIB) -> str:
        """Return why a file cannot be read."""
        with pytest.raises(OperatorError) as refused:
            self.read(config, file, most)
        return str(refused.value).replace(config.path, "IMAGE")


def test_a_kernel_is_copied(imgboot: Reader, disk: Path, tmp_path: Path) -> None:
    """From a raw disk or an overlay, through a link, from a given partition or the first one that has the file."""
    raw = DiskConfig(path=str(disk), format="raw")
    top = tmp_path / "top.qcow2"
    qemu("qemu-img", "create", "-qf", "qcow2", "-F", "raw", "-b", disk, tmp_path / "middle.qcow2")
    qemu("qemu-img", "create", "-qf", "qcow2", "-F", "qcow2", "-b", "middle.qcow2", top)

    assert imgboot.read(raw, DiskFile(disk=0, path="/vmlinuz")) == ("disk0p2:/vmlinuz", KERNEL)
    initrd = DiskFile(disk=0, partition="p2", path="/initrd.img")
    assert imgboot.read(raw, initrd) == ("disk0p2:/initrd.img", b"initrd!")
    layered = DiskConfig(path=str(top), format="qcow2")
    assert imgboot.read(layered, DiskFile(disk=1, path="/boot/vmlinuz-6.1")) == ("disk1p2:/boot/vmlinuz-6.1", KERNEL)


@pytest.mark.parametrize(
    ("conf", "found"),
    [
        (None, ("disk0a:/bsd", b"bsd", "")),
        (b"set image /bsd.mp\n", ("disk0a:/bsd.mp", b"mp", "")),
        (b"boot hd0a:/bsd.mp -s", ("disk0a:/bsd.mp", b"mp", "s")),
    ],
)
def test_what_an_openbsd_system_boots(
    imgboot: Reader, tmp_path: Path, conf: bytes | None, found: tuple[str, bytes, str]
) -> None:
    """It boots the kernel in its boot.conf, with the options there, or else /bsd."""
    files = {"bsd": b"bsd", "bsd.mp": b"mp", **({"etc/boot.conf": conf} if conf is not None else {})}
    config = DiskConfig(path=str(ffs_disk(tmp_path / "bsd.img", files)), format="raw")

    assert (*imgboot.read(config, DiskFile(disk=0)), imgboot.options) == found


def test_what_an_openbsd_system_cannot_boot(imgboot: Reader, tmp_path: Path) -> None:
    """The message has the file or device from its boot.conf."""
    for conf, why in (
        (b"set image /gone", "partition a (FFS2): /gone: there is no /gone"),
        (b"boot hd0b:/bsd", "partition b: has no known file system"),
        (b"boot hd1a:/bsd", "/etc/boot.conf: device 'hd1a' is no partition of the disk itself, such as hd0a"),
    ):
        disk = ffs_disk(tmp_path / "bsd.img", {"bsd": b"bsd", "etc/boot.conf": conf})
        said = imgboot.refusal(DiskConfig(path=str(disk), format="raw"), DiskFile(disk=0))
        assert said == f"disk0: disk IMAGE: {why}"


def test_refused_files(imgboot: Reader, disk: Path, tmp_path: Path) -> None:
    """Each refusal is one sentence with the disk, the partition, the file system and the file."""
    raw = DiskConfig(path=str(disk), format="raw")
    empty = tmp_path / "empty.img"
    empty.write_bytes(bytes(MIB))

    said = imgboot.refusal(raw, DiskFile(disk=0, path="/nope"))
    assert said.startswith("disk0:/nope: disk IMAGE: no partition has /nope: partition p1: ")
    assert "partition p2 (ext4): /nope: there is no /nope" in said
    assert imgboot.refusal(raw, DiskFile(disk=0, partition="p3", path="/vmlinuz")) == (
        "disk0p3:/vmlinuz: disk IMAGE: there is no partition p3: its MBR has p1, p2"
    )
    assert imgboot.refusal(raw, DiskFile(disk=0, path="/boot")).endswith("partition p2 (ext4): /boot: is a directory")
    said = imgboot.refusal(raw, DiskFile(disk=0, partition="p2", path="/no\x1b[31m\u2028pe"))
    assert said.endswith("partition p2 (ext4): /no\\x1b[31m\\u2028pe: there is no /no\\x1b[31m\\u2028pe")
    few = f"has {len(KERNEL)} bytes, and {MIB} are the most for this vm"
    said = imgboot.refusal(raw, DiskFile(disk=0, path="/vmlinuz"), MIB)
    assert said == f"disk0:/vmlinuz: disk IMAGE: partition p2: /vmlinuz: {few}"
    assert "the whole disk: has no known file system" in imgboot.refusal(
        DiskConfig(path=str(empty), format="raw"), DiskFile(disk=0)
    )
    assert imgboot.read(raw, DiskFile(disk=0, path="/etc/hostname"))[1] == b"web\n"  # the process still serves


def test_imgboot_holds_one_disk_and_nothing_else(imgboot: Reader, disk: Path) -> None:
    """It has the images only during a request, and can write to none of them."""
    imgboot.read(DiskConfig(path=str(disk), format="raw"), DiskFile(disk=0, path="/initrd.img"))

    status = blocked(imgboot.child)
    held = sorted(map(int, os.listdir(f"/proc/{imgboot.child.pid}/fd")))
    assert (status["CapEff"], status["CapBnd"], status["NoNewPrivs"]) == ("0" * 16, "0" * 16, "1")
    assert (held, Path(f"/proc/{imgboot.child.pid}/comm").read_text()) == ([0, 1, 2, 3], "imgboot\n")


def test_the_description_of_a_disk(imgboot: Reader, tmp_path: Path) -> None:
    """It has partitions and file systems, and the kernel and initrd that could be booted, if there are any."""
    (tmp_path / "empty.img").write_bytes(bytes(MIB))
    disks = {
        "both": ext4_disk(tmp_path / "both.img", FILES, divided=True),
        "alone": ext4_disk(tmp_path / "alone.img", {"boot/vmlinuz": b"k"}),
        "none": ext4_disk(tmp_path / "none.img", {"etc/motd": b"hello"}),
        "bsd": ffs_disk(tmp_path / "bsd.img", {"bsd": b"k"}),
        "empty": tmp_path / "empty.img",
    }
    nothing = "has no known file system"
    assert {name: imgboot.look(disk) for name, disk in disks.items()} == {
        "both": (
            f'MBR; partition p1: {nothing}; partition p2: ext4; boot "disk1p2:/vmlinuz" initrd "disk1p2:/initrd.img"'
            " may help"
        ),
        "alone": 'no partition table; the whole disk: ext4; boot "disk1:/boot/vmlinuz" may help',
        "none": "no partition table; the whole disk: ext4",
        "bsd": f'MBR and OpenBSD disklabel; partition a: FFS2; partition b: {nothing}; boot "disk1a:/bsd" may help',
        "empty": "it is empty: start its VM once from a CD (-r) or a kernel (-b) that installs a system",
    }


@contextmanager
def bad(function: str, cell: Cell) -> Iterator[Reader]:
    """Start a faulty process instead of imgboot."""
    child, sock = start_probe(None, entry=f"tests.support.imgprobes:{function}", title="imgboot")
    with sock:
        yield Reader(cell, child, sock)
    child.kill()
    child.reap(DEADLINE_S)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("nonsense", "cannot be read: imgboot answered nonsense: "),
        ("die", "cannot be read: imgboot has ended"),
        ("claim", f"imgboot answered nonsense: {1 << 40} bytes of {MIB}"),
        ("keep", "cannot be kept: Device or resource busy"),
    ],
)
def test_imgboot_that_was_taken_over(cell: Cell, disk: Path, function: str, words: str) -> None:
    """After a false answer the VM gets no file that is incomplete, or that another process can still change."""
    with bad(function, cell) as reader:
        said = reader.refusal(DiskConfig(path=str(disk), format="raw"), DiskFile(disk=0, path="/vmlinuz"), MIB)
        assert said.startswith(f"disk0:/vmlinuz: disk IMAGE: {words}")


def test_imgboot_cannot_write_a_disk_or_a_larger_copy(cell: Cell, disk: Path) -> None:
    """Our descriptor is writable; the one that it gets is not.  The memory for the copy has the size limit."""
    with bad("overstep", cell) as reader:
        reader.read(DiskConfig(path=str(disk), format="raw"), DiskFile(disk=0, path="/vmlinuz"), MIB)
        assert reader.options == ""
