"""bzImage kernels and their start state."""

import gzip
import struct

import pytest

from tests.unit.vm.boot.samples import (
    INIT_SIZE,
    MIB,
    PAYLOAD_AT,
    PREF_ADDRESS,
    FakeMemory,
    bzimage,
    load,
    put,
)
from vmd.errors import ImageError
from vmd.vm import layout
from vmd.vm.boot.start import Mode, Start

CODE = bytes(range(256)) * 0x14
ZERO_PAGE = layout.LINUX_BOOT_PARAMS


def translate(memory: FakeMemory, start: Start, address: int) -> int:
    """Walk the page tables as the CPU does (Intel SDM 3, 4.5.4)."""
    table = start.cr3
    for shift in (39, 30, 21):
        (entry,) = memory.unpack("<Q", table + 8 * (address >> shift & 511))
        assert entry & 3 == 3
        table = entry & 0x000FFFFFFFFFF000
    assert entry & 0x80
    return (entry & 0x000FFFFFFFE00000) | address & 0x1FFFFF


def test_code_is_loaded_at_its_preferred_address_and_entered_at_200h() -> None:
    """The 64-bit entry is at the load address plus 0x200 (boot.rst, "64-bit boot protocol")."""
    memory = FakeMemory()

    start = load(memory, bzimage(CODE))

    assert memory.read(PREF_ADDRESS, len(CODE)) == CODE
    assert start.mode is Mode.LONG64
    assert start.registers == {
        "rip": PREF_ADDRESS + 0x200,
        "rsi": ZERO_PAGE,
        "rsp": layout.LINUX_STACK,
        "rflags": 2,
    }
    assert start.text == "Linux 6.1.0-56-amd64"


def test_long_mode_is_on_and_4_gib_are_mapped_one_to_one() -> None:
    """CR0, CR4 and EFER are those of long mode.  The page tables map every address below 4 GiB to itself."""
    memory = FakeMemory()

    start = load(memory, bzimage())

    assert (start.cr0, start.cr4, start.efer) == (0x80000011, 0x20, 0x500)
    for address in (0, 0x7000, 0x200200, 0x3FFFFFFF, 0x40000000, 0xFEE00000, 0xFFFFFFFF):
        assert translate(memory, start, address) == address
    assert memory.unpack("<Q", start.cr3 + 8) == (0,)


def test_segments_agree_with_the_descriptor_table() -> None:
    """__BOOT_CS is 10h and 64-bit, and __BOOT_DS is 18h.  The table in memory agrees with the segment registers."""
    memory = FakeMemory()

    start = load(memory, bzimage())

    cs, ds, tr = start.segments["cs"], start.segments["ds"], start.segments["tr"]
    assert (cs.selector, cs.l, cs.db, cs.type) == (0x10, 1, 0, 0xB)
    assert (ds.selector, ds.type) == (0x18, 3)
    assert memory.unpack("<6Q", start.gdt_base) == (
        0,
        0,
        0x00AF9B000000FFFF,
        0x00CF93000000FFFF,
        0x00008B0000000067,
        0,
    )
    assert start.gdt_limit == 47
    assert (start.gdt_base, start.idt_base, start.idt_limit) == (layout.BOOT_GDT, layout.BOOT_IDT, 0)
    assert (tr.selector, tr.type, tr.s) == (0x20, 0xB, 0)


