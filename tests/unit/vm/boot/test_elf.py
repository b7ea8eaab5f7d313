"""Bad ELF files.  The loaders of both protocols share these checks."""

import gzip
import struct

import pytest

from tests.unit.vm.boot.samples import (
    MIB,
    PVH_ENTRY,
    FakeMemory,
    Named,
    Part,
    elf_file,
    load,
    note,
    openbsd,
    put,
    pvh,
)
from vmd.errors import ImageError
from vmd.vm import layout

PHDR = 64  # the first program header of a 64-bit file, and its fields
P_OFFSET, P_PADDR, P_FILESZ, P_MEMSZ = PHDR + 8, PHDR + 24, PHDR + 32, PHDR + 40
HUGE = (1 << 64) - 1

BAD_FIELDS = {
    "class 3": ("<B", 4, 3, "of class 3"),
    "big-endian": ("<B", 5, 2, "byte order 2"),
    "arm64": ("<H", 18, 183, "for machine 183 .arm64., not for x86"),
    "mips": ("<H", 18, 8, "for machine 8 .mips., not for x86"),
    "powerpc": ("<H", 18, 20, "for machine 20 .powerpc., not for x86"),
    "powerpc64": ("<H", 18, 21, "for machine 21 .powerpc64., not for x86"),
    "s390": ("<H", 18, 22, "for machine 22 .s390., not for x86"),
    "arm": ("<H", 18, 40, "for machine 40 .arm., not for x86"),
    "riscv": ("<H", 18, 243, "for machine 243 .riscv., not for x86"),
    "loongarch": ("<H", 18, 258, "for machine 258 .loongarch., not for x86"),
    "sparc": ("<H", 18, 2, "for machine 2, not for x86"),
    "relocatable": ("<H", 16, 1, "of type 1, not an executable"),
    "core": ("<H", 16, 4, "of type 4"),
    "phentsize 0": ("<H", 54, 0, "program headers of 0 bytes"),
    "phentsize 55": ("<H", 54, 55, "program headers of 55 bytes"),
    "phentsize 65535": ("<H", 54, 0xFFFF, "is truncated: the table of program headers"),
    "phnum 0": ("<H", 56, 0, "has 0 program headers"),
    "phnum 65535": ("<H", 56, 0xFFFF, "has 65535 program headers"),
    "phnum 128": ("<H", 56, 128, "is truncated: the table of program headers"),
    "phoff at the end": ("<Q", 32, 0x8F0, "is truncated: the table of program headers"),
    "phoff 2^64 - 1": ("<Q", 32, HUGE, "is truncated: the table of program headers"),
    "offset 2^64 - 1": ("<Q", P_OFFSET, HUGE, "is truncated: segment 0"),
    "filesz beyond the file": ("<Q", P_FILESZ, 0x1700, "is truncated: segment 0"),
    "filesz above memsz": ("<Q", P_FILESZ, 0x1801, "has 6145 bytes in segment 0, which takes 6144"),
    "filesz 2^64 - 1": ("<Q", P_FILESZ, HUGE, "which takes 6144 in memory"),
    "memsz 2^64 - 1": ("<Q", P_MEMSZ, HUGE, "segment 0 at .* does not lie in guest memory"),
    "memsz above RAM": ("<Q", P_MEMSZ, 20 * MIB, "segment 0 at .* needs a guest of 21 MiB, this one has 16"),
    "nothing to load": ("<I", PHDR, 0, "has no segment to load"),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_bad_header_is_refused(case: str) -> None:
    """hostile 54: each impossible field gives an error that names its value."""
    layout_format, offset, value, sentence = BAD_FIELDS[case]

    with pytest.raises(ImageError, match=sentence):
        load(FakeMemory(), put(pvh(), layout_format, offset, value))


PLACES = {
    "vectors": (0, "overlaps the boot data at 0x0-0x30000"),
    "GDT": (layout.BOOT_GDT, "overlaps the boot data at 0x0-0x30000"),
    "start info": (layout.PVH_START_INFO, "overlaps the boot data at 0x0-0x30000"),
    "command line": (layout.BOOT_CMDLINE + 0xF000, "overlaps the boot data at 0x0-0x30000"),
    "VGA": (0xA0000, "does not lie in guest memory"),
    "into VGA": (0x9F001, "does not lie in guest memory"),
    "ACPI tables": (layout.ACPI_TABLES, "does not lie in guest memory"),
    "end of RAM": (16 * MIB - 0x800, "needs a guest of 17 MiB"),
    "end of the largest low RAM": (0xE0000000 - 0x1000, "needs a guest of 3584 MiB, this one has 16 MiB"),
    "PCI window": (0xE0000000, "does not lie in guest memory"),
    "KVM's pages": (layout.KVM_TSS, "does not lie in guest memory"),
    "firmware": (0xFFFC0000, "does not lie in guest memory"),
    "above 4 GiB": (layout.FOUR_GIB, "does not lie in guest memory"),
    "end of the address space": (HUGE - 0x100, "does not lie in guest memory"),
}


@pytest.mark.parametrize("case", PLACES)
def test_segment_in_a_forbidden_place_is_refused(case: str) -> None:
    """hostile 54: the segment is outside RAM, in a reserved area, or over data that the loader itself stores."""
    paddr, sentence = PLACES[case]
    memory = FakeMemory(firmware_bytes=256 * 1024)
    entry_note = note(b"Xen", 18, struct.pack("<Q", paddr & 0xFFFFFFFF))
    kernel = elf_file([Part(1, 0x100000, b"\xf4" * 64), Part(1, paddr, bytes(0x1000)), Part(4, 0, entry_note)], entry=0)
    kernel = kernel.replace(entry_note, note(b"Xen", 18, struct.pack("<Q", 0x100000)))

    with pytest.raises(ImageError, match=f"segment 1 at {paddr:#x}-.*{sentence}"):
        load(memory, kernel)

    assert memory.stored == []


def test_segments_above_4_gib_are_accepted_if_there_is_memory() -> None:
    """Data may lie above 4 GiB, but not the entry."""
    memory = FakeMemory(memory_bytes=4 << 30)

    load(memory, pvh(extra=[Part(1, layout.FOUR_GIB + 0x1000, b"high")]))

    assert memory.read(layout.FOUR_GIB + 0x1000, 4) == b"high"


@pytest.mark.parametrize("paddr", [0x100000, 0x1017FF, 0xFFC01])
def test_overlapping_segments_are_refused(paddr: int) -> None:
    """hostile 54: two segments may not share a byte, not even of a bss."""
    with pytest.raises(ImageError, match=r"segment 2 at .* (overlaps segment 0|does not lie)"):
        load(FakeMemory(), pvh(extra=[Part(1, paddr, bytes(0x400))]))


def test_adjacent_segments_are_accepted() -> None:
    """One segment ends where the next one starts."""
    memory = FakeMemory()

    load(memory, pvh(extra=[Part(1, 0x101800, b"next")]))

    assert memory.read(0x1017FC, 8) == b"\0\0\0\0next"


def test_segments_may_be_adjacent_in_any_order() -> None:
    """The segment that comes later in the file ends where the earlier one begins."""
    memory = FakeMemory()

    load(memory, pvh(extra=[Part(1, 0x300000, b"high"), Part(1, 0x300000 - 4, b"low!")]))

    assert memory.read(0x300000 - 4, 8) == b"low!high"


def test_bss_is_zeroed() -> None:
    """The loader clears a bss even if the memory had other content."""
    memory = FakeMemory()
    memory.write(0x100000, b"\xaa" * 0x2000)

    load(memory, pvh())

    assert memory.read(0x100000, 0x1800) == b"\xf4" * 0x800 + bytes(0x1000)
    assert memory.read(0x101800, 0x800) == b"\xaa" * 0x800


def test_bss_larger_than_the_piece_it_is_cleared_in() -> None:
    """A bss of several MiB is cleared up to its last byte, and not beyond."""
    memory = FakeMemory()
    memory.write(4 * MIB, b"\xaa" * (4 * MIB))

    load(memory, pvh(extra=[Part(1, 4 * MIB, b"x", memsz=3 * MIB + 5)]))

    assert memory.read(4 * MIB, 3 * MIB + 6) == b"x" + bytes(3 * MIB + 4) + b"\xaa"


def test_segment_may_end_with_the_last_byte_of_memory() -> None:
    """Without a bss nothing is cleared after it."""
    memory = FakeMemory()

    load(memory, pvh(extra=[Part(1, 16 * MIB - 4, b"last")]))

    assert memory.read(16 * MIB - 4, 4) == b"last"


NOTES = {
    "name length huge": (struct.pack("<III", 0xFFFFFFFF, 4, 18) + b"Xen\0abcd", "damaged note: name of 4294967295"),
    "content length huge": (struct.pack("<III", 4, 0xFFFFFFF0, 18) + b"Xen\0", "content of 4294967280 bytes in 16"),
    "content one byte short": (note(b"Xen", 18, bytes(8))[:-1], "damaged note"),
    "entry of 0 bytes": (note(b"Xen", 18, b""), "damaged PVH note"),
    "entry of 16 bytes": (note(b"Xen", 18, bytes(16)), "damaged PVH note"),
    "entry above 4 GiB": (note(b"Xen", 18, struct.pack("<Q", 1 << 32)), "damaged PVH note: 0000000001000000"),
    "entry outside": (note(b"Xen", 18, struct.pack("<I", 0x101800)), "starts at 0x101800, outside of all"),
    "entry before the code": (note(b"Xen", 18, struct.pack("<I", 0xFFFFF)), "starts at 0xfffff, outside of all"),
    "entry 0": (note(b"Xen", 18, struct.pack("<I", 0)), "starts at 0x0, outside of all"),
}


@pytest.mark.parametrize("case", NOTES)
def test_bad_note_is_refused(case: str) -> None:
    """hostile 54: the notes have impossible lengths or content."""
    data, sentence = NOTES[case]
    kernel = elf_file([Part(1, 0x100000, bytes(0x800), memsz=0x1800), Part(4, 0, data)], entry=0)

    with pytest.raises(ImageError, match=sentence):
        load(FakeMemory(), kernel)


@pytest.mark.parametrize("entry", [0x100000, 0x1017FF])
def test_entry_may_be_any_byte_of_a_segment(entry: int) -> None:
    """Both ends of the segment belong to it."""
    kernel = elf_file(
        [Part(1, 0x100000, bytes(0x800), memsz=0x1800), Part(4, 0, note(b"Xen", 18, struct.pack("<I", entry)))], entry=0
    )
    assert load(FakeMemory(), kernel).registers["rip"] == entry


def test_too_many_notes_are_refused() -> None:
    """hostile 54: the sum of all note segments has a limit, even if they have the same bytes."""
    notes = [Part(4, 0, bytes(600_000)), Part(4, 0, bytes(600_000))]

    with pytest.raises(ImageError, match="has more than 1048576 bytes of notes"):
        load(FakeMemory(), elf_file([Part(1, 0x100000, bytes(64)), *notes], entry=0))


def test_note_segment_of_zeros_ends() -> None:
    """hostile 54: a series of empty notes is read once."""
    kernel = elf_file([Part(1, 0x100000, bytes(64)), Part(4, 0, bytes(600_000))], entry=0x5000000)

    with pytest.raises(ImageError, match="has no PVH note"):
        load(FakeMemory(), kernel)


BUILD_ID = note(b"GNU", 3, b"\x11" * 20)
PROPERTY = note(b"GNU", 5, b"\x22" * 24, 8)
ENTRY4, ENTRY8 = struct.pack("<I", PVH_ENTRY), struct.pack("<Q", PVH_ENTRY)
DAMAGED = struct.pack("<III", 4, 0xFFFFFFF0, 1) + b"Bad\0"

# Alignment and content of note segments, all of which have the entry.
READABLE = {
    "p_align 4, padded to 4": (4, BUILD_ID + note(b"Xen", 18, ENTRY8)),
    "p_align 8, padded to 4": (8, BUILD_ID + note(b"Xen", 18, ENTRY8)),
    "p_align 8, property first": (8, PROPERTY + BUILD_ID + note(b"Xen", 18, ENTRY4)),
    "p_align 8, padded to 8": (8, note(b"GNU", 3, b"\x11" * 20, 8) + note(b"Xen", 18, ENTRY4, 8)),
    "p_align 4, padded to 8": (4, note(b"GNU", 3, b"\x11" * 20, 8) + note(b"Xen", 18, ENTRY8, 8)),
    "p_align 1": (1, BUILD_ID + note(b"Xen", 18, ENTRY8)),
    "p_align 0": (0, BUILD_ID + note(b"Xen", 18, ENTRY8)),
    "p_align 4096": (4096, BUILD_ID + note(b"Xen", 18, ENTRY8)),
    "a damaged note behind it": (4, note(b"Xen", 18, ENTRY8) + DAMAGED),
    "rubbish behind it": (8, note(b"Xen", 18, ENTRY4) + b"\xff" * 12),
    "a PVH note of three bytes before it": (4, note(b"Xen", 18, b"abc") + note(b"Xen", 18, ENTRY8)),
    "other notes of Xen before it": (4, note(b"Xen", 1, ENTRY8) + note(b"Xen", 5, b"6.1") + note(b"Xen", 18, ENTRY8)),
}


@pytest.mark.parametrize("is64", [True, False])
@pytest.mark.parametrize("case", READABLE)
def test_entry_is_found_with_any_padding_of_notes(case: str, is64: bool) -> None:
    """p_align does not determine the padding.  Damage after the entry does not matter."""
    align, data = READABLE[case]
    parts = [Part(1, 0x100000, b"\xf4" * 0x800), Part(4, 0, data, align=align)]

    assert load(FakeMemory(), elf_file(parts, entry=0, is64=is64)).registers["rip"] == PVH_ENTRY


SEGMENTS = {
    "damaged": Part(4, 0, DAMAGED),
    "without a note": Part(4, 0, b""),
    "shorter than a note": Part(4, 0, b"abc"),
    "of another system": Part(4, 0, BUILD_ID),
    "larger than all that is read": Part(4, 0, note(b"GNU", 3, bytes(1_048_400))),
}


@pytest.mark.parametrize("case", SEGMENTS)
def test_entry_is_found_after_a_note_segment_without_it(case: str) -> None:
    """There may be several note segments.  A useless one ends only the search in that segment."""
    parts = [Part(1, 0x100000, b"\xf4" * 0x800), SEGMENTS[case], Part(4, 0, note(b"Xen", 18, ENTRY8))]

    assert load(FakeMemory(), elf_file(parts, entry=0)).registers["rip"] == PVH_ENTRY


@pytest.mark.parametrize("offset", [0x1000, HUGE, HUGE - 0x100, 1 << 63])
def test_note_segment_outside_the_file_ends_the_search_in_it(offset: int) -> None:
    """The kernel is refused only if no other segment has the entry.  Then the error tells where the segment ends."""
    parts = [Part(1, 0x100000, b"\xf4" * 0x800), Part(4, 0, BUILD_ID)]
    second_offset = PHDR + 56 + 8

    with pytest.raises(ImageError, match=r"has no PVH note, .* .is truncated: a note segment ends at byte"):
        load(FakeMemory(), put(elf_file(parts, entry=0), "<Q", second_offset, offset))
    kernel = elf_file([*parts, Part(4, 0, note(b"Xen", 18, ENTRY8))], entry=0)
    assert load(FakeMemory(), put(kernel, "<Q", second_offset, offset)).registers["rip"] == PVH_ENTRY


def test_note_segment_that_ends_after_the_file_is_read_to_its_end() -> None:
    """Notes are found even if the length of their segment is too large."""
    parts = [Part(1, 0x100000, b"\xf4" * 0x800), Part(4, 0, note(b"Xen", 18, ENTRY8))]
    kernel = elf_file(parts, entry=0)

    assert load(FakeMemory(), put(kernel, "<Q", PHDR + 56 + 32, 0x1000)).registers["rip"] == PVH_ENTRY


@pytest.mark.parametrize("is64", [True, False])
def test_headers_may_be_longer_than_the_known_fields(is64: bool) -> None:
    """e_phentsize and e_shentsize give the distance to the next entry."""
    parts = [Part(1, 0x100000, b"\xf4" * 0x800), Part(4, 0, note(b"Xen", 18, ENTRY8))]

    assert load(FakeMemory(), elf_file(parts, entry=0, is64=is64, gap=8)).registers["rip"] == PVH_ENTRY
    by_section = elf_file(
        parts[:1], entry=0, is64=is64, gap=8, sections=[Named(b".note.Xen", 7, note(b"Xen", 18, ENTRY8))]
    )
    assert load(FakeMemory(), by_section).registers["rip"] == PVH_ENTRY


@pytest.mark.parametrize(("is64", "phnum_at", "info_at", "shoff_at"), [(True, 56, 44, 40), (False, 44, 28, 32)])
def test_number_of_program_headers_may_be_in_the_first_section(
    is64: bool, phnum_at: int, info_at: int, shoff_at: int
) -> None:
    """e_phnum FFFFh refers to sh_info of section 0 (System V ABI, PN_XNUM)."""
    parts = [Part(1, 0x100000, b"\xf4" * 0x800), Part(4, 0, note(b"Xen", 18, ENTRY8))]
    kernel = put(elf_file(parts, entry=0, is64=is64, sections=[Named(b".text", 1)]), "<H", phnum_at, 0xFFFF)
    (shoff,) = struct.unpack_from("<Q" if is64 else "<I", kernel, shoff_at)

    assert load(FakeMemory(), put(kernel, "<I", shoff + info_at, 2)).registers["rip"] == PVH_ENTRY
    for bad in (0, 129, 1 << 31):
        with pytest.raises(ImageError, match=f"has {bad} program headers"):
            load(FakeMemory(), put(kernel, "<I", shoff + info_at, bad))


SECTION_TABLES = {
    "headers of 39 bytes": ("<H", 58, 39),
    "65535 sections": ("<H", 60, 0xFFFF),
    "behind the end": ("<Q", 40, 1 << 40),
    "at the end of the address space": ("<Q", 40, HUGE),
    "names in section 99": ("<H", 62, 99),
}


@pytest.mark.parametrize("case", SECTION_TABLES)
def test_pvh_kernel_needs_no_section_table(case: str) -> None:
    """Only segments are loaded.  Sections are for debuggers."""
    parts = [Part(1, 0x100000, b"\xf4" * 0x800), Part(4, 0, note(b"Xen", 18, ENTRY8))]
    kernel = elf_file(parts, entry=0, sections=[Named(b".text", 1)])

    assert load(FakeMemory(), put(kernel, *SECTION_TABLES[case])).registers["rip"] == PVH_ENTRY


@pytest.mark.parametrize("case", SECTION_TABLES)
def test_openbsd_kernel_with_a_damaged_section_table_has_no_symbols(
    case: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """hostile 54: symbols are only for ddb(4).  Without them, the kernel is loaded like a stripped one."""
    memory, stripped = FakeMemory(), FakeMemory()

    start = load(memory, put(openbsd(), *SECTION_TABLES[case]))

    assert start.text == "OpenBSD/amd64 kernel"
    assert memory.unpack("<9I", start.registers["rsp"])[4] == 0x202008 + 64
    assert memory.unpack("<3H", 0x202008 + 58) == (64, 0, 0)
    assert "it is started without its symbols" in capfd.readouterr().err
    load(stripped, openbsd(stripped=True))
    assert memory.read(0x200000, 0x2003) != stripped.read(0x200000, 0x2003)  # random data
    assert memory.read(0x202008 + 40, 24) == stripped.read(0x202008 + 40, 24)


@pytest.mark.parametrize(
    ("sections", "said"), [(4096, "is truncated"), (4097, "has 4097 sections, a kernel has at most 4096")]
)
def test_number_of_sections_is_limited(sections: int, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The file is too short for either table, which is not said of the one with too many sections."""
    load(FakeMemory(), put(openbsd(), "<H", 60, sections))
    assert said in capfd.readouterr().err


@pytest.mark.parametrize("offset", [0, 0x10000, HUGE])
@pytest.mark.parametrize("memsz", [0, 0x2000])
def test_segment_without_bytes_in_the_file_may_have_any_offset(offset: int, memsz: int) -> None:
    """It is a segment of bss only, or empty.  strip(1) leaves any offset in it."""
    memory = FakeMemory()
    memory.write(0x300000, b"\xaa" * 0x3000)
    kernel = pvh(extra=[Part(1, 0x300000, b"", memsz=memsz)])

    start = load(memory, put(kernel, "<Q", PHDR + 2 * 56 + 8, offset))

    assert start.registers["rip"] == PVH_ENTRY
    assert memory.read(0x300000, 0x3000) == bytes(memsz) + b"\xaa" * (0x3000 - memsz)


@pytest.mark.parametrize("paddr", [0, 0xA0000, layout.FOUR_GIB, HUGE])
def test_empty_segment_may_be_anywhere(paddr: int) -> None:
    """A segment that takes no memory is at no wrong address."""
    assert load(FakeMemory(), pvh(extra=[Part(1, paddr, b"")])).registers["rip"] == PVH_ENTRY


def test_segments_are_loaded_at_physical_addresses() -> None:
    """p_vaddr does not matter, and may be the same for two segments."""
    memory = FakeMemory()
    data = Part(1, 0x300000, b"data", vaddr=0xFFFFFFFF80000000)
    code = Part(1, 0x100000, b"\xf4" * 0x800, vaddr=0xFFFFFFFF80000000)

    load(memory, elf_file([data, code, Part(4, 0, note(b"Xen", 18, ENTRY8))], entry=0))

    assert memory.read(0x300000, 4) == b"data"
    assert memory.read(0x100000, 4) == b"\xf4" * 4


@pytest.mark.parametrize(("is64", "machine"), [(True, 3), (False, 62)])
def test_class_and_machine_need_not_agree(is64: bool, machine: int) -> None:
    """A kernel that is built for x32 has 32-bit headers and the 64-bit machine."""
    parts = [Part(1, 0x100000, b"\xf4" * 0x800), Part(4, 0, note(b"Xen", 18, ENTRY8))]

    kernel = put(elf_file(parts, entry=0, is64=is64, elf_type=3), "<H", 18, machine)

    assert load(FakeMemory(), kernel).registers["rip"] == PVH_ENTRY


def test_note_section_is_used_if_there_is_no_note_segment() -> None:
    """With a linker script without PHDRS, notes may be in the section table only."""
    entry_note = note(b"Xen", 18, struct.pack("<I", 0x100004))
    kernel = elf_file([Part(1, 0x100000, bytes(64))], entry=0, sections=[Named(b".note.Xen", 7, entry_note)])

    assert load(FakeMemory(), kernel).registers["rip"] == 0x100004


@pytest.mark.parametrize(
    "kernel", [pvh(), pvh(is64=False), *(openbsd(is64=is64, stripped=True) for is64 in (True, False))]
)
def test_every_prefix_of_a_kernel_is_refused(kernel: bytes) -> None:
    """hostile 54: every truncated kernel is refused, unless only padding is cut off."""
    needed = len(kernel.rstrip(b"\0"))
    for length in (*range(1, 0x180), *range(0x180, needed, 61)):
        with pytest.raises(ImageError):
            load(FakeMemory(), kernel[:length])


@pytest.mark.parametrize("is64", [True, False])
def test_prefix_of_a_kernel_with_symbols_has_all_segments_or_is_refused(is64: bool) -> None:
    """hostile 54: a kernel that has lost only symbols is loaded without symbols."""
    kernel, stripped = openbsd(is64=is64), openbsd(is64=is64, stripped=True)
    for length in range(0x180, len(kernel) - 1, 61):
        memory = FakeMemory()
        if length < len(stripped.rstrip(b"\0")):
            with pytest.raises(ImageError):
                load(memory, kernel[:length])
        else:
            end = memory.unpack("<9I", load(memory, kernel[:length]).registers["rsp"])[4]
            assert end == -(-0x202003 // 8) * 8 + 64 if is64 else -(-0x202003 // 4) * 4 + 52


def test_gzip_compressed_kernels_are_unpacked() -> None:
    """bsd.gz and vmlinux.gz are loaded like the files in them."""
    assert load(FakeMemory(), gzip.compress(pvh())).registers["rip"] == PVH_ENTRY
    assert load(FakeMemory(), gzip.compress(openbsd())).text == "OpenBSD/amd64 kernel"
