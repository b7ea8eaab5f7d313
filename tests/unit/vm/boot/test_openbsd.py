"""OpenBSD kernels, and the data that boot(8) would prepare for them."""

import struct

import pytest

from tests.unit.vm.boot.samples import (
    LINES,
    OPENBSD_START,
    STRINGS,
    SYMBOLS,
    FakeMemory,
    Named,
    Part,
    elf_file,
    load,
    note,
    openbsd,
    pvh,
)
from vmd.errors import ImageError
from vmd.vm import layout
from vmd.vm.boot.start import Mode, Start

IMAGE_END = OPENBSD_START + 0x2003


def arguments(memory: FakeMemory, start: Start) -> dict[int, bytes]:
    """Return the boot arguments.  Like the kernel, find them by its stack, and go from one to the next."""
    _return, _howto, _bootdev, _api, _end, _extmem, _basemem, size, at = memory.unpack("<9I", start.registers["rsp"])
    raw = memory.read(at, size)
    found = {}
    offset = 0
    while struct.unpack_from("<I", raw, offset) != (0xFFFFFFFF,):
        kind, length, _next = struct.unpack_from("<III", raw, offset)
        found[kind] = raw[offset + 12 : offset + length]
        offset += length
    assert offset + 4 == size
    return found


def symbol_end(memory: FakeMemory, start: Start) -> int:
    """Return the end of kernel and symbols from the stack."""
    return memory.unpack("<9I", start.registers["rsp"])[4]


def test_segments_are_loaded_at_their_physical_addresses() -> None:
    """Text, data and the cleared bss are at low physical addresses, although they are linked high."""
    memory = FakeMemory()
    memory.write(OPENBSD_START + 0x1200, b"\xaa" * 0xE03)

    load(memory, openbsd())

    assert memory.read(OPENBSD_START, 0x900) == b"\xf4" * 0x900
    assert memory.read(OPENBSD_START + 0x1000, 0x100) == b"data" * 0x40
    assert memory.read(OPENBSD_START + 0x1200, 0xE03) == bytes(0xE03)


def test_kernel_linked_high_without_physical_addresses_is_loaded_low() -> None:
    """Old i386 kernels have their virtual address in p_paddr.  boot(8) masks it."""
    memory = FakeMemory()
    kernel = elf_file([Part(1, 0xD0200000, b"\xf4" * 64)], entry=0xD0200000, is64=False)

    start = load(memory, kernel)

    assert memory.read(0x200000, 64) == b"\xf4" * 64
    assert start.registers["rip"] == 0x200000


def test_amd64_starts_in_compatibility_mode_with_1_gib_mapped() -> None:
    """The kernel starts with 32-bit code while long mode is active (*cat. 5.2*)."""
    memory = FakeMemory()

    start = load(memory, openbsd())

    assert start.mode is Mode.COMPAT32
    assert start.registers["rip"] == OPENBSD_START + 0x20
    assert (start.cr0, start.cr3, start.cr4, start.efer) == (0x80000011, 0x11000, 0x30, 0x500)
    assert memory.unpack("<2Q", 0x11000) == (0x12003, 0)
    assert memory.unpack("<2Q", 0x12000) == (0x13003, 0)
    assert memory.unpack("<512Q", 0x13000) == tuple(page << 21 | 0x83 for page in range(512))
    cs, ds = start.segments["cs"], start.segments["ds"]
    assert (cs.selector, cs.l, cs.db, cs.limit) == (8, 0, 1, 0xFFFFFFFF)
    assert ds.selector == 0x10
    assert start.gdt_base == 0x10000
    assert memory.unpack("<3Q", 0x10000) == (0, cs.descriptor(), ds.descriptor())


def test_i386_starts_paged_with_4_mib_pages() -> None:
    """One page directory maps all 4 GiB, without long mode."""
    memory = FakeMemory()

    start = load(memory, openbsd(is64=False))

    assert start.mode is Mode.PAGED32
    assert start.text == "OpenBSD/i386 kernel"
    assert (start.cr0, start.cr3, start.cr4, start.efer) == (0x80000011, 0x12000, 0x10, 0)
    assert memory.unpack("<1024I", 0x12000) == tuple(page << 22 | 0x83 for page in range(1024))


