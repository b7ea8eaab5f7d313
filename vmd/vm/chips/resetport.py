"""The two ports that reset a PC: the reset control register CF9h and system control port A, 92h.

CF9h is inside the 32 bits of PCI's address register.  The PCI bus passes byte accesses on to it (PCI 3.0, 3.2.2.3.2).
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# Reset control register (Intel PIIX3 data sheet, 2.1.3)
SYSTEM_RESET = 0x02  # the kind of reset that bit 2 causes; here both kinds reset the whole VM
RESET_CPU = 0x04

# System control port A
FAST_RESET = 0x01
FAST_A20 = 0x02


class ResetPort:
    """CF9h: setting the reset bit calls `reset`, on the vCPU thread that wrote it.

    The FADT's RESET_REG names this port, so ACPI guests use it to reset.
    """

    pio_width = 1

    def __init__(self, reset: "Callable[[], None]") -> None:
        self.control = 0
        self._reset = reset

    def pio_read(self, offset: int, size: int) -> int:
        """Return the register.  The reset bit reads as 0: a reset ends the VM."""
        return self.control

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Reset if bit 2 is set, for both values of bit 1 (soft or hard reset)."""
        rising = value & RESET_CPU
        self.control = value & SYSTEM_RESET
        if rising:
            self._reset()

    def state(self) -> dict[str, int]:
        """Return the state, for `restore`."""
        return {"control": self.control}

    def restore(self, state: dict[str, int]) -> None:
        """Continue from a saved state."""
        self.control = state["control"] & SYSTEM_RESET


class SystemControlA:
    """92h: writing 1 to bit 0 resets.  Bit 1 gates A20; here A20 is always on, and the bit is only remembered."""

    pio_width = 1

    def __init__(self, reset: "Callable[[], None]") -> None:
        self.control = FAST_A20
        self._reset = reset

    def pio_read(self, offset: int, size: int) -> int:
        """Return the register, which has the A20 bit."""
        return self.control

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Set the A20 bit, and reset if bit 0 is set."""
        self.control = value & FAST_A20
        if value & FAST_RESET:
            self._reset()

    def state(self) -> dict[str, int]:
        """Return the state, for `restore`."""
        return {"control": self.control}

    def restore(self, state: dict[str, int]) -> None:
        """Continue from a saved state."""
        self.control = state["control"] & FAST_A20
