"""Loads OpenBSD kernels, and starts them as boot(8), the second-stage boot loader, does (*cat. 5.2*, item 3).

The kernel gets boot arguments with a memory map and a console.  The stack has their address.  The symbols are behind
the image.  boot(8) has no command line and no initrd, so both are refused here.
"""

import os
from struct import Struct

from vmd.errors import ImageError
from vmd.log import log
from vmd.units import PAGE
from vmd.vm import layout
from vmd.vm.boot import elf
from vmd.vm.boot.elf import EHDR32, EHDR64, SHDR32, SHDR64
from vmd.vm.boot.placement import Placement, round_up
from vmd.vm.boot.start import (
    CR0_ET,
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    CR4_PSE,
    EFER_LMA,
    EFER_LME,
    PTE_LARGE,
    PTE_PRESENT,
    PTE_WRITE,
    RFLAGS_CLEAR,
    Boot,
    Mode,
    Start,
    code32,
    data32,
    descriptor_table,
    flat_segments,
    identity_map,
    task,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.vm.boot.elf import Elf, Notes, Section, Segment
    from vmd.vm.boot.start import Memory

ADDRESS_MASK = 0x0FFFFFFF  # makes a physical address from a kernel's virtual address, as in boot(8)
KERNBASE_32 = 0xD0000000  # of i386; Linux, FreeBSD and NetBSD have other bases

BOOTARGS_PAGE = 0x2000
STACK_PAGE = 0xF000
GDT_PAGE = 0x10000
PML4_PAGE = 0x11000  # with its PDPT at 12000 and its page directory at 13000
PAGE_DIRECTORY_32 = 0x12000
KERNEL_CS = 0x08
KERNEL_DS = 0x10

PT_OPENBSD_RANDOMIZE = 0x65A3DBE6
OPENBSD_SEGMENTS = range(0x65A3DBE5, 0x65A41BE7)  # PT_OPENBSD_MUTABLE to PT_OPENBSD_BOOTDATA
OPENBSD_SECTIONS = (b".openbsd.", b".note.openbsd.")
RANDOM_MAX_BYTES = 16 << 20
RANDOM_CHUNK = 1 << 20

SHT_SYMTAB = 2
SHT_STRTAB = 3
SHF_ALLOC = 2
SYMBOL_SECTIONS = (b".debug_line\0", b".SUNW_ctf\0")  # loaded besides symbols and strings

# sys/arch/amd64/include/biosvar.h: an argument has a type, its size with this header, and that size again
BOOTARG = Struct("<III")
BOOTARG_MEMMAP = 0
BOOTARG_CONSDEV = 5
BOOTARG_BOOTMAC = 7
BOOTARG_END = Struct("<I").pack(0xFFFFFFFF)
BIOS_MEMMAP = Struct("<QQI")
BIOS_CONSDEV = Struct("<iiQiIii")
COM0 = 8 << 8 | 0  # makedev(8, 0)
CONSOLE_BAUD = 115200

HOWTO = {"a": 0x001, "s": 0x002, "d": 0x040, "c": 0x400}  # sys/sys/reboot.h: ask for the root, single, ddb, config
BOOTARG_APIVER = 0x0E  # vector of arguments, environment, memory map in bytes
BOOTDEV_SD0A = 0xA0000000 | 4  # B_DEVMAGIC, major number of sd(4)
STACK = Struct("<8I")
RETURN_ADDRESS_BYTES = 4


def is_kernel(file: "Elf", notes: "Notes") -> bool:
    """Return whether this is an OpenBSD kernel, by segments, notes and sections that no other kernel has.

    An i386 kernel is also recognised by the base to which it is linked.  For amd64 that does not work, because Linux
    has the same base.
    """
    if any(part.type in (elf.PT_INTERP, elf.PT_DYNAMIC) for part in file.segments):
        return False  # a user program, not a kernel
    if any(part.type in OPENBSD_SEGMENTS for part in file.segments):
        return True
    if any(note.name == b"OpenBSD" for note in notes.found):
        return True
    if not file.is64 and file.entry & ~ADDRESS_MASK == KERNBASE_32:
        return True
    try:
        headers = elf.sections(file)
        names = elf.section_names(file, headers)
    except ImageError:
        return False
    return any(names.startswith(OPENBSD_SECTIONS, section.name) for section in headers)


def load(memory: "Memory", file: "Elf", boot: Boot) -> Start:
    """Load an OpenBSD kernel of either architecture with its symbols and boot arguments.

    Raises:
        ImageError: the kernel is damaged, or the guest has too little memory.
        HostError: a file cannot be read.
    """
    if boot.initrd is not None:
        raise file.image.error("is an OpenBSD kernel, which takes no initrd")
    if boot.cmdline:
        raise file.image.error("is an OpenBSD kernel, which takes no command line")
    space = Placement(file.image.name, boot.memory_bytes)
    parts = elf.loadable(file)
    entry = _physical(file.entry)
    elf.check_entry(file, parts, entry, _physical)
    end = elf.load_segments(memory, file, parts, space, _physical)
    _randomize(memory, file, parts)
    end = _load_symbols(memory, file, space, end)

    arguments = _bootargs(boot)
    memory.write(BOOTARGS_PAGE, arguments)
    stack = STACK.pack(
        sum(HOWTO.get(letter, 0) for letter in set(boot.options)),
        BOOTDEV_SD0A,
        BOOTARG_APIVER,
        end,
        0,  # extended memory: not used
        0,  # base memory: 0 means that the kernel uses the memory map
        len(arguments),
        BOOTARGS_PAGE,
    )
    stack_at = STACK_PAGE + PAGE - len(stack)
    memory.write(stack_at, stack)
    code, data = code32(KERNEL_CS), data32(KERNEL_DS)
    gdt = descriptor_table(code, data)
    memory.write(GDT_PAGE, gdt)
    if file.is64:
        memory.write(PML4_PAGE, identity_map(PML4_PAGE, 1))
        mode, cr3, cr4, efer = Mode.COMPAT32, PML4_PAGE, CR4_PAE | CR4_PSE, EFER_LME | EFER_LMA
    else:
        memory.write(PAGE_DIRECTORY_32, _page_directory_32())
        mode, cr3, cr4, efer = Mode.PAGED32, PAGE_DIRECTORY_32, CR4_PSE, 0
    return Start(
        text=f"OpenBSD/{'amd64' if file.is64 else 'i386'} kernel",
        mode=mode,
        # The kernel's entry is a 32-bit function: its arguments are on the stack, above a return address.
        registers={"rip": entry, "rsp": stack_at - RETURN_ADDRESS_BYTES, "rflags": RFLAGS_CLEAR},
        cr0=CR0_PG | CR0_ET | CR0_PE,
        cr3=cr3,
        cr4=cr4,
        efer=efer,
        gdt_base=GDT_PAGE,
        gdt_limit=len(gdt) - 1,
        segments=flat_segments(code, data, task(0)),
    )


def _physical(address: int) -> int:
    """Return the physical address at which boot(8) loads code that is linked to `address`."""
    return address & ADDRESS_MASK


def _randomize(memory: "Memory", file: "Elf", parts: "list[Segment]") -> None:
    """Fill the segments that ask for random bytes.  Each must be inside a loaded segment."""
    budget = RANDOM_MAX_BYTES
    for part in file.segments:
        if part.type != PT_OPENBSD_RANDOMIZE or part.filesz == 0:
            continue
        start = _physical(part.paddr)
        end = start + part.filesz
        if not any(_physical(p.paddr) <= start and end <= _physical(p.paddr) + p.memsz for p in parts):
            raise file.image.error(f"has random data at {start:#x}-{end:#x}, outside of all its segments")
        budget -= part.filesz
        if budget < 0:
            raise file.image.error(f"asks for more than {RANDOM_MAX_BYTES} random bytes")
        for gpa in range(start, end, RANDOM_CHUNK):
            memory.write(gpa, os.urandom(min(RANDOM_CHUNK, end - gpa)))


def _load_symbols(memory: "Memory", file: "Elf", space: Placement, end: int) -> int:
    """Put ELF header, section headers and symbols behind the image, for ddb(4).  Return the end of them.

    The copied headers describe the copy: section offsets count from the copied ELF header.  If the symbols cannot be
    read, there are none, as in a stripped kernel.
    """
    ehdr, shdr, unit = (EHDR64, SHDR64, 8) if file.is64 else (EHDR32, SHDR32, 4)
    try:
        headers = elf.sections(file)
        wanted = _symbol_sections(file, headers)
    except ImageError as error:
        log.warn(f"{error}; it is started without its symbols")
        headers, wanted = [], set()
    header_at = round_up(end, unit)
    offset = ehdr.size + round_up(len(headers) * shdr.size, unit)
    places: list[tuple[int, Section]] = []
    table = bytearray()
    for index, section in enumerate(headers):
        copy = section
        if index in wanted:
            places.append((offset, section))
            copy = section.replace(offset=offset, flags=section.flags | SHF_ALLOC)
            offset += round_up(section.size, unit)
        table += shdr.pack(*copy.as_dict().values())
    space.claim(header_at, offset, "the symbol table")

    fields = list(ehdr.unpack(file.header))
    fields[5], fields[6], fields[9], fields[10] = 0, ehdr.size, 0, 0  # phoff, shoff, phentsize, phnum
    fields[11], fields[12] = shdr.size, len(headers)  # shentsize, shnum
    if not headers:
        fields[13] = 0  # shstrndx
    memory.write(header_at, ehdr.pack(*fields) + bytes(table))
    for place, section in places:
        if section.size:
            file.image.read_into(memory.view(header_at + place, section.size), section.offset, "the symbol table")
    return header_at + offset


def _symbol_sections(file: "Elf", headers: "list[Section]") -> set[int]:
    """Return the indices of the sections to load; an empty set if there is no symbol table.

    Raises:
        ImageError: one of these sections is not in the file.
    """
    if not any(section.type == SHT_SYMTAB for section in headers):
        return set()
    names = elf.section_names(file, headers)
    wanted = {
        index
        for index, section in enumerate(headers)
        if section.type in (SHT_SYMTAB, SHT_STRTAB)
        or (section.type != elf.SHT_NOBITS and names.startswith(SYMBOL_SECTIONS, section.name))
    }
    for index in wanted:
        file.image.check_range(headers[index].offset, headers[index].size, f"section {index}")
    return wanted


def _bootargs(boot: Boot) -> bytes:
    """Return the boot arguments, each with its header."""
    memmap = [BIOS_MEMMAP.pack(*entry) for entry in layout.e820_map(boot.memory_bytes)]
    arguments = [
        (BOOTARG_MEMMAP, b"".join(memmap) + BIOS_MEMMAP.pack(0, 0, 0)),
        (BOOTARG_CONSDEV, BIOS_CONSDEV.pack(COM0, CONSOLE_BAUD, layout.PORT_COM1, 0, 0, 0, 0)),
    ]
    if boot.bootmac:
        # Padded, so that the next argument, to which the kernel steps by the size, begins at a whole word.
        arguments.append((BOOTARG_BOOTMAC, boot.bootmac.ljust(8, b"\0")))
    packed = [BOOTARG.pack(kind, BOOTARG.size + len(data), BOOTARG.size + len(data)) + data for kind, data in arguments]
    return b"".join(packed) + BOOTARG_END


def _page_directory_32() -> bytes:
    """Return a page directory that maps all 4 GiB one to one with 4 MiB pages."""
    flags = PTE_PRESENT | PTE_WRITE | PTE_LARGE
    return Struct("<1024I").pack(*[index << 22 | flags for index in range(1024)])
