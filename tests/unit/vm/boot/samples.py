"""Boot images that are built field by field, and a guest memory for them."""

import mmap
import os
import struct
from collections.abc import Sequence

from vmd.errors import GuestError
from vmd.vm import layout
from vmd.vm.boot import loader
from vmd.vm.boot.start import Start

MIB = 1 << 20
PAYLOAD_BYTES = 0x1400
PAYLOAD_AT = 5 * 512
PREF_ADDRESS = 2 * MIB
INIT_SIZE = 0x30000


class FakeMemory:
    """Guest RAM with the same holes as the real one.  An access outside is an error of the loader."""

    def __init__(self, memory_bytes: int = 16 * MIB, firmware_bytes: int = 0) -> None:
        low = layout.low_ram_bytes(memory_bytes)
        self.regions = [(0, mmap.mmap(-1, max(low, MIB)))]
        if memory_bytes > low:
            self.regions.append((layout.FOUR_GIB, mmap.mmap(-1, memory_bytes - low)))
        if firmware_bytes:
            self.regions.append((layout.FOUR_GIB - firmware_bytes, mmap.mmap(-1, firmware_bytes)))
        self.firmware = range(layout.FOUR_GIB - firmware_bytes, layout.FOUR_GIB)
        self.memory_bytes = memory_bytes
        self.stored: list[tuple[int, int]] = []

    def _place(self, gpa: int, size: int) -> memoryview:
        """Return bytes of one region.  As in the real class, even 0 bytes at the end of a region are an error."""
        for start, region in self.regions:
            if start <= gpa < start + len(region) and gpa + size <= start + len(region):
                self.stored.append((gpa, gpa + size))
                return memoryview(region)[gpa - start : gpa - start + size]
        raise GuestError(f"{size} bytes at {gpa:#x} are outside guest memory")

    def view(self, gpa: int, size: int) -> memoryview:
        """Return a view.  Views of firmware are read-only."""
        view = self._place(gpa, size)
        return view.toreadonly() if gpa in self.firmware else view

    def write(self, gpa: int, data: bytes) -> None:
        """Store bytes as the guest may."""
        self.view(gpa, len(data))[:] = data

    def load(self, gpa: int, data: bytes) -> None:
        """Store bytes anywhere, also in firmware."""
        self._place(gpa, len(data))[:] = data

    def read(self, gpa: int, size: int) -> bytes:
        """Return bytes of memory."""
        return bytes(self.view(gpa, size))

    def unpack(self, layout_format: str, gpa: int) -> tuple[int, ...]:
        """Return the numbers of one structure."""
        return struct.unpack(layout_format, self.read(gpa, struct.calcsize(layout_format)))


def memfd(data: bytes) -> int:
    """Return a descriptor of a file with `data`.  Its position is at the end, which a reader must not rely on."""
    fd = os.memfd_create("sample")
    os.write(fd, data)
    return fd


def load(
    memory: FakeMemory,
    data: bytes,
    *,
    initrd: bytes | None = None,
    cmdline: bytes = b"",
    rsdp_gpa: int = 0,
    bootmac: bytes = b"",
    options: str = "",
) -> Start:
    """Load an image, given by its bytes."""
    fds = [memfd(data)]
    if initrd is not None:
        fds.append(memfd(initrd))
    try:
        return loader.load(
            memory,
            fds[0],
            "/bsd",
            memory_bytes=memory.memory_bytes,
            initrd_fd=fds[1] if initrd is not None else None,
            initrd_name="/initrd",
            cmdline=cmdline,
            rsdp_gpa=rsdp_gpa,
            bootmac=bootmac,
            options=options,
        )
    finally:
        for fd in fds:
            os.close(fd)


def put(image: bytes, layout_format: str, offset: int, *values: int | bytes) -> bytes:
    """Return the image with some fields overwritten."""
    patched = bytearray(image)
    struct.pack_into(layout_format, patched, offset, *values)
    return bytes(patched)


