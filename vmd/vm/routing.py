"""Which interrupt line goes where: KVM's GSI routing table, which is always replaced as a whole (api.rst 4.52)."""

from vmd import threads
from vmd.kvmapi import abi
from vmd.kvmapi.vm import chip_route, msi_route

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


class Routing:
    """The table of one VM: the chips' fixed part, and a GSI of its own for each MSI-X vector of a device."""

    def __init__(self, vm: "Vm") -> None:
        self._vm = vm
        self._lock = threads.Lock()
        self._messages: dict[int, tuple[int, int]] = {}  # gsi -> address, data
        self._next_gsi = IOAPIC_PINS
        self._commit()

    def allocate(self, count: int) -> int:
        """Return the first of `count` GSIs that are nobody else's; there is no route behind them yet."""
        first = self._next_gsi
        self._next_gsi += count
        return first

    def set_message(self, gsi: int, address: int, data: int) -> None:
        """Let a GSI send this message from now on."""
        with self._lock:
            if self._messages.get(gsi) != (address, data):
                self._messages[gsi] = (address, data)
                self._commit()

    def _commit(self) -> None:
        messages = [msi_route(gsi, address, data) for gsi, (address, data) in self._messages.items()]
        self._vm.set_gsi_routing(chip_routes() + messages)
