"""The registers of a virtio device, which a driver reads and writes through PCI (virtio 1.2, 4.1).

This is a pure state machine without PCI, KVM or processes: a `Backend` does the rest.  The legacy register block
(4.1.4.10) and the structures of virtio 1.x (4.1.4.3) act on the same state, so a transitional device is one object.

Features can be written before FEATURES_OK, and queues before DRIVER_OK.  A later write is ignored, so a running queue
never gets another size or address (hostile input 4).  Ignored writes are reported to `Backend.complain`, so that the
log has the mistakes of a driver.

Drivers differ in the order in which they use the registers.  `tests/unit/virtio/orders.py` has the orders of many
drivers, and all of them work.
"""

from struct import Struct

from vmd.virtio import spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Backend(Protocol):
        """The device behind the registers.  All methods are called under the device's lock."""

        def activate(self, features: int, queues: "list[QueueRegisters]") -> bool:
            """Begin to serve the rings.  Return False if a ring cannot be used."""

        def reset(self) -> None:
            """Forget the rings and writes to configuration.  When this returns, no ring is accessed any more."""

        def write_config(self, offset: int, data: bytes) -> bytes:
            """Take a write to device configuration, which may be empty.  Return the configuration after it."""

        def take_isr(self) -> int:
            """Return and clear ISR status."""

        def vectors_changed(self) -> None:
            """Act on a new MSI-X vector of a queue or of configuration changes."""

        def raise_config(self) -> None:
            """Send a configuration change interrupt."""

        def complain(self, text: str) -> None:
            """Log a mistake of the driver that was ignored.  `text` continues "the driver".  The rate is limited."""


COMMON_BYTES = 60  # virtio_pci_common_cfg up to queue_reset
COMMON = Struct("<IIIIHHBBHHHHHQQQHH")

# Legacy block
LEGACY_CONFIG = 20
LEGACY_CONFIG_MSIX = 24
LEGACY_REGISTERS = ((0, 4), (4, 4), (8, 4), (12, 2), (14, 2), (16, 2), (18, 1), (19, 1), (20, 2), (22, 2))
# For each byte, offset and width of its register.  An access acts on a register also if its width differs from the
# register's, as in other virtual machines.
LEGACY_AT = tuple(register for register in LEGACY_REGISTERS for _ in range(register[1]))


