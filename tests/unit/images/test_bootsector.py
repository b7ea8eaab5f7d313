"""Whether a disk has something for a BIOS to boot.  Only imgprobe reads the images for this."""

import errno
import os
import struct
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.images import MIB, qemu
from vmd.config.model import DiskConfig
from vmd.errors import OperatorError
from vmd.files.images import Use, open_disk
from vmd.images.create import create
from vmd.images.probe import answer
from vmd.ipc.probemsg import BOOTS, Probe, unpack

SECTOR = 512
SIGNATURE = b"\x55\xaa"
STARTS = b"\xeb\xfe".ljust(SECTOR - 2, b"\0") + SIGNATURE
TABLE_ONLY = bytes(446).ljust(SECTOR - 2, b"\x01") + SIGNATURE  # a protective MBR


class InProcess:
    """imgprobe without its process."""

    def probe(self, fd: int, name: str, format_hint: str, *, boots: bool = False) -> Probe:
        """Probe an image."""
        said = unpack(answer(fd, format_hint, [BOOTS] if boots else []))
        if isinstance(said, str):
            raise OperatorError(errno.EINVAL, f"{name}: {said}")
        return said


def starts(path: Path, image_format: str = "") -> bool | None:
    """Return whether a disk has a boot sector, or None."""
    with closing(open_disk(DiskConfig(path=str(path), format=image_format), InProcess(), Use(boots=True))) as disk:
        return disk.boots


def disk_with(path: Path, first: bytes) -> Path:
    """Make a raw disk that begins with these bytes, and return its path."""
    path.write_bytes(first.ljust(MIB, b"\0"))
    return path


@pytest.mark.parametrize(
    ("first", "found"),
    [(STARTS, True), (b"", False), (TABLE_ONLY, False), (STARTS[:-2], False), (b"\x01" * SECTOR, False)],
)
@pytest.mark.parametrize("image_format", ["", "raw"])
def test_a_raw_disk(tmp_path: Path, first: bytes, found: bool, image_format: str) -> None:
    """It needs a signature and code.  It does not matter whether `raw` was configured or guessed."""
    assert starts(disk_with(tmp_path / "disk.img", first), image_format) is found


def test_a_disk_of_several_images(tmp_path: Path) -> None:
    """The topmost image that has the first sector counts, also with zeros.  A compressed one is assumed to boot."""
    base = disk_with(tmp_path / "base.img", STARTS)
    create(str(tmp_path / "middle.qcow2"), "qcow2", MIB, "base.img", "raw")
    create(str(tmp_path / "top.qcow2"), "qcow2", MIB, "middle.qcow2", "qcow2")
    create(str(tmp_path / "alone.qcow2"), "qcow2", MIB)
    qemu("qemu-img", "convert", "-O", "qcow2", base, tmp_path / "full.qcow2")
    qemu("qemu-img", "convert", "-c", "-O", "qcow2", base, tmp_path / "packed.qcow2")

    found = {name: starts(tmp_path / f"{name}.qcow2") for name in ("top", "alone", "full", "packed")}
    assert found == {"top": True, "alone": False, "full": True, "packed": True}

    qemu("qemu-io", "-c", "write -z 0 64k", "-f", "qcow2", tmp_path / "top.qcow2")
    assert starts(tmp_path / "top.qcow2") is False


def test_invalid_tables(tmp_path: Path) -> None:
    """An image with a wrong table is not refused here, because its opener reports the damage."""
    image = tmp_path / "full.qcow2"
    qemu("qemu-img", "convert", "-O", "qcow2", disk_with(tmp_path / "base.img", STARTS), image)
    raw = image.read_bytes()
    (l1,) = struct.unpack_from(">Q", raw, 40)
    for entry in (1 << 40, (1 << 56) - 512, 0xFFFFFFFFFFFFFFFF):
        with image.open("r+b") as file:
            os.pwrite(file.fileno(), struct.pack(">Q", entry), l1)
        assert starts(image) in (True, False)


def test_the_boot_sector_is_not_read_without_a_request(tmp_path: Path) -> None:
    """A VM that boots a kernel needs no boot sector."""
    disk = disk_with(tmp_path / "disk.img", b"")
    with closing(open_disk(DiskConfig(path=str(disk)), InProcess())) as opened:
        assert opened.boots is None
