"""The routes of interrupts: those of the chips, and the messages of devices."""

from typing import Any

from vmd.kvmapi import abi
from vmd.vm.routing import Routing

MASTER, SLAVE, IOAPIC = abi.KVM_IRQCHIP_PIC_MASTER, abi.KVM_IRQCHIP_PIC_SLAVE, abi.KVM_IRQCHIP_IOAPIC
PINS = 24  # of an I/O APIC


class Kvm:
    """A VM of KVM, with all the tables that it got."""

    def __init__(self) -> None:
        self.tables: list[list[Any]] = []

    def set_gsi_routing(self, routes: list[Any]) -> None:
        """Take a table."""
        self.tables.append(routes)

    def messages(self) -> dict[int, tuple[int, int, int]]:
        """Return the messages of the last table: address and data by GSI."""
        found = [route for route in self.tables[-1] if route.type == abi.KVM_IRQ_ROUTING_MSI]
        return {each.gsi: (each.u.msi.address_lo, each.u.msi.address_hi, each.u.msi.data) for each in found}


def test_lines_of_a_pc() -> None:
    """Each ISA line goes to its 8259, except that of the slave, and all lines to the I/O APIC, the timer's to pin 2."""
    kvm: Any = Kvm()
    Routing(kvm)
    (table,) = kvm.tables
    found = {(each.u.irqchip.irqchip, each.u.irqchip.pin): each.gsi for each in table}
    assert len(found) == len(table)
    assert {pin: gsi for (chip, pin), gsi in found.items() if chip == MASTER} == {
        pin: pin for pin in range(8) if pin != 2
    }
    assert {pin: gsi for (chip, pin), gsi in found.items() if chip == SLAVE} == {pin: pin + 8 for pin in range(8)}
    assert {pin: gsi for (chip, pin), gsi in found.items() if chip == IOAPIC} == {
        2: 0, 1: 1, **{pin: pin for pin in range(3, PINS)},
    }  # fmt: skip


def test_messages_of_devices() -> None:
    """Their numbers follow those of the lines.  KVM gets a new table only if a message has changed."""
    kvm: Any = Kvm()
    routing = Routing(kvm)
    assert [routing.allocate(2), routing.allocate(3), routing.allocate(1)] == [PINS, PINS + 2, PINS + 5]
    lines = len(kvm.tables[0])
    routing.set_message(PINS, 0x1_FEE00000, 0x41)
    routing.set_message(PINS, 0x1_FEE00000, 0x41)
    routing.set_message(PINS + 5, 0xFEE01000, 0x42)
    assert kvm.messages() == {PINS: (0xFEE00000, 1, 0x41), PINS + 5: (0xFEE01000, 0, 0x42)}
    routing.set_message(PINS, 0xFEE00000, 0x43)
    assert kvm.messages()[PINS] == (0xFEE00000, 0, 0x43)
    assert [len(table) for table in kvm.tables] == [lines, lines + 1, lines + 2, lines + 2]
