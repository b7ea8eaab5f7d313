"""Disks and a CD that a BIOS boots with GRUB: GRUB's `cat`, `ls` and kernel loader check what they read from them.

They are made without root, loop devices and mounts.  They are made once for each state of their sources (a stock
kernel among them), and kept.
"""

import hashlib
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from tests.support import images
from tests.support.linux import linux_guest

CHECKOUT = Path(__file__).parents[2]
CACHE = CHECKOUT / "build" / "bootable-cache"
GRUB = Path("/usr/lib/grub/i386-pc")
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"

MIB = 1 << 20
SECTOR = 512
CLUSTER = 64 * 1024
PARTITION_OFFSET = 1 * MIB  # bytes; GRUB's core lies between the boot record and this
FAT16, LINUX = 0x06, 0x83  # partition types

# The partition table's offset in the boot record, and one entry: active flag, cylinder, head and sector of the first
# sector (here the value for "not addressable"), type, the same of the last sector, first sector, number of sectors.
TABLE_AT = 0x1BE
ENTRY = struct.Struct("<B3sB3sII")
BEYOND_CHS = b"\xfe\xff\xff"

MODULES = ("biosdisk", "serial", "terminal", "terminfo", "echo", "ls", "cat", "linux", "reboot", "halt")
# A dumb terminal: each byte costs a VM exit, and cursor movements would add five bytes to each letter typed.
EARLY = """\
serial --unit=0 --speed=115200
terminal_input serial
terminal_output serial
terminfo serial dumb
"""

LAYERS = ("base", "middle", "top")  # of the qcow2 disk, the one written to last


class Bootable:
    """The images in one folder.  A test that writes to an image copies it first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fat = folder / "fat.raw"  # GRUB, FAT16
        self.layers = tuple(folder / f"{name}.qcow2" for name in LAYERS)  # GRUB, ext4, kernel and initramfs
        self.cd = folder / "cd.iso"  # GRUB, ISO 9660 with Rock Ridge
        self.data = folder / "data.raw"  # ext4 without partitions, nothing to boot

    def copy(self, source: Path, target: Path) -> Path:
        """Copy an image with its holes, to a file or into a folder; return the path of the copy."""
        target = target / source.name if target.is_dir() else target
        _run("cp", "--sparse=always", source, target)
        return target


def text_of(name: str) -> str:
    """Return the line in the file `<name>.txt` of the medium or layer `name`."""
    return f"written on the {name}"


def noise(name: str) -> bytes:
    """Return the content of a larger file: reproducible, and no two sectors are equal."""
    return random.Random(name).randbytes(3 * MIB + 777)


@cache
def bootable() -> Bootable:
    """Return the images; make them if they do not exist yet.  Raises CalledProcessError, KernelError."""
    made = CACHE / _digest()
    if made.exists():
        return Bootable(made)
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        scratch, fresh = Path(name, "scratch"), Path(name, "images")
        scratch.mkdir()
        fresh.mkdir()
        result = Bootable(fresh)
        _make_fat_disk(result, scratch)
        _make_linux_disk(result, scratch)
        _make_cd(result, scratch)
        _make_data_disk(result, scratch)
        try:
            fresh.rename(made)
        except OSError:
            # Another test run was faster.  Its images are the same.
            if not made.exists():
                raise
    return Bootable(made)


def _digest() -> str:
    """Return a digest of everything that the images are made from."""
    digest = hashlib.sha256()
    code = [Path(__file__), CHECKOUT / "vmctl/commands/create.py", *sorted((CHECKOUT / "vmd/images").glob("*.py"))]
    for path in (*code, GRUB / "kernel.img"):
        digest.update(path.read_bytes())
    for path in linux_guest():
        digest.update(f"{path}\0{path.stat().st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]


# --- the media -----------------------------------------------------------------------------------------------


def _make_fat_disk(result: Bootable, scratch: Path) -> None:
    """Make a raw disk with GRUB and FAT16."""
    size = 32 * MIB
    _start_disk(result.fat, size, FAT16, "fat", scratch)
    drive = f"{result.fat}@@{PARTITION_OFFSET}"
    sectors = (size - PARTITION_OFFSET) // SECTOR
    _run("mformat", "-i", drive, "-T", sectors, "-h", 16, "-s", 63, "-v", "VMD", "::")
    _run("mcopy", "-s", "-i", drive, *_tree(scratch / "fat", "fat").iterdir(), "::/")


def _make_linux_disk(result: Bootable, scratch: Path) -> None:
    """Make a disk of three layers.  Each layer adds a file that the layers below do not have."""
    size = 64 * MIB
    kernel, initrd = linux_guest()
    raw = scratch / "linux.raw"
    _start_disk(raw, size, LINUX, "ext2", scratch)
    tree = _tree(scratch / "linux", LAYERS[0])
    shutil.copy(kernel, tree / "boot/vmlinuz")
    shutil.copy(initrd, tree / "boot/initrd")
    partition_kib = (size - PARTITION_OFFSET) // 1024
    _run("mke2fs", "-q", "-F", "-t", "ext4", "-E", f"offset={PARTITION_OFFSET}", "-d", tree, raw, f"{partition_kib}k")
    base, middle, top = result.layers
    _vmctl("create", "-i", f"raw:{raw}", base)
    for name, below, layer in ((LAYERS[1], base, middle), (LAYERS[2], middle, top)):
        before = raw.read_bytes()
        addition = scratch / f"{name}.txt"
        addition.write_text(text_of(name) + "\n")
        _run("debugfs", "-w", "-R", f"write {addition} {name}.txt", f"{raw}?offset={PARTITION_OFFSET}")
        _vmctl("create", "-b", below.name, layer)
        _write_changes(layer, result, before, raw.read_bytes())


def _write_changes(layer: Path, result: Bootable, before: bytes, after: bytes) -> None:
    """Write the differences from the layer below to an overlay."""
    chain = result.layers[: result.layers.index(layer) + 1]
    image = images.opened(*reversed(chain), writable=True)
    try:
        for offset in range(0, len(after), CLUSTER):
            piece = after[offset : offset + CLUSTER]
            if piece != before[offset : offset + CLUSTER]:
                images.write(image, offset, piece)
        image.flush()
    finally:
        image.close()


def _make_cd(result: Bootable, scratch: Path) -> None:
    """Make an El Torito CD without floppy emulation."""
    tree = _tree(scratch / "cd", "cd")
    (tree / "noise").write_bytes(noise("cd"))
    _make_core("i386-pc-eltorito", "(cd)", ("iso9660",), tree / "boot/eltorito.img", scratch)
    _run(
        "xorriso", "-as", "mkisofs", "-quiet", "-R", "-V", "VMD", "-b", "boot/eltorito.img",
        "-no-emul-boot", "-boot-load-size", 4, "-boot-info-table", "-o", result.cd, tree,
    )  # fmt: skip


def _make_data_disk(result: Bootable, scratch: Path) -> None:
    """Make a file system that guests write to, large enough that lost writes show."""
    tree = scratch / "data"
    tree.mkdir()
    (tree / "noise").write_bytes(noise("data"))
    _run("mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, result.data, "96M")


# --- their parts -----------------------------------------------------------------------------------------------


def _tree(folder: Path, name: str) -> Path:
    """Return a folder with the files that every medium has, GRUB's configuration among them."""
    (folder / "boot/grub").mkdir(parents=True)
    (folder / "boot/grub/grub.cfg").write_text(f"echo GRUB from the {name}\n")
    (folder / f"{name}.txt").write_text(text_of(name) + "\n")
    return folder


