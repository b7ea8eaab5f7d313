"""Recognises files that are not boot images, so that the error message says what to give instead.

A file is recognised by magic numbers in its first bytes.  Files that can be booted were recognised before, so this
module does not decide how a VM boots.
"""

from struct import Struct

from vmd.vm.boot import elf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.vm.boot.elf import Elf, Notes
    from vmd.vm.boot.image import Image

COMPRESSED = "is compressed by {0}, and only gzip is unpacked here: give the output of `{1}`"
DISK = "is a disk image ({0}): give it as disk"
FILE_SYSTEM = "is the image of a file system ({0}): give it as disk"
CD = "is a CD image (ISO 9660): give it as cdrom"
INITRD = "is an initramfs (cpio archive): give it as initrd, and its kernel as boot"
ARCHIVE = "is an archive ({0}): give the kernel in it"
OTHER_MACHINE = "is a Linux kernel for {0}, not for x86"
EFI_PROGRAM = (
    "is an EFI program, which is not started directly: give a Linux bzImage or an ELF kernel, "
    "or start the program by EFI firmware from a disk"
)
UNIFIED = (
    "is a unified kernel image, an EFI program: give the kernel in it, which "
    "`objcopy -O binary --only-section=.linux` extracts, and give its section .initrd as initrd"
)
ZBOOT = (
    "is a compressed EFI kernel (zboot), which only EFI firmware can start: give the kernel in it, "
    "a bzImage or vmlinux"
)

# (offset, magic number, message)
MAGICS = (
    (0, b"\xfd7zXZ\0", COMPRESSED.format("xz", "xz -dc")),
    (0, b"\x28\xb5\x2f\xfd", COMPRESSED.format("zstd", "zstd -dc")),
    (0, b"\x04\x22\x4d\x18", COMPRESSED.format("lz4", "lz4 -dc")),
    (0, b"\x02\x21\x4c\x18", COMPRESSED.format("lz4", "lz4 -dc")),
    (0, b"BZh", COMPRESSED.format("bzip2", "bzip2 -dc")),
    (0, b"\x89LZO\0\r\n\x1a\n", COMPRESSED.format("lzop", "lzop -dc")),
    (0, b"LZIP", COMPRESSED.format("lzip", "lzip -dc")),
    (0, b"070701", INITRD),
    (0, b"070702", INITRD),
    (0, b"070707", INITRD),
    (0, b"PK\3\4", ARCHIVE.format("zip")),
    (0, b"!<arch>\n", ARCHIVE.format("ar, as Debian packages are")),
    (0, b"\xed\xab\xee\xdb", ARCHIVE.format("RPM package")),
    (257, b"ustar", ARCHIVE.format("tar")),
    (0, b"\x27\x05\x19\x56", "is a U-Boot image (uImage): give the kernel in it, which dumpimage(1) extracts"),
    (0, b"\xd0\x0d\xfe\xed", "is a device tree or a U-Boot FIT image: give the kernel, which dumpimage(1) extracts"),
    (56, b"ARM\x64", OTHER_MACHINE.format("arm64")),
    (36, b"\x18\x28\x6f\x01", OTHER_MACHINE.format("arm")),
    (56, b"RSC\x05", OTHER_MACHINE.format("riscv")),
    (56, b"\xcd\x23\x82\x81", OTHER_MACHINE.format("loongarch")),
    (0, b"QFI\xfb", DISK.format("qcow2")),
    (0, b"QED\0", DISK.format("QED")),
    (0, b"KDMV", DISK.format("VMDK")),
    (0, b"COWD", DISK.format("VMDK")),
    (0, b"# Disk DescriptorFile", DISK.format("VMDK")),
    (0, b"vhdxfile", DISK.format("VHDX")),
    (0, b"conectix", DISK.format("VHD")),
    (0, b"WithoutFreeSpace", DISK.format("Parallels")),
    (0, b"WithouFreSpacExt", DISK.format("Parallels")),
    (64, b"\x7f\x10\xda\xbe", DISK.format("VDI")),
    (0, b"LUKS\xba\xbe", DISK.format("LUKS")),
    (512, b"EFI PART", DISK.format("GPT")),
    (4096, b"EFI PART", DISK.format("GPT")),
    (512, b"\x57\x45\x56\x82", DISK.format("OpenBSD disklabel")),
    (0x8001, b"CD001", CD),
    (0, b"hsqs", FILE_SYSTEM.format("squashfs")),
    (0, b"XFSB", FILE_SYSTEM.format("XFS")),
    (0x10040, b"_BHRfS_M", FILE_SYSTEM.format("btrfs")),
)
# These are so short that a firmware image may have them by chance, so they are looked for last.
WEAK_MAGICS = (
    (0, b"\x1f\x9d", COMPRESSED.format("compress", "gzip -dc")),
    (0, b"\x5d\0\0", COMPRESSED.format("lzma", "xz -dc")),
    (1080, b"\x53\xef", FILE_SYSTEM.format("ext4")),
    (510, b"\x55\xaa", DISK.format("boot sector")),
)
HEAD_BYTES = 0x10040 + 8

