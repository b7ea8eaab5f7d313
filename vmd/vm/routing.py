"""Which interrupt line goes where: KVM's GSI routing table, which is always replaced as a whole (api.rst 4.52)."""

from vmd.kvmapi import abi
from vmd.kvmapi.vm import chip_route

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.kvmapi.vm import Vm

PIC_PINS = 8  # of each 8259
IOAPIC_PINS = 24
GSI_PIT = 0  # KVM's PIT raises this one
IOAPIC_PIN_PIT = 2  # ... which a PC wires to pin 2, as the MADT's override says


def chip_routes() -> list[abi.kvm_irq_routing_entry]:
    """Return the fixed part: each ISA line to its 8259, every line to the I/O APIC, line 0 to pin 2 there."""
    routes = []
    for gsi in range(2 * PIC_PINS):
        chip = abi.KVM_IRQCHIP_PIC_MASTER if gsi < PIC_PINS else abi.KVM_IRQCHIP_PIC_SLAVE
        if gsi != 2:  # the cascade is no line
            routes.append(chip_route(gsi, chip, gsi % PIC_PINS))
    for gsi in range(IOAPIC_PINS):
        if gsi != IOAPIC_PIN_PIT:
            pin = IOAPIC_PIN_PIT if gsi == GSI_PIT else gsi
            routes.append(chip_route(gsi, abi.KVM_IRQCHIP_IOAPIC, pin))
    return routes


def set_up(vm: "Vm") -> None:
    """Replace KVM's default table, in which line 0 goes to pin 0."""
    vm.set_gsi_routing(chip_routes())