class QueueRegisters:
    """The registers of one queue."""

    __slots__ = ("avail", "desc", "enabled", "max_size", "pfn", "size", "used", "vector")

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self.reset()

    def reset(self) -> None:
        """Set the state after power-on."""
        self.size = self.max_size
        self.enabled = False
        self.desc = self.avail = self.used = 0
        self.pfn = 0
        self.vector = spec.VIRTIO_MSI_NO_VECTOR

    def set_pfn(self, pfn: int) -> None:
        """Place the three parts of a legacy queue: one after the other, the last one at a page boundary (2.7.2)."""
        self.pfn = pfn
        self.enabled = pfn != 0
        self.size = self.max_size
        self.desc = pfn * spec.LEGACY_QUEUE_ALIGN
        self.avail = self.desc + spec.DESC_BYTES * self.size
        end = self.avail + 6 + 2 * self.size  # with used_event
        self.used = -(-end // spec.LEGACY_QUEUE_ALIGN) * spec.LEGACY_QUEUE_ALIGN


class Transport:
    """The registers of one device."""

    def __init__(
        self,
        features: int,
        queue_sizes: tuple[int, ...],
        config: bytes,
        vectors: int,
        backend: "Backend",
        *,
        separate_notify: bool = False,
    ) -> None:
        """Set the state after power-on.  With `separate_notify` each queue has a notification address (4.1.4.4)."""
        self.offered_legacy = features & spec.LEGACY_FEATURES
        self.offered = features & ~spec.LEGACY_ONLY | 1 << spec.VIRTIO_F_VERSION_1
        self.queues = [QueueRegisters(size) for size in queue_sizes]
        self.config = config
        self.vectors = vectors
        self.backend = backend
        self.separate_notify = separate_notify
        self.generation = 0
        self.msix_enabled = False
        self._clear()

    def _clear(self) -> None:
        self.status = 0
        self.driver_features = 0
        self.features_locked = False
        self.active = False
        self.configured = False  # the driver has written to device configuration
        self.device_feature_select = 0
        self.driver_feature_select = 0
        self.queue_select = 0
        self.config_vector = spec.VIRTIO_MSI_NO_VECTOR
        for queue in self.queues:
            queue.reset()

    # --- both interfaces ---------------------------------------------------------------------------------

    @property
    def selected(self) -> QueueRegisters | None:
        """The queue with the number queue_select, or None."""
        return self.queues[self.queue_select] if self.queue_select < len(self.queues) else None

    def reset(self) -> None:
        """Reset the device.  The reset is complete when this returns."""
        if self.active or self.configured:
            self.backend.reset()
        self._reread_config()
        self._clear()
        self.backend.take_isr()
        self.backend.vectors_changed()

    def write_status(self, value: int, *, modern: bool) -> None:
        """Write device status.  Bits can be set, but only a reset clears them (2.1)."""
        value &= 0xFF
        if value == 0:
            self.reset()
            return
        added = value & ~self.status & ~spec.DEVICE_NEEDS_RESET
        if added & spec.FEATURES_OK:
            if modern and not self._features_acceptable("FEATURES_OK"):
                added &= ~spec.FEATURES_OK
            else:
                self.features_locked = True
        # A driver that sets DRIVER_OK without FEATURES_OK has accepted its features, too.
        skipped = added & spec.DRIVER_OK and modern and not (self.status | added) & spec.FEATURES_OK
        if skipped and not self._features_acceptable("DRIVER_OK"):
            added &= ~spec.DRIVER_OK
        self.status |= added
        if added & spec.DRIVER_OK:
            self._activate(modern=modern)

    def _activate(self, *, modern: bool) -> None:
        if not self.active:
            self.features_locked = True
            self.active = True
            usable = self.backend.activate(self.negotiated(modern=modern), self.queues)
            self._reread_config()
            if not usable:
                self.needs_reset()

    def _features_acceptable(self, step: str) -> bool:
        unknown = self.driver_features & ~self.offered
        if unknown:
            self.backend.complain(f"accepts features {unknown:#x}, which were not offered: {step} is refused")
            return False
        if not self.driver_features >> spec.VIRTIO_F_VERSION_1 & 1:
            self.backend.complain(f"uses the registers of virtio 1.x without VIRTIO_F_VERSION_1: {step} is refused")
            return False
        return True

    def negotiated(self, *, modern: bool) -> int:
        """Return the features that driver and device have agreed on.  They are a subset of those offered."""
        return self.driver_features & (self.offered if modern else self.offered_legacy)

    def needs_reset(self) -> None:
        """Set DEVICE_NEEDS_RESET, because the device cannot go on with its driver (2.1.2)."""
        self.status |= spec.DEVICE_NEEDS_RESET
        if self.status & spec.DRIVER_OK:
            self.backend.raise_config()

    def config_changed(self, config: bytes) -> None:
        """Take a configuration that the device has changed, and tell the driver."""
        self.config = config
        self.generation = self.generation + 1 & 0xFF
        if self.status & spec.DRIVER_OK:
            self.backend.raise_config()

    def read_config(self, offset: int, size: int) -> int:
        """Read device configuration.  Bytes behind its end read as zero."""
        return int.from_bytes(self.config[offset : offset + size], "little")

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Write device configuration.  A write outside of it is ignored."""
        if offset + size <= len(self.config):
            self.configured = True
            self.config = self.backend.write_config(offset, value.to_bytes(size, "little"))

    def _reread_config(self) -> None:
        """Read the configuration again: activation or reset may have changed what the driver has written to it."""
        if self.configured:
            self.config = self.backend.write_config(0, b"")

    def valid_vector(self, value: int) -> int:
        """Return the vector, or NO_VECTOR if it does not exist: the driver reads this back (4.1.5.1.2)."""
        return value if value < self.vectors else spec.VIRTIO_MSI_NO_VECTOR

    # --- virtio 1.x: common configuration (4.1.4.3) --------------------------------------------------------

    def common_read(self, offset: int, size: int) -> int:
        """Read any bytes of the structure."""
        queue = self.selected
        image = COMMON.pack(
            self.device_feature_select,
            self._window(self.offered, self.device_feature_select),
            self.driver_feature_select,
            self._window(self.driver_features, self.driver_feature_select),
            self.config_vector,
            len(self.queues),
            self.status,
            self.generation,
            self.queue_select,
            queue.size if queue else 0,
            queue.vector if queue else spec.VIRTIO_MSI_NO_VECTOR,
            queue.enabled if queue else 0,
            self.queue_select if queue and self.separate_notify else 0,  # queue_notify_off
            *((queue.desc, queue.avail, queue.used) if queue else (0, 0, 0)),
            0,
            0,
        )
        return int.from_bytes(image[offset : offset + size], "little")

    @staticmethod
    def _window(features: int, select: int) -> int:
        return features >> 32 * select & 0xFFFFFFFF if select < 2 else 0

    def common_write(self, offset: int, size: int, value: int) -> None:
        """Write one field.  A write whose width differs from the field's is ignored.

        An address may be written as a whole, as by drivers that have mapped memory, or in two halves (4.1.3.1).
        """
        field = COMMON_WRITES.get((offset, size))
        if field is not None:
            field(self, value)
        else:
            self.backend.complain(
                f"writes {size} bytes at {offset} of the common configuration,"
                " where no writable field of this size begins"
            )

    def _write_driver_feature(self, value: int) -> None:
        if self.features_locked:
            self.backend.complain("writes its features after it has accepted them")
            return
        if self.driver_feature_select > 1:
            return
        shift = 32 * self.driver_feature_select
        self.driver_features = self.driver_features & ~(0xFFFFFFFF << shift) | value << shift

    def _write_config_vector(self, value: int) -> None:
        self.config_vector = self.valid_vector(value)
        self.backend.vectors_changed()

    def _write_queue_vector(self, value: int) -> None:
        if self.selected is not None:
            self.selected.vector = self.valid_vector(value)
            self.backend.vectors_changed()

    def _configurable(self, what: str) -> QueueRegisters | None:
        queue = self.selected
        if queue is None or not (self.active or queue.enabled):
            return queue
        state = f"queue {self.queue_select} is enabled" if queue.enabled else "DRIVER_OK"
        self.backend.complain(f"writes {what} of queue {self.queue_select} after {state}")
        return None

    def _write_queue_size(self, value: int) -> None:
        queue = self._configurable("the size")
        if queue is None:
            return
        if 0 < value <= queue.max_size and value & value - 1 == 0:
            queue.size = value
        else:
            self.backend.complain(f"asks for a size of {value} for queue {self.queue_select}, which keeps {queue.size}")

    def _write_queue_enable(self, value: int) -> None:
        queue = self.selected
        if queue is not None and queue.enabled and value == 1:
            return  # it is enabled already
        queue = self._configurable("queue_enable")
        if queue is not None and value == 1:
            queue.enabled = True

    def _write_address(self, name: str, mask: int, shift: int, value: int) -> None:
        queue = self._configurable("an address")
        if queue is not None:
            setattr(queue, name, getattr(queue, name) & ~mask | value << shift)

    # --- the legacy block (4.1.4.10) -------------------------------------------------------------------------

    def legacy_notify(self, number: int) -> None:
        """Activate the device, if a driver notifies a queue before DRIVER_OK.

        Some legacy drivers use a device before they have set DRIVER_OK (3.1.2).
        """
        if number < len(self.queues) and self.queues[number].pfn and self.status & spec.DRIVER:
            self._activate(modern=False)

    def legacy_config_offset(self) -> int:
        """Return the offset of device configuration: it is behind the vectors while MSI-X is enabled."""
        return LEGACY_CONFIG_MSIX if self.msix_enabled else LEGACY_CONFIG

    def legacy_read(self, offset: int, size: int) -> int:
        """Read a legacy register, or the device configuration behind the registers."""
        start = self.legacy_config_offset()
        if offset >= start:
            return self.read_config(offset - start, size)
        first, width = LEGACY_AT[offset]
        return self._legacy_register_value(first) >> 8 * (offset - first) & (1 << 8 * min(size, width)) - 1

    def _legacy_register_value(self, offset: int) -> int:
        queue = self.selected
        match offset:
            case 0:
                return self.offered_legacy
            case 4:
                return self.driver_features & spec.LEGACY_FEATURES
            case 8:
                return queue.pfn if queue else 0
            case 12:
                return queue.max_size if queue else 0
            case 14:
                return self.queue_select
            case 18:
                return self.status
            case 19:
                return self.backend.take_isr()
            case 20:
                return self.config_vector
            case 22:
                return queue.vector if queue else spec.VIRTIO_MSI_NO_VECTOR
            case _:
                return 0

    def legacy_write(self, offset: int, size: int, value: int) -> None:
        """Write a legacy register, or the device configuration behind the registers."""
        start = self.legacy_config_offset()
        if offset >= start:
            self.write_config(offset - start, size, value)
            return
        value &= (1 << 8 * LEGACY_AT[offset][1]) - 1
        match offset:
            case 4:
                if self.features_locked:
                    self.backend.complain("writes its features after it has accepted them")
                else:
                    self.driver_features = value
            case 8:
                self._write_pfn(value)
            case 14:
                self.queue_select = value
            case 18:
                self.write_status(value, modern=False)
            case 20:
                self._write_config_vector(value)
            case 22:
                self._write_queue_vector(value)
            case _:
                self.backend.complain(
                    f"writes {size} bytes at {offset} of the legacy registers, where no writable register begins"
                )

    def _write_pfn(self, value: int) -> None:
        queue = self.selected
        if queue is None:
            return
        if not self.active:
            queue.set_pfn(value)
        elif queue.pfn and value == 0:
            # A legacy driver takes a queue back like this, without a reset.  The queue's memory must not be accessed
            # any more.
            self.reset()
        else:
            self.backend.complain(f"sets up queue {self.queue_select} after the device was started")


def _address_writes() -> "dict[tuple[int, int], object]":
    writes: dict[tuple[int, int], object] = {}
    for name, base in (("desc", 32), ("avail", 40), ("used", 48)):
        for at, size in ((0, 4), (4, 4), (0, 8)):

            def write(self: Transport, value: int, name: str = name, at: int = at, size: int = size) -> None:
                self._write_address(name, (1 << 8 * size) - 1 << 8 * at, 8 * at, value)

            writes[base + at, size] = write
    return writes


def _select(name: str) -> object:
    return lambda self, value: setattr(self, name, value)


COMMON_WRITES: dict = {  # type: ignore[type-arg]
    (0, 4): _select("device_feature_select"),
    (8, 4): _select("driver_feature_select"),
    (12, 4): Transport._write_driver_feature,
    (16, 2): Transport._write_config_vector,
    (20, 1): lambda self, value: self.write_status(value, modern=True),
    (22, 2): _select("queue_select"),
    (24, 2): Transport._write_queue_size,
    (26, 2): Transport._write_queue_vector,
    (28, 2): Transport._write_queue_enable,
    **_address_writes(),
}
