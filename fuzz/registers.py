"""A target for a machine's bus: chips, PCI, a virtio function and vmmci, with accesses of any kind in any order.

There are no KVM and no other processes.  Time passes only by events in the input.
"""

import struct

from tests.support.virtiopci import LEGACY, MAPPED, MODERN, TABLE, Machine
from vmd.guestmem import GuestMemory, RegionSpec
from vmd.vm import layout
from vmd.vm.boot.fwcfg import FwCfg, for_seabios
from vmd.vm.chips.acpipm import AcpiPm
from vmd.vm.chips.i8042 import I8042
from vmd.vm.chips.mc146818 import Mc146818
from vmd.vm.chips.ns8250 import Uart
from vmd.vm.chips.resetport import ResetPort, SystemControlA
from vmd.vm.vmmci import Vmmci

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20
SLOT_VMMCI, VMMCI = 5, 0xC200

# An access: bits of `how`, a place, an offset from it, and the value to be written.
ACCESS = struct.Struct("<BBHQ")
SIZES = (1, 2, 4, 8)  # chosen by the two lowest bits of `how`; port accesses have at most 4 bytes
WRITE, STRING = 4, 8
PORTS = (
    layout.PORT_COM1, layout.PORT_RTC_INDEX, layout.PORT_ACPI_PM, layout.PORT_PCI_ADDRESS, layout.PORT_FWCFG_SELECT,
    layout.PORT_KBD_DATA, layout.PORT_SYSTEM_CONTROL_A, LEGACY, MODERN, VMMCI, 0,
)  # fmt: skip
ADDRESSES = (TABLE, MAPPED, 0)
PLACES = (*PORTS, *ADDRESSES)
# Further values of the place: not accesses, but other events.
INPUT, BREAK, LATER, BUTTON, INTERRUPT, STATES = range(len(PLACES), len(PLACES) + 6)
EVENTS = (INPUT, BREAK, LATER, BUTTON, INTERRUPT, STATES)
ACCESSES_MAX = 512  # in one input.  Longer inputs would leave time for fewer inputs
DMA_AT = 0x8000  # address of a prepared fw_cfg DMA request in guest memory