def test_boot_params_have_the_header_and_the_fields_of_the_loader() -> None:
    """The zero page has the kernel's header and the loader's fields, at the offsets of boot.rst."""
    memory = FakeMemory()

    load(memory, bzimage(), cmdline=b"console=ttyS0", rsdp_gpa=0xE0000)

    assert memory.read(ZERO_PAGE + 0x1F1, 0x10) == bzimage()[0x1F1:0x1FA] + b"\xff\xff" + bzimage()[0x1FC:0x201]
    assert memory.read(ZERO_PAGE + 0x202, 4) == b"HdrS"
    assert memory.unpack("<BB", ZERO_PAGE + 0x210) == (0xFF, 0x01)
    assert memory.unpack("<I", ZERO_PAGE + 0x214) == (PREF_ADDRESS,)
    assert memory.unpack("<I", ZERO_PAGE + 0x228) == (layout.BOOT_CMDLINE,)
    assert memory.unpack("<Q", ZERO_PAGE + 0x70) == (0xE0000,)
    assert memory.unpack("<Q", ZERO_PAGE + 0x250) == (0,)
    assert memory.unpack("<B", ZERO_PAGE + 0x1EF) == (0,)  # the sentinel: else Linux clears parts of the page
    assert memory.read(layout.BOOT_CMDLINE, 14) == b"console=ttyS0\0"


def test_no_other_byte_of_boot_params_is_set() -> None:
    """The page has the kernel's header, with the loader's fields (boot.rst) in it, and zeroes."""
    memory = FakeMemory()
    image = put(bzimage(), "<BBB", 0x1FA, 1, 2, 3)  # vid_mode, and the field behind it
    for offset in range(0x210, 0x26C):
        if not 0x22C <= offset < 0x264 and offset != 0x211:
            image = put(image, "<B", offset, 0xA5)
    image = put(image, "<IIQ", 0x248, 0x11223344, 0x55667788, (1 << 64) - 1)  # the payload, then setup_data

    load(memory, image, initrd=b"x" * 5000, cmdline=b"quiet", rsdp_gpa=0xE0000)

    e820 = layout.e820_map(memory.memory_bytes)
    page = bytearray(4096)
    page[0x1F1:0x26C] = image[0x1F1:0x26C]
    for layout_format, offset, values in (
        ("<Q", 0x070, [0xE0000]), ("<B", 0x1E8, [len(e820)]), ("<H", 0x1FA, [0xFFFF]), ("<BB", 0x210, [0xFF, 0x01]),
        ("<III", 0x214, [PREF_ADDRESS, 16 * MIB - 8192, 5000]), ("<I", 0x228, [0x20000]), ("<Q", 0x250, [0]),
    ):  # fmt: skip
        struct.pack_into(layout_format, page, offset, *values)
    for index, entry in enumerate(e820):
        struct.pack_into("<QQI", page, 0x2D0 + 20 * index, *entry)
    found = memory.read(ZERO_PAGE, 4096)
    assert {at: found[at] for at in range(4096) if found[at] != page[at]} == {}


def test_without_an_initrd_its_address_is_zero() -> None:
    """Its size is zero, too."""
    memory = FakeMemory()
    load(memory, bzimage())
    assert memory.unpack("<II", ZERO_PAGE + 0x218) == (0, 0)


def test_e820_table_is_the_layout() -> None:
    """The kernel gets exactly the ranges of the layout."""
    memory = FakeMemory()

    load(memory, bzimage())

    (count,) = memory.unpack("<B", ZERO_PAGE + 0x1E8)
    table = [memory.unpack("<QQI", ZERO_PAGE + 0x2D0 + 20 * index) for index in range(count)]
    assert table == layout.e820_map(memory.memory_bytes)


def test_initrd_is_page_aligned_at_the_top_of_memory() -> None:
    """The initrd ends in the last page of RAM.  boot_params has its address and size."""
    memory = FakeMemory()
    initrd = b"\x5a" * 5000

    load(memory, bzimage(), initrd=initrd)

    at, size = memory.unpack("<II", ZERO_PAGE + 0x218)
    assert (at, size) == (16 * MIB - 8192, 5000)
    assert memory.read(at, size) == initrd
    assert memory.unpack("<II", ZERO_PAGE + 0xC0) == (0, 0)


def test_initrd_is_below_the_limit_of_the_kernel() -> None:
    """initrd_addr_max is the last byte an initrd may occupy."""
    memory = FakeMemory()
    image = put(bzimage(), "<I", 0x22C, 12 * MIB - 1)

    load(memory, image, initrd=bytes(4096))

    assert memory.unpack("<I", ZERO_PAGE + 0x218) == (12 * MIB - 4096,)


