"""Numbers that this program cannot choose: processors, guests that have arrived and other versions rely on them.

Elsewhere tests use their names, and would not notice another value.
"""

import importlib

import pytest

from vmd.units import GIB, KIB, MIB
from vmd.virtio import spec
from vmd.vm import kinds, layout

# A guest that was started under an earlier version finds its hardware at the same places.
PLACES = {
    "LOW_RAM_END": 0xA0000, "HIGH_RAM_START": 0x100000, "LOW_RAM_MAX": 0xE0000000, "PCI_WINDOW_END": 0xFEC00000,
    "IOAPIC_BASE": 0xFEC00000, "LAPIC_BASE": 0xFEE00000, "KVM_IDENTITY_MAP": 0xFEFFC000, "KVM_TSS": 0xFEFFD000,
    "FIRMWARE_BYTES": 256 * KIB, "ACPI_TABLES": 0xE0000,
    "PORT_KBD_DATA": 0x60, "PORT_KBD_STATUS": 0x64, "PORT_SYSTEM_CONTROL_A": 0x92, "PORT_RTC_INDEX": 0x70,
    "PORT_RTC_DATA": 0x71, "PORT_COM1": 0x3F8, "PORT_FWCFG_SELECT": 0x510, "PORT_FWCFG_DATA": 0x511,
    "PORT_FWCFG_DMA": 0x514, "PORT_ACPI_PM": 0x600, "PORT_PCI_ADDRESS": 0xCF8, "PORT_RESET": 0xCF9,
    "PORT_PCI_DATA": 0xCFC, "PCI_IO_START": 0xC000, "PCI_IO_END": 0x10000,
    "IRQ_PIT": 0, "GSI_PIT": 2, "IRQ_COM1": 4, "IRQ_RTC": 8, "IRQ_SCI": 9, "PCI_IRQS": (10, 11),
}  # fmt: skip
# Where a kernel that is booted directly finds its data.  They do not overlap, and page tables are in whole pages.
BOOT = {
    "RESERVED_END": 0x100000, "ACPI_TABLES_END": 0xF0000, "E820_RAM": 1, "E820_RESERVED": 2, "IOAPIC_ID": 0,
    "BOOT_GDT": 0x1000, "BOOT_IDT": 0x1800, "PVH_START_INFO": 0x6000, "LINUX_BOOT_PARAMS": 0x7000,
    "LINUX_STACK": 0x8FF0, "LINUX_PAGE_TABLES": 0x9000, "BOOT_CMDLINE": 0x20000,
}  # fmt: skip
# Drivers (virtio 1.2).  The legacy bits of features have other meanings in virtio 1.x.
VIRTIO = {
    "ACKNOWLEDGE": 1, "DRIVER": 2, "DRIVER_OK": 4, "FEATURES_OK": 8, "DEVICE_NEEDS_RESET": 0x40,
    "VIRTQ_DESC_F_NEXT": 1, "VIRTQ_DESC_F_WRITE": 2, "VIRTQ_DESC_F_INDIRECT": 4, "VIRTQ_AVAIL_F_NO_INTERRUPT": 1,
    "VIRTQ_USED_F_NO_NOTIFY": 1, "DESC_BYTES": 16, "LEGACY_QUEUE_ALIGN": 4096,
    "VIRTIO_F_NOTIFY_ON_EMPTY": 24, "VIRTIO_F_ANY_LAYOUT": 27, "VIRTIO_F_RING_INDIRECT_DESC": 28,
    "VIRTIO_F_RING_EVENT_IDX": 29, "VIRTIO_F_VERSION_1": 32, "LEGACY_FEATURES": 0xFFFF_FFFF, "LEGACY_ONLY": 0x0900_0000,
    "VENDOR": 0x1AF4, "DEVICE_MODERN_BASE": 0x1040, "SUBSYSTEM_MODERN_BASE": 0x40, "SUBSYSTEM_VENDOR": 0x0B5D,
    "PCI_CAP_ID_VENDOR": 9, "VIRTIO_PCI_CAP_COMMON_CFG": 1, "VIRTIO_PCI_CAP_NOTIFY_CFG": 2,
    "VIRTIO_PCI_CAP_ISR_CFG": 3, "VIRTIO_PCI_CAP_DEVICE_CFG": 4, "VIRTIO_PCI_CAP_PCI_CFG": 5,
    "VIRTIO_MSI_NO_VECTOR": 0xFFFF, "ISR_QUEUE": 1, "ISR_CONFIG": 2,
    "VIRTIO_NET_F_CSUM": 0, "VIRTIO_NET_F_GUEST_CSUM": 1, "VIRTIO_NET_F_MTU": 3, "VIRTIO_NET_F_MAC": 5,
    "VIRTIO_NET_F_GUEST_TSO4": 7, "VIRTIO_NET_F_GUEST_TSO6": 8, "VIRTIO_NET_F_GUEST_ECN": 9,
    "VIRTIO_NET_F_HOST_TSO4": 11, "VIRTIO_NET_F_HOST_TSO6": 12, "VIRTIO_NET_F_HOST_ECN": 13,
    "VIRTIO_NET_F_MRG_RXBUF": 15, "VIRTIO_NET_F_STATUS": 16, "VIRTIO_NET_S_LINK_UP": 1,
    "VIRTIO_NET_HDR_F_NEEDS_CSUM": 1, "NET_HDR_BYTES": 12, "NET_HDR_BYTES_LEGACY": 10,
    "VIRTIO_BLK_F_SEG_MAX": 2, "VIRTIO_BLK_F_RO": 5, "VIRTIO_BLK_F_BLK_SIZE": 6, "VIRTIO_BLK_F_FLUSH": 9,
    "VIRTIO_BLK_F_CONFIG_WCE": 11, "VIRTIO_BLK_F_DISCARD": 13, "VIRTIO_BLK_F_WRITE_ZEROES": 14,
    "VIRTIO_BLK_T_IN": 0, "VIRTIO_BLK_T_OUT": 1, "VIRTIO_BLK_T_FLUSH": 4, "VIRTIO_BLK_T_GET_ID": 8,
    "VIRTIO_BLK_T_DISCARD": 11, "VIRTIO_BLK_T_WRITE_ZEROES": 13,
    "VIRTIO_BLK_S_OK": 0, "VIRTIO_BLK_S_IOERR": 1, "VIRTIO_BLK_S_UNSUPP": 2, "VIRTIO_BLK_ID_BYTES": 20,
}  # fmt: skip
# Firmware (QEMU, docs/specs/fw_cfg.rst).
FWCFG = {
    "SELECTOR": 0, "DATA": 1, "DMA_HIGH": 4, "DMA_LOW": 8, "SIGNATURE": 0, "ID": 1, "UUID": 2, "RAM_SIZE": 3,
    "NO_GRAPHIC": 4, "CPUS": 5, "NUMA": 0x0D, "BOOT_MENU": 0x0E, "MAX_CPUS": 0x0F, "FILE_DIR": 0x19,
    "FILE_FIRST": 0x20, "IRQ0_OVERRIDE": 0x8002, "KEY_WRITE": 0x4000,
    "DMA_ERROR": 1, "DMA_READ": 2, "DMA_SKIP": 4, "DMA_SELECT": 8, "DMA_WRITE": 0x10,
}  # fmt: skip
# Registers of chips, by the offset of their ports: Linux and other drivers have these numbers, too.
UART = {
    "DATA": 0, "IER": 1, "IIR_FCR": 2, "LCR": 3, "MCR": 4, "LSR": 5, "MSR": 6, "SCR": 7,
    "IER_RDI": 1, "IER_THRI": 2, "IER_RLSI": 4, "IER_MSI": 8, "IIR_NONE": 1, "IIR_MSI": 0, "IIR_THRI": 2, "IIR_RDI": 4,
    "IIR_RLSI": 6, "IIR_TIMEOUT": 0x0C, "IIR_FIFO": 0xC0, "FCR_ENABLE": 1, "FCR_CLEAR_RX": 2, "LCR_DLAB": 0x80,
    "MCR_DTR": 1, "MCR_RTS": 2, "MCR_OUT1": 4, "MCR_OUT2": 8, "MCR_LOOP": 0x10, "LSR_DR": 1, "LSR_OE": 2,
    "LSR_PE": 4, "LSR_FE": 8, "LSR_BI": 0x10, "LSR_EMPTY": 0x60, "LSR_FIFO_ERROR": 0x80, "MSR_TERI": 4,
    "MSR_CTS": 0x10, "MSR_DSR": 0x20, "MSR_RI": 0x40, "MSR_DCD": 0x80,
    "FIFO_BYTES": 16, "TRIGGER_LEVELS": (1, 4, 8, 14),
}  # fmt: skip
RTC = {
    "SECONDS": 0, "SECONDS_ALARM": 1, "MINUTES": 2, "MINUTES_ALARM": 3, "HOURS": 4, "HOURS_ALARM": 5, "WEEKDAY": 6,
    "DAY": 7, "MONTH": 8, "YEAR": 9, "REG_A": 10, "REG_B": 11, "REG_C": 12, "REG_D": 13, "CENTURY": 0x32,
    "CENTURY_PS2": 0x37, "CMOS_BYTES": 128, "PM": 0x80, "ANY": 0xC0, "OSCILLATOR_HZ": 32768,
}  # fmt: skip
PM = {"PM1_STS": 0, "PM1_EN": 2, "PM1_CNT": 4, "PM_TMR": 8, "TIMER_HZ": 3579545, "TIMER_HALF": 1 << 31}
KEYBOARD = {"DATA": 0, "STATUS": 4}
# Model-specific registers (Intel SDM 4), registers of the local APIC (3A, table 11-1), and the 8254.
CLOCKS = {
    "MSR_TSC": 0x10, "MSR_TSC_DEADLINE": 0x6E0,
    "LAPIC_SPURIOUS": 0xF0, "LAPIC_IRR": 0x200, "LAPIC_TIMER": 0x320, "LAPIC_INITIAL": 0x380, "LAPIC_CURRENT": 0x390,
    "LAPIC_DIVIDE": 0x3E0, "LAPIC_ON": 0x100, "TIMER_MASKED": 0x10000, "TIMER_MODE": 0x60000,
    "TIMER_PERIODIC": 0x20000, "TIMER_DEADLINE": 0x40000, "PIT_HZ": 1193182, "MASK_64": 0xFFFFFFFFFFFFFFFF,
}  # fmt: skip
# Where a guest that has arrived finds its devices.
SLOTS = {"SLOT_HOST_BRIDGE": 0, "LAYOUT_FIRST": 1, "LAYOUT": 2}
# What drivers look for (virtio 1.2, 5): device type, id of a legacy device, class code, sizes of queues, fixed slot.
KINDS = {
    "rng": (4, 0x1005, 0x00FF00, (64,), None), "net": (1, 0x1000, 0x020000, (256, 256), None),
    "blk": (2, 0x1001, 0x010000, (256,), None), "scsi": (8, 0x1004, 0x010000, (128, 128, 128), None),
    "cidata": (2, 0x1001, 0x010000, (256,), 31),
}  # fmt: skip
# Streams: what one version writes, others read.
STREAM = {
    "VERSION": 4, "STILL": 3, "OLDEST": 2, "MEMORY": 1, "STATE": 2, "END": 3, "RUNS": 4, "HEADER_MAX": 64 * KIB,
    "PIECE_BYTES": 8 * MIB, "RUNS_MAX": 2048,
}  # fmt: skip
# The file of figures, which a parent of a later version reads, and messages to it.
FIGURES = {"FIGURES_SLOTS": 16, "FIGURES_SLOT_BYTES": 512, "FIGURES_HEAD": 3}
MESSAGES = {"MAX_MESSAGE": 16384, "MAX_FDS": 64}
# Drivers for vmmci(4).
VMMCI = {
    "VENDOR": 0x0B5D, "DEVICE": 0x0777, "F_TIMESYNC": 1, "F_ACK": 2, "F_SYNCRTC": 4, "NONE": 0, "SHUTDOWN": 1,
    "REBOOT": 2, "SYNCRTC": 3, "COMMAND_AT": 0, "SECONDS_AT": 4, "MICROSECONDS_AT": 12,
}  # fmt: skip


