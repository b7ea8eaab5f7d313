"""Port and memory-mapped I/O: finds the device for an access that KVM did not handle.

The tables are immutable and are replaced as a whole.  So a vCPU thread looks up a device without a lock while another
one moves a BAR.  No access by a guest ends the VM: an address without a device reads as all ones and ignores writes, as
on the bus of a PC.  (Unlike vmd, where string I/O and unmapped memory are fatal.)
"""

from vmd import threads
from vmd.errors import GuestError
from vmd.log import RateLimit, log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class PioDevice(Protocol):
        """Answers x86 port I/O.  Called on a vCPU thread, which waits for the answer.

        A device whose ports are 8 bits wide has a class attribute `pio_width = 1`.  The bus then splits wider accesses
        into single bytes, as the ISA bridge in front of such a chip does.
        """

        def pio_read(self, offset: int, size: int) -> int:
            """Return `size` (1, 2 or 4) bytes at `offset` from the device's first port."""

        def pio_write(self, offset: int, size: int, value: int) -> None:
            """Write `size` bytes at `offset`.  A write to an unknown register is ignored, as in hardware."""

    class MmioDevice(Protocol):
        """Answers accesses to memory that is not RAM.  Called on a vCPU thread."""

        def mmio_read(self, offset: int, size: int) -> int:
            """Return `size` (1, 2, 4 or 8) bytes at `offset` from the device's base."""

        def mmio_write(self, offset: int, size: int, value: int) -> None:
            """Write `size` bytes at `offset`."""

    # (first address, end, read, write, size of the widest access that the device takes)
    Range = tuple[int, int, Callable[[int, int], int], Callable[[int, int, int], None], int]

PIO_PORTS = 0x10000
PIO_WIDTH = 4
MMIO_SIZES = (1, 2, 4, 8)


