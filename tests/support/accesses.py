"""A driver that makes the accesses listed in a row of `tests/unit/virtio/orders.py`, through one view of a device."""

from tests.support.virtiopci import LEGACY, Machine
from vmd.virtio import spec
from vmd.virtio.transport import COMMON_BYTES
from vmd.vm import virtio

LEGACY_REGISTERS = {
    "features": (0, 4), "guest_features": (4, 4), "pfn": (8, 4), "size": (12, 2), "select": (14, 2), "status": (18, 1),
    "isr": (19, 1), "config_vector": (20, 2), "queue_vector": (22, 2),
}  # fmt: skip
COMMON_REGISTERS = {
    "device_feature_select": (0, 4), "device_feature": (4, 4), "driver_feature_select": (8, 4),
    "driver_feature": (12, 4), "config_vector": (16, 2), "num_queues": (18, 2), "status": (20, 1),
    "config_generation": (21, 1), "select": (22, 2), "size": (24, 2), "vector": (26, 2), "enable": (28, 2),
    "notify_off": (30, 2), "desc": (32, 8), "desc_lo": (32, 4), "desc_hi": (36, 4), "avail": (40, 8),
    "avail_lo": (40, 4), "avail_hi": (44, 4), "used": (48, 8), "used_lo": (48, 4), "used_hi": (52, 4),
    "isr": (virtio.ISR, 1), "config": (virtio.DEVICE_CONFIG, 1),
}  # fmt: skip
assert max(at for at, _ in COMMON_REGISTERS.values() if at < virtio.NOTIFY) < COMMON_BYTES

PORTS, MEMORY, LEGACY_PORTS, WINDOW = "ports", "memory", "legacy ports", "window"


class Driver:
    """A driver of one device.  `symbols` maps the names that rows may use to their values."""

    def __init__(self, machine: Machine, view: str, symbols: dict[str, int]) -> None:
        self.machine = machine
        self.view = view
        self.legacy = view == LEGACY_PORTS
        self.registers = LEGACY_REGISTERS if self.legacy else COMMON_REGISTERS
        transport = machine.function.transport
        offered = transport.offered_legacy if self.legacy else transport.offered & 0xFFFFFFFF
        self.symbols = {"F": offered, **symbols}
        self.vectors: set[int] = set()  # those whose MSI-X table entry is filled in
        self.early = False  # the device was active before the driver wrote DRIVER_OK
        machine.mapped = view == MEMORY

    def run(self, steps: str) -> None:
        """Carry out all steps of a row, which blanks separate."""
        for step in steps.split():
            self.step(step)

    def step(self, step: str) -> None:
        """Carry out one step; a value of eight bytes takes two accesses.  Raises AssertionError for a wrong value."""
        place, asks, given = step.partition("?") if "?" in step else step.partition("=")
        name, _, width = place.partition(":")
        if asks == "?":
            found = self.read(name, int(width or 0))
            assert not given or found == self.value(given), f"{step}: {found:#x}"
        elif name == "notify":
            self.notify(int(given))
        elif name == "msix":
            self.machine.enable_msix(0x8000 * int(given))
        elif name == "table":
            self.machine.set_vector(int(given), 0x40 + int(given))
            self.vectors.add(int(given))
        else:
            if name == "status" and self.value(given) & spec.DRIVER_OK:
                self.early |= self.machine.function.transport.active
            self.write(name, int(width or 0), self.value(given))

    def notify(self, queue: int) -> None:
        """Notify a queue at the address that the device gave."""
        if self.view == WINDOW:
            capability = self.machine.capabilities()[spec.VIRTIO_PCI_CAP_NOTIFY_CFG]
            at, multiplier = (self.machine.config_read(capability + word, 4) for word in (8, 16))
            self.machine.config_write(self.point(at + queue * multiplier, virtio.NOTIFY_BYTES), 2, queue)
        else:
            self.machine.notify(queue, LEGACY + virtio.LEGACY_NOTIFY if self.legacy else None)

    def value(self, text: str) -> int:
        """Return the number that a word of a row stands for: a symbol, or hexadecimal digits."""
        if text == "OFF":
            transport = self.machine.function.transport
            return transport.queue_select if transport.separate_notify else 0
        return self.symbols[text] if text in self.symbols else int(text, 16)

    def place(self, name: str, width: int) -> tuple[int, int]:
        """Return offset and width of an access to a register."""
        if self.legacy and name == "config":
            return self.machine.function.transport.legacy_config_offset(), width or 1
        at, own = self.registers[name]
        return at, width or own

    def read(self, name: str, width: int) -> int:
        """Read a register."""
        at, size = self.place(name, width)
        if self.legacy:
            return self.machine.legacy_read(at, size)
        if self.view == WINDOW:
            window = self.point(at, size)
            return self.machine.config_read(window, size)
        return self.machine.read(at, size)

    def write(self, name: str, width: int, value: int) -> None:
        """Write a register."""
        at, size = self.place(name, width)
        pieces = [(at, size, value)]
        if size == 8 and not width:
            pieces = [(at, 4, value & 0xFFFFFFFF), (at + 4, 4, value >> 32)]
        for at, size, value in pieces:
            if self.legacy:
                self.machine.legacy_write(at, size, value)
            elif self.view == WINDOW:
                self.machine.config_write(self.point(at, size), size, value)
            else:
                self.machine.write(at, size, value)

    def point(self, at: int, size: int) -> int:
        """Point VIRTIO_PCI_CAP_PCI_CFG at a register, as iPXE does; return the offset of the window's data."""
        capability = self.machine.capabilities()[spec.VIRTIO_PCI_CAP_PCI_CFG]
        bar = self.machine.config_read(self.machine.capabilities()[spec.VIRTIO_PCI_CAP_COMMON_CFG] + 4, 1)
        for word, width, value in ((4, 1, bar), (12, 4, size), (8, 4, at)):
            self.machine.config_write(capability + word, width, value)
        return capability + 16
