"""Kernels with a PVH note, and the start info that they get (Xen, docs/misc/pvh.pandoc)."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.unit.vm.boot.samples import MIB, PVH_ENTRY, FakeMemory, Part, load, pvh
from vmd.errors import ImageError
from vmd.vm import layout
from vmd.vm.boot.start import Mode

INFO = "<4I4Q2I"
SOURCE = """
    .section .note.Xen, "a", @note
    .long 4, 4, 18
    .asciz "Xen"
    .long start
    .text
    .code32
    nop
    .globl start
start:
    hlt
    .data
    .ascii "data"
    .bss
    .skip 64
"""


@pytest.mark.parametrize("is64", [True, False])
def test_cpu_starts_flat_and_unpaged_with_start_info_in_ebx(is64: bool) -> None:
    """The start state is that of the ABI, for both classes of ELF."""
    memory = FakeMemory()

    start = load(memory, pvh(is64=is64))

    assert start.mode is Mode.PROTECTED32
    assert start.registers == {"rip": PVH_ENTRY, "rbx": layout.PVH_START_INFO, "rflags": 2}
    assert (start.cr0, start.cr3, start.cr4, start.efer) == (0x11, 0, 0, 0)
    cs, ss, tr = start.segments["cs"], start.segments["ss"], start.segments["tr"]
    assert (cs.base, cs.limit, cs.type, cs.db, cs.g) == (0, 0xFFFFFFFF, 0xB, 1, 1)
    assert (ss.base, ss.limit, ss.type, ss.db, ss.g) == (0, 0xFFFFFFFF, 0x3, 1, 1)
    assert (tr.base, tr.limit, tr.type, tr.s) == (0, 0x67, 0xB, 0)
    for name in ("cs", "ss", "tr"):
        segment = start.segments[name]
        assert memory.unpack("<Q", start.gdt_base + segment.selector) == (segment.descriptor(),)
        assert segment.selector + 7 <= start.gdt_limit
    assert start.gdt_limit == 4 * 8 - 1
    assert (start.gdt_base, start.idt_base, start.idt_limit) == (layout.BOOT_GDT, layout.BOOT_IDT, 0)


def test_start_info_has_command_line_rsdp_and_memory_map() -> None:
    """hvm_start_info of version 1 has their addresses."""
    memory = FakeMemory()

    load(memory, pvh(), cmdline=b"quiet", rsdp_gpa=0xE0000)

    magic, version, flags, modules, modlist, cmdline, rsdp, memmap, entries, reserved = memory.unpack(
        INFO, layout.PVH_START_INFO
    )
    assert (magic, version, flags, modules, modlist, rsdp, reserved) == (0x336EC578, 1, 0, 0, 0, 0xE0000, 0)
    assert memory.read(cmdline, 6) == b"quiet\0"
    table = [memory.unpack("<QQII", memmap + 24 * index) for index in range(entries)]
    assert table == [(*entry, 0) for entry in layout.e820_map(memory.memory_bytes)]


def test_initrd_is_the_only_module() -> None:
    """The module list has the address and the size of the initrd."""
    memory = FakeMemory()

    load(memory, pvh(), initrd=b"cpio" * 2000)

    _, _, _, modules, modlist, _, _, memmap, entries, _ = memory.unpack(INFO, layout.PVH_START_INFO)
    assert modules == 1
    assert memmap == modlist + 32
    assert memory.unpack("<QQI", memmap) == layout.e820_map(memory.memory_bytes)[0]
    assert entries == len(layout.e820_map(memory.memory_bytes))
    assert memory.unpack("<QQQQ", modlist) == (16 * MIB - 8192, 8000, 0, 0)
    assert memory.read(16 * MIB - 8192, 8000) == b"cpio" * 2000


def test_initrd_keeps_off_every_segment() -> None:
    """The highest free place may be between two segments."""
    memory = FakeMemory()
    top = [Part(1, 15 * MIB, b"top"), Part(1, 16 * MIB - 0x1000, b"toptop")]

    load(memory, pvh(extra=top), initrd=bytes(2 * MIB))

    modlist = memory.unpack(INFO, layout.PVH_START_INFO)[4]
    assert memory.unpack("<Q", modlist) == (13 * MIB,)


def test_start_info_stays_in_its_page() -> None:
    """The largest memory map and a module end before the zero page of the other protocol."""
    memory = FakeMemory(memory_bytes=5 << 30)

    load(memory, pvh(), initrd=b"x")

    memmap, entries = memory.unpack(INFO, layout.PVH_START_INFO)[7:9]
    assert memmap + 24 * entries <= layout.LINUX_BOOT_PARAMS


def test_cmdline_is_bounded() -> None:
    """The ABI has no limit, but the space for the command line has one."""
    with pytest.raises(ImageError, match="the command line has 65536 bytes, this kernel takes 65535"):
        load(FakeMemory(), pvh(), cmdline=b"x" * 65536)


@pytest.mark.skipif(shutil.which("as") is None or shutil.which("ld") is None, reason="needs as and ld")
@pytest.mark.parametrize(("bits", "emulation"), [("--64", "elf_x86_64"), ("--32", "elf_i386")])
def test_kernel_from_a_real_linker_is_loaded(tmp_path: Path, bits: str, emulation: str) -> None:
    """We read a note as binutils write it."""
    source, objects, kernel = tmp_path / "k.S", tmp_path / "k.o", tmp_path / "k"
    source.write_text(SOURCE)
    subprocess.run(["as", bits, "-o", objects, source], check=True)
    link = ["ld", "-m", emulation, "--build-id=none", "-z", "noexecstack", "-Ttext-segment=0x100000"]
    subprocess.run([*link, "-e", "start", "-o", kernel, objects], check=True)
    memory = FakeMemory()

    start = load(memory, kernel.read_bytes())

    assert memory.read(start.registers["rip"] - 1, 2) == b"\x90\xf4"
