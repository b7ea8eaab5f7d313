"""ELF kernels: their headers, notes and loadable segments (System V ABI, chapters 4 and 5)."""

from struct import Struct

from vmd.record import Record
from vmd.vm.boot import placement

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.vm.boot.image import Image
    from vmd.vm.boot.placement import Placement
    from vmd.vm.boot.start import Memory

CLASS_32 = 1
CLASS_64 = 2
LITTLE_ENDIAN = 1
ET_EXEC = 2
ET_DYN = 3
EM_386 = 3
EM_X86_64 = 62

PT_LOAD = 1
PT_NOTE = 4
SHT_NOTE = 7
SHT_NOBITS = 8

IDENT = Struct("<4sBBB9x")
EHDR32 = Struct("<16sHHIIIIIHHHHHH")
EHDR64 = Struct("<16sHHIQQQIHHHHHH")
PHDR32 = Struct("<IIIIIIII")
PHDR64 = Struct("<IIQQQQQQ")
SHDR32 = Struct("<IIIIIIIIII")
SHDR64 = Struct("<IIQQQQIIQQ")
NHDR = Struct("<III")

# Real kernels have about ten segments and a hundred sections; what exceeds these is not one.
SEGMENTS_MAX = 128
SECTIONS_MAX = 4096
NOTES_MAX_BYTES = 1 << 20


class Segment(Record):
    """A program header."""

    index: int
    type: int
    flags: int
    offset: int
    paddr: int
    filesz: int
    memsz: int
    align: int


class Section(Record):
    """A section header, whole, because an OpenBSD kernel gets its own back."""

    name: int
    type: int
    flags: int
    addr: int
    offset: int
    size: int
    link: int
    info: int
    addralign: int
    entsize: int


class Note(Record):
    """One entry of a note segment or section."""

    name: bytes
    type: int
    desc: bytes


class Elf(Record):
    """The checked header of an x86 executable."""

    image: "Image"
    header: bytes
    is64: bool
    type: int
    entry: int
    segments: tuple[Segment, ...]
    shoff: int
    shentsize: int
    shnum: int
    shstrndx: int


def parse(image: "Image") -> Elf:
    """Read the ELF header and the program headers.

    Raises:
        ImageError: they are damaged, or this is no x86 executable.
    """
    _magic, elf_class, encoding, _version = IDENT.unpack(image.read(0, IDENT.size, "the ELF header"))
    if elf_class not in (CLASS_32, CLASS_64) or encoding != LITTLE_ENDIAN:
        raise image.error(f"is an ELF file of class {elf_class} and byte order {encoding}, not of x86")
    is64 = elf_class == CLASS_64
    ehdr, phdr = (EHDR64, PHDR64) if is64 else (EHDR32, PHDR32)
    header = image.read(0, ehdr.size, "the ELF header")
    (
        _ident, elf_type, machine, _e_version, entry, phoff, shoff, _flags, _ehsize,
        phentsize, phnum, shentsize, shnum, shstrndx,
    ) = ehdr.unpack(header)  # fmt: skip
    if machine != (EM_X86_64 if is64 else EM_386):
        raise image.error(f"is an ELF file for machine {machine}, not for x86")
    if elf_type not in (ET_EXEC, ET_DYN):
        raise image.error(f"is an ELF file of type {elf_type}, not an executable")
    if phentsize != phdr.size:
        raise image.error(f"has program headers of {phentsize} bytes, not {phdr.size}")
    if not 1 <= phnum <= SEGMENTS_MAX:
        raise image.error(f"has {phnum} program headers, a kernel has 1 to {SEGMENTS_MAX}")
    table = image.read(phoff, phnum * phdr.size, "the table of program headers")
    return Elf(
        image=image,
        header=header,
        is64=is64,
        type=elf_type,
        entry=entry,
        segments=tuple(_segment(index, is64, fields) for index, fields in enumerate(phdr.iter_unpack(table))),
        shoff=shoff,
        shentsize=shentsize,
        shnum=shnum,
        shstrndx=shstrndx,
    )


def _segment(index: int, is64: bool, fields: tuple[int, ...]) -> Segment:
    """Return a program header; the two classes order its fields differently."""
    if is64:
        kind, flags, offset, _vaddr, paddr, filesz, memsz, align = fields
    else:
        kind, offset, _vaddr, paddr, filesz, memsz, flags, align = fields
    return Segment(
        index=index,
        type=kind,
        flags=flags,
        offset=offset,
        paddr=paddr,
        filesz=filesz,
        memsz=memsz,
        align=align,
    )


