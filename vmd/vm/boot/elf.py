"""ELF kernels: reads headers and notes, and loads segments (System V ABI, chapters 4 and 5)."""

from struct import Struct

from vmd.errors import ImageError
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
PT_DYNAMIC = 2
PT_INTERP = 3
PT_NOTE = 4
PN_XNUM = 0xFFFF  # the number of program headers is in the first section header
SHT_NOTE = 7
SHT_NOBITS = 8

MACHINES = {
    8: "mips", 20: "powerpc", 21: "powerpc64", 22: "s390", 40: "arm", 183: "arm64", 243: "riscv", 258: "loongarch",
}  # fmt: skip

IDENT = Struct("<4sBBBB8x")
EHDR32 = Struct("<16sHHIIIIIHHHHHH")
EHDR64 = Struct("<16sHHIQQQIHHHHHH")
PHDR32 = Struct("<IIIIIIII")
PHDR64 = Struct("<IIQQQQQQ")
SHDR32 = Struct("<IIIIIIIIII")
SHDR64 = Struct("<IIQQQQIIQQ")
NHDR = Struct("<III")

# Real kernels have about ten segments and a hundred sections.  A file that exceeds these bounds is refused.
SEGMENTS_MAX = 128
SECTIONS_MAX = 4096
NOTES_MAX_BYTES = 1 << 20
NOTE_PADDINGS = (4, 8)  # p_align does not tell which: linkers merge notes of both paddings into one segment of 8
NAMES_MAX_BYTES = 1 << 20


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
    """A section header with all its fields, because an OpenBSD kernel gets a copy of its section headers."""

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


class Notes(Record):
    """The notes of a file.  `damage` says why some notes could not be read; it is empty if all could."""

    found: tuple[Note, ...]
    damage: str


