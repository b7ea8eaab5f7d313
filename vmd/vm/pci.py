"""PCI: configuration mechanism 1, and functions with BARs and capabilities (PCI 3.0).  `msix.py` has MSI-X.

There is one bus with 32 slots, and each slot has function 0 only (*cat. 5.4*).  This module does not use KVM: a
function maps its BARs on the `Bus` that it was given, and calls a hook when they change.

There are three kinds of lock, always taken in this order: `PciBus.placement` (which function decodes which address),
then a function's `lock` (its registers), then the locks of the subclass.  A function may answer slowly.  Then only a
vCPU that moves BARs waits for it, not one that reads the configuration of another function.
"""

from vmd import threads
from vmd.log import RateLimit
from vmd.vm import layout
from vmd.vm.bus import all_ones
from vmd.vm.msix import MSIX_ENABLE, MSIX_FUNCTION_MASK, Msix

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import TypedDict

    from vmd.vm.bus import Bus, MmioDevice, PioDevice

    class FunctionState(TypedDict):
        """One function in a saved stream; `msix` is empty for a function without MSI-X."""

        slot: int
        config: bytes
        msix: bytes

    class BusState(TypedDict):
        """The whole of PCI in a saved stream."""

        address: int
        functions: list[FunctionState]


SLOTS = 32
CONFIG_BYTES = 256

# Header type 0 (PCI 3.0, 6.1)
VENDOR_ID = 0x00
DEVICE_ID = 0x02
COMMAND = 0x04
STATUS = 0x06
REVISION_ID = 0x08
CLASS_CODE = 0x09
CACHE_LINE_SIZE = 0x0C
LATENCY_TIMER = 0x0D
BAR0 = 0x10
BARS = 6
SUBSYSTEM_VENDOR_ID = 0x2C
SUBSYSTEM_ID = 0x2E
CAPABILITIES_POINTER = 0x34
INTERRUPT_LINE = 0x3C
INTERRUPT_PIN = 0x3D
HEADER_END = 0x40

COMMAND_IO = 1 << 0
COMMAND_MEMORY = 1 << 1
COMMAND_MASTER = 1 << 2
COMMAND_PARITY = 1 << 6
COMMAND_SERR = 1 << 8
COMMAND_INTX_DISABLE = 1 << 10
COMMAND_WRITABLE = COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER | COMMAND_PARITY | COMMAND_SERR | COMMAND_INTX_DISABLE
STATUS_INTERRUPT = 1 << 3
STATUS_CAPABILITIES = 1 << 4
STATUS_WRITE_1_TO_CLEAR = 0xF900  # parity and abort bits

BAR_IO = 1 << 0
IO_BAR_MIN = 4  # bytes; a smaller BAR would have no room for its flag bits (PCI 3.0, 6.2.5.1)
MEMORY_BAR_MIN = 16
IO_BAR_MAX = 256

CAP_ID_MSIX = 0x11

PCI_IO_FIRST = 0x1000  # the chips have fixed ports below


class Bar:
    """One base address register: the device behind it, and the address that it decodes."""

    def __init__(self, index: int, size: int, pio: "PioDevice | None", mmio: "MmioDevice | None") -> None:
        self.index = index
        self.size = size
        self.pio = pio
        self.mmio = mmio
        self.mapped: int | None = None  # the base address at which it is on the bus
        self.refused: int | None = None  # the base address that was refused last: it is logged only once

    @property
    def is_io(self) -> bool:
        """Whether this BAR decodes ports."""
        return self.pio is not None


