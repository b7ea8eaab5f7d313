"""MSI-X: the table of messages and the pending bits of a function (PCI 3.0, 6.8.2)."""

from vmd import threads
from vmd.units import PAGE
from vmd.vm.bus import all_ones

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

MSIX_ENTRY_BYTES = 16
MSIX_VECTORS_MAX = 2048
MSIX_ENABLE = 1 << 15
MSIX_FUNCTION_MASK = 1 << 14
MSIX_VECTOR_MASKED = 1 << 0
# Writable bits of one table entry: address (dword aligned), data, mask bit.
MSIX_ENTRY_WRITABLE = bytes.fromhex("fcffffff ffffffff ffffffff 01000000")


class Msix:
    """The device behind a memory BAR.

    `on_change(vector, address, data, masked)` is called when a vector is masked or unmasked, and when an unmasked
    vector gets another message.  A vector is masked by its own mask bit, by the mask bit of the function, or because
    MSI-X is disabled.  A change of a masked entry is told when the entry is unmasked.
    `on_enable(enabled)` is called when MSI-X is enabled or disabled, before `on_change` for its vectors.
    `pending(vector)` returns the vector's pending bit.
    All three run on the vCPU thread that wrote or read, under the function's lock.
    """

    def __init__(
        self,
        vectors: int,
        on_change: "Callable[[int, int, int, bool], None]",
        pending: "Callable[[int], bool]",
        on_enable: "Callable[[bool], None] | None" = None,
    ) -> None:
        if not 1 <= vectors <= MSIX_VECTORS_MAX:
            raise ValueError(f"{vectors} msi-x vectors are not between 1 and {MSIX_VECTORS_MAX}")
        self.vectors = vectors
        self.on_change = on_change
        self.pending = pending
        self.on_enable = on_enable
        self.lock = threads.RLock()  # replaced by the function's lock in `PciFunction.add_msix`
        self.enabled = False
        self.function_masked = False
        table_bytes = vectors * MSIX_ENTRY_BYTES
        self.table = bytearray(table_bytes)
        for vector in range(vectors):
            self.table[vector * MSIX_ENTRY_BYTES + 12] = MSIX_VECTOR_MASKED
        # The tables of all our devices fit half a page, so the BAR is one page.
        self.pba_offset = PAGE // 2 if table_bytes <= PAGE // 2 else -(-table_bytes // PAGE) * PAGE
        pba_bytes = -(-vectors // 64) * 8
        self.bar_bytes = max(PAGE, 1 << (self.pba_offset + pba_bytes - 1).bit_length())
        self.told: list[tuple[int, int, bool]] = [(0, 0, True)] * vectors

    def message(self, vector: int) -> tuple[int, int, bool]:
        """Return the present (address, data, masked) of a vector."""
        with self.lock:
            entry = self.table[vector * MSIX_ENTRY_BYTES : (vector + 1) * MSIX_ENTRY_BYTES]
            address = int.from_bytes(entry[0:8], "little")
            data = int.from_bytes(entry[8:12], "little")
            masked = not self.enabled or self.function_masked or bool(entry[12] & MSIX_VECTOR_MASKED)
            return address, data, masked

    def mmio_read(self, offset: int, size: int) -> int:
        """Return bytes of the table or of the pending bits.  The bytes between and behind them read as zero."""
        with self.lock:
            if offset < len(self.table):
                return int.from_bytes(self.table[offset : offset + size], "little")
            if offset < self.pba_offset:
                return 0
            first = (offset - self.pba_offset) * 8
            covered = range(first, min(first + size * 8, self.vectors))
            return sum(1 << vector - first for vector in covered if self.pending(vector))

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        """Write to the table.  A write to the pending bits is ignored: they are read-only."""
        with self.lock:
            raw = (value & all_ones(size)).to_bytes(size, "little")
            end = min(offset + size, len(self.table))
            for at in range(offset, end):
                writable = MSIX_ENTRY_WRITABLE[at % MSIX_ENTRY_BYTES]
                self.table[at] = self.table[at] & ~writable | raw[at - offset] & writable
            for vector in range(offset // MSIX_ENTRY_BYTES, -(-end // MSIX_ENTRY_BYTES)):
                self._tell(vector)

    def set_control(self, control: int) -> None:
        """Set the message control register of the capability."""
        with self.lock:
            was_enabled = self.enabled
            self.enabled = bool(control & MSIX_ENABLE)
            self.function_masked = bool(control & MSIX_FUNCTION_MASK)
            if self.on_enable is not None and self.enabled != was_enabled:
                self.on_enable(self.enabled)
            for vector in range(self.vectors):
                self._tell(vector)

    def restore_table(self, table: bytes) -> None:
        """Restore a saved table as if the guest wrote it.  Raises ValueError if it is not of this size."""
        if len(table) != len(self.table):
            raise ValueError(f"msi-x table of {len(table)} bytes where this function has {len(self.table)}")
        self.mmio_write(0, len(table), int.from_bytes(table, "little"))

    def _tell(self, vector: int) -> None:
        message = self.message(vector)
        told = self.told[vector]
        if message == told or (message[2] and told[2]):
            return
        self.told[vector] = message
        self.on_change(vector, *message)