def sections(elf: Elf) -> list[Section]:
    """Return the section headers; a stripped file may have none.

    Raises:
        ImageError: the table is damaged.
    """
    shdr = SHDR64 if elf.is64 else SHDR32
    if elf.shnum == 0:
        return []
    if elf.shentsize != shdr.size:
        raise elf.image.error(f"has section headers of {elf.shentsize} bytes, not {shdr.size}")
    if elf.shnum > SECTIONS_MAX:
        raise elf.image.error(f"has {elf.shnum} sections, a kernel has at most {SECTIONS_MAX}")
    table = elf.image.read(elf.shoff, elf.shnum * shdr.size, "the table of section headers")
    names = tuple(Section.fields)
    return [Section(**dict(zip(names, fields, strict=True))) for fields in shdr.iter_unpack(table)]


def notes(elf: Elf) -> list[Note]:
    """Return all notes: those of note segments, or without such a segment those of note sections.

    Raises:
        ImageError: a note is damaged.
    """
    places = [(part.offset, part.filesz, part.align) for part in elf.segments if part.type == PT_NOTE]
    if not places:
        places = [(part.offset, part.size, part.addralign) for part in sections(elf) if part.type == SHT_NOTE]
    found: list[Note] = []
    budget = NOTES_MAX_BYTES
    for offset, size, align in places:
        budget -= size
        if budget < 0:
            raise elf.image.error(f"has more than {NOTES_MAX_BYTES} bytes of notes")
        found += _parse_notes(elf, elf.image.read(offset, size, "its notes"), 8 if align == 8 else 4)
    return found


def _parse_notes(elf: Elf, data: bytes, align: int) -> list[Note]:
    """Return the notes in `data`; each one takes at least its header, so this ends."""
    found = []
    offset = 0
    while offset + NHDR.size <= len(data):
        namesz, descsz, kind = NHDR.unpack_from(data, offset)
        name_at = offset + NHDR.size
        desc_at = placement.round_up(name_at + namesz, align)
        if desc_at + descsz > len(data):
            raise elf.image.error(
                f"has a damaged note: name of {namesz} and content of {descsz} bytes in {len(data) - offset}"
            )
        name = data[name_at : name_at + namesz].rstrip(b"\0")
        found.append(Note(name=name, type=kind, desc=data[desc_at : desc_at + descsz]))
        offset = placement.round_up(desc_at + descsz, align)
    return found


def loadable(elf: Elf) -> list[Segment]:
    """Return the segments that take memory.

    Raises:
        ImageError: there are none, or one of them has more bytes in the file than in memory.
    """
    parts = [part for part in elf.segments if part.type == PT_LOAD and (part.memsz or part.filesz)]
    if not parts:
        raise elf.image.error("has no segment to load")
    for part in parts:
        if part.filesz > part.memsz:
            raise elf.image.error(
                f"has {part.filesz} bytes in segment {part.index}, which takes {part.memsz} in memory"
            )
        elf.image.check_range(part.offset, part.filesz, f"segment {part.index}")
    return parts


def load_segments(
    memory: "Memory", elf: Elf, parts: list[Segment], space: "Placement", physical: "Callable[[int], int]"
) -> int:
    """Load `parts` where `physical` maps their addresses, and return the end of the highest.

    Raises:
        ImageError: a segment does not lie in free guest RAM; memory is untouched then.
    """
    for part in parts:
        space.claim(physical(part.paddr), part.memsz, f"segment {part.index}")
    for part in parts:
        gpa = physical(part.paddr)
        if part.filesz:
            elf.image.read_into(memory.view(gpa, part.filesz), part.offset, f"segment {part.index}")
        placement.clear(memory, gpa + part.filesz, part.memsz - part.filesz)
    return max(physical(part.paddr) + part.memsz for part in parts)


def check_entry(elf: Elf, parts: list[Segment], entry: int, physical: "Callable[[int], int]") -> None:
    """Raise ImageError unless the first instruction lies in a loaded segment."""
    if not any(0 <= entry - physical(part.paddr) < part.memsz for part in parts):
        raise elf.image.error(f"starts at {entry:#x}, outside of all its segments")
