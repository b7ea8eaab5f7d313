"""Files that are no boot images, but that users may give as such.  Each error names the kind and tells what to do."""

import bz2
import lzma
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from tests.unit.vm.boot.samples import FakeMemory, Part, bzimage, elf_file, load, note, put, pvh, seabios
from vmd.errors import ImageError

CODE = Part(1, 0x100000, b"\xf4" * 64)


def at(offset: int, magic: bytes, size: int = 70_000) -> bytes:
    """Return a file with a magic number between other bytes."""
    return b"\x77" * offset + magic + b"\x77" * (size - offset - len(magic))


def efi(*sections: bytes) -> bytes:
    """Return the headers of an EFI program (PE/COFF)."""
    optional = bytes(0xF0)
    header = struct.pack("<4sHH12xHH", b"PE\0\0", 0x8664, len(sections), len(optional), 0x22E)
    table = b"".join(name.ljust(8, b"\0") + bytes(32) for name in sections)
    return b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0x80) + bytes(0x40) + header + optional + table + bytes(4096)


FILES = {
    "vmlinux.xz": (lzma.compress(pvh()), "is compressed by xz, and only gzip is unpacked here: give .* `xz -dc`"),
    "vmlinux.lzma": (lzma.compress(pvh(), lzma.FORMAT_ALONE), "is compressed by lzma, .* the output of `xz -dc`"),
    "vmlinux.bz2": (bz2.compress(pvh()), "is compressed by bzip2, .* `bzip2 -dc`"),
    "vmlinux.zst": (at(0, b"\x28\xb5\x2f\xfd"), "is compressed by zstd, .* `zstd -dc`"),
    "vmlinux.lz4": (at(0, b"\x04\x22\x4d\x18"), "is compressed by lz4, .* `lz4 -dc`"),
    "vmlinux.lz4 -l": (at(0, b"\x02\x21\x4c\x18"), "is compressed by lz4, .* `lz4 -dc`"),
    "vmlinux.lzo": (at(0, b"\x89LZO\0\r\n\x1a\n"), "is compressed by lzop, .* `lzop -dc`"),
    "vmlinux.Z": (at(0, b"\x1f\x9d\x90"), "is compressed by compress, .* `gzip -dc`"),
    "vmlinux.lz": (at(0, b"LZIP"), "is compressed by lzip, .* `lzip -dc`"),
    "initrd.img with checksums": (at(0, b"070702"), "is an initramfs .cpio archive.: give it as initrd"),
    "initrd.img of the old form": (at(0, b"070707"), "is an initramfs .cpio archive.: give it as initrd"),
    "initrd.img": (at(0, b"070701"), "is an initramfs .cpio archive.: give it as initrd, and its kernel as boot"),
    "linux.deb": (at(0, b"!<arch>\ndebian-binary"), "is an archive .ar, .*: give the kernel in it"),
    "linux.rpm": (at(0, b"\xed\xab\xee\xdb"), "is an archive .RPM package."),
    "linux.zip": (at(0, b"PK\3\4"), "is an archive .zip."),
    "linux.tar": (at(257, b"ustar\x0000"), "is an archive .tar."),
    "uImage": (at(0, b"\x27\x05\x19\x56"), "is a U-Boot image .uImage.: give the kernel in it"),
    "fit.itb": (at(0, b"\xd0\x0d\xfe\xed"), "is a device tree or a U-Boot FIT image"),
    "Image of arm64": (at(56, b"ARM\x64"), "is a Linux kernel for arm64, not for x86"),
    "Image of arm64 with EFI entry": (put(efi(b".text"), "<4s", 56, b"ARM\x64"), "is a Linux kernel for arm64"),
    "zImage of arm": (at(36, b"\x18\x28\x6f\x01"), "is a Linux kernel for arm, not for x86"),
    "Image of riscv": (at(56, b"RSC\x05"), "is a Linux kernel for riscv, not for x86"),
    "Image of loongarch": (at(56, b"\xcd\x23\x82\x81"), "is a Linux kernel for loongarch, not for x86"),
    "vmlinuz.efi of zboot": (put(efi(b".text"), "<4s", 4, b"zimg"), "is a compressed EFI kernel .zboot., .*: give the"),
    "UKI": (efi(b".text", b".osrel", b".cmdline", b".linux", b".initrd"), "is a unified kernel image, .* `objcopy"),
    "BOOTX64.EFI": (efi(b".text", b".data"), "is an EFI program, which is not started directly: give a Linux bzImage"),
    "disk.qcow2": (at(0, b"QFI\xfb\0\0\0\3", 196608), "is a disk image .qcow2.: give it as disk"),
    "disk.vmdk": (at(0, b"KDMV"), "is a disk image .VMDK.: give it as disk"),
    "disk.qed": (at(0, b"QED\0"), "is a disk image .QED.: give it as disk"),
    "esx.vmdk": (at(0, b"COWD"), "is a disk image .VMDK.: give it as disk"),
    "split.vmdk": (at(0, b"# Disk DescriptorFile"), "is a disk image .VMDK.: give it as disk"),
    "disk.hdd": (at(0, b"WithoutFreeSpace"), "is a disk image .Parallels.: give it as disk"),
    "large.hdd": (at(0, b"WithouFreSpacExt"), "is a disk image .Parallels.: give it as disk"),
    "disk.luks": (at(0, b"LUKS\xba\xbe"), "is a disk image .LUKS.: give it as disk"),
    "gpt.img of a disk with 4 KiB sectors": (at(4096, b"EFI PART"), "is a disk image .GPT.: give it as disk"),
    "root.xfs": (at(0, b"XFSB"), "is the image of a file system .XFS.: give it as disk"),
    "root.btrfs": (at(0x10040, b"_BHRfS_M"), "is the image of a file system .btrfs.: give it as disk"),
    "disk.vdi": (at(64, b"\x7f\x10\xda\xbe"), "is a disk image .VDI."),
    "disk.vhd": (at(0, b"conectix"), "is a disk image .VHD."),
    "disk.vhdx": (at(0, b"vhdxfile"), "is a disk image .VHDX."),
    "gpt.img": (put(at(510, b"\x55\xaa"), "<8s", 512, b"EFI PART"), "is a disk image .GPT.: give it as disk"),
    "mbr.img": (at(510, b"\x55\xaa", 1 << 20), "is a disk image .boot sector.: give it as disk"),
    "openbsd.img": (at(512, b"\x57\x45\x56\x82"), "is a disk image .OpenBSD disklabel."),
    "root.ext4": (at(1080, b"\x53\xef", 1 << 20), "is the image of a file system .ext4.: give it as disk"),
    "root.squashfs": (at(0, b"hsqs"), "is the image of a file system .squashfs.: give it as disk"),
    "cd.iso": (at(0x8001, b"CD001"), "is a CD image .ISO 9660.: give it as cdrom"),
    "hybrid.iso": (put(at(0x8001, b"CD001"), "<2s", 510, b"\x55\xaa"), "is a CD image .ISO 9660.: give it as cdrom"),
}


