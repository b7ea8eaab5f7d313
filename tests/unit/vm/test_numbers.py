"""Numbers that this program cannot choose: processors, guests that have arrived and other versions rely on them.

Elsewhere tests use their names, and would not notice another value.
"""

import importlib

import pytest

from vmd.units import GIB, KIB, MIB
from vmd.vm import layout

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
# Model-specific registers (Intel SDM 4), registers of the local APIC (3A, table 11-1), and the 8254.
CLOCKS = {
    "MSR_TSC": 0x10, "MSR_TSC_DEADLINE": 0x6E0,
    "LAPIC_SPURIOUS": 0xF0, "LAPIC_IRR": 0x200, "LAPIC_TIMER": 0x320, "LAPIC_INITIAL": 0x380, "LAPIC_CURRENT": 0x390,
    "LAPIC_DIVIDE": 0x3E0, "LAPIC_ON": 0x100, "TIMER_MASKED": 0x10000, "TIMER_MODE": 0x60000,
    "TIMER_PERIODIC": 0x20000, "TIMER_DEADLINE": 0x40000, "PIT_HZ": 1193182,
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
    ("vmd.vm.layout", PLACES), ("vmd.vm.clocks", CLOCKS), ("vmd.vm.stream", STREAM), ("vmd.ipc.devmsg", FIGURES),
    ("vmd.ipc.imsg", MESSAGES), ("vmd.vm.vmmci", VMMCI),
])  # fmt: skip
def test_numbers(module: str, numbers: dict[str, object]) -> None:
    """Each has the value that others rely on."""
    found = vars(importlib.import_module(module))
    assert {name: found[name] for name in numbers} == numbers


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
