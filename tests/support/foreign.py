"""Files in formats that vmd does not support, made by the programs that define the formats."""

import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.support.images import MIB, qemu

OVF = b'<?xml version="1.0"?>\n<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1">\n</Envelope>\n'
Make = Callable[[Path], None]


def converted(image_format: str, options: str = "") -> Make:
    """Return a function that makes an image with some content, with qemu-img."""

    def make(path: Path) -> None:
        source = path.with_name("source.bin")
        source.write_bytes(b"\x33\xc0" + os.urandom(MIB - 2))
        given = ("-o", options) if options else ()
        qemu("qemu-img", "convert", "-f", "raw", "-O", image_format, *given, source, path)
        source.unlink()

    return make


def luks(path: Path) -> None:
    """Make a LUKS container."""
    arguments = ("--object", "secret,id=key,data=secret", "-o", "key-secret=key,iter-time=10")
    qemu("qemu-img", "create", "-q", "-f", "luks", *arguments, path, "1M")


def luks1(path: Path) -> None:
    """Write the header of a LUKS 1 container."""
    header = struct.pack(">6sH32s32s32sII", b"LUKS\xba\xbe", 1, b"aes", b"xts-plain64", b"sha256", 4040, 64)
    path.write_bytes(header.ljust(MIB, b"\0"))


def luks2(path: Path) -> None:
    """Write the header of a LUKS 2 container."""
    header = struct.pack(">6sHQQ48s32s", b"LUKS\xba\xbe", 2, 16384, 1, b"", b"sha256")
    path.write_bytes(header.ljust(16 * MIB, b"\0"))


def compressed(*command: str) -> Make:
    """Return a function that makes a compressed disk with a program that writes to standard output."""

    def make(path: Path) -> None:
        disk = bytes(510) + b"\x55\xaa" + os.urandom(3001)
        path.write_bytes(subprocess.run(command, input=disk, capture_output=True, check=True).stdout)

    return make


def zipped(path: Path) -> None:
    """Make a zip archive."""
    source = path.with_name("disk.bin")
    source.write_bytes(os.urandom(3001))
    made = path.with_name("made.zip")
    subprocess.run(["zip", "-q", "-j", made, source], check=True)
    made.rename(path)
    source.unlink()


def archive(first: str, content: bytes, path: Path) -> None:
    """Make a tar archive with one file."""
    folder = path.with_name("content")
    folder.mkdir()
    (folder / first).write_bytes(content)
    subprocess.run(["tar", "-C", folder, "-cf", path, first], check=True)
    shutil.rmtree(folder)


def ova(path: Path) -> None:
    """Make an OVA: a tar archive that begins with a description."""
    archive("vm.ovf", OVF, path)


def plain(content: bytes) -> Make:
    """Return a function that writes these bytes to a file."""

    def make(path: Path) -> None:
        path.write_bytes(content)

    return make


def once(make: Make) -> Make:
    """Return a function that makes the file only once and copies it later, because some programs are slow."""
    made: list[bytes] = []

    def again(path: Path) -> None:
        if made:
            path.write_bytes(made[0])
        else:
            make(path)
            made.append(path.read_bytes())

    return again


# (name in foreign.FOREIGN, label of the sample, the function that makes it)
KINDS: list[tuple[str, str, Make]] = [
    ("VMDK", "vmdk-monolithicSparse", converted("vmdk", "subformat=monolithicSparse")),
    ("VMDK", "vmdk-streamOptimized", converted("vmdk", "subformat=streamOptimized")),
    ("VMDK", "vmdk-descriptor", converted("vmdk", "subformat=monolithicFlat")),
    ("VMDK", "vmdk-extents", converted("vmdk", "subformat=twoGbMaxExtentSparse")),
    ("VMDK", "vmdk-bare-descriptor", plain(b"# made by hand\r\n\r\nversion=1\r\nCID=fffffffe\r\n")),
    ("VMDK", "vmdk-cowd", plain(b"COWD".ljust(MIB, b"\0"))),
    ("VMDK", "vmdk-sesparse", plain(struct.pack("<QQ", 0xCAFEBABE, 0x200000001).ljust(MIB, b"\0"))),
    ("VDI", "vdi", converted("vdi")),
    ("VDI", "vdi-static", converted("vdi", "static=on")),
    ("VHD", "vhd-dynamic", converted("vpc", "subformat=dynamic")),
    ("VHD", "vhd-fixed", converted("vpc", "subformat=fixed")),
    ("VHD", "vhd-fixed-exact", converted("vpc", "subformat=fixed,force_size=on")),
    ("VHDX", "vhdx", converted("vhdx")),
    ("QED", "qed", converted("qed")),
    ("QCOW", "qcow", converted("qcow")),
    ("Parallels", "parallels", converted("parallels")),
    ("Parallels", "parallels-old", plain(b"WithoutFreeSpace".ljust(MIB, b"\0"))),
    ("LUKS", "luks1", luks1),
    ("LUKS", "luks2", luks2),
    ("Bochs", "bochs", plain(b"Bochs Virtual HD Image".ljust(MIB, b"\0"))),
    ("cloop", "cloop", plain(b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0\n".ljust(MIB, b"\0"))),
    ("DMG", "dmg", plain(bytes(MIB) + struct.pack(">4sII", b"koly", 4, 512).ljust(512, b"\0"))),
    ("OVA", "ova", ova),
    ("OVF", "ovf", plain(OVF)),
    ("VMA", "vma", plain(b"VMA\0\0\0\0\1".ljust(MIB, b"\0"))),
    ("Android sparse", "simg", plain(struct.pack("<IHH", 0xED26FF3A, 1, 0).ljust(MIB, b"\0"))),
    ("gzip", "gzip", compressed("gzip")),
    ("xz", "xz", compressed("xz")),
    ("zstd", "zstd", compressed("zstd", "-q")),
    ("bzip2", "bzip2", compressed("bzip2")),
    ("lz4", "lz4", compressed("lz4", "-q")),
    ("zip", "zip", zipped),
    ("7-Zip", "7z", plain(b"7z\xbc\xaf\x27\x1c\0\4" + os.urandom(93))),
]
SAMPLES = [(name, label, once(make)) for name, label, make in KINDS]
NAMES = {"gzip": "gz", "bzip2": "bz2", "zstd": "zst"}


def whole_sectors(path: Path) -> None:
    """Pad a file to whole sectors, like an archive on a disk.  It stays valid for its program."""
    os.truncate(path, -(-path.stat().st_size // 512) * 512)


def odd(path: Path) -> None:
    """Make the length of a file no multiple of a sector."""
    if path.stat().st_size % 512 == 0:
        os.truncate(path, path.stat().st_size + 1)
