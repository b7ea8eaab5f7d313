"""The guest's address map: physical addresses, I/O ports and interrupt numbers, with reasons (*cat. 5.1, 5.3*).

            0 -     9FFFF   RAM
        A0000 -     FFFFF   reserved, backed by memory: shadow of the firmware, ACPI tables on direct boot
       100000 - low_ram_end RAM, at most up to DFFFFFFF
  pci_window  -    FEBFFFFF PCI memory window (MSI-X tables)
     FEC00000               I/O APIC (KVM's)
     FEE00000               local APICs (KVM's)
     FEFFC000               KVM's identity map page and TSS pages: no memory slot may overlap them
     4 GiB - firmware size  firmware, read-only
    100000000 -             the rest of RAM

Unlike vmd, where RAM below 4 GiB ends at F0000000, it ends at E0000000 at the latest.  An unmodified SeaBIOS puts its
PCI window at 80000000, C0000000 or E0000000 and never higher, so that the window would overlap RAM.
"""

from vmd.units import GIB, KIB, PAGE

FOUR_GIB = 4 * GIB

LOW_RAM_END = 0xA0000  # end of conventional memory; a PC has VGA memory and option ROMs behind it
RESERVED_END = 0x100000
HIGH_RAM_START = 0x100000
LOW_RAM_MAX = 0xE0000000  # see above

PCI_WINDOW_END = 0xFEC00000  # exclusive; the I/O APIC's page starts here
IOAPIC_BASE = 0xFEC00000
LAPIC_BASE = 0xFEE00000
KVM_IDENTITY_MAP = 0xFEFFC000  # one page, for real mode on hosts without unrestricted guest
KVM_TSS = 0xFEFFD000  # three pages


def low_ram_bytes(memory_bytes: int) -> int:
    """Return where RAM below 4 GiB ends."""
    return min(memory_bytes, LOW_RAM_MAX)


def pci_window_start(memory_bytes: int) -> int:
    """Return where SeaBIOS starts its PCI window (its `i440fx` memory set-up); direct boot uses the same."""
    low = low_ram_bytes(memory_bytes)
    if low <= 0x80000000:
        return 0x80000000
    if low <= 0xC0000000:
        return 0xC0000000
    return 0xE0000000


# e820 types
E820_RAM = 1
E820_RESERVED = 2


FIRMWARE_BYTES = 256 * KIB  # size of SeaBIOS; also reserved on direct boot, so that the map is the same


def e820_map(memory_bytes: int, firmware_bytes: int = FIRMWARE_BYTES) -> list[tuple[int, int, int]]:
    """Return the memory map that a guest gets: (address, size, type) of each range, in ascending order."""
    low = low_ram_bytes(memory_bytes)
    ranges = [
        (0, LOW_RAM_END, E820_RAM),
        (LOW_RAM_END, RESERVED_END - LOW_RAM_END, E820_RESERVED),
        (HIGH_RAM_START, low - HIGH_RAM_START, E820_RAM),
        (KVM_IDENTITY_MAP, 4 * PAGE, E820_RESERVED),
        (FOUR_GIB - firmware_bytes, firmware_bytes, E820_RESERVED),
        (FOUR_GIB, memory_bytes - low, E820_RAM),
    ]
    return [entry for entry in ranges if entry[1] > 0]


# Addresses of the data that direct boot passes to a kernel, all in conventional memory except the ACPI tables.
BOOT_GDT = 0x1000
BOOT_IDT = 0x1800
PVH_START_INFO = 0x6000  # hvm_start_info, module list and memory map
LINUX_BOOT_PARAMS = 0x7000  # one page
LINUX_STACK = 0x8FF0
LINUX_PAGE_TABLES = 0x9000  # PML4, PDPT, 4 page directories
BOOT_CMDLINE = 0x20000
ACPI_TABLES = 0xE0000  # the RSDP comes first; a scan of the BIOS area finds it here, too
ACPI_TABLES_END = 0xF0000

# I/O ports
PORT_KBD_DATA = 0x60
PORT_KBD_STATUS = 0x64
PORT_SYSTEM_CONTROL_A = 0x92
PORT_RTC_INDEX = 0x70
PORT_RTC_DATA = 0x71
PORT_COM1 = 0x3F8
PORT_FWCFG_SELECT = 0x510
PORT_FWCFG_DATA = 0x511
PORT_FWCFG_DMA = 0x514
PORT_ACPI_PM = 0x600  # event block 600h, control block 604h, timer 608h
PORT_PCI_ADDRESS = 0xCF8
PORT_RESET = 0xCF9
PORT_PCI_DATA = 0xCFC
PCI_IO_START = 0xC000  # first port that SeaBIOS assigns to I/O BARs; direct boot does the same
PCI_IO_END = 0x10000

# Interrupts: global system interrupt numbers.  The PIT raises ISA IRQ 0, which a PC wires to pin 2 of the I/O APIC.
IRQ_PIT = 0
GSI_PIT = 2
IRQ_COM1 = 4
IRQ_RTC = 8
IRQ_SCI = 9  # level triggered, active high
PCI_IRQS = (10, 11)  # INTx, level triggered; see pci_irq()


def pci_irq(slot: int, pin: int) -> int:
    """Return the IRQ of INT`pin` (1 = INTA) of a slot, wired as SeaBIOS wires an i440FX."""
    return (10, 10, 11, 11)[(pin - 1 + slot - 1) & 3]


IOAPIC_ID = 0