@pytest.mark.parametrize("case", FILES)
def test_error_names_the_kind_and_the_remedy(case: str) -> None:
    """The length of the file does not matter, even if it is that of a firmware image."""
    data, sentence = FILES[case]

    with pytest.raises(ImageError, match=f"^/bsd: {sentence}"):
        load(FakeMemory(), data)
    firmware_sized = data + b"\x77" * (-len(data) % 65536)
    with pytest.raises(ImageError, match=f"^/bsd: {sentence}"):
        load(FakeMemory(), firmware_sized)


STRONG = [name for name in FILES if name not in ("vmlinux.Z", "vmlinux.lzma", "root.ext4", "mbr.img")]


@pytest.mark.parametrize("case", STRONG)
def test_magic_number_has_precedence_over_a_jump_at_the_end(case: str) -> None:
    """A file with a magic number is never taken for firmware, which is recognised last."""
    data = FILES[case][0]
    data += b"\x77" * (-len(data) % 65536)

    with pytest.raises(ImageError, match=f"^/bsd: {FILES[case][1]}"):
        load(FakeMemory(), data[:-16] + seabios()[-16:])


@pytest.mark.parametrize("case", FILES)
def test_every_prefix_is_refused(case: str) -> None:
    """hostile 54: a truncated file is refused too."""
    data = FILES[case][0]
    for length in (*range(1, 0x180, 7), *range(0x180, min(len(data), 5000), 211)):
        with pytest.raises(ImageError):
            load(FakeMemory(), data[:length])


def test_linux_kernel_with_an_efi_entry_is_a_linux_kernel() -> None:
    """The bzImage of every distribution is also an EFI program, and is booted as a bzImage."""
    image = put(put(bzimage(), "<2s", 0, b"MZ"), "<I", 0x3C, 0x80)

    assert load(FakeMemory(), put(image, "<4s", 0x80, b"PE\0\0")).text.startswith("Linux")


