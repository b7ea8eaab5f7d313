"""PCI configuration space, BAR placement and MSI-X, on the real bus with fake devices that record accesses."""

import struct
import threading
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmd.log import log
from vmd.units import MIB
from vmd.vm import layout, pci
from vmd.vm.bus import Bus
from vmd.vm.msix import Msix

ADDRESS, DATA = layout.PORT_PCI_ADDRESS, layout.PORT_PCI_DATA
WINDOW = 0x80000000  # start of the PCI window of a machine with 128 MiB
IO_BASE = 0xC000


class Registers:
    """A device whose registers are plain memory, for ports and MMIO."""

    def __init__(self, fill: int = 0) -> None:
        self.content = bytearray([fill]) * 4096

    def pio_read(self, offset: int, size: int) -> int:
        """Return the bytes that were written, or the fill."""
        return int.from_bytes(self.content[offset : offset + size], "little")

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Keep the bytes."""
        self.content[offset : offset + size] = value.to_bytes(size, "little")

    mmio_read = pio_read
    mmio_write = pio_write


class Function(pci.PciFunction):
    """A network card with one BAR of each kind.  It records all calls."""

    def __init__(self, fill: int = 0x11, vectors: int = 2) -> None:
        super().__init__(
            vendor=0x1AF4,
            device=0x1000,
            class_code=0x020000,
            subsystem_vendor=0x0B5D,
            subsystem=1,
            interrupt_pin=1,
        )
        self.events: list[tuple[int, int | None]] = []
        self.commands: list[int] = []
        self.changes: list[tuple[int, int, int, bool]] = []
        self.switches: list[bool] = []
        self.pending: set[int] = set()
        self.line = False
        self.registers = Registers(fill)
        self.add_io_bar(0, 128, self.registers)
        self.table = Msix(vectors, self.on_change, self.pending.__contains__, self.switches.append)
        self.cap = self.add_msix(self.table, 1)

    def on_change(self, vector: int, address: int, data: int, masked: bool) -> None:
        """Record the change of a vector."""
        self.changes.append((vector, address, data, masked))

    def bar_changed(self, index: int, base: int | None) -> None:
        """Record the change of a BAR."""
        super().bar_changed(index, base)
        self.events.append((index, base))

    def command_changed(self, command: int) -> None:
        """Record the change of the command register."""
        self.commands.append(command)

    def interrupt_pending(self) -> bool:
        """Return the value that the test has set."""
        return self.line


class PlainFunction(pci.PciFunction):
    """A function without BARs."""

    def __init__(self) -> None:
        super().__init__(vendor=1, device=2, class_code=0xFF0000, subsystem_vendor=3, subsystem=4)


class Guest:
    """A driver that uses ports for configuration mechanism 1."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus

    def select(self, slot: int, register: int, bus: int = 0, function: int = 0) -> None:
        """Write the address register."""
        address = 1 << 31 | bus << 16 | slot << 11 | function << 8 | register & 0xFC
        self.bus.pio_write(ADDRESS, 4, address)

    def read(self, slot: int, register: int, size: int = 4) -> int:
        """Read configuration space."""
        self.select(slot, register)
        return self.bus.pio_read(DATA + (register & 3), size)

    def write(self, slot: int, register: int, value: int, size: int = 4) -> None:
        """Write configuration space."""
        self.select(slot, register)
        self.bus.pio_write(DATA + (register & 3), size, value)


class Machine:
    """A bus with a host bridge and functions in slots 1, 2, ..."""

    def __init__(self, functions: int = 1, memory_bytes: int = 128 * MIB) -> None:
        self.bus = Bus()
        self.pci = pci.PciBus(self.bus, memory_bytes)
        self.bus.add_pio(ADDRESS, 8, self.pci)
        self.pci.add(0, pci.HostBridge())
        self.functions = [Function(fill=0x11 * (index + 1) & 0xFF) for index in range(functions)]
        for index, function in enumerate(self.functions):
            self.pci.add(index + 1, function)
        self.guest = Guest(self.bus)


@pytest.fixture
def machine() -> Machine:
    """Return a machine with one function, in slot 1."""
    return Machine()


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list that collects log lines."""
    written: list[str] = []
    monkeypatch.setattr(log, "write", lambda _severity, text: written.append(text))
    return written


# Configuration mechanism 1


def test_host_bridge_is_the_one_that_seabios_looks_for(machine: Machine) -> None:
    """It has the ids, subsystem ids, class and revision of a 440FX, and a plain header without BARs."""
    assert machine.guest.read(0, 0x00) == 0x12378086
    assert machine.guest.read(0, 0x08) == 0x06000002
    assert machine.guest.read(0, 0x2C) == 0x11001AF4
    assert machine.guest.read(0, 0x0E, 1) == 0
    assert [machine.guest.read(0, at) for at in range(0x10, 0x28, 4)] == [0] * 6


def test_a_header_starts_with_the_given_values_and_zeroes() -> None:
    """All other registers are zero until the guest's firmware sets them."""
    given = {pci.VENDOR_ID: 0x1AF4, pci.DEVICE_ID: 0x1000, pci.SUBSYSTEM_VENDOR_ID: 0x0B5D, pci.SUBSYSTEM_ID: 1}
    header = bytearray(pci.HEADER_END)
    for register, value in given.items():
        header[register : register + 2] = value.to_bytes(2, "little")
    header[pci.REVISION_ID] = 5
    header[pci.CLASS_CODE : pci.CLASS_CODE + 3] = (0x020001).to_bytes(3, "little")
    header[pci.INTERRUPT_PIN] = 1

    function = pci.PciFunction(
        vendor=0x1AF4,
        device=0x1000,
        class_code=0x020001,
        subsystem_vendor=0x0B5D,
        subsystem=1,
        revision=5,
        interrupt_pin=1,
    )

    assert function.config[: pci.HEADER_END] == header
    assert not any(function.config[pci.HEADER_END :])


