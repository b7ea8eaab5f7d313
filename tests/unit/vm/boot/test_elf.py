"""ELF files that lie: for both protocols, whose loaders share these checks."""

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

LIES = {
    "class 3": ("<B", 4, 3, "of class 3"),
    "big-endian": ("<B", 5, 2, "byte order 2"),
    "arm64": ("<H", 18, 183, "for machine 183"),
    "relocatable": ("<H", 16, 1, "of type 1, not an executable"),
    "core": ("<H", 16, 4, "of type 4"),
    "phentsize 0": ("<H", 54, 0, "program headers of 0 bytes"),
    "phentsize 57": ("<H", 54, 57, "program headers of 57 bytes"),
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


@pytest.mark.parametrize("case", LIES)
def test_lying_header_is_refused(case: str) -> None:
    """hostile 54: each field that cannot be true ends in one sentence that names the value."""
    layout_format, offset, value, sentence = LIES[case]

    with pytest.raises(ImageError, match=sentence):
        load(FakeMemory(), put(pvh(), layout_format, offset, value))


PLACES = {
    "vectors": (0, "overlaps the boot data"),
    "GDT": (layout.BOOT_GDT, "overlaps the boot data"),
    "start info": (layout.PVH_START_INFO, "overlaps the boot data"),
    "command line": (layout.BOOT_CMDLINE + 0xF000, "overlaps the boot data"),
    "VGA": (0xA0000, "does not lie in guest memory"),
    "into VGA": (0x9F001, "does not lie in guest memory"),
    "ACPI tables": (layout.ACPI_TABLES, "does not lie in guest memory"),
    "end of RAM": (16 * MIB - 0x800, "needs a guest of 17 MiB"),
    "PCI window": (0xE0000000, "does not lie in guest memory"),
    "KVM's pages": (layout.KVM_TSS, "does not lie in guest memory"),
    "firmware": (0xFFFC0000, "does not lie in guest memory"),
    "above 4 GiB": (layout.FOUR_GIB, "does not lie in guest memory"),
    "end of the address space": (HUGE - 0x100, "does not lie in guest memory"),
}


@pytest.mark.parametrize("case", PLACES)
def test_segment_in_a_forbidden_place_is_refused(case: str) -> None:
    """hostile 54: outside RAM, in reserved areas, over what the loader itself stores."""
    paddr, sentence = PLACES[case]
    memory = FakeMemory(firmware_bytes=256 * 1024)
    entry_note = note(b"Xen", 18, struct.pack("<Q", paddr & 0xFFFFFFFF))
    kernel = elf_file([Part(1, 0x100000, b"\xf4" * 64), Part(1, paddr, bytes(0x1000)), Part(4, 0, entry_note)], entry=0)
    kernel = kernel.replace(entry_note, note(b"Xen", 18, struct.pack("<Q", 0x100000)))

    with pytest.raises(ImageError, match=f"segment 1 at {paddr:#x}-.*{sentence}"):
        load(memory, kernel)

    assert memory.stored == []


def test_segments_above_4_gib_are_taken_where_there_is_memory() -> None:
    """Data may lie above 4 GiB; only the entry may not."""
    memory = FakeMemory(memory_bytes=4 << 30)

    load(memory, pvh(extra=[Part(1, layout.FOUR_GIB + 0x1000, b"high")]))

    assert memory.read(layout.FOUR_GIB + 0x1000, 4) == b"high"


@pytest.mark.parametrize("paddr", [0x100000, 0x1017FF, 0xFFC01])
def test_overlapping_segments_are_refused(paddr: int) -> None:
    """hostile 54: two segments may not share a byte, bss included."""
    with pytest.raises(ImageError, match=r"segment 2 at .* (overlaps segment 0|does not lie)"):
        load(FakeMemory(), pvh(extra=[Part(1, paddr, bytes(0x400))]))


def test_adjacent_segments_are_taken() -> None:
    """The end of one is the start of the next."""
    memory = FakeMemory()

    load(memory, pvh(extra=[Part(1, 0x101800, b"next")]))

    assert memory.read(0x1017FC, 8) == b"\0\0\0\0next"


def test_bss_is_zeroed_where_memory_was_not() -> None:
    """A bss is zero by the loader's doing, not by luck."""
    memory = FakeMemory()
    memory.write(0x100000, b"\xaa" * 0x2000)

    load(memory, pvh())

    assert memory.read(0x100000, 0x1800) == b"\xf4" * 0x800 + bytes(0x1000)
    assert memory.read(0x101800, 0x800) == b"\xaa" * 0x800


def test_bss_larger_than_the_piece_it_is_cleared_in() -> None:
    """A bss of several MiB is zero to its last byte and no further."""
    memory = FakeMemory()
    memory.write(4 * MIB, b"\xaa" * (4 * MIB))

    load(memory, pvh(extra=[Part(1, 4 * MIB, b"x", memsz=3 * MIB + 5)]))

    assert memory.read(4 * MIB, 3 * MIB + 6) == b"x" + bytes(3 * MIB + 4) + b"\xaa"


def test_segment_may_end_with_the_last_byte_of_memory() -> None:
    """Without a bss there is nothing to clear behind it."""
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
    "entry 0": (note(b"Xen", 18, struct.pack("<I", 0)), "starts at 0x0, outside of all"),
}