MULTIBOOT1 = struct.pack("<3I", 0x1BADB002, 3, (1 << 32) - 0x1BADB002 - 3)
MULTIBOOT2 = struct.pack("<4I", 0xE85250D6, 0, 24, (1 << 32) - 0xE85250D6 - 24)
NO_NOTE = "has no PVH note, which tells where an ELF kernel is entered"
ELFS = {
    "vmlinux": (
        elf_file([Part(1, 0x1000000, b"\xf4" * 64)], entry=0x1000000),
        f"{NO_NOTE}: build Linux with CONFIG_PVH=y",
    ),
    "vmlinux with notes": (
        elf_file([CODE, Part(4, 0, note(b"Linux", 0x101, b"\1\0\0\0") + note(b"Xen", 5, b"xen-3.0"))], entry=0x100000),
        f"{NO_NOTE}: build Linux with CONFIG_PVH=y, or give its bzImage",
    ),
    "PVH note of three bytes": (
        elf_file([CODE, Part(4, 0, note(b"Xen", 18, b"abc"))], entry=0x100000),
        f"{NO_NOTE} .has a damaged PVH note: 616263 is no 32-bit address.: build Linux",
    ),
    "Multiboot": (
        elf_file([Part(1, 0x100000, MULTIBOOT1)], entry=0x100000),
        f"is a Multiboot kernel and {NO_NOTE}: add",
    ),
    "Multiboot 2": (elf_file([Part(1, 0x100000, MULTIBOOT2)], entry=0x100000), "is a Multiboot kernel and .* by GRUB"),
    "Multiboot at the end of its area": (
        elf_file([Part(1, 0x100000, bytes(8192 - 120 - 12) + MULTIBOOT1)], entry=0x100000),
        "is a Multiboot kernel and",
    ),
    "Multiboot behind its area": (
        elf_file([Part(1, 0x100000, bytes(8192 - 120 - 8) + MULTIBOOT1)], entry=0x100000),
        NO_NOTE,
    ),
    "Multiboot 2 at the end of its area": (
        elf_file([Part(1, 0x100000, bytes(32768 - 120 - 16) + MULTIBOOT2)], entry=0x100000),
        "is a Multiboot kernel and",
    ),
    "Multiboot 2 behind its area": (
        elf_file([Part(1, 0x100000, bytes(32768 - 120 - 12) + MULTIBOOT2)], entry=0x100000),
        NO_NOTE,
    ),
    "a magic without its sum": (elf_file([Part(1, 0x100000, MULTIBOOT1[:8] + bytes(8))], entry=0x100000), NO_NOTE),
    "dynamic program": (
        elf_file([CODE, Part(3, 0, b"/lib64/ld.so\0")], entry=0x100000, elf_type=3),
        "is a user program, not",
    ),
    "static program": (
        elf_file([CODE, Part(4, 0, note(b"GNU", 1, bytes(16)))], entry=0x100000),
        "is a user program, not",
    ),
    "static program of musl": (
        elf_file([CODE, Part(0x6474E552, 0)], entry=0x100000),
        f"{NO_NOTE}, and looks like a user",
    ),
    "FreeBSD": (
        put(elf_file([CODE, Part(3, 0, b"/red/herring\0")], entry=0), "<B", 7, 9),
        f"{NO_NOTE}: start FreeBSD by",
    ),
    "NetBSD by its header": (
        put(elf_file([CODE], entry=0x100000), "<B", 7, 2),
        f"{NO_NOTE}: start NetBSD by",
    ),
    "NetBSD": (
        elf_file([CODE, Part(4, 0, note(b"NetBSD", 1, bytes(4)))], entry=0x100000),
        f"{NO_NOTE}: start NetBSD by",
    ),
    "vmlinux of arm64": (put(pvh(), "<H", 18, 183), "is an ELF file for machine 183 .arm64., not for x86"),
}


@pytest.mark.parametrize("cmdline", [b"", b"console=ttyS0"])
@pytest.mark.parametrize("case", ELFS)
def test_error_names_what_an_elf_file_lacks(case: str, cmdline: bytes) -> None:
    """The error is about the missing entry, and not about the command line."""
    kernel, sentence = ELFS[case]

    with pytest.raises(ImageError, match=f"^/bsd: {sentence}"):
        load(FakeMemory(), kernel, cmdline=cmdline)


@pytest.mark.parametrize("program", ["/bin/busybox", "/bin/sh"])
def test_programs_of_this_host_are_no_kernels(program: str) -> None:
    """One program is static, and one is dynamic."""
    with pytest.raises(ImageError, match="is a user program, not a kernel"):
        load(FakeMemory(), Path(program).read_bytes(), cmdline=b"quiet")


def test_kernel_module_is_no_kernel(tmp_path: Path) -> None:
    """An object file has no code to start."""
    source, objects = tmp_path / "k.S", tmp_path / "k.o"
    source.write_text("nop\n")
    subprocess.run([shutil.which("as") or "as", "-o", objects, source], check=True)

    with pytest.raises(ImageError, match="is an ELF file of type 1, not an executable"):
        load(FakeMemory(), objects.read_bytes())