def bzimage(payload: bytes = b"\x90" * PAYLOAD_BYTES) -> bytes:
    """Return a small Linux kernel of boot protocol 2.15."""
    image = bytes(PAYLOAD_AT) + payload
    image = put(image, "<B", 0x1F1, 4)  # setup_sects
    image = put(image, "<I", 0x1F4, len(payload) // 16)  # syssize
    image = put(image, "<H", 0x1FE, 0xAA55)
    image = put(image, "<BB", 0x200, 0xEB, 0x6A)
    image = put(image, "<4sH", 0x202, b"HdrS", 0x20F)
    image = put(image, "<H", 0x20E, 0x300)  # kernel_version
    image = put(image, "<B", 0x211, 0x81)  # LOADED_HIGH, CAN_USE_HEAP
    image = put(image, "<I", 0x22C, 0x7FFFFFFF)  # initrd_addr_max
    image = put(image, "<IB", 0x230, 2 * MIB, 1)  # kernel_alignment, relocatable_kernel
    image = put(image, "<HI", 0x236, 0x7F, 2047)  # xloadflags, cmdline_size
    image = put(image, "<Q", 0x250, 0x1234)  # setup_data
    image = put(image, "<QI", 0x258, PREF_ADDRESS, INIT_SIZE)
    return put(image, "<24s", 0x500, b"6.1.0-56-amd64 (builder)")


class Part:
    """A program header and its bytes."""

    def __init__(
        self,
        kind: int,
        paddr: int = 0,
        data: bytes = b"",
        memsz: int | None = None,
        vaddr: int | None = None,
        align: int = 4,
    ) -> None:
        self.kind = kind
        self.align = align
        self.paddr = paddr
        self.vaddr = paddr if vaddr is None else vaddr
        self.data = data
        self.memsz = len(data) if memsz is None else memsz


class Named:
    """A section and its bytes."""

    def __init__(self, name: bytes, kind: int, data: bytes = b"") -> None:
        self.name = name
        self.kind = kind
        self.data = data


def elf_file(
    parts: Sequence[Part],
    *,
    entry: int,
    is64: bool = True,
    sections: Sequence[Named] = (),
    elf_type: int = 2,
    gap: int = 0,
) -> bytes:
    """Return an ELF file: header, program headers, contents, section contents, section headers.

    `gap` is the number of bytes that follow the known fields in each program header and section header.
    """
    ehdr_size, phdr_size, shdr_size = (64, 56, 64) if is64 else (52, 32, 40)
    names = b"\0"
    starts = []
    if sections:
        sections = [Named(b"", 0), *sections, Named(b".shstrtab", 3)]
        for section in sections:
            starts.append(len(names) if section.name else 0)
            names += section.name + b"\0" if section.name else b""
        sections[-1].data = names
    body = b""
    body_at = ehdr_size + (phdr_size + gap) * len(parts)
    table = b""
    for part in parts:
        offset, size = body_at + len(body), len(part.data)
        body += part.data
        if is64:
            fields = (part.kind, 7, offset, part.vaddr, part.paddr, size, part.memsz, part.align)
            table += struct.pack("<IIQQQQQQ", *fields)
        else:
            fields = (part.kind, offset, part.vaddr, part.paddr, size, part.memsz, 7, part.align)
            table += struct.pack("<IIIIIIII", *fields)
        table += b"\xee" * gap
    headers = b""
    for start, section in zip(starts, sections, strict=True):
        fields10 = (start, section.kind, 0, 0, body_at + len(body), len(section.data), 0, 0, 4, 0)
        body += section.data
        headers += struct.pack("<IIQQQQIIQQ" if is64 else "<IIIIIIIIII", *fields10) + b"\xee" * gap
    ident = b"\x7fELF" + bytes([2 if is64 else 1, 1, 1]) + bytes(9)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH" if is64 else "<16sHHIIIIIHHHHHH",
        ident, elf_type, 62 if is64 else 3, 1, entry, ehdr_size, body_at + len(body), 0, ehdr_size,
        phdr_size + gap, len(parts), shdr_size + gap, len(sections), max(len(sections) - 1, 0),
    )  # fmt: skip
    return header + table + body + headers


def note(name: bytes, kind: int, desc: bytes, padding: int = 4) -> bytes:
    """Return one note, padded to words of 4 or 8 bytes."""
    name += b"\0"
    head = struct.pack("<III", len(name), len(desc), kind) + name
    head += bytes(-len(head) % padding) + desc
    return head + bytes(-len(head) % padding)


PVH_ENTRY = 0x100010


def pvh(*, is64: bool = True, extra: Sequence[Part] = ()) -> bytes:
    """Return a kernel with a PVH note, code at 1 MiB and a bss."""
    notes = note(b"GNU", 3, b"\x11" * 20) + note(b"Xen", 18, struct.pack("<Q", PVH_ENTRY))
    code = Part(1, 0x100000, b"\xf4" * 0x800, memsz=0x1800)
    return elf_file([code, Part(4, 0, notes), *extra], entry=0xFFFFFFFF81000000 if is64 else 0, is64=is64)


KERNBASE64 = 0xFFFFFFFF80000000
KERNBASE32 = 0xD0000000
SYMBOLS = b"symbols." * 5
STRINGS = b"\0start\0main\0pad"  # its length is no multiple of a word
LINES = b"lines!!"
OPENBSD_START = 0x200000


def openbsd(*, is64: bool = True, stripped: bool = False, extra: Sequence[Part] = ()) -> bytes:
    """Return an OpenBSD kernel with text, data, bss, random data and symbols."""
    base = KERNBASE64 if is64 else KERNBASE32
    text = Part(1, OPENBSD_START, b"\xf4" * 0x900, vaddr=base + OPENBSD_START)
    data = Part(1, OPENBSD_START + 0x1000, b"data" * 0x80, memsz=0x1003)
    random = Part(0x65A3DBE6, OPENBSD_START + 0x1100, bytes(0x40))
    sections = [
        Named(b".text", 1, b"text"),
        Named(b".symtab", 2, SYMBOLS),
        Named(b".strtab", 3, STRINGS),
        Named(b".debug_line", 1, LINES),
        Named(b".comment", 1, b"not loaded"),
    ]
    return elf_file(
        [text, data, random, *extra],
        entry=base + OPENBSD_START + 0x20,
        is64=is64,
        sections=() if stripped else sections,
    )


def seabios(size: int = 256 * 1024) -> bytes:
    """Return bytes like a SeaBIOS image: each 64 KiB block differs, and the end has a jump."""
    blocks = b"".join(bytes([index % 251 + 1]) * 65536 for index in range(size // 65536))
    return blocks[:-16] + b"\xea\x5b\xe0\x00\xf0" + b"06/23/99\x00\xfc\x00"
