"""Disks with a file system that has a kernel in it, and no boot loader: made without root, loop devices and mounts."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.support.filesystems import MIB, SECTOR, Part, ext_image, ffs_image, mbr_disk, openbsd_disk, run

Files = Mapping[str, bytes | str]  # by path; links are text
SIZE = 16 * MIB
FIRST = 2 * MIB // SECTOR


def ext4_disk(image: Path, files: Files, *, divided: bool = False) -> Path:
    """Make a raw disk whose file system has these files; return its path.

    With `divided` the file system is on the second partition of an MBR, and the first one is empty.
    """
    with tempfile.TemporaryDirectory() as name:
        plant(Path(name), files)
        ext_image(image, Path(name), "-t", "ext4", size=SIZE)
    if divided:
        parts = Part(MIB // SECTOR, bytes(MIB)), Part(FIRST, image.read_bytes())
        image.write_bytes(mbr_disk(*parts))
    return image


def ffs_disk(image: Path, files: Files) -> Path:
    """Make a raw disk in OpenBSD's layout, FFS on partition a of a disklabel in an MBR; return its path."""
    with tempfile.TemporaryDirectory() as name:
        plant(Path(name), files)
        ffs_image(image, Path(name))
    image.write_bytes(openbsd_disk(image.read_bytes()))
    return image


def plant(tree: Path, files: Files) -> None:
    """Make files below a directory."""
    for name, what in files.items():
        path = tree / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(what, str):
            path.symlink_to(what)
        else:
            path.write_bytes(what)


def replace(image: Path, name: str, content: bytes) -> None:
    """Replace a file in an ext4 file system, as an upgrade of the system on it does."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        for command in (f"rm {name}", f"write {file.name} {name}"):
            run("debugfs", "-w", "-R", command, image)