class Bus:
    """The address decoder of one VM.

    If two devices claim an address, the device that was added first has it, until it is removed.  So a guest can move a
    BAR over a chip, but cannot hide the chip.

    An access goes to the device that has its first byte.  If the access goes past the end of that device's range, or
    begins at an address without a device, it is split into bytes, and each byte is looked up.  (Hardware would split it
    into the largest aligned pieces; no driver depends on the difference.)
    """

    def __init__(self) -> None:
        self.unclaimed = 0  # bytes at addresses without a device; approximate, as threads count without a lock
        self._lock = threads.Lock()  # serialises changes of the tables
        self._pio_ranges: tuple[Range, ...] = ()
        self._mmio_ranges: tuple[Range, ...] = ()
        self._ports: dict[int, Range] = {}
        self._unclaimed_limit = RateLimit()
        self._error_limit = RateLimit()

    # ---- adding and removing devices

    def add_pio(self, first_port: int, count: int, device: "PioDevice") -> None:
        """Let `device` answer `count` ports.  Ports above FFFFh do not exist, and are ignored."""
        width = getattr(device, "pio_width", PIO_WIDTH)
        entry = (first_port, first_port + count, device.pio_read, device.pio_write, width)
        with self._lock:
            self._pio_ranges = (*self._pio_ranges, entry)
            self._rebuild_ports()

    def remove_pio(self, first_port: int, count: int) -> None:
        """Undo the latest `add_pio` of this range.

        Raises:
            ValueError: there is no such range.
        """
        with self._lock:
            self._pio_ranges = _without(self._pio_ranges, first_port, first_port + count)
            self._rebuild_ports()

    def add_mmio(self, base: int, size: int, device: "MmioDevice") -> None:
        """Let `device` answer `size` bytes of guest-physical memory that is not RAM."""
        entry = (base, base + size, device.mmio_read, device.mmio_write, MMIO_SIZES[-1])
        with self._lock:
            self._mmio_ranges = (*self._mmio_ranges, entry)

    def remove_mmio(self, base: int, size: int) -> None:
        """Undo the latest `add_mmio` of this range.

        Raises:
            ValueError: there is no such range.
        """
        with self._lock:
            self._mmio_ranges = _without(self._mmio_ranges, base, base + size)

    def _rebuild_ports(self) -> None:
        ports: dict[int, Range] = {}
        for entry in reversed(self._pio_ranges):  # the earliest is written last and wins
            ports.update(dict.fromkeys(range(entry[0], min(entry[1], PIO_PORTS)), entry))
        self._ports = ports

    # ---- port I/O

    def pio_read(self, port: int, size: int) -> int:
        """Answer IN."""
        entry = self._ports.get(port)
        if entry is None:
            if size > 1:  # a device's range may begin in the middle of the access
                return self._pio_read_bytes(port, size)
            self._count_unclaimed("read from", "port", port)
            return 0xFF
        first, end, read, _, width = entry
        if size > width or port + size > end:
            return self._pio_read_bytes(port, size)
        try:
            return read(port - first, size)
        except GuestError as error:
            self._refused("read from", "port", port, error)
            return all_ones(size)

    def pio_write(self, port: int, size: int, value: int) -> None:
        """Answer OUT."""
        entry = self._ports.get(port)
        if entry is None:
            if size > 1:
                self._pio_write_bytes(port, size, value)
            else:
                self._count_unclaimed("write to", "port", port)
            return
        first, end, _, write, width = entry
        if size > width or port + size > end:
            self._pio_write_bytes(port, size, value)
            return
        try:
            write(port - first, size, value)
        except GuestError as error:
            self._refused("write to", "port", port, error)

    def pio_read_string(self, port: int, size: int, count: int) -> bytes:
        """Answer REP INS: `count` reads of one port, in order."""
        read = self.pio_read
        return b"".join([read(port, size).to_bytes(size, "little") for _ in range(count)])

    def pio_write_string(self, port: int, size: int, data: "bytes | memoryview") -> None:
        """Answer REP OUTS: writes to one port, in order."""
        write = self.pio_write
        if size == 1:
            for byte in data:
                write(port, 1, byte)
            return
        for at in range(0, len(data) - size + 1, size):
            write(port, size, int.from_bytes(data[at : at + size], "little"))

    def _pio_read_bytes(self, port: int, size: int) -> int:
        value = 0
        for index in range(size):
            value |= self.pio_read(port + index, 1) << 8 * index
        return value

    def _pio_write_bytes(self, port: int, size: int, value: int) -> None:
        for index in range(size):
            self.pio_write(port + index, 1, value >> 8 * index & 0xFF)

    # ---- memory-mapped I/O

    def mmio_read(self, gpa: int, size: int) -> int:
        """Answer a load of 1 to 8 bytes.  KVM reports other sizes than powers of 2 if an access crosses a page."""
        for base, end, read, _, _ in self._mmio_ranges:
            if base <= gpa < end:
                if size not in MMIO_SIZES or gpa + size > end:
                    break
                try:
                    return read(gpa - base, size)
                except GuestError as error:
                    self._refused("read from", "address", gpa, error)
                    return all_ones(size)
        else:
            if size == 1:
                self._count_unclaimed("read from", "address", gpa)
                return 0xFF
        value = 0
        for index in range(size):
            value |= self.mmio_read(gpa + index, 1) << 8 * index
        return value

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        """Answer a store."""
        for base, end, _, write, _ in self._mmio_ranges:
            if base <= gpa < end:
                if size not in MMIO_SIZES or gpa + size > end:
                    break
                try:
                    write(gpa - base, size, value)
                except GuestError as error:
                    self._refused("write to", "address", gpa, error)
                return
        else:
            if size == 1:
                self._count_unclaimed("write to", "address", gpa)
                return
        for index in range(size):
            self.mmio_write(gpa + index, 1, value >> 8 * index & 0xFF)

    # ---- mistakes of the guest

    def _count_unclaimed(self, what: str, space: str, address: int) -> None:
        self.unclaimed += 1
        # No warning: firmware and drivers probe ports of devices that no present machine has.
        if log.verbosity > 1 and self._unclaimed_limit.allow():
            log.debug(f"guest {what} unclaimed {space} {address:#x}")

    def _refused(self, what: str, space: str, address: int, error: GuestError) -> None:
        self._error_limit.warn(f"guest {what} {space} {address:#x}: {error}")


def all_ones(size: int) -> int:
    """Return the value of a read of `size` bytes at an address that no device decodes."""
    return (1 << 8 * size) - 1


def _without(ranges: "tuple[Range, ...]", start: int, end: int) -> "tuple[Range, ...]":
    for index in range(len(ranges) - 1, -1, -1):
        if ranges[index][:2] == (start, end):
            return ranges[:index] + ranges[index + 1 :]
    raise ValueError(f"no device at {start:#x}-{end - 1:#x}")