def test_stack_has_the_arguments_of_the_kernels_first_function() -> None:
    """Above the return address are howto, bootdev, version, end, two sizes, and the boot arguments."""
    memory = FakeMemory()

    start = load(memory, openbsd())

    assert start.registers["rsp"] == 0x10000 - 36
    _return, howto, bootdev, version, end, extmem, basemem, size, at = memory.unpack("<9I", 0x10000 - 36)
    assert (howto, bootdev, version, extmem, basemem, at) == (0, 0xA0000004, 0x0E, 0, 0, 0x2000)
    assert end > IMAGE_END
    assert size == 12 + 20 * 6 + 12 + 32 + 4


@pytest.mark.parametrize(("options", "howto"), [
    ("a", 0x001), ("s", 0x002), ("d", 0x040), ("c", 0x400), ("sd", 0x042), ("ss", 0x002), ("cdsa", 0x443), ("x", 0),
])  # fmt: skip
def test_options_of_boot_are_passed_on(options: str, howto: int) -> None:
    """Each letter sets its bit (sys/reboot.h).  Others are ignored, as by boot(8)."""
    memory = FakeMemory()
    start = load(memory, openbsd(), options=options)
    assert memory.unpack("<9I", start.registers["rsp"])[1] == howto


def test_boot_arguments_are_memory_map_and_console() -> None:
    """The map is that of the layout with an empty last entry.  The console is com0 at 115200 baud."""
    memory = FakeMemory()

    found = arguments(memory, load(memory, openbsd()))

    assert sorted(found) == [0, 5]
    entries = list(struct.iter_unpack("<QQI", found[0]))
    assert entries == [*layout.e820_map(memory.memory_bytes), (0, 0, 0)]
    assert struct.unpack("<iiQiIii", found[5]) == (0x800, 115200, 0x3F8, 0, 0, 0, 0)


def test_boot_mac_is_passed_if_the_boot_device_is_the_network() -> None:
    """It is the address of the first NIC, padded to words."""
    memory = FakeMemory()

    found = arguments(memory, load(memory, openbsd(), bootmac=b"\xfe\xe1\xba\xd0\x00\x01"))

    assert found[7] == b"\xfe\xe1\xba\xd0\x00\x01\0\0"