def test_host_bridge_keeps_writes_to_pam_registers_only(machine: Machine) -> None:
    """SeaBIOS reads 58h-5Fh as two dwords, finds RAM not enabled, and writes both back."""
    assert machine.guest.read(0, 0x58) == machine.guest.read(0, 0x5C) == 0

    machine.guest.write(0, 0x58, 0x33333030 | 0xFF)
    machine.guest.write(0, 0x5C, 0x33333333)

    assert machine.guest.read(0, 0x58) == 0x33333000
    assert machine.guest.read(0, 0x5C) == 0x33333333


@pytest.mark.parametrize(
    ("slot", "bus", "function"),
    [(2, 0, 0), (31, 0, 0), (1, 1, 0), (1, 255, 0), (1, 0, 1), (0, 0, 7)],
)
def test_absent_functions_read_all_ones(machine: Machine, slot: int, bus: int, function: int) -> None:
    """So do other buses and functions 1 to 7.  Writes are dropped."""
    machine.guest.select(slot, 0x3C, bus, function)
    machine.bus.pio_write(DATA, 4, 0x05)

    assert [machine.bus.pio_read(DATA, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFFFFFF]
    assert machine.guest.read(1, 0x3C, 1) == 0


def test_data_port_uses_byte_lanes(machine: Machine) -> None:
    """A narrow access reads or writes the bytes of its own port (unlike vmd)."""
    assert machine.guest.read(1, 0x02, 2) == 0x1000
    assert machine.guest.read(1, 0x01, 1) == 0x1A
    assert machine.guest.read(1, 0x0B, 1) == 0x02

    machine.guest.write(1, 0x0D, 0x40, 1)

    assert machine.guest.read(1, 0x0C) == 0x4000


def test_address_register_needs_the_enable_bit(machine: Machine) -> None:
    """Without that bit no device answers at the data port."""
    machine.bus.pio_write(ADDRESS, 4, 1 << 11)
    assert machine.bus.pio_read(DATA, 4) == 0xFFFFFFFF


@pytest.mark.parametrize(
    ("written", "read"),
    [(0x80000000, 0x80000000), (0xFFFFFFFF, 0x80FFFFFC), (0xFF000001, 0x80000000), (0, 0)],
)
def test_address_register_has_hard_wired_zeros(machine: Machine, written: int, read: int) -> None:
    """Operating systems use them to detect mechanism 1."""
    machine.bus.pio_write(ADDRESS, 4, written)
    assert machine.bus.pio_read(ADDRESS, 4) == read


@pytest.mark.parametrize(("port", "size"), [(0xCF8, 1), (0xCF8, 2), (0xCFA, 2), (0xCFB, 1), (0xCFA, 1)])
def test_narrow_access_to_the_address_register_is_ignored(machine: Machine, port: int, size: int) -> None:
    """It neither changes nor reads the register (Linux writes 1 to CFBh when it probes)."""
    machine.bus.pio_write(ADDRESS, 4, 0x80000800)
    machine.bus.pio_write(port, size, 0)

    assert machine.bus.pio_read(port, size) == (1 << 8 * size) - 1
    assert machine.bus.pio_read(ADDRESS, 4) == 0x80000800


def test_cf9_belongs_to_another_chip() -> None:
    """Byte accesses to CF9h reach the injected device, and wider accesses do not."""
    bus, reset = Bus(), Registers(fill=0x02)
    bus.add_pio(ADDRESS, 8, pci.PciBus(bus, 128 * MIB, byte_ports={layout.PORT_RESET: reset}))

    bus.pio_write(layout.PORT_RESET, 2, 0xFFFF)
    assert bus.pio_read(layout.PORT_RESET, 1) == 0x02

    bus.pio_write(layout.PORT_RESET, 1, 0x06)
    assert bus.pio_read(layout.PORT_RESET, 1) == 0x06
    assert bus.pio_read(ADDRESS, 4) == 0


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("size", [1, 2, 4])
def test_access_across_register_and_device_ends(machine: Machine, offset: int, size: int) -> None:
    """Hostile 51: an access across CFBh/CFCh or CFFh/D00h has a result of its size, with and without the bus."""
    machine.bus.pio_write(ADDRESS, 4, 0x80000800)

    assert 0 <= machine.pci.pio_read(offset, size) < 1 << 8 * size
    assert 0 <= machine.bus.pio_read(ADDRESS + offset, size) < 1 << 8 * size
    machine.pci.pio_write(offset, size, (1 << 8 * size) - 1)
    machine.bus.pio_write(ADDRESS + offset, size, (1 << 8 * size) - 1)
    assert machine.guest.read(1, 0x00) == 0x10001AF4


def test_slots_are_checked(machine: Machine) -> None:
    """A slot number must exist, and a slot holds one function."""
    for slot in (-1, 32):
        with pytest.raises(ValueError, match=f"slot {slot} is not between"):
            machine.pci.add(slot, Function())
    with pytest.raises(ValueError, match="slot 1 is taken"):
        machine.pci.add(1, Function())


# Configuration space of a function


@pytest.mark.parametrize("register", [0x00, 0x08, 0x2C, 0x30, 0x34, 0x28, 0x24, 0x40 - 4])
def test_read_only_registers_stay(machine: Machine, register: int) -> None:
    """Ids, class, expansion ROM, capability pointer and unused BARs keep their values."""
    before = machine.guest.read(1, register)
    machine.guest.write(1, register, 0xFFFFFFFF)
    machine.guest.write(1, register, 0x00000000)
    assert machine.guest.read(1, register) == before


def test_the_latency_timer_takes_every_value(machine: Machine) -> None:
    """It has no effect.  Firmware writes it."""
    for value in (0xFF, 0x40, 0):
        machine.guest.write(1, pci.LATENCY_TIMER, value, 1)
        assert machine.guest.read(1, pci.LATENCY_TIMER, 1) == value


def test_command_register_keeps_its_writable_bits(machine: Machine) -> None:
    """The function is told once for each change."""
    machine.guest.write(1, 0x04, 0xFFFF, 2)
    machine.guest.write(1, 0x04, 0xFFFF, 2)

    assert machine.guest.read(1, 0x04, 2) == 0x0547
    assert machine.functions[0].commands == [0x0547]


def test_status_bits_are_cleared_by_ones(machine: Machine) -> None:
    """To write zero keeps them.  Read-only status bits are never cleared."""
    machine.functions[0].config[0x07] |= 0xF1
    machine.guest.write(1, 0x06, 0, 2)
    assert machine.guest.read(1, 0x06, 2) == 0xF110

    machine.guest.write(1, 0x04, 0x8000FFFF)
    assert machine.guest.read(1, 0x06, 2) == 0x7110
    machine.functions[0].config[0x06:0x08] = b"\xf7\xff"
    machine.guest.write(1, 0x06, 0xFFFF, 2)
    assert machine.guest.read(1, 0x06, 2) == 0x06F7


def test_interrupt_status_shows_the_line(machine: Machine) -> None:
    """Bit 3 of the status register shows it, in accesses of every size."""
    assert not machine.guest.read(1, 0x06, 2) & 8
    machine.functions[0].line = True
    assert machine.guest.read(1, 0x06, 2) & 8
    assert machine.guest.read(1, 0x04, 4) >> 16 & 8
    assert machine.guest.read(1, 0x06, 1) & 8
    assert not machine.guest.read(1, 0x04, 2) & 8
    assert not machine.guest.read(1, 0x07, 1) & 8


def test_interrupt_line_is_writable(machine: Machine) -> None:
    """The interrupt pin is read-only."""
    machine.guest.write(1, 0x3C, 0xFFFF, 2)
    assert machine.guest.read(1, 0x3C, 2) == 0x01FF


def test_capabilities_form_a_list_with_write_masks(machine: Machine) -> None:
    """The list is in order of addition, dword-aligned, and ends with zero.  Only bits in a write mask change."""
    function = Function()
    first = function.add_capability(0x09, b"\x05\x01\x02", b"\x00\x0f")
    second = function.add_capability(0x09, bytes(18), bytes(14) + b"\xff" * 4)
    machine.pci.add(2, function)

    chain = []
    at = machine.guest.read(2, 0x34, 1)
    while at:
        chain.append((at, machine.guest.read(2, at, 1)))
        at = machine.guest.read(2, at + 1, 1)
    machine.guest.write(2, first, 0xFFFFFFFF)
    machine.guest.write(2, second + 16, 0x12345678)

    assert chain == [(0x40, 0x11), (first, 0x09), (second, 0x09)]
    assert first == 0x4C
    assert second == 0x54
    assert machine.guest.read(2, 0x06, 2) & 0x10
    assert machine.guest.read(2, first) == 0x0F050009 | second << 8
    assert machine.guest.read(2, first + 4, 1) == 0x02
    assert machine.guest.read(2, second + 16) == 0x12345678


def test_capability_without_room_is_refused() -> None:
    """Configuration space ends at 256 bytes."""
    function = Function()
    with pytest.raises(ValueError, match="no room for a capability of 256 bytes"):
        function.add_capability(0x09, bytes(254))
    with pytest.raises(ValueError, match="write mask of 2 bytes"):
        function.add_capability(0x09, b"\0", b"\0\0")
    left = 256 - 0x4C
    with pytest.raises(ValueError, match=f"no room for a capability of {left + 1} bytes at 0x4c"):
        function.add_capability(0x09, bytes(left - 1))
    assert function.add_capability(0x09, bytes(left - 2), b"\xff" * (left - 2)) == 0x4C


def test_the_smallest_and_the_largest_bars() -> None:
    """They are those that `add_io_bar` and `add_memory_bar` promise.  A guest finds their sizes."""
    function = Function()
    for index, size in ((2, 4), (3, 256)):
        assert function.add_io_bar(index, size, Registers()).size == size
    for index, size in ((4, 16), (5, 1 << 30)):
        assert function.add_memory_bar(index, size, Registers()).size == size
    for index in range(2, 6):
        function.config_write(0x10 + 4 * index, 4, 0xFFFFFFFF)
    assert [function.config_read(0x10 + 4 * index, 4) for index in range(2, 6)] == [
        0xFFFFFFFD, 0xFFFFFF01, 0xFFFFFFF0, 0xC0000000,
    ]  # fmt: skip


@pytest.mark.parametrize(("index", "size"), [(2, 48), (2, 2), (2, 512), (6, 16), (0, 16), (-1, 16)])
def test_impossible_io_bars_are_refused(index: int, size: int) -> None:
    """The size is no power of two, too small or too large, or the BAR does not exist or is taken."""
    with pytest.raises(ValueError, match=f"bar {index}"):
        Function().add_io_bar(index, size, Registers())


@pytest.mark.parametrize("size", [8, 4097, 1 << 31])
def test_impossible_memory_bars_are_refused(size: int) -> None:
    """The size is no power of two, too small or too large."""
    with pytest.raises(ValueError, match="bar 2"):
        Function().add_memory_bar(2, size, Registers())


# BARs


def test_sizing_shows_size_and_kind(machine: Machine) -> None:
    """After a write of all ones a BAR reads as its size and kind.  Unused BARs and the expansion ROM stay zero."""
    sizes = []
    for register in (*range(0x10, 0x28, 4), 0x30):
        machine.guest.write(1, register, 0xFFFFFFFF)
        sizes.append(machine.guest.read(1, register))
    assert sizes == [0xFFFFFF81, 0xFFFFF000, 0, 0, 0, 0, 0]


def test_the_command_register_enables_bars(machine: Machine) -> None:
    """It enables and disables I/O and memory separately."""
    guest, function = machine.guest, machine.functions[0]
    guest.write(1, 0x10, IO_BASE)
    guest.write(1, 0x14, WINDOW)
    assert function.events == []
    assert machine.bus.pio_read(IO_BASE, 1) == 0xFF

    guest.write(1, 0x04, 1, 2)
    assert machine.bus.pio_read(IO_BASE + 127, 1) == 0x11
    assert machine.bus.pio_read(IO_BASE + 128, 1) == 0xFF
    assert machine.bus.mmio_read(WINDOW, 1) == 0xFF

    guest.write(1, 0x04, 2, 2)
    assert machine.bus.pio_read(IO_BASE, 1) == 0xFF
    assert machine.bus.mmio_read(WINDOW, 1) == 0

    guest.write(1, 0x04, 0, 2)
    assert machine.bus.mmio_read(WINDOW, 1) == 0xFF
    assert function.events == [(0, IO_BASE), (0, None), (1, WINDOW), (1, None)]


def test_moved_bar_is_unmapped_first(machine: Machine) -> None:
    """The function is told None in between, and is told nothing if nothing changed."""
    machine.guest.write(1, 0x04, 1, 2)
    machine.guest.write(1, 0x10, 0xC000)
    machine.guest.write(1, 0x10, 0xC07F)
    machine.guest.write(1, 0x10, 0xD000)

    assert machine.functions[0].events == [(0, 0xC000), (0, None), (0, 0xD000)]
    assert machine.bus.pio_read(0xC000, 1) == 0xFF
    assert machine.bus.pio_read(0xD000, 1) == 0x11


@pytest.mark.parametrize(
    "base", [0x80, 0x600, 0xC80, 0xF80, 0x10000, 0x1C000, 0xFFFF8000], ids=lambda base: f"{base:#x}"
)
def test_io_bar_outside_pci_ports_is_not_mapped(machine: Machine, lines: list[str], base: int) -> None:
    """Hostile 8: the address is at a chip's ports, or no port at all.  The register keeps the written value."""
    machine.guest.write(1, 0x04, 1, 2)
    machine.guest.write(1, 0x10, base)

    assert machine.functions[0].events == []
    assert machine.guest.read(1, 0x10) == base | 1
    assert lines == [f"pci slot 1: bar 0 stays unmapped, i/o address {base:#x} is not free"]


@pytest.mark.parametrize(
    "base",
    [0x1000, 0xA0000, 0x100000, 128 * MIB - 4096, 0xFEC00000, 0xFEE00000, 0xFEFFC000, 0xFFFC0000],
    ids=lambda base: f"{base:#x}",
)
def test_memory_bar_outside_the_window_is_not_mapped(machine: Machine, lines: list[str], base: int) -> None:
    """Hostile 8: the addresses are those of RAM, I/O APIC, local APIC, KVM's pages and firmware."""
    machine.guest.write(1, 0x04, 2, 2)
    machine.guest.write(1, 0x14, base)

    assert machine.functions[0].events == []
    assert lines == [f"pci slot 1: bar 1 stays unmapped, memory address {base:#x} is not free"]


@pytest.mark.parametrize("memory_bytes", [3584 * MIB, 5120 * MIB], ids=["3.5G", "5G"])
def test_memory_bar_on_low_ram_of_a_large_machine_is_not_mapped(lines: list[str], memory_bytes: int) -> None:
    """Low RAM of such a machine ends at E0000000h."""
    machine = Machine(memory_bytes=memory_bytes)
    machine.guest.write(1, 0x04, 2, 2)
    machine.guest.write(1, 0x14, 0xDFFFF000)
    machine.guest.write(1, 0x14, 0xE0000000)
    machine.guest.write(1, 0x14, 0xFEBFF000)

    assert machine.functions[0].events == [(1, 0xE0000000), (1, None), (1, 0xFEBFF000)]
    assert len(lines) == 1


def test_sizing_while_decoding_is_not_logged(machine: Machine, lines: list[str]) -> None:
    """Hostile 8: the BAR is unmapped and mapped again, and the log stays empty."""
    machine.guest.write(1, 0x04, 3, 2)
    for register, base in ((0x10, IO_BASE), (0x14, WINDOW)):
        machine.guest.write(1, register, base)
        machine.guest.write(1, register, 0xFFFFFFFF)
        machine.guest.write(1, register, base)

    assert machine.functions[0].events == [
        *((0, IO_BASE), (0, None), (0, IO_BASE)),
        *((1, WINDOW), (1, None), (1, WINDOW)),
    ]
    assert lines == []


def test_bar_storm_does_not_flood_the_log(machine: Machine, lines: list[str]) -> None:
    """A thousand bad addresses give a few lines."""
    machine.guest.write(1, 0x04, 2, 2)
    for page in range(1, 1000):
        machine.guest.write(1, 0x14, page * 4096)
    assert 1 <= len(lines) <= 6


def test_overlapping_bars_go_to_the_lower_slot() -> None:
    """The other BAR is mapped while the address is free, and loses it again."""
    machine = Machine(functions=2)
    for slot in (2, 1):
        machine.guest.write(slot, 0x10, IO_BASE + 128 * (slot - 1))
        machine.guest.write(slot, 0x04, 1, 2)
    assert machine.bus.pio_read(IO_BASE + 128, 1) == 0x22

    machine.guest.write(1, 0x10, IO_BASE + 128)
    assert machine.bus.pio_read(IO_BASE + 128, 1) == 0x11

    machine.guest.write(1, 0x04, 0, 2)
    assert machine.bus.pio_read(IO_BASE + 128, 1) == 0x22
    assert machine.functions[1].events == [(0, 0xC080), (0, None), (0, 0xC080)]


def test_ports_and_memory_do_not_collide() -> None:
    """A port and a memory address with the same number are different."""
    machine = Machine(memory_bytes=128 * MIB)
    function = Function()
    function.add_memory_bar(2, 4096, Registers(fill=0x77))
    machine.pci.add(2, function)
    machine.guest.write(2, 0x18, 0x0800C000)
    machine.guest.write(1, 0x10, 0x0000C000)
    machine.guest.write(2, 0x04, 2, 2)
    machine.guest.write(1, 0x04, 1, 2)

    assert machine.bus.mmio_read(0x0800C000, 1) == 0x77
    assert machine.bus.pio_read(0xC000, 1) == 0x11


# MSI-X


def entry(address: int = 0xFEE01000, data: int = 0x41, control: int = 0) -> bytes:
    """Return a table entry."""
    return struct.pack("<QII", address, data, control)


def write_entry(msix: Msix, vector: int, content: bytes) -> None:
    """Write a table entry as Linux does, dword by dword."""
    for at in range(0, 16, 4):
        msix.mmio_write(vector * 16 + at, 4, int.from_bytes(content[at : at + 4], "little"))


def test_msix_capability_describes_the_table(machine: Machine) -> None:
    """It has the size less one, and places table and pending bits in one BAR.  Only enable and mask are writable."""
    cap = machine.functions[0].cap
    machine.guest.write(1, cap, 0xFFFFFFFF)

    assert machine.guest.read(1, cap, 1) == 0x11
    assert machine.guest.read(1, cap + 2, 2) == 0xC001
    assert machine.guest.read(1, cap + 4) == 1
    assert machine.guest.read(1, cap + 8) == 0x801


@pytest.mark.parametrize(
    ("vectors", "pba", "bar"),
    [(1, 2048, 4096), (128, 2048, 4096), (129, 4096, 8192), (2048, 32768, 65536)],
)
def test_msix_bar_holds_table_and_pending_bits(vectors: int, pba: int, bar: int) -> None:
    """One page is enough for all our devices.  A larger table takes the next power of two."""
    msix = Msix(vectors, lambda *_: None, lambda _: True)

    assert (msix.pba_offset, msix.bar_bytes) == (pba, bar)
    assert msix.mmio_read((vectors - 1) * 16 + 12, 4) == 1
    assert msix.mmio_read(pba + (vectors - 1) // 64 * 8, 8).bit_count() == (vectors - 1) % 64 + 1


def test_a_message_has_all_its_bits() -> None:
    """An address of 64 bits and data of 32 bits.  A vector is masked by its own bit, or all at once."""
    msix = Msix(2, lambda *_: None, lambda _: False)
    write_entry(msix, 1, bytes(range(0x10, 0x1C)) + bytes(4))
    address, data = 0x1716151413121110, 0x1B1A1918
    assert msix.message(1) == (address, data, True)
    for control, masked in ((0x8000, False), (0xC000, True), (0x4000, True)):
        msix.set_control(control)
        assert [msix.message(vector) for vector in range(2)] == [(0, 0, True), (address, data, masked)]


@pytest.mark.parametrize("vectors", [0, 2049])
def test_msix_has_between_1_and_2048_vectors(vectors: int) -> None:
    """The capability has room for 2048."""
    with pytest.raises(ValueError, match=f"{vectors} msi-x vectors"):
        Msix(vectors, lambda *_: None, lambda _: False)


def test_a_change_of_a_deliverable_vector_is_reported(machine: Machine) -> None:
    """Enable bit, function mask and vector mask decide.  Changes of a masked entry are not reported."""
    function, guest = machine.functions[0], machine.guest
    write_entry(function.table, 1, entry())
    assert function.changes == []

    guest.write(1, function.cap + 2, 0xC000, 2)
    assert function.changes == []
    guest.write(1, function.cap + 2, 0x8000, 2)
    assert function.changes == [(1, 0xFEE01000, 0x41, False)]

    function.table.mmio_write(28, 4, 1)
    function.table.mmio_write(24, 4, 0x42)
    function.table.mmio_write(28, 4, 0)
    function.table.mmio_write(24, 4, 0x43)
    assert function.changes[1:] == [
        (1, 0xFEE01000, 0x41, True),
        (1, 0xFEE01000, 0x42, False),
        (1, 0xFEE01000, 0x43, False),
    ]

    guest.write(1, function.cap + 3, 0x00, 1)
    assert function.changes[4:] == [(1, 0xFEE01000, 0x43, True)]
    assert function.switches == [True, False]
    assert function.table.message(1) == (0xFEE01000, 0x43, True)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_table_takes_every_access_size(machine: Machine, size: int) -> None:
    """Hostile 9: reserved bits and alignment bits stay zero."""
    msix = machine.functions[0].table
    for at in range(0, 32, size):
        msix.mmio_write(at, size, (1 << 8 * size) - 1)

    raw = b"".join(msix.mmio_read(at, size).to_bytes(size, "little") for at in range(0, 32, size))
    assert raw == bytes.fromhex("fcffffff ffffffff ffffffff 01000000") * 2


def test_access_beside_the_table_is_harmless(machine: Machine) -> None:
    """Hostile 9: such an access is across the table's end, between table and pending bits, or after them."""
    function = machine.functions[0]
    msix = function.table
    function.pending.add(1)
    msix.mmio_write(28, 8, 0xFFFFFFFF_FFFFFFFE)
    msix.mmio_write(32, 8, (1 << 64) - 1)
    msix.mmio_write(msix.pba_offset, 8, 0)
    msix.mmio_write(4088, 8, 0)

    assert msix.mmio_read(28, 8) == 0
    assert msix.mmio_read(32, 8) == 0
    assert msix.mmio_read(msix.pba_offset - 4, 8) == 0
    assert msix.mmio_read(msix.pba_offset, 1) == 0b10
    assert msix.mmio_read(msix.pba_offset, 8) == 0b10
    assert msix.mmio_read(msix.pba_offset + 1, 4) == 0
    assert msix.mmio_read(4088, 8) == 0


def test_msix_shares_the_lock_of_its_function(machine: Machine) -> None:
    """Different vCPUs may write the table and the capability at the same time."""
    assert machine.functions[0].table.lock is machine.functions[0].lock


# Direct boot


@pytest.mark.parametrize("memory_bytes", [128 * MIB, 3584 * MIB, 5120 * MIB], ids=["128M", "3.5G", "5G"])
def test_assigned_resources_are_complete_and_disjoint(memory_bytes: int) -> None:
    """With a function in every slot, all BARs are mapped, aligned, inside the windows, and do not overlap."""
    machine = Machine(functions=31, memory_bytes=memory_bytes)
    for function in machine.functions:
        function.add_io_bar(2, 256, Registers())

    machine.pci.assign_resources()

    bars = [bar for function in machine.functions for bar in function.bars.values()]
    io = sorted((bar.mapped or 0, bar.size) for bar in bars if bar.is_io)
    memory = sorted((bar.mapped or 0, bar.size) for bar in bars if not bar.is_io)
    assert len(io) == 62
    assert len(memory) == 31
    for ranges, first, end in (
        (io, 0xC000, 0x10000),
        (memory, layout.pci_window_start(memory_bytes), 0xFEC00000),
    ):
        assert first <= ranges[0][0]
        assert sum(ranges[-1]) <= end
        assert all(base % size == 0 for base, size in ranges)
        assert all(base + size <= after for (base, size), (after, _) in pairwise(ranges))


def test_assigned_interrupt_lines_are_those_of_the_layout() -> None:
    """Each function has the line of its slot's INTA.  A bridge has no pin and gets no line."""
    machine = Machine(functions=8)
    machine.pci.assign_resources()

    assert [machine.guest.read(slot, 0x3C, 1) for slot in range(9)] == [0, 10, 10, 11, 11, 10, 10, 11, 11]
    assert machine.guest.read(1, 0x04, 2) == 3


def test_low_ports_are_used_when_the_others_are_full() -> None:
    """SeaBIOS does the same.  If those are full too, there is an error."""
    machine = Machine(functions=31)
    for function in machine.functions:
        for index in (2, 3):
            function.add_io_bar(index, 256, Registers())
    machine.pci.assign_resources()
    assert min(bar.mapped or 0 for f in machine.functions for bar in f.bars.values() if bar.is_io) == 0x1000

    for function in machine.functions:
        function.add_memory_bar(4, 1 << 30, Registers())
    with pytest.raises(ValueError, match=r"slot \d+: no address left for bar 4 of 1073741824 bytes"):
        machine.pci.assign_resources()


def test_bars_may_fill_their_ranges() -> None:
    """The last BAR ends where the range ends, and is mapped there.  One more has no address."""
    machine = Machine(functions=31, memory_bytes=5120 * MIB)
    sizes = [256] * 48 + [128]  # with the 31 BARs of the functions, these are 4000h bytes
    for number, size in enumerate(sizes):
        machine.functions[number % 31].add_io_bar(2 + number // 31, size, Registers())
    machine.pci.assign_resources()
    ports = [bar for function in machine.functions for bar in function.bars.values() if bar.is_io]
    assert min(bar.mapped or 0 for bar in ports) == 0xC000
    assert max((bar.mapped or 0) + bar.size for bar in ports) == 0x10000

    memory = PlainFunction()
    for index, megabytes in enumerate((256, 128, 64, 32, 8, 4)):  # E0000000h to FEC00000h
        memory.add_memory_bar(index, megabytes * MIB, Registers())
    alone = pci.PciBus(Bus(), 5120 * MIB)
    alone.add(1, memory)
    alone.assign_resources()
    assert [memory.bars[0].mapped, memory.bars[5].mapped] == [0xE0000000, 0xFE800000]
    other = PlainFunction()
    other.add_memory_bar(0, 16, Registers())
    alone.add(2, other)
    with pytest.raises(ValueError, match="slot 2: no address left for bar 0 of 16 bytes"):
        alone.assign_resources()


def test_refused_addresses_are_logged_once(machine: Machine, lines: list[str]) -> None:
    """The same address is logged again only if the BAR had another one in between."""
    machine.guest.write(1, 0x04, 1, 2)  # the address is 0 now
    machine.guest.write(1, 0x10, 0x600)
    machine.guest.write(1, 0x04, 3, 2)
    machine.guest.write(1, 0x10, 0x600)
    assert len(lines) == 1
    machine.guest.write(1, 0x10, IO_BASE)
    machine.guest.write(1, 0x10, 0x600)
    assert len(lines) == 2


# Saving


def test_state_is_restored_in_a_new_machine() -> None:
    """The new machine has the same registers, mappings and vectors, and its functions are told of them."""
    old = Machine(functions=2)
    old.pci.assign_resources()
    write_entry(old.functions[1].table, 0, entry(data=0x55))
    old.guest.write(2, old.functions[1].cap + 2, 0x8000, 2)
    old.guest.write(0, 0x5A, 0x33, 1)
    old.guest.select(2, 0x10)

    new = Machine(functions=2)
    new.pci.restore(old.pci.state())

    assert new.pci.state() == old.pci.state()
    assert new.bus.pio_read(ADDRESS, 4) == 0x80001010
    assert [f.events for f in new.functions] == [f.events for f in old.functions]
    assert new.functions[1].changes == [(0, 0xFEE01000, 0x55, False)]
    assert new.functions[1].switches == [True]
    assert new.functions[1].commands == [3]


def test_state_of_overlapping_bars_maps_the_same_ones() -> None:
    """Which BAR is mapped does not depend on the order of the writes."""
    old = Machine(functions=2)
    for slot in (2, 1):
        old.guest.write(slot, 0x10, IO_BASE)
        old.guest.write(slot, 0x04, 1, 2)

    new = Machine(functions=2)
    new.pci.restore(old.pci.state())

    assert [f.bars[0].mapped for f in new.functions] == [IO_BASE, None]
    assert [f.bars[0].mapped for f in old.functions] == [IO_BASE, None]


def test_state_of_another_machine_is_refused() -> None:
    """Hostile 55: other slots, other functions and wrong lengths each give their own error."""
    machine = Machine(functions=2)
    state = machine.pci.state()
    first = state["functions"][1]
    other_device = b"\xff" + first["config"][1:]
    other_bar = first["config"][:0x10] + b"\x11" + first["config"][0x11:]

    with pytest.raises(ValueError, match=r"slots \[0, 1\] are not those"):
        machine.pci.restore({"address": 0, "functions": state["functions"][:2]})
    with pytest.raises(ValueError, match="slot 1: saved byte 0x0 is 0xff, here it is 0xf4"):
        machine.functions[0].check({"slot": 1, "config": other_device, "msix": first["msix"]})
    with pytest.raises(ValueError, match="slot 1: saved byte 0x10"):
        machine.functions[0].check({"slot": 1, "config": other_bar, "msix": first["msix"]})
    with pytest.raises(ValueError, match="slot 1: configuration space of 255 bytes"):
        machine.functions[0].check({"slot": 1, "config": first["config"][1:], "msix": first["msix"]})
    with pytest.raises(ValueError, match="slot 1: msi-x table of 31 bytes"):
        machine.functions[0].check({"slot": 1, "config": first["config"], "msix": first["msix"][1:]})
    assert machine.pci.state() == state


# Random accesses

sizes = st.sampled_from([1, 2, 4])
values = st.one_of(
    st.integers(0, 0xFFFFFFFF),
    st.sampled_from([0, 1, 2, 3, 0xFFFFFFFF, 0xC000, 0xC040, 0x1000, WINDOW, WINDOW + 4096, 0xFEE00000, 0x9000]),
)
config_writes = st.tuples(st.integers(0, 3), st.integers(0, 0x5F), sizes, values)


def check_invariants(machine: Machine) -> None:
    """Raise AssertionError unless mapped BARs agree with the registers, lie in their windows, and do not overlap."""
    mapped = []
    for function in machine.functions:
        decoded = function.decoded()
        for index, bar in function.bars.items():
            if bar.mapped is not None:
                assert decoded[index] == bar.mapped
                mapped.append((bar.is_io, bar.mapped, bar.mapped + bar.size))
    for is_io, start, end in mapped:
        assert (0x1000, 128 * MIB)[not is_io] <= start
        assert end <= (0x10000, 0xFEC00000)[not is_io]
        overlapping = [other for other in mapped if other[0] == is_io and other[1] < end and start < other[2]]
        assert overlapping == [(is_io, start, end)]
    io_fill = {0x11 * (i + 1): f.bars[0].mapped for i, f in enumerate(machine.functions)}
    for fill, base in io_fill.items():
        assert base is None or machine.bus.pio_read(base, 1) == fill


@given(st.lists(config_writes, max_size=40))
def test_random_configuration_keeps_the_invariants(writes: list[tuple[int, int, int, int]]) -> None:
    """Hostile 8, 9, 10: writes of every value, to every register, of every size and alignment."""
    machine = Machine(functions=2)
    machine.pci.complaints.burst = 0
    ids = [machine.guest.read(slot, 0) for slot in range(4)]
    for slot, register, size, value in writes:
        machine.guest.write(slot, register, value & ((1 << 8 * size) - 1), size)
        check_invariants(machine)

    assert [machine.guest.read(slot, 0) for slot in range(4)] == ids
    fresh = Machine(functions=2)
    fresh.pci.complaints.burst = 0
    fresh.pci.restore(machine.pci.state())
    assert fresh.pci.state() == machine.pci.state()
    assert [[b.mapped for b in f.bars.values()] for f in fresh.functions] == [
        [b.mapped for b in f.bars.values()] for f in machine.functions
    ]


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 4095), st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1)),
        max_size=60,
    )
)
def test_random_msix_access_reports_every_deliverable_message(
    accesses: list[tuple[bool, int, int, int]],
) -> None:
    """Hostile 9: a result has its size.  The reported changes alone give every deliverable message."""
    function = Function(vectors=5)
    known = [(0, 0, True)] * 5
    for enable, offset, size, value in accesses:
        function.config_write(function.cap + 2, 2, 0x8000 if enable else value & 0xFFFF)
        function.table.mmio_write(offset % 96, size, value & ((1 << 8 * size) - 1))
        assert 0 <= function.table.mmio_read(offset, size) < 1 << 8 * size
        for vector, address, data, masked in function.changes:
            known[vector] = (address, data, masked)
        function.changes.clear()
        actual = [function.table.message(vector) for vector in range(5)]
        assert [m[2] for m in known] == [m[2] for m in actual]
        assert [m for m in known if not m[2]] == [m for m in actual if not m[2]]


def test_two_vcpus_moving_bars_end_in_agreement() -> None:
    """The last call of `settle` sees the last registers, so no old address stays mapped."""
    machine = Machine(functions=2)
    machine.pci.complaints.burst = 0
    for function in machine.functions:
        function.config_write(0x04, 2, 3)

    def move(function: Function, seed: int) -> None:
        for round_ in range(300):
            function.config_write(0x10, 4, 0xC000 + (round_ * seed % 4) * 128)
            machine.pci.settle(function)

    movers = [threading.Thread(target=move, args=(f, s)) for f in machine.functions for s in (1, 3)]
    for mover in movers:
        mover.start()
    for mover in movers:
        mover.join()

    check_invariants(machine)