@pytest.mark.parametrize(("module", "numbers"), [
    ("vmd.vm.layout", PLACES), ("vmd.vm.layout", BOOT), ("vmd.virtio.spec", VIRTIO), ("vmd.vm.boot.fwcfg", FWCFG),
    ("vmd.vm.chips.ns8250", UART), ("vmd.vm.chips.mc146818", RTC), ("vmd.vm.chips.acpipm", PM),
    ("vmd.vm.chips.i8042", KEYBOARD), ("vmd.vm.clocks", CLOCKS), ("vmd.vm.stream", STREAM),
    ("vmd.ipc.devmsg", FIGURES), ("vmd.ipc.imsg", MESSAGES), ("vmd.vm.vmmci", VMMCI),
    ("vmd.vm.slots", SLOTS),
])  # fmt: skip
def test_numbers(module: str, numbers: dict[str, object]) -> None:
    """Each has the value that others rely on."""
    found = vars(importlib.import_module(module))
    assert {name: found[name] for name in numbers} == numbers


def test_every_number_of_virtio_is_here() -> None:
    """A new one gets its row above."""
    assert {name for name in vars(spec) if name.isupper() and name != "TYPE_CHECKING"} == set(VIRTIO)


def test_kinds_of_devices() -> None:
    """A driver of a guest that has arrived goes on with them."""
    fields = ("device_type", "legacy_id", "class_code", "queues", "slot")
    assert {kind.name: tuple(getattr(kind, field) for field in fields) for kind in kinds.KINDS} == KINDS


