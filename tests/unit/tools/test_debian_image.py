"""The disk of a Debian image: a guest finds the files of its root, and it can be grown."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tools import debian_image
from tools.debian_image import ImageError
from vmd.diskfs.disk import Disk

SIZE_MIB = 16
SECTOR = 512


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with a small root."""
    folder = tmp_path_factory.mktemp("image")
    debian_image.write(folder / "root", {"etc/hostname": "debian\n", "boot/vmlinuz-6": "kernel"})
    (folder / "root/vmlinuz").symlink_to("boot/vmlinuz-6")
    debian_image.make_disk(folder / "disk.raw", folder / "root", SIZE_MIB)
    return folder / "disk.raw"


def test_files_on_the_disk(disk: Path) -> None:
    """It has one partition with a label, and links are links."""
    with disk.open("rb") as file:
        found = Disk(lambda offset, length: os.pread(file.fileno(), length, offset), disk.stat().st_size)
        assert found.describe() == "GPT; partition p1: ext4"
        for path, content in (("/vmlinuz", b"kernel"), ("/etc/hostname", b"debian\n")):
            assert b"".join(piece for _, piece in found.find(path).pieces()) == content


def test_it_is_complete_and_can_be_grown(disk: Path, tmp_path: Path) -> None:
    """The file system fits into the partition, and a copy is grown by cloud-init's programs."""
    copy = tmp_path / "copy.raw"
    shutil.copy(disk, copy)
    os.truncate(copy, 2 * SIZE_MIB << 20)
    path = {**os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    subprocess.run(["growpart", copy, "1"], check=True, capture_output=True, env=path)
    table = json.loads(subprocess.run(["sfdisk", "-J", copy], check=True, capture_output=True, env=path).stdout)
    (partition,) = table["partitiontable"]["partitions"]
    assert partition["size"] * SECTOR > (2 * SIZE_MIB - 2) << 20
    root = tmp_path / "root.ext4"
    root.write_bytes(copy.read_bytes()[partition["start"] * SECTOR :][: partition["size"] * SECTOR])
    subprocess.run(["e2fsck", "-f", "-n", root], check=True, capture_output=True, env=path)
    subprocess.run(["resize2fs", root], check=True, capture_output=True, env=path)


def test_files_take_the_place_of_links(tmp_path: Path) -> None:
    """A link of the root could lead to a file of this host."""
    host = tmp_path / "resolv.conf"
    host.write_text("host")
    (tmp_path / "root/etc").mkdir(parents=True)
    (tmp_path / "root/etc/resolv.conf").symlink_to(host)

    debian_image.write(tmp_path / "root", {"etc/resolv.conf": "guest"})

    assert (host.read_text(), (tmp_path / "root/etc/resolv.conf").read_text()) == ("host", "guest")


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has the program's output, and the next run starts from the beginning."""
    monkeypatch.setattr(debian_image, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(debian_image, "ENVIRONMENT", {"PATH": str(tmp_path / "bin")})
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/debootstrap"
    program.write_text("#!/bin/sh\necho E: no network\nexit 7\n")
    program.chmod(0o755)
    timeout = shutil.which("timeout")
    assert timeout is not None
    (tmp_path / "bin/timeout").symlink_to(timeout)

    with pytest.raises(ImageError, match=r"debootstrap .*: status 7\nE: no network"):
        debian_image.cached()

    (lock,) = [path.name for path in tmp_path.iterdir() if path.name != "bin"]
    assert lock.endswith(".lock")
