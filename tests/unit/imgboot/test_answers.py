"""imgboot without a process: what it answers, and what it copies, for disks of Linux and OpenBSD."""

import errno
import os
from pathlib import Path

import pytest

from tests.support.filesystems import MIB
from tests.support.systemdisk import Files, ext4_disk, ffs_disk
from vmd.config.model import DiskFile
from vmd.imgboot import main
from vmd.ipc.bootmsg import BootFile, BootLink, pack_error, question, unpack_file

KERNEL = b"k" * 5000 + bytes(MIB) + b"end"  # with a hole
LINUX: Files = {
    "boot/vmlinuz-6.1": KERNEL, "vmlinuz": "boot/vmlinuz-6.1", "initrd.img": b"initrd!", "etc/hostname": b"web\n"
}  # fmt: skip


@pytest.fixture(scope="module")
def linux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with its file system on the second partition."""
    return ext4_disk(tmp_path_factory.mktemp("linux") / "disk.img", LINUX, divided=True)


def ask(disk: Path, file: DiskFile, most: int | None = 2 * MIB) -> tuple[BootFile | str, bytes]:
    """Return the answer, and what was copied to a memory file of `most` bytes; without `most` there is none."""
    image = os.open(disk, os.O_RDONLY)
    files = [image]
    if most is not None:
        files.append(os.memfd_create("kernel"))
        os.ftruncate(files[1], most)
    answer = main.answer(question(file, [BootLink(path=str(disk), format="raw", guessed=False)]), files)
    with pytest.raises(OSError, match="Bad file descriptor"):  # the image is closed
        os.fstat(image)
    assert len(files) == (most is not None)  # the memory file is the caller's
    copied = b""
    if files:
        copied = os.pread(files[0], 4 * MIB, 0)
        os.close(files[0])
    return unpack_file(answer), copied


def refusal(disk: Path, file: DiskFile, most: int | None = 2 * MIB) -> str:
    """Return why nothing was copied."""
    answer, copied = ask(disk, file, most)
    assert isinstance(answer, str)
    assert not any(copied)
    return answer


def test_file_is_copied_with_its_length(linux: Path) -> None:
    """By a link, from the first partition that has it, or from the one that is named; it may fill the memory file."""
    assert ask(linux, DiskFile(disk=3, path="/vmlinuz")) == (
        BootFile(size=len(KERNEL), name="disk3p2:/vmlinuz"), KERNEL
    )  # fmt: skip
    initrd = DiskFile(disk=0, partition="p2", path="/initrd.img")
    assert ask(linux, initrd, 7) == (BootFile(size=7, name="disk0p2:/initrd.img"), b"initrd!")
    assert refusal(linux, initrd, 6) == "partition p2: /initrd.img: has 7 bytes, and 6 are the most for this vm"


@pytest.mark.parametrize(
    ("conf", "wanted", "name", "content", "options"),
    [
        (None, "", "disk0a:/bsd", b"bsd", ""),
        (b"set image /bsd.mp\n", "", "disk0a:/bsd.mp", b"mp", ""),
        (b"boot hd0a:/bsd.mp -s", "", "disk0a:/bsd.mp", b"mp", "s"),
        (b"boot hd0b:/bsd.mp -s", "a", "disk0a:/bsd.mp", b"mp", "s"),
        (b"boot hd0p:/bsd.mp", "", "disk0a:/bsd.mp", b"mp", ""),
    ],
)
def test_kernel_of_openbsd(
    tmp_path: Path, conf: bytes | None, wanted: str, name: str, content: bytes, options: str
) -> None:
    """Its boot.conf names it; the configuration's partition, and one that is there, count more than others."""
    files: dict[str, bytes | str] = {"bsd": b"bsd", "bsd.mp": b"mp"}
    if conf is not None:
        files["etc/boot.conf"] = conf
    disk = ffs_disk(tmp_path / "disk.img", files)

    assert ask(disk, DiskFile(disk=0, partition=wanted)) == (
        BootFile(size=len(content), name=name, options=options), content
    )  # fmt: skip


def test_refused_file(linux: Path, tmp_path: Path) -> None:
    """One sentence, which does not name the image."""
    assert refusal(linux, DiskFile(disk=0, partition="p3", path="/vmlinuz")) == (
        "there is no partition p3: its MBR has p1, p2"
    )
    assert refusal(linux, DiskFile(disk=0, partition="p2", path="/nope")).endswith("/nope: there is no /nope")
    bad = ffs_disk(tmp_path / "disk.img", {"bsd": b"bsd", "etc/boot.conf": b"boot hd1a:/bsd"})
    assert refusal(bad, DiskFile(disk=0)).startswith("/etc/boot.conf: device 'hd1a' is no partition of the disk")
    (tmp_path / "short").write_bytes(b"QFI\xfb")
    image = os.open(tmp_path / "short", os.O_RDONLY)
    link = BootLink(path="short", format="qcow2", guessed=False)
    said = unpack_file(main.answer(question(DiskFile(disk=0, path="/x"), [link]), [image]))
    assert isinstance(said, str)
    assert not said.startswith("short: ")


def test_error_of_the_storage(linux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence is that of the system, or Python's if there is no number."""
    for error, words in (
        (OSError(errno.EIO, os.strerror(errno.EIO)), "Input/output error"), (OSError("it is odd"), "it is odd"),
    ):  # fmt: skip

        def fail(_image: object, _size: int, error: OSError = error) -> None:
            raise error

        monkeypatch.setattr(main, "Disk", fail)
        assert refusal(linux, DiskFile(disk=0, path="/vmlinuz")) == unpack_file(pack_error(words))


def test_description_of_a_disk(linux: Path, tmp_path: Path) -> None:
    """Without a memory file: partitions, file systems, and what could be booted."""
    alone = ext4_disk(tmp_path / "alone.img", {"boot/vmlinuz": b"k"})
    none = ext4_disk(tmp_path / "none.img", {"etc/motd": b"hello"})
    bsd = ffs_disk(tmp_path / "bsd.img", {"bsd": b"k"})
    nothing = "has no known file system"
    assert [refusal(disk, DiskFile(disk=1), None) for disk in (linux, alone, none, bsd)] == [
        f'MBR; partition p1: {nothing}; partition p2: ext4; boot "disk1p2:/vmlinuz" initrd "disk1p2:/initrd.img"'
        " may help",
        'no partition table; the whole disk: ext4; boot "disk1:/boot/vmlinuz" may help',
        "no partition table; the whole disk: ext4",
        f'MBR and OpenBSD disklabel; partition a: FFS2; partition b: {nothing}; boot "disk1a:/bsd" may help',
    ]


@pytest.mark.parametrize("size", [512, 128 << 10, (128 << 10) + 512, MIB])
def test_empty_disk(tmp_path: Path, size: int) -> None:
    """Anything in its first 128 KiB makes it another one; a disk may be shorter than that."""
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(size))
    assert refusal(disk, DiskFile(disk=0), None).startswith("it is empty: ")
    disk.write_bytes(bytes(size - 1) + b"x")
    assert refusal(disk, DiskFile(disk=0), None).startswith("it is empty: ") == (size > 128 << 10)
    disk.write_bytes(b"x" + bytes(size - 1))
    assert "the whole disk: has no known file system" in refusal(disk, DiskFile(disk=0), None)
