"""The two ports that reset a PC: the reset control register CF9h and system control port A, 92h.

CF9h lies within the dword of PCI's address register; only a byte access is meant for it, which the PCI bus
tells apart (PCI 3.0, 3.2.2.3.2).
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# Reset control register (Intel PIIX3 data sheet, 2.1.3)
SYSTEM_RESET = 0x02  # what kind of reset bit 2 makes; both kinds start a VM anew
RESET_CPU = 0x04

# System control port A
FAST_RESET = 0x01
FAST_A20 = 0x02


class ResetPort:
    """CF9h: a rising reset bit calls `reset`, on the vCPU thread that wrote it.

    The FADT's RESET_REG names this port, so that ACPI guests reset here.
    """

    pio_width = 1

    def __init__(self, reset: "Callable[[], None]") -> None:
        self.control = 0
        self._reset = reset

    def pio_read(self, offset: int, size: int) -> int:
        """Return what was written; the reset bit is over by the time anybody reads it."""
        return self.control

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Reset on a rising bit 2, whether bit 1 asks for a soft or a hard reset."""
        rising = value & RESET_CPU
        self.control = value & SYSTEM_RESET
        if rising:
            self._reset()

    def state(self) -> dict[str, int]:
        """Return what `restore` takes."""
        return {"control": self.control}

    def restore(self, state: dict[str, int]) -> None:
        """Continue where another one stopped."""
        self.control = state["control"] & SYSTEM_RESET


class SystemControlA:
    """92h: a rising bit 0 resets; bit 1 gates A20, which here is always open and only remembered."""

    pio_width = 1

    def __init__(self, reset: "Callable[[], None]") -> None:
        self.control = FAST_A20
        self._reset = reset

    def pio_read(self, offset: int, size: int) -> int:
        """Return the gate as it was left."""
        return self.control

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Reset on bit 0."""
        self.control = value & FAST_A20
        if value & FAST_RESET:
            self._reset()

    def state(self) -> dict[str, int]:
        """Return what `restore` takes."""
        return {"control": self.control}

    def restore(self, state: dict[str, int]) -> None:
        """Continue where another one stopped."""
        self.control = state["control"] & FAST_A20
