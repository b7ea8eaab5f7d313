"""Loads ELF kernels with a PVH note: Linux vmlinux, FreeBSD, unikernels (Xen, docs/misc/pvh.pandoc)."""

from struct import Struct

from vmd.vm import layout
from vmd.vm.boot import elf, placement
from vmd.vm.boot.placement import Placement
from vmd.vm.boot.start import (
    CR0_ET,
    CR0_PE,
    RFLAGS_CLEAR,
    Boot,
    Mode,
    Start,
    code32,
    data32,
    descriptor_table,
    flat_segments,
    task,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.vm.boot.elf import Elf, Note, Notes
    from vmd.vm.boot.start import Memory

XEN_ELFNOTE_PHYS32_ENTRY = 18
ENTRY_BYTES = (4, 8)  # both sizes are in use, in 32-bit and in 64-bit files

# Xen, public/arch-x86/hvm/start_info.h, version 1
HVM_START_INFO = Struct("<IIIIQQQQII")
HVM_MODLIST_ENTRY = Struct("<QQQQ")
HVM_MEMMAP_TABLE_ENTRY = Struct("<QQII")
XEN_HVM_START_MAGIC_VALUE = 0x336EC578
START_INFO_VERSION = 1

PVH_CS = 0x08
PVH_DS = 0x10
PVH_TSS = 0x18


def find_entry(notes: "Notes") -> int | None:
    """Return the entry address in the first usable PVH note, or None if there is no such note."""
    for note in _pvh_notes(notes):
        entry = int.from_bytes(note.desc, "little")
        if len(note.desc) in ENTRY_BYTES and entry < layout.FOUR_GIB:
            return entry
    return None


def damage(notes: "Notes") -> str:
    """Return why there is no usable PVH note, if there is a damaged one; else ""."""
    for note in _pvh_notes(notes):
        return f"has a damaged PVH note: {note.desc[:16].hex()} is no 32-bit address"
    return notes.damage


def _pvh_notes(notes: "Notes") -> "list[Note]":
    return [note for note in notes.found if note.name == b"Xen" and note.type == XEN_ELFNOTE_PHYS32_ENTRY]


def load(memory: "Memory", file: "Elf", entry: int, boot: Boot) -> Start:
    """Load an ELF kernel that starts at `entry` by the PVH protocol.

    Raises:
        ImageError: the kernel is damaged, or the guest has too little memory.
        HostError: a file cannot be read.
    """
    space = Placement(file.image.name, boot.memory_bytes)
    parts = elf.loadable(file)
    elf.check_entry(file, parts, entry, _physical)
    elf.load_segments(memory, file, parts, space, _physical)
    placement.store_cmdline(memory, file.image.name, boot.cmdline, placement.CMDLINE_MAX)
    initrd: tuple[int, int] | None = None
    if boot.initrd is not None:
        # Below 4 GiB, because Linux copies the address into a field of 32 bits.
        gpa = placement.load_initrd(memory, space, boot.initrd, layout.FOUR_GIB)
        initrd = (gpa, boot.initrd.size)
    memory.write(layout.PVH_START_INFO, _start_info(boot, initrd))
    code, data, tss = code32(PVH_CS), data32(PVH_DS), task(PVH_TSS)
    gdt = descriptor_table(code, data, tss)
    memory.write(layout.BOOT_GDT, gdt)
    return Start(
        text=f"{'64' if file.is64 else '32'}-bit ELF kernel with PVH entry {entry:#x}",
        mode=Mode.PROTECTED32,
        registers={"rip": entry, "rbx": layout.PVH_START_INFO, "rflags": RFLAGS_CLEAR},
        cr0=CR0_ET | CR0_PE,
        gdt_base=layout.BOOT_GDT,
        gdt_limit=len(gdt) - 1,
        idt_base=layout.BOOT_IDT,
        segments=flat_segments(code, data, tss),
    )


def _physical(paddr: int) -> int:
    """Return the address: PVH kernels have physical addresses in their program headers."""
    return paddr


def _start_info(boot: Boot, initrd: tuple[int, int] | None) -> bytes:
    """Return hvm_start_info, followed by the module list and the memory map to which it points."""
    modlist_at = layout.PVH_START_INFO + HVM_START_INFO.size
    modules = b"" if initrd is None else HVM_MODLIST_ENTRY.pack(*initrd, 0, 0)
    memmap_at = modlist_at + len(modules)
    memmap = [
        HVM_MEMMAP_TABLE_ENTRY.pack(start, size, kind, 0) for start, size, kind in layout.e820_map(boot.memory_bytes)
    ]
    info = HVM_START_INFO.pack(
        XEN_HVM_START_MAGIC_VALUE,
        START_INFO_VERSION,
        0,  # no flags: this is neither dom0 nor a stub domain
        len(modules) // HVM_MODLIST_ENTRY.size,
        modlist_at if modules else 0,
        layout.BOOT_CMDLINE,
        boot.rsdp_gpa,
        memmap_at,
        len(memmap),
        0,
    )
    return info + modules + b"".join(memmap)
