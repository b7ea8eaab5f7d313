"""What a loader is asked for, and what it answers: the state in which vCPU 0 starts.

All of it is plain data; `vmd.vm.vcpu` applies a `Start` through KVM_SET_SREGS and KVM_SET_REGS.
"""

from struct import Struct

from vmd.enums import IntEnum
from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from vmd.vm.boot.image import Image

    class Memory(Protocol):
        """Guest memory as the loaders use it; `vmd.guestmem` is the real one."""

        def write(self, gpa: int, data: bytes) -> None:
            """Store `data` at `gpa`."""

        def load(self, gpa: int, data: bytes) -> None:
            """Store `data` at `gpa`, even where the guest may only read."""

        def view(self, gpa: int, size: int) -> memoryview:
            """Return a writable view of `size` bytes at `gpa`; nothing may be empty or span two regions."""


# Intel SDM volume 3, 2.5 and 2.2.1
CR0_PE = 1 << 0
CR0_ET = 1 << 4  # reads as one on every CPU that exists
CR0_PG = 1 << 31
CR4_PSE = 1 << 4
CR4_PAE = 1 << 5
EFER_LME = 1 << 8
EFER_LMA = 1 << 10
RFLAGS_CLEAR = 0x2  # bit 1 is always set; interrupts and direction flag are off

PAGE_SIZE = 0x1000
PTE_PRESENT = 1 << 0
PTE_WRITE = 1 << 1
PTE_LARGE = 1 << 7  # 2 MiB in a page directory, 4 MiB in one of two levels
ENTRIES = 512  # of one page table in long mode
GIB_OF_2M_PAGES = 512

DESCRIPTOR = Struct("<Q")


class Mode(IntEnum):
    """How the CPU runs its first instruction."""

    REAL_RESET = 0  # as after reset: nothing is to be set
    PROTECTED32 = 1  # flat, without paging
    PAGED32 = 2  # flat, paging with 4 MiB pages
    COMPAT32 = 3  # long mode is active, code is still 32-bit
    LONG64 = 4


class Segment(Record):
    """A segment register with its hidden part, under the names of `struct kvm_segment`."""

    selector: int
    type: int
    base: int = 0
    limit: int = 0xFFFFFFFF  # in bytes, whatever the granularity
    present: int = 1
    dpl: int = 0
    db: int = 0
    s: int = 1
    l: int = 0  # noqa: E741 - KVM's name
    g: int = 0
    avl: int = 0
    unusable: int = 0

    def descriptor(self) -> int:
        """Return the eight bytes of a descriptor table that load this segment (Intel SDM 3, 3.4.5)."""
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
    """Return a TSS at address 0: it is never used, but entering a guest needs a busy one (Intel SDM 3, 26.3.1.2)."""
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
    """Return a GDT in which each segment stands where its selector points; selector 0 is not stored."""
    table = bytearray(max(segment.selector for segment in segments) + 8)
    for segment in segments:
        if segment.selector:
            DESCRIPTOR.pack_into(table, segment.selector, segment.descriptor())
    return bytes(table)


def identity_map(base: int, gib: int) -> bytes:
    """Return a PML4, a PDPT and `gib` page directories, to be stored at `base`, that map 2 MiB pages one to one."""
    entry = PTE_PRESENT | PTE_WRITE
    table = Struct(f"<{ENTRIES}Q")
    directories = [base + (2 + index) * PAGE_SIZE | entry for index in range(gib)]
    pages = [
        table.pack(base + PAGE_SIZE | entry, *[0] * (ENTRIES - 1)),
        table.pack(*directories, *[0] * (ENTRIES - gib)),
    ]
    for index in range(gib):
        first = index * GIB_OF_2M_PAGES
        pages.append(table.pack(*[(first + page) << 21 | entry | PTE_LARGE for page in range(ENTRIES)]))
    return b"".join(pages)


class Boot(Record):
    """What the machine wants booted, apart from the image itself."""

    memory_bytes: int
    cmdline: bytes = b""
    initrd: "Image | None" = None
    rsdp_gpa: int = 0  # 0: there are no ACPI tables
    options: str = ""  # of boot(8), without the hyphen
    bootmac: bytes = b""  # address of the first NIC when the boot device is the network


class Start(Record):
    """The state of vCPU 0 before its first instruction.

    `registers` has KVM's names (`rip`, `rsp`, `rflags`, ...); those not named are 0.  With `Mode.REAL_RESET`
    everything else is left as the reset made it, and the defaults here mean nothing.
    """

    text: str  # what was loaded, for the log
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
