"""The parameters of a loader (`Boot`), and its result (`Start`): the state in which vCPU 0 starts.

Both are plain data.  `vmd.vm.vcpu` applies a `Start` with KVM_SET_SREGS and KVM_SET_REGS.
"""

from struct import Struct

from vmd.enums import IntEnum
from vmd.record import Record
from vmd.units import PAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from vmd.vm.boot.image import Image

    class Memory(Protocol):
        """Guest memory, as loaders use it.  `vmd.guestmem` implements it."""

        def write(self, gpa: int, data: bytes) -> None:
            """Store `data` at `gpa`."""

        def load(self, gpa: int, data: bytes) -> None:
            """Store `data` at `gpa`, also in memory that is read-only for the guest."""

        def view(self, gpa: int, size: int) -> memoryview:
            """Return a writable view of `size` bytes at `gpa`.  It must not be empty or span two regions."""


# Intel SDM volume 3, 2.5 and 2.2.1
CR0_PE = 1 << 0
CR0_ET = 1 << 4  # reads as one on all present processors
CR0_PG = 1 << 31
CR4_PSE = 1 << 4
CR4_PAE = 1 << 5
EFER_LME = 1 << 8
EFER_LMA = 1 << 10
RFLAGS_CLEAR = 0x2  # bit 1 is always set; interrupts are disabled, and the direction flag is clear

PTE_PRESENT = 1 << 0
PTE_WRITE = 1 << 1
PTE_LARGE = 1 << 7  # a page of 2 MiB in long mode, of 4 MiB with two levels of tables
ENTRIES = 512  # of one page table in long mode
GIB_OF_2M_PAGES = 512

DESCRIPTOR = Struct("<Q")


class Mode(IntEnum):
    """The mode in which the processor runs its first instruction."""

    REAL_RESET = 0  # as after reset: no register is set
    PROTECTED32 = 1  # flat, without paging
    PAGED32 = 2  # flat, paging with 4 MiB pages
    COMPAT32 = 3  # long mode is active, code is still 32-bit
    LONG64 = 4


class Segment(Record):
    """A segment register with its hidden part, with the field names of `struct kvm_segment`."""

    selector: int
    type: int
    base: int = 0
    limit: int = 0xFFFFFFFF  # in bytes, for both values of the granularity `g`
    present: int = 1
    dpl: int = 0
    db: int = 0
    s: int = 1
    l: int = 0  # noqa: E741 - KVM's name
    g: int = 0
    avl: int = 0
    unusable: int = 0

    def descriptor(self) -> int:
        """Return the 8-byte descriptor of this segment as a number (Intel SDM 3, 3.4.5)."""
        limit = self.limit >> 12 if self.g else self.limit
        access = self.type | self.s << 4 | self.dpl << 5 | self.present << 7
        flags = self.avl | self.l << 1 | self.db << 2 | self.g << 3
        return (
            limit & 0xFFFF
            | (self.base & 0xFFFFFF) << 16
            | access << 40
            | (limit >> 16 & 0xF) << 48
            | flags << 52
            | (self.base >> 24 & 0xFF) << 56
        )


CODE_ACCESSED = 0xB  # execute, read
DATA_ACCESSED = 0x3  # read, write
BUSY_TSS = 0xB
LDT = 0x2


def code32(selector: int) -> Segment:
    """Return a flat 32-bit code segment."""
    return Segment(selector=selector, type=CODE_ACCESSED, db=1, g=1)


def code64(selector: int) -> Segment:
    """Return a 64-bit code segment."""
    return Segment(selector=selector, type=CODE_ACCESSED, l=1, g=1)


def data32(selector: int) -> Segment:
    """Return a flat data segment."""
    return Segment(selector=selector, type=DATA_ACCESSED, db=1, g=1)


def task(selector: int) -> Segment:
    """Return a TSS at address 0.  It is never used, but VM entry needs a busy TSS (Intel SDM 3, 26.3.1.2)."""
    return Segment(selector=selector, type=BUSY_TSS, s=0, limit=0x67)


def flat_segments(code: Segment, data: Segment, tss: Segment) -> dict[str, Segment]:
    """Return all segment registers for one code and one data segment."""
    return {
        "cs": code,
        **dict.fromkeys(("ds", "es", "fs", "gs", "ss"), data),
        "tr": tss,
        "ldt": Segment(selector=0, type=LDT, s=0, limit=0xFFFF),
    }


def descriptor_table(*segments: Segment) -> bytes:
    """Return a GDT that has each segment at its selector.  A segment with selector 0 is left out."""
    table = bytearray(max(segment.selector for segment in segments) + 8)
    for segment in segments:
        if segment.selector:
            DESCRIPTOR.pack_into(table, segment.selector, segment.descriptor())
    return bytes(table)


def identity_map(base: int, gib: int) -> bytes:
    """Return page tables that map the first `gib` GiB one to one, with pages of 2 MiB, to be stored at `base`.

    They are a PML4, a PDPT and `gib` page directories.
    """
    entry = PTE_PRESENT | PTE_WRITE
    table = Struct(f"<{ENTRIES}Q")
    directories = [base + (2 + index) * PAGE | entry for index in range(gib)]
    pages = [
        table.pack(base + PAGE | entry, *[0] * (ENTRIES - 1)),
        table.pack(*directories, *[0] * (ENTRIES - gib)),
    ]
    for index in range(gib):
        first = index * GIB_OF_2M_PAGES
        pages.append(table.pack(*[(first + page) << 21 | entry | PTE_LARGE for page in range(ENTRIES)]))
    return b"".join(pages)


class Boot(Record):
    """The parameters of a boot, except the image itself."""

    memory_bytes: int
    cmdline: bytes = b""
    initrd: "Image | None" = None
    rsdp_gpa: int = 0  # 0: there are no ACPI tables
    options: str = ""  # of boot(8), without the hyphen
    bootmac: bytes = b""  # link-layer address of the first NIC, if the boot device is the network


class Start(Record):
    """The state of vCPU 0 before its first instruction.

    `registers` has KVM's names (`rip`, `rsp`, `rflags`, ...).  Registers that are not in it are 0.  With
    `Mode.REAL_RESET` the vCPU keeps its reset state, and all fields after `mode` are ignored.
    """

    text: str  # describes the loaded image, for the log
    mode: Mode
    registers: dict[str, int] = {}
    cr0: int = 0
    cr3: int = 0
    cr4: int = 0
    efer: int = 0
    gdt_base: int = 0
    gdt_limit: int = 0
    idt_base: int = 0
    idt_limit: int = 0
    segments: dict[str, Segment] = {}