def test_initrd_moves_below_a_kernel_that_needs_the_top() -> None:
    """If the kernel is at the end of RAM, the initrd is before it."""
    memory = FakeMemory()
    image = put(bzimage(), "<QI", 0x258, 14 * MIB, 2 * MIB)

    load(memory, image, initrd=bytes(4096))

    assert memory.unpack("<I", ZERO_PAGE + 0x218) == (14 * MIB - 4096,)


def test_initrd_fits_exactly_behind_the_kernel() -> None:
    """The kernel ends where the last page of RAM begins."""
    memory = FakeMemory()

    load(memory, put(bzimage(), "<I", 0x260, 14 * MIB - 4096), initrd=bytes(4096))

    assert memory.unpack("<I", ZERO_PAGE + 0x218) == (16 * MIB - 4096,)


def test_initrd_is_never_above_4_gib() -> None:
    """With more than 3.5 GiB of memory the initrd is still below initrd_addr_max."""
    memory = FakeMemory(memory_bytes=4 << 30)

    load(memory, bzimage(), initrd=bytes(4096))

    assert memory.unpack("<I", ZERO_PAGE + 0x218) == (0x7FFFF000,)


def test_zero_setup_sects_mean_four() -> None:
    """hostile 54: setup_sects 0 means 4, for old kernels."""
    memory = FakeMemory()

    load(memory, put(bzimage(CODE), "<B", 0x1F1, 0))

    assert memory.read(PREF_ADDRESS, len(CODE)) == CODE


NO_64_BIT_ENTRY = {
    "xloadflags without it": ("<H", 0x236, 0x7E),
    "protocol 2.11, which has no xloadflags": ("<H", 0x206, 0x20B),
    "protocol 2.10": ("<H", 0x206, 0x20A),
}


@pytest.mark.parametrize("case", NO_64_BIT_ENTRY)
def test_kernel_without_a_64_bit_entry_is_entered_at_its_start_in_32_bit_mode(case: str) -> None:
    """boot.rst, "32-bit boot protocol": flat segments 10h and 18h, no paging, esi: zero page, ebp, edi, ebx: 0."""
    memory = FakeMemory()

    start = load(memory, put(bzimage(CODE), *NO_64_BIT_ENTRY[case]), cmdline=b"quiet")

    assert start.mode is Mode.PROTECTED32
    assert start.registers == {"rip": PREF_ADDRESS, "rsi": ZERO_PAGE, "rsp": layout.LINUX_STACK, "rflags": 2}
    assert (start.cr0, start.cr3, start.cr4, start.efer) == (0x11, 0, 0, 0)
    cs, ds = start.segments["cs"], start.segments["ds"]
    assert (cs.selector, cs.l, cs.db, cs.type, cs.base, cs.limit) == (0x10, 0, 1, 0xB, 0, 0xFFFFFFFF)
    assert (ds.selector, ds.db, ds.type) == (0x18, 1, 3)
    assert memory.unpack("<Q", start.gdt_base + 0x10) == (cs.descriptor(),)
    assert start.gdt_limit == 47
    assert memory.read(PREF_ADDRESS, len(CODE)) == CODE
    assert memory.unpack("<I", ZERO_PAGE + 0x228) == (layout.BOOT_CMDLINE,)


def test_header_of_protocol_2_10_ends_before_the_last_field() -> None:
    """handover_offset exists since 2.11.  In a header of 2.10 the bytes at its offset are not copied."""
    image = put(put(put(bzimage(), "<H", 0x206, 0x20A), "<B", 0x201, 0x62), "<I", 0x264, 0xDEADBEEF)
    memory = FakeMemory()

    load(memory, image)

    assert memory.unpack("<II", ZERO_PAGE + 0x260) == (INIT_SIZE, 0)
    with pytest.raises(ImageError, match="damaged Linux setup header: it ends at 0x264"):
        load(FakeMemory(), put(image, "<H", 0x206, 0x20B))