# An EFI program (PE/COFF): the offset of its PE header, the header, and its sections
MZ = b"MZ"
ZBOOT_AT, ZBOOT_MAGIC = 4, b"zimg"
PE_OFFSET_AT = 0x3C
PE_OFFSET = Struct("<I")
PE_HEADER = Struct("<4sHH12xHH")  # magic, machine, sections, size of the optional header, flags
PE_SECTION_BYTES = 40
PE_SECTIONS_MAX = 96
UNIFIED_SECTION = b".linux\0\0"

# Multiboot, versions 1 and 2: the magic number, the header, and the size of the area that has the header.  The sum of
# the header's words is 0.
MULTIBOOT = ((0x1BADB002, Struct("<3I"), 8192), (0xE85250D6, Struct("<4I"), 32768))

PT_TLS = 7
PT_GNU_RELRO = 0x6474E552
OSABI_NETBSD = 2
OSABI_FREEBSD = 9
NT_GNU_ABI_TAG = 1
NO_ENTRY = "has no PVH note, which tells where an ELF kernel is entered"


def by_magic(image: "Image") -> str | None:
    """Return the kind of a file by unambiguous magic numbers, and the file to give instead; None if unknown."""
    head = image.read(0, min(image.size, HEAD_BYTES), "its beginning")
    if head.startswith(MZ) and (what := _efi_program(head)):
        return what
    return _lookup(head, MAGICS)


def by_weak_magic(image: "Image") -> str | None:
    """Return the same as `by_magic`, by magic numbers that a file may have by chance."""
    return _lookup(image.read(0, min(image.size, HEAD_BYTES), "its beginning"), WEAK_MAGICS)


def _lookup(head: bytes, magics: tuple[tuple[int, bytes, str], ...]) -> str | None:
    for offset, magic, what in magics:
        if head.startswith(magic, offset):
            return what
    return None


def _efi_program(head: bytes) -> str | None:
    """Return what kind of EFI program this is, or None if it is not an EFI program."""
    if head.startswith(ZBOOT_MAGIC, ZBOOT_AT):
        return ZBOOT
    if len(head) < PE_OFFSET_AT + PE_OFFSET.size:
        return None
    (at,) = PE_OFFSET.unpack_from(head, PE_OFFSET_AT)
    if at + PE_HEADER.size > len(head):
        return None
    magic, _machine, sections, optional_bytes, _flags = PE_HEADER.unpack_from(head, at)
    if magic != b"PE\0\0":
        return None
    if _lookup(head, MAGICS) is not None:
        return None  # a Linux kernel for another machine, whose message in MAGICS is better
    first = at + PE_HEADER.size + optional_bytes
    for index in range(min(sections, PE_SECTIONS_MAX)):
        if head.startswith(UNIFIED_SECTION, first + index * PE_SECTION_BYTES):
            return UNIFIED
    return EFI_PROGRAM


def elf_file(file: "Elf", notes: "Notes", damage: str) -> str:
    """Return why an ELF file that cannot be booted is refused, and what to give instead.

    `damage` says what is wrong with its notes, if anything.
    """
    kinds = {part.type for part in file.segments}
    tagged = any(note.name == b"GNU" and note.type == NT_GNU_ABI_TAG for note in notes.found)
    bsd = {b"FreeBSD": "FreeBSD", b"NetBSD": "NetBSD"}
    system = next((bsd[note.name] for note in notes.found if note.name in bsd), "")
    system = system or {OSABI_FREEBSD: "FreeBSD", OSABI_NETBSD: "NetBSD"}.get(file.osabi, "")
    if system:
        return f"{NO_ENTRY}: start {system} by firmware, from its disk or CD"
    if tagged or elf.PT_INTERP in kinds:
        return f"is a user program, not a kernel: it {NO_ENTRY}"
    if _is_multiboot(file):
        return f"is a Multiboot kernel and {NO_ENTRY}: add one, or start it by GRUB from a disk or CD"
    if kinds & {elf.PT_DYNAMIC, PT_TLS, PT_GNU_RELRO}:
        return f"{NO_ENTRY}, and looks like a user program: give a kernel"
    because = f" ({damage})" if damage else ""
    return f"{NO_ENTRY}{because}: build Linux with CONFIG_PVH=y, or give its bzImage"


def _is_multiboot(file: "Elf") -> bool:
    """Return whether the file has a Multiboot header in the area in which boot loaders look for it."""
    image = file.image
    for magic, header, limit in MULTIBOOT:
        head = image.read(0, min(image.size, limit), "its beginning")
        for at in range(0, len(head) - header.size + 1, 4):
            words = header.unpack_from(head, at)
            if words[0] == magic and sum(words) % (1 << 32) == 0:
                return True
    return False