class PciFunction:
    """Function 0 of a slot: 256 bytes of configuration space with some bits that a guest can write.

    A subclass adds BARs and capabilities in its constructor, before `PciBus.add`.  It may override the hooks
    `bar_changed`, `command_changed` and `interrupt_pending`, and `config_read` and `config_write` for registers with
    side effects.  `interrupt_pin` is 1 for INTA, and 0 for a function without INTx.
    """

    def __init__(
        self,
        *,
        vendor: int,
        device: int,
        class_code: int,
        subsystem_vendor: int,
        subsystem: int,
        revision: int = 0,
        interrupt_pin: int = 0,
    ) -> None:
        self.lock = threads.RLock()  # serialises register access from several vCPUs
        self.slot = -1
        self.address_bus: Bus | None = None
        self.bars: dict[int, Bar] = {}
        self.msix: Msix | None = None
        self.msix_control = 0  # offset of the message control register in configuration space
        self.config = bytearray(CONFIG_BYTES)
        self.writable = bytearray(CONFIG_BYTES)  # bits that a guest's write changes
        self.clearable = bytearray(CONFIG_BYTES)  # bits that a guest's 1 clears
        self.settled: dict[int, int] = {}  # decoded() at the time when `PciBus.settle` last mapped the BARs
        self._cap_last = CAPABILITIES_POINTER  # the byte that will point to the next capability
        self._cap_free = HEADER_END

        self._preset(VENDOR_ID, 2, vendor)
        self._preset(DEVICE_ID, 2, device)
        self._preset(COMMAND, 2, 0, writable=COMMAND_WRITABLE)
        self._preset(REVISION_ID, 1, revision)
        self._preset(CLASS_CODE, 3, class_code)
        self._preset(CACHE_LINE_SIZE, 1, 0, writable=0xFF)
        self._preset(LATENCY_TIMER, 1, 0, writable=0xFF)
        self._preset(SUBSYSTEM_VENDOR_ID, 2, subsystem_vendor)
        self._preset(SUBSYSTEM_ID, 2, subsystem)
        self._preset(INTERRUPT_LINE, 1, 0, writable=0xFF)
        self._preset(INTERRUPT_PIN, 1, interrupt_pin)
        self.clearable[STATUS : STATUS + 2] = STATUS_WRITE_1_TO_CLEAR.to_bytes(2, "little")

    def _preset(self, offset: int, size: int, value: int, writable: int = 0) -> None:
        self.config[offset : offset + size] = value.to_bytes(size, "little")
        self.writable[offset : offset + size] = writable.to_bytes(size, "little")

    # Building

    def add_io_bar(self, index: int, size: int, device: "PioDevice") -> Bar:
        """Add an I/O BAR; `size` is a power of two from 4 to 256 (PCI 3.0, 6.2.5.1)."""
        if not IO_BAR_MIN <= size <= IO_BAR_MAX:
            raise ValueError(f"i/o bar {index} of {size} bytes is not between {IO_BAR_MIN} and {IO_BAR_MAX}")
        return self._add_bar(Bar(index, size, device, None), flags=BAR_IO, flag_bits=3)

    def add_memory_bar(self, index: int, size: int, device: "MmioDevice") -> Bar:
        """Add a 32-bit memory BAR, not prefetchable; `size` is a power of two from 16 to 1 GiB."""
        if not MEMORY_BAR_MIN <= size <= 1 << 30:
            raise ValueError(f"memory bar {index} of {size} bytes is not between {MEMORY_BAR_MIN} and 1 GiB")
        return self._add_bar(Bar(index, size, None, device), flags=0, flag_bits=15)

    def _add_bar(self, bar: Bar, flags: int, flag_bits: int) -> Bar:
        if not 0 <= bar.index < BARS or bar.index in self.bars:
            raise ValueError(f"bar {bar.index} does not exist or is taken")
        if bar.size & (bar.size - 1):
            raise ValueError(f"bar {bar.index} of {bar.size} bytes is not a power of two")
        self.bars[bar.index] = bar
        # The address bits below the size are read-only zeros: a guest finds the size by them.
        self._preset(BAR0 + 4 * bar.index, 4, flags, writable=-bar.size & 0xFFFFFFFF & ~flag_bits)
        return bar

    def add_capability(self, cap_id: int, body: bytes, write_mask: bytes = b"") -> int:
        """Append a capability and return its offset.  `body` has the bytes after the id and the next pointer.

        `write_mask` has a 1 for every bit of `body` that a guest may write.  It may be shorter than `body`.
        """
        offset = self._cap_free
        end = offset + 2 + len(body)
        if end > CONFIG_BYTES:
            raise ValueError(f"no room for a capability of {2 + len(body)} bytes at {offset:#x}")
        if len(write_mask) > len(body):
            raise ValueError(f"write mask of {len(write_mask)} bytes for a body of {len(body)}")
        self.config[offset] = cap_id
        self.config[offset + 2 : end] = body
        self.writable[offset + 2 : offset + 2 + len(write_mask)] = write_mask
        self.config[self._cap_last] = offset
        self.config[STATUS] |= STATUS_CAPABILITIES
        self._cap_last = offset + 1
        self._cap_free = -(-end // 4) * 4
        return offset

    def add_msix(self, msix: Msix, bar_index: int) -> int:
        """Add the capability and the memory BAR of MSI-X.  Return the offset of the capability."""
        self.add_memory_bar(bar_index, msix.bar_bytes, msix)
        body = (
            (msix.vectors - 1).to_bytes(2, "little")
            + bar_index.to_bytes(4, "little")  # the table is at offset 0
            + (msix.pba_offset | bar_index).to_bytes(4, "little")
        )
        writable = (MSIX_ENABLE | MSIX_FUNCTION_MASK).to_bytes(2, "little")
        offset = self.add_capability(CAP_ID_MSIX, body, writable)
        self.msix = msix
        self.msix_control = offset + 2
        msix.lock = self.lock
        return offset

    # Registers

    @property
    def command(self) -> int:
        """The command register."""
        return self.config[COMMAND] | self.config[COMMAND + 1] << 8

    def config_read(self, offset: int, size: int) -> int:
        """Return `size` bytes of configuration space.  Bytes past its end read as ones."""
        with self.lock:
            raw = self.config[offset : offset + size]
            value = int.from_bytes(raw, "little") | all_ones(size) & ~all_ones(len(raw))
            # The interrupt status bit is the only bit that is computed when it is read.
            if offset <= STATUS < offset + size and self.interrupt_pending():
                value |= STATUS_INTERRUPT << 8 * (STATUS - offset)
            return value

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Write to the writable bits of `size` bytes.  The caller then calls `PciBus.settle`, which maps the BARs."""
        raw = (value & all_ones(size)).to_bytes(size, "little")
        with self.lock:
            command = self.command
            end = min(offset + size, CONFIG_BYTES)
            for at in range(offset, end):
                new, writable = raw[at - offset], self.writable[at]
                self.config[at] = self.config[at] & ~writable & ~(new & self.clearable[at]) | new & writable
            self._announce(command, offset, end)

    def _announce(self, old_command: int, offset: int, end: int) -> None:
        """Call the hooks for changes of the command register and of MSI-X by a write to [offset, end)."""
        if self.command != old_command:
            self.command_changed(self.command)
        if self.msix is not None and offset < self.msix_control + 2 and end > self.msix_control:
            self.msix.set_control(int.from_bytes(self.config[self.msix_control : self.msix_control + 2], "little"))

    def decoded(self) -> dict[int, int]:
        """Return the address of every BAR whose decoding the command register enables."""
        with self.lock:
            command = self.command
            return {
                index: self.bar_base(index)
                for index, bar in self.bars.items()
                if command & (COMMAND_IO if bar.is_io else COMMAND_MEMORY)
            }

    def bar_base(self, index: int) -> int:
        """Return the address in a BAR, also if its decoding is disabled."""
        at = BAR0 + 4 * index
        return int.from_bytes(self.config[at : at + 4], "little") & -self.bars[index].size

    # Hooks for subclasses

    def bar_changed(self, index: int, base: int | None) -> None:
        """Map BAR `index` at `base`, or unmap it if `base` is None.  A BAR that moves is unmapped first.

        Runs under `PciBus.placement` and this function's lock.  An override must call this method, which updates the
        bus.
        """
        bar, bus = self.bars[index], self.address_bus
        assert bus is not None
        if bar.mapped is not None:
            if bar.is_io:
                bus.remove_pio(bar.mapped, bar.size)
            else:
                bus.remove_mmio(bar.mapped, bar.size)
        bar.mapped = base
        if base is not None:
            if bar.pio is not None:
                bus.add_pio(base, bar.size, bar.pio)
            elif bar.mmio is not None:
                bus.add_mmio(base, bar.size, bar.mmio)

    def command_changed(self, command: int) -> None:
        """Act on a change of the command register.  Runs under this function's lock."""

    def interrupt_pending(self) -> bool:
        """Return whether an INTx interrupt is pending, also if the command register disables INTx."""
        return False

    # Saving

    def state(self) -> "FunctionState":
        """Return the state: all bytes that a guest can change."""
        with self.lock:
            table = b"" if self.msix is None else bytes(self.msix.table)
            return {"slot": self.slot, "config": bytes(self.config), "msix": table}

    def check(self, state: "FunctionState") -> None:
        """Raise ValueError unless this is the state of a function like this one."""
        saved, table = state["config"], state["msix"]
        with self.lock:
            if len(saved) != CONFIG_BYTES:
                raise ValueError(f"pci slot {self.slot}: configuration space of {len(saved)} bytes")
            for at in range(CONFIG_BYTES):
                if (saved[at] ^ self.config[at]) & ~(self.writable[at] | self.clearable[at]):
                    raise ValueError(
                        f"pci slot {self.slot}: saved byte {at:#x} is {saved[at]:#x}, here it is {self.config[at]:#x}"
                    )
            if len(table) != (0 if self.msix is None else len(self.msix.table)):
                raise ValueError(f"pci slot {self.slot}: msi-x table of {len(table)} bytes")

    def restore(self, state: "FunctionState") -> None:
        """Restore a checked state as if the guest wrote it.  `PciBus.restore` maps the BARs afterwards."""
        saved, table = state["config"], state["msix"]
        with self.lock:
            command = self.command
            self.config[:] = saved
            # The table before MSI-X is enabled: then each vector is told once, with its final message.
            if self.msix is not None:
                self.msix.restore_table(table)
            self._announce(command, 0, CONFIG_BYTES)


class HostBridge(PciFunction):
    """Slot 0 has the ids of an Intel 440FX, because an unmodified SeaBIOS unlocks shadow RAM on that host bridge.

    SeaBIOS recognises the emulator by subsystem 1af4:1100.  It reads the PAM registers and writes them.  If RAM was not
    enabled before, it copies itself from below 4 GiB.  Memory at C0000-FFFFF is always writable RAM here, so the PAM
    registers only remember what was written.  Unlike vmd, whose 0b5d:0666 needs a patched BIOS.
    """

    PAM0 = 0x59
    PAM_REGISTERS = 7

    def __init__(self) -> None:
        super().__init__(
            vendor=0x8086,
            device=0x1237,
            class_code=0x060000,
            subsystem_vendor=0x1AF4,
            subsystem=0x1100,
            revision=2,
        )
        for pam in range(self.PAM0, self.PAM0 + self.PAM_REGISTERS):
            self._preset(pam, 1, 0, writable=0xFF)


class PciBus:
    """Bus 0 behind ports CF8h-CFFh.  It decides which function decodes which address.

    The machine maps this device at the eight ports from `layout.PORT_PCI_ADDRESS`.  The functions map their BARs on
    `bus`.  `byte_ports` has devices of other chips inside CF8h-CFBh, by port: a byte access there is not a
    configuration access (PCI 3.0, 3.2.2.3.2), and CF9h is the reset register.

    The mapping of BARs depends on the registers only, so it is the same after save and restore.  A BAR at an address
    that PCI may not use is not mapped.  Of two BARs that overlap, the BAR of the lower slot is mapped.
    """

    def __init__(
        self,
        bus: "Bus",
        memory_bytes: int,
        byte_ports: "Mapping[int, PioDevice] | None" = None,
    ) -> None:
        self.bus = bus
        self.memory_bytes = memory_bytes
        self.byte_ports = dict(byte_ports or {})
        self.address = 0
        self.slots: list[PciFunction | None] = [None] * SLOTS
        self.placement = threads.RLock()
        self.complaints = RateLimit()

    def add(self, slot: int, function: PciFunction) -> None:
        """Put a function into a slot.  Raises ValueError if the slot does not exist or is taken."""
        if not 0 <= slot < SLOTS:
            raise ValueError(f"pci slot {slot} is not between 0 and {SLOTS - 1}")
        if self.slots[slot] is not None:
            raise ValueError(f"pci slot {slot} is taken")
        function.slot = slot
        function.address_bus = self.bus
        self.slots[slot] = function

    def functions(self) -> "Iterator[PciFunction]":
        """Yield the functions in slot order."""
        return (function for function in self.slots if function is not None)

    # Configuration mechanism 1 (PCI 3.0, 3.2.2.3.2); offsets count from CF8h

    def pio_read(self, offset: int, size: int) -> int:
        """Return bytes of the address register, or of the configuration register that it selects."""
        if offset < 4:
            if offset == 0 and size == 4:
                return self.address
            other = self._other_chip(offset, size)
            return all_ones(size) if other is None else other.pio_read(0, size)
        lane = offset - 4
        function = self._selected()
        if function is None:
            return all_ones(size)
        inside = min(size, 4 - lane)
        value = function.config_read((self.address & 0xFC) + lane, inside)
        return value | all_ones(size) & ~all_ones(inside)

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Write to the address register, or to the configuration register that it selects."""
        if offset < 4:
            if offset == 0 and size == 4:
                # The reserved bits and the two lowest bits are always zero: drivers that probe for PCI check that.
                self.address = value & 0x80FFFFFC
                return
            other = self._other_chip(offset, size)
            if other is not None:
                other.pio_write(0, size, value)
            return
        lane = offset - 4
        function = self._selected()
        if function is not None:
            inside = min(size, 4 - lane)
            function.config_write((self.address & 0xFC) + lane, inside, value & all_ones(inside))
            self.settle(function)

    def _other_chip(self, offset: int, size: int) -> "PioDevice | None":
        return self.byte_ports.get(layout.PORT_PCI_ADDRESS + offset) if size == 1 else None

    def _selected(self) -> PciFunction | None:
        """Return the function that CF8h selects, or None.  Only bus 0 and function 0 exist."""
        address = self.address
        if not address & 0x80000000 or address & 0x00FF0700:
            return None
        return self.slots[address >> 11 & 31]

    # Mapping of BARs

    def settle(self, changed: PciFunction | None = None) -> None:
        """Map and unmap BARs as the registers say.  This is cheap if no BAR of `changed` has changed."""
        with self.placement:
            if changed is not None and changed.decoded() == changed.settled:
                return
            targets = list(self._targets())
            # All BARs that move are unmapped before one is mapped, so that two BARs can swap their addresses.
            for function, bar, base in targets:
                if bar.mapped is not None and bar.mapped != base:
                    with function.lock:
                        function.bar_changed(bar.index, None)
            for function, bar, base in targets:
                if base is not None and bar.mapped != base:
                    with function.lock:
                        function.bar_changed(bar.index, base)

    def _targets(self) -> "Iterator[tuple[PciFunction, Bar, int | None]]":
        """Yield every BAR, with the address at which it is to be mapped, or None."""
        taken: list[tuple[bool, int, int]] = []
        for function in self.functions():
            function.settled = function.decoded()
            for index, bar in sorted(function.bars.items()):
                base = function.settled.get(index)
                if base is None:
                    bar.refused = None
                elif self._usable(bar, base) and not any(
                    bar.is_io == is_io and base < end and start < base + bar.size for is_io, start, end in taken
                ):
                    bar.refused = None
                    taken.append((bar.is_io, base, base + bar.size))
                else:
                    self._complain(function, bar, base)
                    base = None
                yield function, bar, base

    def _usable(self, bar: Bar, base: int) -> bool:
        """Return whether PCI may use these addresses: RAM, ports of chips and pages of APICs are not there."""
        if bar.is_io:
            return base >= PCI_IO_FIRST and base + bar.size <= layout.PCI_IO_END
        ram_end = max(layout.low_ram_bytes(self.memory_bytes), layout.RESERVED_END)
        return base >= ram_end and base + bar.size <= layout.PCI_WINDOW_END

    def _complain(self, function: PciFunction, bar: Bar, base: int) -> None:
        # Not logged: a guest that reads the size of a BAR, or that enables decoding before it assigns an address.
        highest = -bar.size & 0xFFFFFFFF
        if base not in (0, highest, bar.refused):
            space = "i/o" if bar.is_io else "memory"
            self.complaints.warn(
                f"pci slot {function.slot}: bar {bar.index} stays unmapped, {space} address {base:#x} is not free"
            )
        bar.refused = base

    def assign_resources(self) -> None:
        """Do the work of firmware: assign addresses and interrupt lines, and enable decoding.

        Raises ValueError if the BARs do not fit.
        """
        io, memory = [
            sorted(
                ((f, bar) for f in self.functions() for bar in f.bars.values() if bar.is_io == is_io),
                key=lambda entry: -entry[1].size,
            )
            for is_io in (True, False)
        ]
        # As SeaBIOS does: low ports are used only if the usual range is too small.
        usual = sum(bar.size for _, bar in io) <= layout.PCI_IO_END - layout.PCI_IO_START
        _assign(io, layout.PCI_IO_START if usual else PCI_IO_FIRST, layout.PCI_IO_END)
        _assign(memory, layout.pci_window_start(self.memory_bytes), layout.PCI_WINDOW_END)
        for function in self.functions():
            pin = function.config[INTERRUPT_PIN]
            if pin:
                function.config_write(INTERRUPT_LINE, 1, layout.pci_irq(function.slot, pin))
            function.config_write(COMMAND, 2, function.command | COMMAND_IO | COMMAND_MEMORY)
        self.settle()

    # Saving

    def state(self) -> "BusState":
        """Return the address register and every function's state."""
        return {"address": self.address, "functions": [function.state() for function in self.functions()]}

    def check(self, state: "BusState") -> None:
        """Raise ValueError unless this is the state of a bus with the same functions."""
        slots = [saved["slot"] for saved in state["functions"]]
        if slots != [function.slot for function in self.functions()]:
            raise ValueError(f"saved pci slots {slots} are not those of this machine")
        for function, saved in zip(self.functions(), state["functions"], strict=True):
            function.check(saved)

    def restore(self, state: "BusState") -> None:
        """Restore a saved state to a bus with the same functions.

        Raises:
            ValueError: the functions are not the same.  Then nothing was changed.
        """
        self.check(state)
        for function, saved in zip(self.functions(), state["functions"], strict=True):
            function.restore(saved)
        self.address = state["address"] & 0x80FFFFFC
        self.settle()


def _assign(bars: list[tuple[PciFunction, Bar]], start: int, end: int) -> None:
    """Write addresses from `start` up into BARs, which come largest first, so that alignment leaves no gaps."""
    for function, bar in bars:
        base = (start + bar.size - 1) & -bar.size
        if base + bar.size > end:
            raise ValueError(f"pci slot {function.slot}: no address left for bar {bar.index} of {bar.size} bytes")
        function.config_write(BAR0 + 4 * bar.index, 4, base)
        start = base + bar.size