def test_kernel_that_is_not_relocatable_is_loaded_at_1_mib() -> None:
    """It moves itself to pref_address, where it takes init_size bytes.  Both places are kept free."""
    memory = FakeMemory()
    image = put(put(bzimage(CODE), "<IB", 0x230, 0, 0), "<QI", 0x258, 8 * MIB, 7 * MIB)

    start = load(memory, image, initrd=bytes(4096))

    assert start.registers["rip"] == MIB + 0x200
    assert memory.read(MIB, len(CODE)) == CODE
    assert memory.unpack("<I", ZERO_PAGE + 0x214) == (MIB,)
    assert memory.unpack("<I", ZERO_PAGE + 0x218) == (16 * MIB - 4096,)
    with pytest.raises(ImageError, match="the kernel at 0x100000-0x1100000 needs a guest of 17 MiB"):
        load(FakeMemory(), put(image, "<QI", 0x258, 8 * MIB, 9 * MIB))


@pytest.mark.parametrize("pref_address", [0, 0x1000, 0xA0000])
def test_preferred_address_below_1_mib_is_ignored(pref_address: int) -> None:
    """A relocatable kernel without a usable address is loaded at an address of its alignment, as in QEMU."""
    memory = FakeMemory()

    start = load(memory, put(bzimage(CODE), "<Q", 0x258, pref_address))

    assert start.registers["rip"] == 2 * MIB + 0x200
    assert memory.read(2 * MIB, len(CODE)) == CODE


@pytest.mark.parametrize("alignment", [0, 3])
def test_alignment_is_ignored_without_relocation(alignment: int) -> None:
    """A field that is not used is no reason to refuse a kernel."""
    start = load(FakeMemory(), put(bzimage(), "<IB", 0x230, alignment, 0))

    assert start.registers["rip"] == MIB + 0x200


@pytest.mark.parametrize("size", [1, 511, 513, 4097])
def test_initrd_of_any_length_is_accepted(size: int) -> None:
    """An initrd may have an odd length."""
    memory = FakeMemory()
    initrd = b"\x07" * size

    load(memory, bzimage(), initrd=initrd)

    at, told = memory.unpack("<II", ZERO_PAGE + 0x218)
    assert told == size
    assert memory.read(at, size) == initrd


def test_gzip_compressed_kernel_is_unpacked() -> None:
    """A gzip-compressed bzImage is loaded like a plain one."""
    memory = FakeMemory()

    start = load(memory, gzip.compress(bzimage(CODE)))

    assert memory.read(PREF_ADDRESS, len(CODE)) == CODE
    assert start.mode is Mode.LONG64


def test_cmdline_of_the_largest_length_is_accepted() -> None:
    """cmdline_size does not count the NUL."""
    memory = FakeMemory()

    load(memory, bzimage(), cmdline=b"x" * 2047)

    assert memory.read(layout.BOOT_CMDLINE, 2048) == b"x" * 2047 + b"\0"


def test_a_long_version_is_cut() -> None:
    """It goes into the log."""
    assert load(FakeMemory(), put(bzimage(), "<200s", 0x500, b"x" * 200)).text == "Linux " + "x" * 96


@pytest.mark.parametrize(("length", "end"), [(0x66, 0x268), (0x8E, 0x290)])
def test_the_shortest_and_the_longest_header(length: int, end: int) -> None:
    """It is copied up to its end.  A header that is shorter or longer by a byte is damaged."""
    image = put(bytes(bzimage()), "<B", 0x201, length)
    image = image[:0x26C] + b"\xa5" * (0x2A0 - 0x26C) + image[0x2A0:]
    memory = FakeMemory()

    load(memory, image)

    copied = memory.read(ZERO_PAGE + 0x264, 0x290 - 0x264)
    assert copied == image[0x264:end].ljust(0x290 - 0x264, b"\0")
    with pytest.raises(ImageError, match="damaged Linux setup header: it ends at"):
        load(FakeMemory(), put(image, "<B", 0x201, length + (1 if end == 0x290 else -1)))