class Timer:
    """A scheduled call of a chip."""

    def __init__(self, due_s: float, call: "Callable[[], None]") -> None:
        self.due_s = due_s
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Cancel the call."""
        self.call = None


class Board:
    """The machine."""

    def __init__(self) -> None:
        self.now_s = 1_700_000_000.0
        self.timers: list[Timer] = []
        self.ended = 0  # number of resets and power-offs
        self.memory = GuestMemory.create([RegionSpec(gpa=0, size=MIB, name="ram")])
        self.memory.load(DMA_AT, struct.pack(">IIQ", 0x19 << 16 | 8 | 2, 64, 0x9000))
        self.machine = Machine.fake()
        bus, pci = self.machine.bus, self.machine.pci
        self.uart = Uart(self.line, len)
        self.rtc = Mc146818(self.line, lambda: self.now_s, self.schedule, 64 * MIB, 2, lambda: self.now_s)
        self.pm = AcpiPm(self.line, self.end, monotonic=lambda: self.now_s, schedule=self.schedule)
        self.keyboard = I8042(self.end)
        self.port_a = SystemControlA(self.end)
        self.reset_port = ResetPort(self.end)
        self.fwcfg = FwCfg(self.memory, lambda items: for_seabios(items, memory_bytes=64 * MIB, vcpus=2))
        self.vmmci = Vmmci(lambda _gsi, _level: None, lambda _command: None, self.end)
        pci.byte_ports[layout.PORT_RESET] = self.reset_port
        pci.add(SLOT_VMMCI, self.vmmci)
        bus.add_pio(layout.PORT_COM1, 8, self.uart)
        bus.add_pio(layout.PORT_RTC_INDEX, 2, self.rtc)
        bus.add_pio(layout.PORT_ACPI_PM, AcpiPm.PORTS, self.pm)
        bus.add_pio(layout.PORT_FWCFG_SELECT, FwCfg.PORTS, self.fwcfg)
        bus.add_pio(layout.PORT_KBD_DATA, I8042.PORTS, self.keyboard)
        bus.add_pio(layout.PORT_SYSTEM_CONTROL_A, 1, self.port_a)
        for register, size, value in ((0x10, 4, VMMCI), (4, 2, 1)):
            bus.pio_write(layout.PORT_PCI_ADDRESS, 4, 1 << 31 | SLOT_VMMCI << 11 | register)
            bus.pio_write(layout.PORT_PCI_DATA, size, value)

    def line(self, _level: bool) -> None:
        """Ignore the level of an interrupt line."""

    def end(self) -> None:
        """Count a reset or power-off.  The guest continues here."""
        self.ended += 1

    def schedule(self, seconds: float, call: "Callable[[], None]") -> Timer:
        """Keep a call for `pass_time`."""
        timer = Timer(self.now_s + seconds, call)
        self.timers.append(timer)
        return timer

    def pass_time(self, seconds: float) -> None:
        """Advance the time, and make the calls that are due."""
        self.now_s += seconds
        due = [timer for timer in self.timers if timer.due_s <= self.now_s]
        self.timers = [timer for timer in self.timers if timer.due_s > self.now_s and timer.call is not None]
        for timer in due:
            if timer.call is not None:
                timer.call()

    def access(self, how: int, place: int, offset: int, value: int) -> None:
        """Do one access of a vCPU, or one other event of the machine."""
        bus, place, size = self.machine.bus, place % (len(PLACES) + len(EVENTS)), SIZES[how & 3]
        if place < len(PORTS):
            self.access_port(how, PORTS[place] + offset & 0xFFFF, min(size, 4), value)
        elif place < len(PLACES):
            gpa = ADDRESSES[place - len(PORTS)] + offset
            if how & WRITE:
                bus.mmio_write(gpa, size, value & (1 << 8 * size) - 1)
            else:
                assert 0 <= bus.mmio_read(gpa, size) < 1 << 8 * size
        elif place == INPUT:
            self.uart.receive(value.to_bytes(8, "little"))
        elif place == BREAK:
            self.uart.send_break()
        elif place == LATER:
            self.pass_time(offset / 64)
        elif place == BUTTON:
            self.pm.power_button()
        elif place == INTERRUPT:
            self.machine.process.raise_queue(value & 1)
        else:
            self.save_and_restore()

    def access_port(self, how: int, port: int, size: int, value: int) -> None:
        """Do one port access of a vCPU."""
        bus = self.machine.bus
        if how & WRITE and how & STRING:
            bus.pio_write_string(port, size, value.to_bytes(8, "little"))
        elif how & WRITE:
            bus.pio_write(port, size, value & (1 << 8 * size) - 1)
        elif how & STRING:
            assert len(bus.pio_read_string(port, size, 3)) == 3 * size
        else:
            assert 0 <= bus.pio_read(port, size) < 1 << 8 * size

    def save_and_restore(self) -> None:
        """Save the state of each chip, and restore it."""
        self.uart.restore(self.uart.state())
        self.rtc.restore(self.rtc.state())
        self.pm.restore(self.pm.state())
        self.keyboard.restore(self.keyboard.state())
        self.port_a.restore(self.port_a.state())
        self.reset_port.restore(self.reset_port.state())
        self.fwcfg.restore(self.fwcfg.state())

    def close(self) -> None:
        """Free memory and eventfds."""
        self.machine.close()
        self.memory.close()


def run(data: bytes) -> None:
    """Do the accesses of an input."""
    accesses = data[: ACCESSES_MAX * ACCESS.size]
    board = Board()
    try:
        for how, place, offset, value in ACCESS.iter_unpack(accesses[: len(accesses) // ACCESS.size * ACCESS.size]):
            board.access(how, place, offset, value)
    finally:
        board.close()


def packed(accesses: "Iterator[tuple[int, int, int, int]]") -> bytes:
    """Return an input.  Each access is a place or an event, an offset, a size, and the value to write or -1 to read."""
    return b"".join(
        ACCESS.pack(SIZES.index(size) | (WRITE if value >= 0 else 0), place, offset, max(value, 0))
        for place, offset, size, value in accesses
    )


def drivers() -> "list[bytes]":
    """Return the accesses of well-behaved drivers: of each chip, of virtio by both interfaces, and of vmmci."""
    com1, rtc, pm, pci, fwcfg, keyboard, port_a, legacy, modern, vmmci, _any = range(len(PORTS))
    table = len(PORTS)
    mapped = table + 1

    def config(slot: int, register: int, size: int, value: int = -1) -> "Iterator[tuple[int, int, int, int]]":
        yield pci, 0, 4, 1 << 31 | slot << 11 | register & 0xFC
        yield pci, 4 + (register & 3), size, value

    def chips() -> "Iterator[tuple[int, int, int, int]]":
        for offset, value in ((3, 0x83), (0, 1), (3, 3), (2, 7), (1, 15), (4, 0x1B)):
            yield com1, offset, 1, value
        yield from ((com1, offset, 1, -1) for offset in range(8))
        yield INPUT, 0, 1, 0x4142434445464748
        yield BREAK, 0, 1, 0
        yield com1, 4, 1, 0xB
        yield com1, 0, 1, 0x41
        yield from ((com1, offset, 1, -1) for offset in (2, 5, 0, 5, 0, 2, 6))
        for register, value in ((11, 0x82), (4, 0x12), (7, 3), (9, 0x26), (10, 0x26), (11, 0x72), (1, 0xC0), (0x40, 1)):
            yield rtc, 0, 1, register
            yield rtc, 1, 1, value
        yield LATER, 640, 1, 0
        for register in (0, 2, 4, 6, 7, 8, 9, 10, 12, 13, 0x32, 0x34, 0x5B):
            yield rtc, 0, 1, register
            yield rtc, 1, 1, -1
        yield pm, 2, 2, 0x101
        yield BUTTON, 0, 1, 0
        yield LATER, 0x4000, 1, 0
        yield from ((pm, offset, size, -1) for offset, size in ((0, 2), (2, 2), (4, 2), (8, 4)))
        yield pm, 0, 2, 0x101
        yield pm, 4, 2, 0x3401
        for command, value in ((0x20, -1), (0x60, 0x45), (0xAA, -1), (0xD0, -1), (0xD1, 0xDE), (0xFE, -1)):
            yield keyboard, 4, 1, command
            yield keyboard, 4, 1, -1
            yield keyboard, 0, 1, value
        yield port_a, 0, 1, 3
        yield pci, 1, 1, 6
        yield STATES, 0, 1, 0

    def firmware() -> "Iterator[tuple[int, int, int, int]]":
        for key in (0, 1, 5, 0x19, 0x4002):
            yield fwcfg, 0, 2, key
            yield from [(fwcfg, 1, 1, -1)] * 6
        yield fwcfg, 4, 4, 0
        yield fwcfg, 8, 4, int.from_bytes(struct.pack(">I", DMA_AT), "little")
        yield fwcfg, 4, 4, -1

    def functions() -> "Iterator[tuple[int, int, int, int]]":
        for slot in (0, 1, SLOT_VMMCI):
            yield from (each for register in range(0, 0x80, 4) for each in config(slot, register, 4))
        yield from config(1, 0x10, 4, 0xFFFFFFFF)
        yield from config(1, 0x10, 4)
        yield from config(1, 0x10, 4, 0xC001)
        yield from config(0, 0x59, 1, 0x33)

    def driver() -> "Iterator[tuple[int, int, int, int]]":
        yield from ((modern, 20, 1, status) for status in (0, 1, 3))
        for half in (0, 1):
            yield from ((modern, 0, 4, half), (modern, 4, 4, -1), (modern, 8, 4, half), (modern, 12, 4, half))
        yield modern, 20, 1, 11
        for queue, base in ((0, 0x10000), (1, 0x20000)):
            yield from ((modern, 22, 2, queue), (modern, 24, 2, -1), (modern, 24, 2, 64), (modern, 26, 2, queue))
            for offset, value in ((32, base), (36, 0), (40, base + 0x1000), (48, base + 0x2000)):
                yield modern, offset, 4, value
            yield modern, 28, 2, 1
        yield modern, 16, 2, 2
        yield modern, 20, 1, 15
        for vector in range(3):
            for offset, value in ((12, 1), (0, 0xFEE00000), (4, 0), (8, 0x30 + vector), (12, 0)):
                yield table, 16 * vector + offset, 4, value
        yield INTERRUPT, 0, 1, 0
        yield from ((mapped, offset, 4, -1) for offset in (0, 0x14, 0x44, 0x80, 0x800))
        yield modern, 0x40, 2, 0
        yield modern, 20, 1, 0
        yield STATES, 0, 1, 0

    def driver_of_old() -> "Iterator[tuple[int, int, int, int]]":
        for port in (legacy, vmmci):
            yield from ((port, offset, 4, -1) for offset in (0, 8, 12, 16, 20))
            yield port, 18, 1, 3
            yield port, 4, 4, 7
            for queue in (0, 1):
                yield from ((port, 14, 2, queue), (port, 12, 2, -1), (port, 8, 4, 16 + 16 * queue), (port, 8, 4, -1))
            yield port, 18, 1, 7
            yield port, 16, 2, 0
            yield from ((port, 19, 1, -1), (port, 20, 4, 1), (port, 24, 4, -1), (port, 18, 1, 0))
        yield INTERRUPT, 0, 1, 1

    return [packed(each()) for each in (chips, firmware, functions, driver, driver_of_old)]