class Elf(Record):
    """The checked header of an x86 executable."""

    image: "Image"
    header: bytes
    is64: bool
    osabi: int
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
        ImageError: the headers are damaged, or this is not an x86 executable.
    """
    _magic, elf_class, encoding, _version, osabi = IDENT.unpack(image.read(0, IDENT.size, "the ELF header"))
    if elf_class not in (CLASS_32, CLASS_64) or encoding != LITTLE_ENDIAN:
        raise image.error(f"is an ELF file of class {elf_class} and byte order {encoding}, not of x86")
    is64 = elf_class == CLASS_64
    ehdr, phdr = (EHDR64, PHDR64) if is64 else (EHDR32, PHDR32)
    header = image.read(0, ehdr.size, "the ELF header")
    (
        _ident, elf_type, machine, _e_version, entry, phoff, shoff, _flags, _ehsize,
        phentsize, phnum, shentsize, shnum, shstrndx,
    ) = ehdr.unpack(header)  # fmt: skip
    if machine not in (EM_386, EM_X86_64):  # an x32 kernel has class 32 and the machine of 64
        known = f" ({MACHINES[machine]})" if machine in MACHINES else ""
        raise image.error(f"is an ELF file for machine {machine}{known}, not for x86")
    if elf_type not in (ET_EXEC, ET_DYN):
        raise image.error(f"is an ELF file of type {elf_type}, not an executable")
    if phentsize < phdr.size:
        raise image.error(f"has program headers of {phentsize} bytes, not {phdr.size}")
    if phnum == PN_XNUM:
        phnum = _extended_phnum(image, is64, shoff)
    if not 1 <= phnum <= SEGMENTS_MAX:
        raise image.error(f"has {phnum} program headers, a kernel has 1 to {SEGMENTS_MAX}")
    table = _read_table(image, phdr, phoff, phnum, phentsize, "the table of program headers")
    return Elf(
        image=image,
        header=header,
        is64=is64,
        osabi=osabi,
        type=elf_type,
        entry=entry,
        segments=tuple(_segment(index, is64, fields) for index, fields in enumerate(table)),
        shoff=shoff,
        shentsize=shentsize,
        shnum=shnum,
        shstrndx=shstrndx,
    )


def _extended_phnum(image: "Image", is64: bool, shoff: int) -> int:
    """Return the number of program headers of a file that has too many for the field in its ELF header."""
    shdr = SHDR64 if is64 else SHDR32
    if shoff == 0 or shoff + shdr.size > image.size:
        return PN_XNUM
    header = Section(**dict(zip(Section.fields, shdr.unpack(image.read(shoff, shdr.size, "section 0")), strict=True)))
    return header.info


def _read_table(image: "Image", entry: Struct, offset: int, count: int, step: int, what: str) -> list[tuple[int, ...]]:
    """Return the entries of a table.  `step` is the size of an entry in the file, which may be larger than `entry`."""
    table = image.read(offset, (count - 1) * step + entry.size, what)
    return [entry.unpack_from(table, index * step) for index in range(count)]


def _segment(index: int, is64: bool, fields: tuple[int, ...]) -> Segment:
    """Return a program header.  The order of its fields depends on the class of the file."""
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
    """Return the section headers.  A stripped file may have none.

    Raises:
        ImageError: the table is damaged.
    """
    shdr = SHDR64 if elf.is64 else SHDR32
    if elf.shnum == 0:
        return []
    if elf.shentsize < shdr.size:
        raise elf.image.error(f"has section headers of {elf.shentsize} bytes, not {shdr.size}")
    if elf.shnum > SECTIONS_MAX:
        raise elf.image.error(f"has {elf.shnum} sections, a kernel has at most {SECTIONS_MAX}")
    table = _read_table(elf.image, shdr, elf.shoff, elf.shnum, elf.shentsize, "the table of section headers")
    names = tuple(Section.fields)
    return [Section(**dict(zip(names, fields, strict=True))) for fields in table]


def section_names(elf: Elf, headers: list[Section]) -> bytes:
    """Return the string table of section names.  `Section.name` is an offset into it.

    Raises:
        ImageError: there is no such table, or it is damaged.
    """
    if elf.shstrndx >= len(headers):
        raise elf.image.error(f"names its sections in section {elf.shstrndx} of {len(headers)}")
    strings = headers[elf.shstrndx]
    if strings.size > NAMES_MAX_BYTES:
        raise elf.image.error(f"has {strings.size} bytes of section names")
    return elf.image.read(strings.offset, strings.size, "the section names")


def notes(elf: Elf) -> Notes:
    """Return all notes that can be read, those of note segments first, then those of note sections.

    Notes are optional.  Damage ends the search in its segment or section, and is returned instead of raised.  Each
    segment and section is read with both paddings.  The wrong padding gives notes with meaningless names, which are
    ignored.
    """
    places = [(part.offset, part.filesz) for part in elf.segments if part.type == PT_NOTE]
    try:
        parts = sections(elf)
    except ImageError:  # without a usable table of sections, note segments still count
        parts = []
    places += [(part.offset, part.size) for part in parts if part.type == SHT_NOTE]
    found: list[Note] = []
    complaints: list[str] = []
    budget = NOTES_MAX_BYTES
    for offset, size in places:
        if size > budget:
            complaints.append(f"has more than {NOTES_MAX_BYTES} bytes of notes")
            size = budget
        budget -= size
        there = min(size, max(0, elf.image.size - offset))
        if there < size:
            complaints.append(
                f"is truncated: a note segment ends at byte {offset + size}, the file at {elf.image.size}"
            )
        if not there:
            continue
        data = elf.image.read(offset, there, "a note segment")
        damage = []
        for padding in NOTE_PADDINGS:
            some, complaint = _parse_notes(data, padding)
            found += some
            damage.append(complaint)
        if all(damage):
            complaints.append(damage[0])
    return Notes(found=tuple(found), damage=complaints[0] if complaints else "")


def _parse_notes(data: bytes, padding: int) -> tuple[list[Note], str]:
    """Return the notes in `data` up to its end or up to the first damaged note, and what is wrong with that note.

    The loop ends, because each note takes at least its header.
    """
    found: list[Note] = []
    offset = 0
    while offset + NHDR.size <= len(data):
        namesz, descsz, kind = NHDR.unpack_from(data, offset)
        name_at = offset + NHDR.size
        desc_at = placement.round_up(name_at + namesz, padding)
        if desc_at + descsz > len(data):
            left = len(data) - offset
            return found, f"has a damaged note: name of {namesz} and content of {descsz} bytes in {left}"
        name = data[name_at : name_at + namesz].rstrip(b"\0")
        found.append(Note(name=name, type=kind, desc=data[desc_at : desc_at + descsz]))
        offset = placement.round_up(desc_at + descsz, padding)
    return found, ""


def loadable(elf: Elf) -> list[Segment]:
    """Return the segments that take memory.

    Raises:
        ImageError: there are none, or a segment has more bytes in the file than in memory.
    """
    parts = [part for part in elf.segments if part.type == PT_LOAD and (part.memsz or part.filesz)]
    if not parts:
        raise elf.image.error("has no segment to load")
    for part in parts:
        if part.filesz > part.memsz:
            raise elf.image.error(
                f"has {part.filesz} bytes in segment {part.index}, which takes {part.memsz} in memory"
            )
        if part.filesz:  # a bss has no bytes in the file, and its offset may be behind the end of the file
            elf.image.check_range(part.offset, part.filesz, f"segment {part.index}")
    return parts


def load_segments(
    memory: "Memory", elf: Elf, parts: list[Segment], space: "Placement", physical: "Callable[[int], int]"
) -> int:
    """Load `parts` at the addresses to which `physical` maps theirs.  Return the highest end of a segment.

    Raises:
        ImageError: a segment is not in free guest RAM.  Then memory is unchanged.
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
    """Raise ImageError unless the first instruction is in a loaded segment."""
    if not any(0 <= entry - physical(part.paddr) < part.memsz for part in parts):
        raise elf.image.error(f"starts at {entry:#x}, outside of all its segments")