def test_control_characters_of_a_version_do_not_reach_the_log() -> None:
    """The version string comes from the image, so only printable ASCII is used."""
    start = load(FakeMemory(), put(bzimage(), "<8s", 0x500, b"6.1\x1b[2J\n"))

    assert start.text == "Linux"


REFUSED = {
    "boot flag": ("<H", 0x1FE, [0], "boot flag 0x0"),
    "protocol 2.09": ("<H", 0x206, [0x209], "boot protocol 2.09, at least 2.10 is needed: start it by a boot loader"),
    "protocol 2.00": ("<H", 0x206, [0x200], "boot protocol 2.00, at least 2.10 is needed"),
    "zImage": ("<B", 0x211, [0], "zImage that loads below 1 MiB: start it by a boot loader"),
    "header too short": ("<B", 0x201, [0x20], "damaged Linux setup header"),
    "header too long": ("<B", 0x201, [0xFF], "damaged Linux setup header"),
    "no jump": ("<B", 0x200, [0x90], "damaged Linux setup header"),
    "setup_sects 255": ("<B", 0x1F1, [255], "is truncated"),
    "syssize 32": ("<I", 0x1F4, [32], "has 512 bytes of code, too few to hold its entry"),
    "syssize beyond the file": ("<I", 0x1F4, [0x10000], "is truncated"),
    "syssize huge": ("<I", 0x1F4, [0xFFFFFFFF], "is truncated"),
    "alignment 0": ("<I", 0x230, [0], "no power of two"),
    "alignment 3": ("<I", 0x230, [3], "no power of two"),
    "alignment huge": ("<I", 0x230, [1 << 31], "needs a guest of 2049 MiB, this one has 16 MiB"),
    "pref_address 2^64 - 1": ("<Q", 0x258, [(1 << 64) - 1], "does not lie in guest memory"),
    "pref_address in the PCI hole": ("<Q", 0x258, [0xFEE00000], "does not lie in guest memory"),
    "init_size beyond memory": ("<I", 0x260, [30 * MIB], "needs a guest of 32 MiB, this one has 16 MiB"),
    "init_size huge": ("<I", 0x260, [0xFFFFFFFF], "does not lie in guest memory"),
    "cmdline_size 0": ("<I", 0x238, [0], "command line has 5 bytes, this kernel takes 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_header_is_refused(case: str) -> None:
    """hostile 54: an impossible setup header gives an error that names the value."""
    layout_format, offset, values, sentence = REFUSED[case]

    with pytest.raises(ImageError, match=sentence):
        load(FakeMemory(), put(bzimage(), layout_format, offset, *values), cmdline=b"quiet")


@pytest.mark.parametrize("relocatable", [0, 1])
def test_address_above_4_gib_is_refused(relocatable: int) -> None:
    """hostile 54: even if there is memory, the kernel's page tables and its header do not reach it."""
    image = put(put(bzimage(), "<B", 0x234, relocatable), "<Q", 0x258, layout.FOUR_GIB)

    with pytest.raises(ImageError, match=r"/bsd: (is to run at 0x100000000, but only|the kernel at .* does not lie)"):
        load(FakeMemory(memory_bytes=5 << 30), image)


def test_init_size_smaller_than_the_code_does_not_hide_the_code() -> None:
    """hostile 54: with init_size 0 the code itself still counts, so the initrd does not overlap it."""
    image = put(bzimage(bytes(13 * MIB)), "<QI", 0x258, 2 * MIB, 0)

    with pytest.raises(ImageError, match=r"initrd /initrd of 2097152 bytes needs a guest of 17 MiB, this"):
        load(FakeMemory(), image, initrd=bytes(2 * MIB))


def test_initrd_that_does_not_fit_names_the_memory_it_needs() -> None:
    """hostile 54: the initrd is larger than the guest."""
    with pytest.raises(ImageError, match="needs a guest of 27 MiB, this one has 16 MiB"):
        load(FakeMemory(), bzimage(), initrd=bytes(24 * MIB))


def test_initrd_that_the_kernel_cannot_reach_is_refused() -> None:
    """With a low initrd_addr_max, more memory would not help, so the error does not suggest it."""
    with pytest.raises(ImageError, match=r"does not fit below 0x100000"):
        load(FakeMemory(), put(bzimage(), "<I", 0x22C, 0xFFFFF), initrd=bytes(4096))


def test_empty_initrd_is_refused() -> None:
    """An empty initrd is an error of the operator."""
    with pytest.raises(ImageError, match="/initrd: is empty"):
        load(FakeMemory(), bzimage(), initrd=b"")


def test_cmdline_longer_than_the_boot_data_is_refused() -> None:
    """hostile 54: the kernel claims to accept a command line of 4 GiB, but our limit counts."""
    image = put(bzimage(), "<I", 0x238, 0xFFFFFFFF)

    with pytest.raises(ImageError, match="takes 65535"):
        load(FakeMemory(), image, cmdline=b"x" * 65536)


def test_cmdline_with_a_nul_is_refused() -> None:
    """The kernel would see only the part before the NUL."""
    with pytest.raises(ImageError, match="contains a NUL"):
        load(FakeMemory(), bzimage(), cmdline=b"a\0b")


def test_every_prefix_of_a_kernel_is_refused() -> None:
    """hostile 54: every truncated kernel is refused, unless fewer bytes are missing than the rounding of its size."""
    image = bzimage()
    for length in (*range(0x300), *range(0x300, len(image) - 16, 97), len(image) - 16):
        with pytest.raises(ImageError):
            load(FakeMemory(), image[:length])


@pytest.mark.parametrize("missing", [1, 8, 15])
def test_last_bytes_may_be_missing_because_the_size_is_rounded_up(missing: int) -> None:
    """syssize counts units of 16 bytes.  The last unit may be incomplete: Debian's memtest86+ lacks 8 bytes."""
    memory = FakeMemory()
    memory.write(PREF_ADDRESS + len(CODE) - 16, b"\xaa" * 32)

    load(memory, bzimage(CODE)[:-missing])

    at = PREF_ADDRESS + len(CODE) - missing
    assert memory.read(at - 16, 16) == CODE[-missing - 16 : -missing]
    assert memory.read(at, 4) == b"\xaa" * 4


def test_kernel_without_a_size_has_the_size_of_its_file() -> None:
    """GRUB, QEMU and Cloud Hypervisor use the file's size only, so some kernels have a syssize of 0."""
    memory = FakeMemory()

    load(memory, put(bzimage(CODE), "<I", 0x1F4, 0) + b"more")

    assert memory.read(PREF_ADDRESS, len(CODE) + 4) == CODE + b"more"
    for length in (PAYLOAD_AT - 1, PAYLOAD_AT, PAYLOAD_AT + 0x200):
        with pytest.raises(ImageError, match=r"has \d+ bytes of code, too few to hold its entry"):
            load(FakeMemory(), put(bzimage(CODE), "<I", 0x1F4, 0)[:length])


def test_missing_whole_units_are_truncation() -> None:
    """hostile 54: if a whole unit is missing, the error has both sizes."""
    image = bzimage(CODE)

    with pytest.raises(ImageError, match=f"is truncated: the kernel's code ends at byte {len(image)}, the file at"):
        load(FakeMemory(), image[:-16])


def test_bytes_after_the_code_are_not_loaded() -> None:
    """A signature for Secure Boot, which follows the kernel, is not loaded."""
    memory = FakeMemory()

    load(memory, bzimage(CODE) + b"signature" * 100)

    assert memory.read(PREF_ADDRESS + len(CODE), 9) == bytes(9)


def test_sample_agrees_with_its_constants() -> None:
    """The constants of the samples agree with the sample file."""
    image = bzimage(CODE)

    assert image[PAYLOAD_AT:] == CODE
    assert struct.unpack_from("<I", image, 0x260) == (INIT_SIZE,)
