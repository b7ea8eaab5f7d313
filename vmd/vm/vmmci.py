"""vmmci: the VM control device of OpenBSD guests (*cat. 6.7*).  It has no device process.

It is a legacy virtio device without queues.  Its configuration space is

    0   u32   command: a request to the guest, until the guest writes the same value; or an announcement of the guest
    4   u64   seconds and
    12  u64   microseconds of the host's clock at the time when the first word of the seconds was read

Its interrupt is INTx.  The level of the line is set by KVM_IRQ_LINE, without an eventfd.
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
        """Sample the host's clock when its first word is read, so that all its words belong to the same moment."""
        if offset <= SECONDS_AT < offset + size:
            now_us = time.time_ns() // 1000
            clock = (now_us // 1_000_000).to_bytes(8, "little") + (now_us % 1_000_000).to_bytes(8, "little")
            self.config = self.config[:SECONDS_AT] + clock
        return super().read_config(offset, size)


class Vmmci(PciFunction):
    """The device.  Both callbacks run on a vCPU thread.

    `on_acknowledged(command)`: the guest has accepted the request.  `on_power_off()`: the guest is about to switch the
    machine off, or to halt if it cannot switch it off.
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
        """Whether the guest's driver is ready."""
        return self.registers.active

    @property
    def acknowledges(self) -> bool:
        """Whether the driver acknowledges commands."""
        return bool(self.registers.driver_features & F_ACK)

    def ask(self, command: int) -> bool:
        """Send a command to the guest.  An earlier command that was not acknowledged is forgotten.

        Return False if the command was not sent.  There may be no driver, or a driver that does not know SYNCRTC; and
        SYNCRTC does not replace a request to shut down or to reboot.
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
        """The command that was sent and is not acknowledged yet, or NONE."""
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
        """Return whether an INTx interrupt is pending."""
        return self.config_pending

    def command_changed(self, _command: int) -> None:
        """Drive the line: the command register may have switched INTx off or on."""
        self._drive_line()

    def _drive_line(self) -> None:
        if self.slot > 0:
            enabled = not self.command & COMMAND_INTX_DISABLE
            self.line(layout.pci_irq(self.slot, 1), self.config_pending and enabled)

    # --- Backend ---------------------------------------------------------------------------------------------

    def activate(self, _features: int, _queues: "list[QueueRegisters]") -> bool:
        """Return True: there are no rings that could be unusable."""
        return True

    def reset(self) -> None:
        """Forget the pending command: the driver that it was for is gone."""
        self._set_command(NONE)

    def write_config(self, offset: int, data: bytes) -> bytes:
        """Take an acknowledgement or an announcement of the guest (*cat. 4.4*).  The clock is read-only."""
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
        """Return and clear ISR, and lower the line."""
        config, self.config_pending = self.config_pending, False
        self._drive_line()
        return spec.ISR_CONFIG if config else 0

    def vectors_changed(self) -> None:
        """Do nothing: there are no vectors."""

    def complain(self, text: str) -> None:
        """Log a mistake of the driver that was ignored."""
        self.complaints.warn(f"vmmci: the driver {text}")

    def raise_config(self) -> None:
        """Interrupt the guest."""
        self.config_pending = True
        self._drive_line()

    # --- saving ----------------------------------------------------------------------------------------------

    def save(self) -> dict[str, int | bytes]:
        """Return the state, for `restore_registers`."""
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
        """Restore the state.  Raises KeyError, TypeError or ValueError."""
        with self.lock:
            config = state["config"]
            if not isinstance(config, bytes) or len(config) != CONFIG_BYTES:
                raise ValueError("the configuration has a wrong size")
            registers = self.registers
            registers.status = int(state["status"]) & 0xFF
            registers.driver_features = int(state["features"]) & 0xFFFFFFFF
            registers.features_locked = registers.active = bool(state["active"])
            registers.config = config
            self.config_pending = bool(state["pending"])
            self._drive_line()
