"""The routes of interrupts: KVM's GSI routing table, which is always replaced as a whole (api.rst 4.52)."""

from vmd import threads
from vmd.kvmapi import abi
from vmd.kvmapi.vm import chip_route, msi_route
from vmd.vm import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.kvmapi.vm import Vm

PIC_PINS = 8  # of each 8259


def chip_routes() -> list[abi.kvm_irq_routing_entry]:
    """Return the fixed routes: each ISA line to its 8259, and all lines to the I/O APIC, where line 0 has pin 2."""
    routes = []
    for gsi in range(2 * PIC_PINS):
        chip = abi.KVM_IRQCHIP_PIC_MASTER if gsi < PIC_PINS else abi.KVM_IRQCHIP_PIC_SLAVE
        if gsi != 2:  # pin 2 of the master connects the slave, and has no line
            routes.append(chip_route(gsi, chip, gsi % PIC_PINS))
    for gsi in range(abi.KVM_IOAPIC_NUM_PINS):
        if gsi != layout.GSI_PIT:
            pin = layout.GSI_PIT if gsi == layout.IRQ_PIT else gsi
            routes.append(chip_route(gsi, abi.KVM_IRQCHIP_IOAPIC, pin))
    return routes


class Routing:
    """The table of one VM: the chips' fixed part, and a GSI of its own for each MSI-X vector of a device."""

    def __init__(self, vm: "Vm") -> None:
        self._vm = vm
        self._lock = threads.Lock()
        self._messages: dict[int, tuple[int, int]] = {}  # gsi -> address, data
        self._next_gsi = abi.KVM_IOAPIC_NUM_PINS
        self._commit()

    def allocate(self, count: int) -> int:
        """Reserve `count` GSIs in a row, and return the first.  They have no routes yet."""
        first = self._next_gsi
        self._next_gsi += count
        return first

    def set_message(self, gsi: int, address: int, data: int) -> None:
        """Set the message that a GSI sends."""
        with self._lock:
            if self._messages.get(gsi) != (address, data):
                self._messages[gsi] = (address, data)
                self._commit()

    def _commit(self) -> None:
        messages = [msi_route(gsi, address, data) for gsi, (address, data) in self._messages.items()]
        self._vm.set_gsi_routing(chip_routes() + messages)