@pytest.mark.parametrize(("is64", "unit"), [(True, 8), (False, 4)])
def test_symbols_follow_the_image_after_an_elf_header(is64: bool, unit: int) -> None:
    """ddb(4) finds section headers and symbols by offsets from the copied ELF header."""
    memory = FakeMemory()

    start = load(memory, openbsd(is64=is64))

    header_at = -(-IMAGE_END // unit) * unit
    ehdr, shdr = ("<16sHHIQQQIHHHHHH", "<IIQQQQIIQQ") if is64 else ("<16sHHIIIIIHHHHHH", "<IIIIIIIIII")
    fields = memory.unpack(ehdr, header_at)
    phoff, shoff, phentsize, phnum, shnum = fields[5], fields[6], fields[9], fields[10], fields[12]
    assert (phoff, shoff, phentsize, phnum, shnum) == (0, struct.calcsize(ehdr), 0, 0, 7)
    headers = [memory.unpack(shdr, header_at + shoff + index * struct.calcsize(shdr)) for index in range(shnum)]
    loaded = [memory.read(header_at + header[4], header[5]) for header in headers if header[2] & 2]
    assert loaded[:3] == [SYMBOLS, STRINGS, LINES]
    assert loaded[3].startswith(b"\0.text\0.symtab")
    assert len(loaded) == 4
    assert all(header[4] % unit == 0 for header in headers if header[2] & 2)
    assert symbol_end(memory, start) == header_at + headers[6][4] + -(-headers[6][5] // unit) * unit


def test_a_section_without_bytes_in_the_file_is_no_symbol() -> None:
    """strip(1) leaves such a section in the place of debugging information.  Its offset may be anywhere."""
    kernel = bytearray(openbsd())
    (table,) = struct.unpack_from("<Q", kernel, 40)
    section = table + 4 * 64  # .debug_line
    assert struct.unpack_from("<I", kernel, section + 4) == (1,)
    struct.pack_into("<I", kernel, section + 4, 8)  # SHT_NOBITS
    struct.pack_into("<Q", kernel, section + 24, 1 << 40)
    memory = FakeMemory()

    load(memory, bytes(kernel))

    headers_at = -(-IMAGE_END // 8) * 8 + 64
    loaded = [memory.unpack("<Q", headers_at + 64 * index + 8)[0] & 2 for index in range(7)]
    assert loaded == [0, 0, 2, 2, 0, 0, 2]  # symbols, their names and the names of sections


def test_stripped_kernel_gets_the_header_only() -> None:
    """The copied ELF header shows that there are no sections."""
    memory = FakeMemory()

    start = load(memory, openbsd(stripped=True))

    header_at = -(-IMAGE_END // 8) * 8
    assert memory.read(header_at, 4) == b"\x7fELF"
    assert symbol_end(memory, start) == header_at + 64


def test_random_segment_differs_from_boot_to_boot() -> None:
    """PT_OPENBSD_RANDOMIZE is filled, and the bytes around it are not."""
    first, second = FakeMemory(), FakeMemory()

    load(first, openbsd())
    load(second, openbsd())

    at = OPENBSD_START + 0x1100
    assert first.read(at, 0x40) != second.read(at, 0x40)
    assert first.read(at, 0x40) != b"data" * 16
    assert first.read(at - 4, 4) == first.read(at + 0x40, 4) == b"data"


@pytest.mark.parametrize("paddr", [0x1000, OPENBSD_START + 0x1FC4, 0x800000, 0xF000000])
def test_random_segment_outside_the_image_is_refused(paddr: int) -> None:
    """hostile 54: random bytes are stored only in loaded segments."""
    with pytest.raises(ImageError, match=r"has random data at .* outside of all its segments"):
        load(FakeMemory(), openbsd(extra=[Part(0x65A3DBE6, paddr, bytes(0x40))]))


@pytest.mark.parametrize("paddr", [OPENBSD_START, OPENBSD_START + 0x1000, IMAGE_END - 0x40])
def test_random_segment_may_begin_and_end_with_its_segment(paddr: int) -> None:
    """It is filled with random bytes then, too."""
    plain, filled = FakeMemory(), FakeMemory()
    load(plain, openbsd())
    load(filled, openbsd(extra=[Part(0x65A3DBE6, paddr, bytes(0x40))]))
    assert filled.read(paddr, 0x40) != plain.read(paddr, 0x40)


def test_the_largest_number_of_random_bytes() -> None:
    """It is the sum of all such segments."""
    sizes = 8 << 20, (8 << 20) - 0x40  # the kernel itself asks for 40h
    random = [Part(0x65A3DBE6, 0x400000, bytes(size)) for size in sizes]
    parts = [Part(1, 0x400000, b"", memsz=8 << 20), *random]
    assert load(FakeMemory(), openbsd(extra=parts)).text == "OpenBSD/amd64 kernel"


def test_random_bytes_are_bounded() -> None:
    """hostile 54: several headers ask for the same memory."""
    huge = [Part(1, 0x400000, b"", memsz=9 << 20), *[Part(0x65A3DBE6, 0x400000, bytes(9 << 20))] * 2]

    with pytest.raises(ImageError, match="asks for more than 16777216 random bytes"):
        load(FakeMemory(), openbsd(extra=huge))


def test_symbols_that_are_not_in_the_file_are_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    """hostile 54: a section is longer than the file.  The kernel is loaded without its symbols."""
    kernel = bytearray(openbsd())
    section_2 = struct.unpack_from("<Q", kernel, 40)[0] + 2 * 64
    struct.pack_into("<Q", kernel, section_2 + 32, 1 << 40)
    memory = FakeMemory()

    start = load(memory, bytes(kernel))

    assert symbol_end(memory, start) == -(-IMAGE_END // 8) * 8 + 64
    assert "/bsd: is truncated: section 2" in capfd.readouterr().err


def test_symbols_beyond_guest_memory_are_refused() -> None:
    """The kernel fills the guest, so its symbols have no room."""
    kernel = openbsd(extra=[Part(1, 0x400000, b"", memsz=(12 << 20) - 64)])

    with pytest.raises(ImageError, match=r"the symbol table at .* needs a guest of 17 MiB"):
        load(FakeMemory(), kernel)


def test_note_alone_identifies_an_openbsd_kernel() -> None:
    """.note.openbsd.ident is enough.  The entry is checked after that."""
    kernel = elf_file([Part(1, 0x200000, b"\xf4" * 64), Part(4, 0, note(b"OpenBSD", 1, bytes(4)))], entry=0x300000)

    with pytest.raises(ImageError, match="starts at 0x300000, outside of all its segments"):
        load(FakeMemory(), kernel)


TEXT = Part(1, 0x200000, b"\xf4" * 64)
RANDOM = Part(0x65A3DBE6, 0x200000, bytes(8))

# The segments, sections and entry of an OpenBSD kernel, by the feature that identifies it
MARKS = {
    "mutable data": ([TEXT, Part(0x65A3DBE5, 0x200000, bytes(8))], [], 0x200000),
    "random data": ([TEXT, RANDOM], [], 0x200000),
    "boot data": ([TEXT, Part(0x65A41BE6, 0x200000, bytes(8))], [], 0x200000),
    "a note": ([TEXT, Part(4, 0, note(b"OpenBSD", 1, bytes(4)))], [], 0x200000),
    "a note section": ([TEXT], [Named(b".note", 7, note(b"OpenBSD", 1, bytes(4)))], 0x200000),
    "the name of a section": ([TEXT], [Named(b".openbsd.randomdata", 1, bytes(8))], 0x200000),
    "the name of its note's section": ([TEXT], [Named(b".note.openbsd.ident", 1, bytes(8))], 0x200000),
}


@pytest.mark.parametrize("is64", [True, False])
@pytest.mark.parametrize("case", MARKS)
def test_openbsd_kernel_is_identified(case: str, is64: bool) -> None:
    """A segment, a note or a section that only OpenBSD has identifies it."""
    parts, sections, entry = MARKS[case]

    start = load(FakeMemory(), elf_file(parts, entry=entry, sections=sections, is64=is64))

    assert start.text == f"OpenBSD/{'amd64' if is64 else 'i386'} kernel"


NOT_OPENBSD = {
    "Linux, entered at its physical address": ([Part(1, 0x1000000, b"\xf4" * 64, vaddr=0xFFFFFFFF81000000)], 0x1000000),
    "a kernel linked high on amd64": ([Part(1, 0x200000, b"\xf4" * 64)], 0xFFFFFFFF80200000),
    "a segment before those of OpenBSD": ([TEXT, Part(0x65A3DBE4, 0x200000, bytes(8))], 0x200000),
    "a segment after those of OpenBSD": ([TEXT, Part(0x65A41BE7, 0x200000, bytes(8))], 0x200000),
    "a program of OpenBSD": ([TEXT, RANDOM, Part(3, 0, b"/usr/libexec/ld.so\0")], 0x200000),
    "a static program of OpenBSD": ([TEXT, RANDOM, Part(2, 0, bytes(16))], 0x200000),
    "Linux on i386": ([Part(1, 0x1000000, b"\xf4" * 64, vaddr=0xC1000000)], 0xC1000000),
}


@pytest.mark.parametrize("cmdline", [b"", b"console=ttyS0"])
@pytest.mark.parametrize("case", NOT_OPENBSD)
def test_other_kernels_are_not_taken_for_openbsd(case: str, cmdline: bytes) -> None:
    """The error names the missing PVH note, with and without a command line."""
    parts, entry = NOT_OPENBSD[case]

    with pytest.raises(ImageError, match=r"has no PVH note, which tells where an ELF kernel is entered"):
        load(FakeMemory(), elf_file(parts, entry=entry, is64="i386" not in case), cmdline=cmdline)


def test_pvh_note_has_precedence() -> None:
    """A kernel with both gets more information by the newer protocol."""
    assert load(FakeMemory(), pvh(extra=[Part(4, 0, note(b"OpenBSD", 1, bytes(4)))])).mode is Mode.PROTECTED32


def test_initrd_and_cmdline_are_refused() -> None:
    """boot(8) passes neither."""
    with pytest.raises(ImageError, match="/bsd: is an OpenBSD kernel, which takes no initrd"):
        load(FakeMemory(), openbsd(), initrd=b"x")
    with pytest.raises(ImageError, match="/bsd: is an OpenBSD kernel, which takes no command line"):
        load(FakeMemory(), openbsd(), cmdline=b"-s")