def _start_disk(path: Path, size: int, kind: int, file_system: str, scratch: Path) -> None:
    """Write boot record, partition table and GRUB's core to a new raw disk with one partition."""
    core = scratch / "core.img"
    _make_core("i386-pc", "(hd0,msdos1)", ("part_msdos", file_system), core, scratch)
    # GRUB's boot record expects the core in the next sector, and the core expects the rest of itself right after its
    # first sector.  Only the partition table has to be filled in.
    record = bytearray((GRUB / "boot.img").read_bytes())
    first, sectors = PARTITION_OFFSET // SECTOR, (size - PARTITION_OFFSET) // SECTOR
    entry = ENTRY.pack(0x80, BEYOND_CHS, kind, BEYOND_CHS, first, sectors)
    record[TABLE_AT : SECTOR - 2] = entry.ljust(4 * ENTRY.size, b"\0")
    head = bytes(record) + core.read_bytes()
    assert len(head) <= PARTITION_OFFSET
    path.write_bytes(head)
    os.truncate(path, size)


def _make_core(kind: str, device: str, modules: tuple[str, ...], path: Path, scratch: Path) -> None:
    early = scratch / "early.cfg"
    early.write_text(EARLY)
    prefix = f"{device}/boot/grub"
    _run("grub-mkimage", "-O", kind, "-p", prefix, "-c", early, "-o", path, *modules, *MODULES)


def _vmctl(*words: object) -> None:
    _run(sys.executable, "-m", "vmctl", *words)


def _run(*words: object) -> None:
    """Run a program.  Raises CalledProcessError, with the program's output as notes."""
    try:
        subprocess.run(
            [str(word) for word in words], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True,
            env={**os.environ, "PATH": PATH, "LC_ALL": "C"}, cwd=CHECKOUT,
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        error.add_note(f"{error.stdout}{error.stderr}")
        raise
