"""vmmci: the VM control device of OpenBSD guests (*cat. 6.7*), all of it in this process.

A legacy virtio device without queues, whose configuration space is

    0   u32   command: what we ask of the guest, until it writes the same back; or what the guest announces
    4   u64   seconds and
    12  u64   microseconds of the host's clock, as they were when the first word of the seconds was read

Its interrupt is INTx, driven through KVM's level of the line: nobody but the driver ever waits for it.
"""

import time

from vmd.log import RateLimit
from vmd.virtio import spec
from vmd.virtio.transport import Transport
from vmd.vm import layout
from vmd.vm.pci import COMMAND_INTX_DISABLE, PciFunction

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.virtio.transport import QueueRegisters

VENDOR, DEVICE = 0x0B5D, 0x0777
SUBSYSTEM = 0xFFFF
CLASS = 0x078000  # communication controller, other
BAR, BAR_BYTES = 0, 0x40

F_TIMESYNC, F_ACK, F_SYNCRTC = 1 << 0, 1 << 1, 1 << 2
NONE, SHUTDOWN, REBOOT, SYNCRTC = range(4)

COMMAND_AT, SECONDS_AT, MICROSECONDS_AT, CONFIG_BYTES = 0, 4, 12, 20


class Registers(Transport):
    """The registers, with a clock in configuration space."""

    def read_config(self, offset: int, size: int) -> int:
        """Sample the host's clock when its first word is read: the others belong to the same moment."""
        if offset <= SECONDS_AT < offset + size:
            now_us = time.time_ns() // 1000
            clock = (now_us // 1_000_000).to_bytes(8, "little") + (now_us % 1_000_000).to_bytes(8, "little")
            self.config = self.config[:SECONDS_AT] + clock
        return super().read_config(offset, size)


class Vmmci(PciFunction):
    """The device; `on_acknowledged` and `on_power_off` are called on a vCPU thread.

    `on_acknowledged(command)`: the guest does what it was asked for.  `on_power_off()`: the guest is about to switch
    itself off, or would be if it knew how.
    """

    def __init__(
        self,
        line: "Callable[[int, bool], None]",
        on_acknowledged: "Callable[[int], None]",
        on_power_off: "Callable[[], None]",
    ) -> None:
        """`line(gsi, level)` drives an interrupt line."""
        super().__init__(
            vendor=VENDOR,
            device=DEVICE,
            class_code=CLASS,
            subsystem_vendor=spec.SUBSYSTEM_VENDOR,
            subsystem=SUBSYSTEM,
            interrupt_pin=1,
        )
        self.line = line
        self.on_acknowledged = on_acknowledged
        self.on_power_off = on_power_off
        self.registers = Registers(F_TIMESYNC | F_ACK | F_SYNCRTC, (), bytes(CONFIG_BYTES), 0, self)
        self.config_pending = False
        self.complaints = RateLimit()
        self.add_io_bar(BAR, BAR_BYTES, self)

    # --- asking ----------------------------------------------------------------------------------------------

    @property
    def driver_is_up(self) -> bool:
        """Whether the guest listens."""
        return self.registers.active

    @property
    def acknowledges(self) -> bool:
        """Whether the driver says when it has taken a command."""
        return bool(self.registers.driver_features & F_ACK)

    def ask(self, command: int) -> bool:
        """Ask something of the guest; False if nobody listens or knows of such a thing, or something else is urgent.

        What was asked for before and not acknowledged is forgotten.
        """
        with self.lock:
            if not self.driver_is_up:
                return False
            if command == SYNCRTC and (
                not self.registers.driver_features & F_SYNCRTC or self.command_now in (SHUTDOWN, REBOOT)
            ):
                return False
            self._set_command(command)
            self.registers.config_changed(self.registers.config)
            return True

    @property
    def command_now(self) -> int:
        """What the guest has been asked for and not acknowledged."""
        return int.from_bytes(self.registers.config[:SECONDS_AT], "little")

    def _set_command(self, command: int) -> None:
        self.registers.config = command.to_bytes(4, "little") + self.registers.config[SECONDS_AT:]

    # --- registers -------------------------------------------------------------------------------------------

    def pio_read(self, offset: int, size: int) -> int:
        """Read a legacy register."""
        with self.lock:
            return self.registers.legacy_read(offset, size)

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Write a legacy register."""
        with self.lock:
            self.registers.legacy_write(offset, size, value)

    def interrupt_pending(self) -> bool:
        """Return whether INTx would be asserted."""
        return self.config_pending

    def command_changed(self, _command: int) -> None:
        """INTx may have been switched off."""
        self._drive_line()

    def _drive_line(self) -> None:
        if self.slot > 0:
            enabled = not self.command & COMMAND_INTX_DISABLE
            self.line(layout.pci_irq(self.slot, 1), self.config_pending and enabled)

    # --- Backend ---------------------------------------------------------------------------------------------

    def activate(self, _features: int, _queues: "list[QueueRegisters]") -> bool:
        """There are no rings."""
        return True

    def reset(self) -> None:
        """A driver that goes takes what it was asked for with it."""
        self._set_command(NONE)

    def write_config(self, offset: int, data: bytes) -> bytes:
        """Take an acknowledgement, or what the guest announces (*cat. 4.4*); the clock is read-only."""
        if offset != COMMAND_AT or len(data) != 4:
            return self.registers.config
        command, asked = int.from_bytes(data, "little"), self.command_now
        if asked != NONE and command == asked:
            if asked == SYNCRTC:
                self._set_command(NONE)
            self.on_acknowledged(command)
        elif command == SHUTDOWN:
            self.on_power_off()
        return self.registers.config

    def take_isr(self) -> int:
        """Return and clear ISR; the line falls."""
        config, self.config_pending = self.config_pending, False
        self._drive_line()
        return spec.ISR_CONFIG if config else 0

    def vectors_changed(self) -> None:
        """There are no vectors."""

    def complain(self, text: str) -> None:
        """Log what the driver did in vain."""
        self.complaints.warn(f"vmmci: the driver {text}")

    def raise_config(self) -> None:
        """Interrupt the guest."""
        self.config_pending = True
        self._drive_line()

    # --- saving ----------------------------------------------------------------------------------------------

    def save(self) -> dict[str, int | bytes]:
        """Return what `restore_registers` takes."""
        with self.lock:
            registers = self.registers
            return {
                "status": registers.status,
                "features": registers.driver_features,
                "active": int(registers.active),
                "config": registers.config,
                "pending": int(self.config_pending),
            }

    def restore_registers(self, state: "dict[str, int | bytes]") -> None:
        """Become such a device.  Raises KeyError, TypeError or ValueError."""
        with self.lock:
            config = state["config"]
            if not isinstance(config, bytes) or len(config) != CONFIG_BYTES:
                raise ValueError("configuration of vmmci")
            registers = self.registers
            registers.status = int(state["status"]) & 0xFF
            registers.driver_features = int(state["features"]) & 0xFFFFFFFF
            registers.features_locked = registers.active = bool(state["active"])
            registers.config = config
            self.config_pending = bool(state["pending"])
            self._drive_line()