@pytest.mark.parametrize(("memory_bytes", "low", "window"), [
    (64 * MIB, 64 * MIB, 0x80000000), (2 * GIB, 2 * GIB, 0x80000000), (2 * GIB + MIB, 2 * GIB + MIB, 0xC0000000),
    (3 * GIB, 3 * GIB, 0xC0000000), (3 * GIB + MIB, 3 * GIB + MIB, 0xE0000000), (64 * GIB, 0xE0000000, 0xE0000000),
])  # fmt: skip
def test_memory_ends_below_the_window_of_pci(memory_bytes: int, low: int, window: int) -> None:
    """The window begins where SeaBIOS begins it.  The rest of the memory lies above 4 GiB."""
    assert (layout.low_ram_bytes(memory_bytes), layout.pci_window_start(memory_bytes)) == (low, window)
    tables = [entry for entry in layout.e820_map(memory_bytes) if entry[2] == layout.E820_RAM]
    assert sum(size for _, size, _ in tables) == memory_bytes - 0x60000  # the BIOS area is no RAM for a guest


def test_the_memory_map_of_a_guest() -> None:
    """Ranges are in order, and each is what the address map says."""
    ram, reserved = 1, 2
    assert layout.e820_map(5 * GIB) == [
        (0, 0xA0000, ram), (0xA0000, 0x60000, reserved), (0x100000, 0xDFF00000, ram),
        (0xFEFFC000, 0x4000, reserved), (0xFFFC0000, 0x40000, reserved), (4 * GIB, 5 * GIB - 0xE0000000, ram),
    ]  # fmt: skip
    assert layout.e820_map(64 * MIB, 128 * KIB)[2:] == [
        (0x100000, 63 * MIB, ram), (0xFEFFC000, 0x4000, reserved), (0xFFFE0000, 0x20000, reserved),
    ]  # fmt: skip


def test_interrupt_lines_of_slots() -> None:
    """As SeaBIOS wires them: it writes them into configuration space."""
    assert [layout.pci_irq(slot, 1) for slot in range(1, 9)] == [10, 10, 11, 11] * 2
    assert [layout.pci_irq(1, pin) for pin in (1, 2, 3, 4)] == [10, 10, 11, 11]