@pytest.mark.parametrize("case", NOTES)
def test_lying_note_is_refused(case: str) -> None:
    """hostile 54: notes whose lengths or content cannot be."""
    data, sentence = NOTES[case]
    kernel = elf_file([Part(1, 0x100000, bytes(0x800), memsz=0x1800), Part(4, 0, data)], entry=0)

    with pytest.raises(ImageError, match=sentence):
        load(FakeMemory(), kernel)


def test_notes_beyond_the_bound_are_refused() -> None:
    """hostile 54: many note segments that all point to the same bytes cost no more than their sum may."""
    notes = [Part(4, 0, bytes(600_000)), Part(4, 0, bytes(600_000))]

    with pytest.raises(ImageError, match="has more than 1048576 bytes of notes"):
        load(FakeMemory(), elf_file([Part(1, 0x100000, bytes(64)), *notes], entry=0))


def test_note_segment_of_zeros_ends() -> None:
    """hostile 54: empty notes, one after the other, are walked once."""
    kernel = elf_file([Part(1, 0x100000, bytes(64)), Part(4, 0, bytes(600_000))], entry=0x5000000)

    with pytest.raises(ImageError, match="neither a kernel with a PVH note nor one of OpenBSD"):
        load(FakeMemory(), kernel)


@pytest.mark.parametrize(
    ("offset", "layout_format", "value", "sentence"),
    [
        (58, "<H", 39, "section headers of 39 bytes"),
        (60, "<H", 0xFFFF, "has 65535 sections"),
        (60, "<H", 4096, "is truncated: the table of section headers"),
        (40, "<Q", HUGE, "is truncated: the table of section headers"),
        (62, "<H", 99, "names its sections in section 99 of 7"),
    ],
)
def test_lying_section_table_is_refused(offset: int, layout_format: str, value: int, sentence: str) -> None:
    """hostile 54: section headers are read for OpenBSD's symbols, and checked like the rest."""
    with pytest.raises(ImageError, match=sentence):
        load(FakeMemory(), put(openbsd(), layout_format, offset, value))


def test_note_section_serves_where_there_is_no_note_segment() -> None:
    """A linker script without PHDRS may leave notes to the section table."""
    entry_note = note(b"Xen", 18, struct.pack("<I", 0x100004))
    kernel = elf_file([Part(1, 0x100000, bytes(64))], entry=0, sections=[Named(b".note.Xen", 7, entry_note)])

    assert load(FakeMemory(), kernel).registers["rip"] == 0x100004


def test_other_elf_files_are_refused() -> None:
    """An ELF file whose entry lies nowhere is no kernel we know."""
    with pytest.raises(ImageError, match="neither a kernel with a PVH note nor one of OpenBSD"):
        load(FakeMemory(), elf_file([Part(1, 0x100000, bytes(64))], entry=0x200000))


@pytest.mark.parametrize("kernel", [pvh(), pvh(is64=False), openbsd(), openbsd(is64=False)])
def test_every_prefix_of_a_kernel_is_refused(kernel: bytes) -> None:
    """hostile 54: no truncation passes for a kernel, except one that only cuts off padding."""
    needed = len(kernel.rstrip(b"\0"))
    for length in (*range(1, 0x180), *range(0x180, needed, 61)):
        with pytest.raises(ImageError):
            load(FakeMemory(), kernel[:length])


def test_gzip_compressed_kernels_are_unpacked() -> None:
    """bsd.gz and vmlinux.gz load like what is in them."""
    assert load(FakeMemory(), gzip.compress(pvh())).registers["rip"] == PVH_ENTRY
    assert load(FakeMemory(), gzip.compress(openbsd())).text == "OpenBSD/amd64 kernel"
