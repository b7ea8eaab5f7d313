"""A virtio device on the PCI bus: its registers are here, its rings are in its device process.

Notifications and interrupts of a running queue do not enter this process (arch. 5).  When the guest writes to the
notify port, the kernel signals the queue's kick eventfd.  When the device process writes to the queue's call eventfd,
the kernel interrupts the guest.  This module registers both eventfds with KVM where the guest's registers say.

A device that this process serves itself (`vm/entropy.py`) has both eventfds, too.  The only difference: KVM signals the
end of an INTx interrupt by `config_resample`, to which this process listens.  KVM does so for every interrupt on that
line, also for those of other devices.

    BAR 0   i/o, 128 bytes   legacy register block    (with `virtio transitional` or `legacy`)
    BAR 1   memory, 4 KiB    MSI-X table and pending bits
    BAR 2   i/o, 256 bytes   virtio 1.x structures    (with `virtio transitional` or `modern`)
    BAR 4   memory, 4 KiB    the same structures      (not with `virtio legacy`)

BARs 2 and 4 give access to the same registers: common configuration at 0, ISR at 44h, device configuration from 80h on.
The notify word is at 40h in BAR 2, and at 800h in BAR 4.

A machine of layout 1, which an earlier version has sent, has no BAR 4.

A driver takes the first set of structures that it can use.  The i/o set comes first, because an access to it costs
less: the kernel need not decode the instruction.  Some drivers that know only memory BARs go on to the second set, and
others give up at the first set.  `virtio memory`, which has no i/o BAR at all, is for drivers that give up.

Several drivers confuse the two sets.  SeaBIOS takes the first notification structure and the multiplier of the last
one, so both multipliers are 0.  Redox refuses a multiplier of 0, so `virtio memory` has another one.
"""

import os

from vmd.config.model import VirtioMode
from vmd.errors import PeerError
from vmd.eventfd import drain, eventfd
from vmd.ipc.devmsg import OWN_MAX, PAUSE, RESET
from vmd.log import RateLimit, log
from vmd.readable import readable
from vmd.record import Part, Record
from vmd.virtio import spec
from vmd.virtio.transport import COMMON_BYTES, Transport
from vmd.vm import layout
from vmd.vm.devproc import are_addresses
from vmd.vm.kinds import INTERFACE
from vmd.vm.msix import Msix
from vmd.vm.pci import COMMAND_INTX_DISABLE, PciFunction
from vmd.vm.slots import LAYOUT, LAYOUT_FIRST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    from vmd.kvmapi.vm import Vm
    from vmd.virtio.transport import QueueRegisters
    from vmd.vm.devproc import Interrupts
    from vmd.vm.kinds import Kind
    from vmd.vm.routing import Routing

BAR_LEGACY, BAR_MSIX, BAR_MODERN, BAR_MEMORY = 0, 1, 2, 4
LEGACY_BYTES = 0x80
LEGACY_NOTIFY = 16

MODERN_BYTES = 0x100
COMMON = 0x00
NOTIFY = 0x40
ISR = 0x44
DEVICE_CONFIG = 0x80
NOTIFY_BYTES = 2

MEMORY_BYTES = 0x1000  # a whole page, which a driver can map without the registers of another device
MEMORY_NOTIFY = 0x800
NOTIFY_STEP = 4  # bytes between the notify words of two queues, if each queue has its own word

# virtio_pci_cap after id and next pointer: length, type, bar, id, padding, offset, length (virtio 1.2, 4.1.4)
CAP_BYTES = 16


# Attributes that a saved state has under the same names, and their widths in bits.
QUEUE_REGISTERS = {"size": 16, "enabled": 1, "desc": 64, "avail": 64, "used": 64, "pfn": 32, "vector": 16}
QUEUE_INDICES = {"next_avail": 16, "next_used": 16}
REGISTERS = {
    "status": 8, "driver_features": 64, "features_locked": 1, "active": 1, "device_feature_select": 32,
    "driver_feature_select": 32, "queue_select": 16, "config_vector": 16, "generation": 8,
}  # fmt: skip


if TYPE_CHECKING:
    # Port or address; width in bytes, or 0 for any; value, or None for any; whether it is a port.
    NotifyAddress = tuple[int, int, int | None, bool]

    class Server(Protocol):
        """Serves the rings of a device: a `DeviceProcess`, which documents these methods, or `vm/entropy.py`."""

        kind: Kind
        title: str
        name: str
        features: int
        config: bytes
        kicks: list[int]
        calls: list[int]
        interrupts: Interrupts
        activations: int
        arrived_with: bytes

        @property
        def resample(self) -> int | None:
            """The eventfd by which KVM reports the end of an INTx interrupt to it; None if it is in this process."""

        def activate(self, features: int, queues: Sequence[tuple[int, bool, int, int, int, int, int]]) -> bool:
            """Take the rings, and serve them."""

        def command(self, kind: int) -> bool:
            """Execute RESET, PAUSE, RESUME, MARK or UNMARK."""

        def write_config(self, offset: int, data: bytes) -> bytes:
            """Take a write of the driver to configuration space."""

        def export(self) -> tuple[list[tuple[int, int]], bytes]:
            """Return the positions in the rings, and the device's own state."""

        def restore(self, own: bytes) -> bool:
            """Take the own state of the device that was saved."""

        def addresses(self) -> bytes:
            """For an interface: return the addresses that its guest has announced to its neighbours."""

        def tell_direct(self, direct: bool) -> None:
            """For an interface: take whether each queue has an MSI-X vector."""


class QueueState(Record):
    """One queue of a saved device."""

    size: int
    enabled: bool
    desc: int
    avail: int
    used: int
    pfn: int
    vector: int
    next_avail: int
    next_used: int
    called: bool  # an interrupt is pending behind a masked vector
    unseen: bool  # INTx: the guest has not read ISR yet


class VirtioState(Part):
    """A saved device: its registers, and the positions of its process in the rings."""

    kind: str = ""  # the kind of device; "" in streams of older versions, which have it in the header only
    status: int
    driver_features: int
    features_locked: bool
    active: bool
    device_feature_select: int
    driver_feature_select: int
    queue_select: int
    config_vector: int
    generation: int
    config: bytes
    config_pending: bool
    config_called: bool
    own: bytes = b""  # the state of its process besides the rings
    queues: tuple[QueueState, ...]
    addresses: bytes = b""  # of an interface: those that its guest has announced, as devmsg.ANNOUNCED


class VirtioFunction(PciFunction):
    """One virtio device.  It is also the `Backend` of its registers."""

    def __init__(
        self,
        server: "Server",
        kvm: "Vm",
        routing: "Routing",
        mode: VirtioMode,
        fail: "Callable[[str], None]",
        function_layout: int = LAYOUT,
    ) -> None:
        modern_only = mode in (VirtioMode.MODERN, VirtioMode.MEMORY)
        kind = server.kind
        subsystem_base = spec.SUBSYSTEM_MODERN_BASE if modern_only and function_layout > LAYOUT_FIRST else 0
        super().__init__(
            vendor=spec.VENDOR,
            device=spec.DEVICE_MODERN_BASE + kind.device_type if modern_only else kind.legacy_id,
            class_code=kind.class_code,
            subsystem_vendor=spec.SUBSYSTEM_VENDOR,
            subsystem=subsystem_base + kind.device_type,
            revision=1 if modern_only else 0,
            interrupt_pin=1,
        )
        self.pci_cfg = 0  # offset of the window (PCI_CFG) in configuration space
        self.server = server
        self.kvm = kvm
        self.routing = routing
        self.fail = fail
        self.complaints = RateLimit()
        self.remarks = RateLimit()  # a limit of its own: remarks must not suppress complaints
        vectors = len(kind.queues) + 1
        separate = mode is VirtioMode.MEMORY
        self.transport = Transport(
            server.features, kind.queues, server.config, vectors, self, separate_notify=separate
        )
        self.config_call = eventfd()
        self.config_resample = eventfd()
        self.config_pending = False
        self.detached = False  # true while the machine is paused
        self.first_gsi = routing.allocate(vectors)
        self.irqfds: dict[int, tuple[int, bool]] = {}  # eventfd -> (gsi, whether with resample)
        self.ioeventfds: set[tuple[NotifyAddress, int]] = set()  # (address, queue)
        self.structures: dict[int, LegacyBlock | ModernBlock] = {}  # register blocks that the window reaches, by BAR
        if not modern_only:
            self.structures[BAR_LEGACY] = legacy = LegacyBlock(self)
            self.add_io_bar(BAR_LEGACY, LEGACY_BYTES, legacy)
        if mode in (VirtioMode.TRANSITIONAL, VirtioMode.MODERN):
            self.structures[BAR_MODERN] = ports = ModernBlock(self, NOTIFY)
            self.add_io_bar(BAR_MODERN, MODERN_BYTES, ports)
            self._add_structures(BAR_MODERN, NOTIFY)
        if mode is not VirtioMode.LEGACY:
            self._add_window()
        self.add_msix(
            Msix(vectors, self._on_vector, self._vector_pending, self._on_msix_enable), BAR_MSIX
        )
        if mode is not VirtioMode.LEGACY and function_layout > LAYOUT_FIRST:
            self.structures[BAR_MEMORY] = memory = ModernBlock(self, MEMORY_NOTIFY)
            self.add_memory_bar(BAR_MEMORY, MEMORY_BYTES, memory)
            self._add_structures(BAR_MEMORY, MEMORY_NOTIFY)

    def _add_structures(self, bar: int, notify: int) -> None:
        """Add the capabilities that give the offset of each structure in a BAR (4.1.4)."""
        separate = self.transport.separate_notify
        multiplier = NOTIFY_STEP if separate else 0  # 0: one word for all queues
        notify_bytes = NOTIFY_STEP * len(self.transport.queues) if separate else NOTIFY_BYTES
        structures = (
            (spec.VIRTIO_PCI_CAP_COMMON_CFG, COMMON, COMMON_BYTES, b""),
            (spec.VIRTIO_PCI_CAP_NOTIFY_CFG, notify, notify_bytes, multiplier.to_bytes(4, "little")),
            (spec.VIRTIO_PCI_CAP_ISR_CFG, ISR, 1, b""),
            (spec.VIRTIO_PCI_CAP_DEVICE_CFG, DEVICE_CONFIG, max(len(self.server.config), 4), b""),
        )
        for cap_type, offset, length, extra in structures:
            body = bytes((CAP_BYTES + len(extra), cap_type, bar, 0, 0, 0))
            body += offset.to_bytes(4, "little") + length.to_bytes(4, "little") + extra
            self.add_capability(spec.PCI_CAP_ID_VENDOR, body)

    def _add_window(self) -> None:
        """Add a window for drivers that can access BARs only through configuration space (4.1.4.9)."""
        body = bytes((CAP_BYTES + 4, spec.VIRTIO_PCI_CAP_PCI_CFG, 0, 0, 0, 0)) + bytes(8) + bytes(4)
        writable = bytes((0, 0, 0xFF, 0, 0, 0)) + b"\xff" * 12
        self.pci_cfg = self.add_capability(spec.PCI_CAP_ID_VENDOR, body, writable)

    # --- PCI -----------------------------------------------------------------------------------------------

    def config_read(self, offset: int, size: int) -> int:
        """Read configuration space.  A read of pci_cfg_data reads the register that its capability points to."""
        self._window(offset, None)
        return super().config_read(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Write configuration space.  A write to pci_cfg_data writes the register that its capability points to."""
        super().config_write(offset, size, value)
        self._window(offset, value)

    def _window(self, offset: int, value: int | None) -> None:
        cap = self.pci_cfg
        if not cap or not cap + CAP_BYTES <= offset < cap + CAP_BYTES + 4:
            return
        with self.lock:
            index = self.config[cap + 4]
            block = self.structures.get(index)
            at = int.from_bytes(self.config[cap + 8 : cap + 12], "little")
            length = int.from_bytes(self.config[cap + 12 : cap + 16], "little")
            if block is None or length not in (1, 2, 4) or at + length > self.bars[index].size:
                return
            if value is None:
                data = block.read(at, length)
                self.config[cap + CAP_BYTES : cap + CAP_BYTES + 4] = data.to_bytes(4, "little")
            else:
                data = int.from_bytes(self.config[cap + CAP_BYTES : cap + CAP_BYTES + length], "little")
                block.write(at, length, data)

    def bar_changed(self, index: int, base: int | None) -> None:
        """Map a BAR, and register the notify addresses in it."""
        super().bar_changed(index, base)
        self._place_notifications()

    def command_changed(self, command: int) -> None:
        """Switch INTx off or on.  When it is switched on, interrupt the guest for events that it has not seen."""
        silent = not self.irqfds
        self._place_interrupts()
        if silent and self.irqfds:
            self._raise_unseen()

    def interrupt_pending(self) -> bool:
        """Return whether an INTx interrupt is pending."""
        if self.transport.msix_enabled:
            return False
        queues = range(len(self.transport.queues))
        return self.config_pending or any(self.server.interrupts.pending(queue) for queue in queues)

    # --- interrupts ----------------------------------------------------------------------------------------

    def _calls(self) -> "list[tuple[int, int]]":
        """Return (eventfd, MSI-X vector) of each source of interrupts: the queues, then configuration."""
        sources = [(fd, queue.vector) for fd, queue in zip(self.server.calls, self.transport.queues, strict=True)]
        return [*sources, (self.config_call, self.transport.config_vector)]

    def _place_interrupts(self) -> None:
        """Assign each call eventfd to the interrupt that the guest has set up.

        An eventfd whose vector is masked has no interrupt: it counts.
        """
        assert self.msix is not None
        self._tell_direct()  # first: interrupts that the kernel has raised until now still go to the old place
        wanted: dict[int, tuple[int, bool]] = {}
        if self.detached:
            pass
        elif self.transport.msix_enabled:
            for fd, vector in self._calls():
                if vector < self.msix.vectors and not self.msix.message(vector)[2]:
                    wanted[fd] = (self.first_gsi + vector, False)
        elif self.slot > 0 and not self.command & COMMAND_INTX_DISABLE:
            # The eventfds of this process are assigned only while an interrupt is pending: until then, each end of an
            # interrupt on this line, also of another device, would wake the event thread.  The eventfds of a device
            # process are assigned once it has rings: an assignment takes the kernel a millisecond, and most drivers
            # have enabled MSI-X by then.
            gsi, pending = layout.pci_irq(self.slot, 1), self.server.interrupts.pending
            serves = self.server.resample is not None and self.transport.active
            for queue, fd in enumerate(self.server.calls):
                if serves or pending(queue):
                    wanted[fd] = (gsi, True)
            if self.config_pending:
                wanted[self.config_call] = (gsi, True)
        for fd, (gsi, _) in list(self.irqfds.items()):
            if wanted.get(fd) != self.irqfds[fd]:
                self.kvm.deassign_irqfd(fd, gsi)
                del self.irqfds[fd]
        for fd, (gsi, level) in wanted.items():
            if fd not in self.irqfds:
                ours = fd == self.config_call or self.server.resample is None
                resample = self.config_resample if ours else self.server.resample
                self.kvm.assign_irqfd(fd, gsi, resample if level else None)
                self.irqfds[fd] = (gsi, level)

    def _tell_direct(self) -> None:
        """Tell the process whether each queue has a vector, masked or not.

        If not, the process has to count each interrupt for ISR.
        """
        vectors = [queue.vector for queue in self.transport.queues]
        try:
            self.server.tell_direct(self.transport.msix_enabled and spec.VIRTIO_MSI_NO_VECTOR not in vectors)
        except PeerError as error:
            self.fail(str(error))

    def detach_interrupts(self) -> None:
        """Detach all call eventfds from the interrupt controllers.  When this returns, no injection is under way."""
        with self.lock:
            self.detached = True
            self._place_interrupts()

    def attach_interrupts(self) -> None:
        """Undo `detach_interrupts`.

        Interrupts that the eventfds have counted meanwhile are injected.  INTx is asserted if the guest has not read
        ISR.
        """
        with self.lock:
            self.detached = False
            self._place_interrupts()
            self._raise_unseen()

    def _raise_unseen(self) -> None:
        """Assert INTx for interrupts that the guest has not read from ISR yet."""
        if self.transport.msix_enabled:
            return
        for queue, call in enumerate(self.server.calls):
            if self.server.interrupts.pending(queue):
                os.eventfd_write(call, 1)
        if self.config_pending:
            os.eventfd_write(self.config_call, 1)

    def _on_vector(self, vector: int, address: int, data: int, masked: bool) -> None:
        if not masked:
            self.routing.set_message(self.first_gsi + vector, address, data)  # before anything can be injected
        self._place_interrupts()

    def _on_msix_enable(self, enabled: bool) -> None:
        self.transport.msix_enabled = enabled
        self._place_interrupts()

    def _vector_pending(self, vector: int) -> bool:
        return any(
            number == vector and fd not in self.irqfds and readable(fd) for fd, number in self._calls()
        )

    def on_config_resample(self, _events: int) -> None:
        """The guest has ended an INTx interrupt: assert it again if the guest has not read ISR."""
        drain(self.config_resample)
        with self.lock:
            self._raise_unseen()

    # --- notifications ---------------------------------------------------------------------------------------

    def notify(self, number: int, size: int = NOTIFY_BYTES) -> None:
        """Take a notification that KVM has not handled: it came through the window, or before it was registered."""
        if size != NOTIFY_BYTES:
            self.complain(f"notifies by {size} bytes, not {NOTIFY_BYTES}")
        elif number >= len(self.server.kicks):
            self.complain(f"notifies queue {number}, which does not exist")
        elif self.transport.active:
            os.eventfd_write(self.server.kicks[number], 1)

    def _place_notifications(self) -> None:
        """Register the kick of each queue at all addresses at which the guest can notify it now."""
        wanted: set[tuple[NotifyAddress, int]] = set()
        if self.transport.active:
            for index, offset in ((BAR_LEGACY, LEGACY_NOTIFY), (BAR_MODERN, NOTIFY), (BAR_MEMORY, MEMORY_NOTIFY)):
                bar = self.bars.get(index)
                if bar is not None and bar.mapped is not None:
                    wanted |= {
                        (self._notify_address(bar.mapped + offset, queue, pio=bar.is_io), queue)
                        for queue in range(len(self.transport.queues))
                    }
        for (address, size, datamatch, pio), queue in self.ioeventfds - wanted:
            self.kvm.deassign_ioeventfd(self.server.kicks[queue], address, size, datamatch, pio=pio)
        for (address, size, datamatch, pio), queue in wanted - self.ioeventfds:
            self.kvm.assign_ioeventfd(self.server.kicks[queue], address, size, datamatch, pio=pio)
        self.ioeventfds = wanted

    def _notify_address(self, base: int, queue: int, *, pio: bool) -> "NotifyAddress":
        if self.transport.separate_notify:
            # Any value that is written there notifies this queue, so KVM need not decode the instruction.
            return base + NOTIFY_STEP * queue, 0, None, pio
        return base, NOTIFY_BYTES, queue, pio

    # --- Backend ---------------------------------------------------------------------------------------------

    def activate(self, features: int, queues: "list[QueueRegisters]") -> bool:
        """Hand the rings to the device process."""
        rows = [(q.size, q.enabled, q.desc, q.avail, q.used, 0, 0) for q in queues]
        try:
            usable = self.server.activate(features, rows)
        except PeerError as error:
            self.fail(str(error))
            return False
        self._place_notifications()
        self._place_interrupts()
        return usable

    def reset(self) -> None:
        """Take the rings from the device process.  If it cannot let go of them, the VM ends."""
        self.transport.active = False
        self._place_notifications()
        try:
            self.server.command(RESET)
        except PeerError as error:
            self.fail(str(error))
        for fd in (*self.server.kicks, *self.server.calls, self.config_call):
            drain(fd)
        self._place_interrupts()

    def write_config(self, offset: int, data: bytes) -> bytes:
        """Pass a write to device configuration on to the device process."""
        try:
            config = self.server.write_config(offset, data)
            if len(config) != len(self.transport.config):
                raise PeerError(self.server.title, f"configuration has {len(config)} bytes after a write to it")
        except PeerError as error:
            self.fail(str(error))
            return self.transport.config
        return config

    def take_isr(self) -> int:
        """Return and clear ISR."""
        queue = self.server.interrupts.take(len(self.transport.queues))
        config, self.config_pending = self.config_pending, False
        ours = [self.config_call] if config else []
        if queue and self.server.resample is None:
            ours += self.server.calls
        if ours and not self.transport.msix_enabled:
            for fd in ours:
                drain(fd)  # INTx may have been disabled, so that the eventfd still counts
            self._place_interrupts()
        return (spec.ISR_QUEUE if queue else 0) | (spec.ISR_CONFIG if config else 0)

    def vectors_changed(self) -> None:
        """Act on a new vector of a queue or of the configuration."""
        self._place_interrupts()

    def complain(self, text: str) -> None:
        """Log a mistake of the driver that was ignored."""
        self.remarks.warn(f"{self.server.name}: the driver {text}")

    def raise_config(self) -> None:
        """Interrupt the guest because configuration has changed, or the device wants a reset."""
        self.config_pending = True
        self._place_interrupts()
        os.eventfd_write(self.config_call, 1)

    # --- saving ----------------------------------------------------------------------------------------------

    def save(self) -> VirtioState:
        """Return the state of a paused device.  Raises PeerError."""
        with self.lock:
            registers = self.transport
            indices, own = self.server.export() if registers.active else ([], b"")
            indices += [(0, 0)] * (len(registers.queues) - len(indices))
            queues = tuple(
                QueueState(
                    **{name: getattr(queue, name) for name in QUEUE_REGISTERS},
                    next_avail=next_avail,
                    next_used=next_used,
                    called=readable(call),
                    unseen=self.server.interrupts.pending(number),
                )
                for number, (queue, (next_avail, next_used), call) in enumerate(
                    zip(registers.queues, indices, self.server.calls, strict=True)
                )
            )
            return VirtioState(
                kind=self.server.kind.name,
                **{name: getattr(registers, name) for name in REGISTERS},
                config=registers.config,
                config_pending=self.config_pending,
                config_called=readable(self.config_call),
                own=own,
                queues=queues,
                addresses=self.server.addresses() if self.server.kind is INTERFACE else b"",
            )

    def check_registers(self, state: VirtioState, offered: int) -> None:
        """Raise ValueError unless this is the state of a device like this one.

        `offered` are the features that its process offered at the sender.
        """
        name, queues = self.server.name, self.transport.queues
        if state.kind not in ("", self.server.kind.name):
            raise ValueError(f"a device of kind {state.kind!r} in the place of {name}")
        if len(state.queues) != len(queues) or len(state.config) != len(self.transport.config):
            raise ValueError(f"{name} has other queues or another size of configuration")
        if not are_addresses(state.addresses):
            raise ValueError(f"impossible addresses of the guest of {name}")
        if len(state.own) > OWN_MAX:
            raise ValueError(f"{len(state.own)} bytes of own state of {name}, at most {OWN_MAX} can be")
        _check_widths(state, REGISTERS)
        for queue, saved in zip(queues, state.queues, strict=True):
            _check_widths(saved, QUEUE_REGISTERS | QUEUE_INDICES)
            if not 0 < saved.size <= queue.max_size or saved.size & saved.size - 1:
                raise ValueError(f"{name} has a queue of {saved.size}")
        missing = state.driver_features & offered & ~self.server.features
        if missing:
            raise ValueError(f"its driver of {name} uses features {missing:#x}, which {name} does not have here")

    def restore_registers(self, state: VirtioState) -> None:
        """Restore the registers from a checked state.  The device is then paused; `restore_rings` comes next."""
        with self.lock:
            registers = self.transport
            self.detach_interrupts()
            for queue, saved in zip(registers.queues, state.queues, strict=True):
                for name in QUEUE_REGISTERS:
                    setattr(queue, name, getattr(saved, name))
                queue.vector = registers.valid_vector(saved.vector)
            for name in REGISTERS:
                setattr(registers, name, getattr(state, name))
            registers.config_vector = registers.valid_vector(state.config_vector)
            self.config_pending = state.config_pending

    def restore_rings(self, state: VirtioState) -> None:
        """Pause the device process and hand it the rings.  Raises PeerError or ValueError."""
        with self.lock:
            registers = self.transport
            self.server.command(PAUSE)
            self.server.arrived_with = state.addresses
            if state.config != self.server.config:
                registers.config = self.server.write_config(0, state.config)
                registers.configured = True
            if state.active:
                modern = bool(state.driver_features >> spec.VIRTIO_F_VERSION_1 & 1)
                rows = [
                    (q.size, q.enabled, q.desc, q.avail, q.used, q.next_avail, q.next_used) for q in state.queues
                ]
                usable = self.server.activate(registers.negotiated(modern=modern), rows)
                if usable and registers.config != state.config and not self.server.kind.config_may_differ:
                    raise ValueError(f"{self.server.name} is a different device here, such as a disk of another size")
                self._place_notifications()
                if not usable:
                    registers.needs_reset()
                if state.own:
                    self.server.restore(state.own)
            for number, queue in enumerate(state.queues):
                if queue.unseen:
                    self.server.interrupts.restore_pending(number)
                if queue.called:
                    os.eventfd_write(self.server.calls[number], 1)
            if state.config_called:
                os.eventfd_write(self.config_call, 1)

    # --- calls from what serves the rings, on the event thread -------------------------------------------------

    def on_interrupt(self) -> None:
        """Interrupt the guest: a device that this process serves has counted an interrupt of its only queue."""
        with self.lock:
            if self.transport.msix_enabled:
                os.eventfd_write(self.server.calls[0], 1)
            else:
                self._place_interrupts()
                self._raise_unseen()

    def on_needs_reset(self, text: str, life: int) -> None:
        """Act on a ring that the driver has broken.  `life` numbers the activation to which the ring belonged."""
        self.complaints.warn(f"{self.server.name}: {text}")
        with self.lock:
            if self.transport.active and life == self.server.activations:
                self.transport.needs_reset()

    def on_config(self, config: bytes) -> None:
        """Take a configuration that the device has changed, and tell the guest."""
        with self.lock:
            if len(config) == len(self.transport.config):
                self.transport.config_changed(config)
            else:
                log.error(f"{self.server.name}: configuration changed its length")


class LegacyBlock:
    """The register block in BAR 0."""

    def __init__(self, function: VirtioFunction) -> None:
        self.function = function

    def read(self, offset: int, size: int) -> int:
        """Read a legacy register."""
        with self.function.lock:
            return self.function.transport.legacy_read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a legacy register.  KVM handles most notifications, so they do not come here."""
        function = self.function
        with function.lock:
            if offset != LEGACY_NOTIFY:
                function.transport.legacy_write(offset, size, value)
                return
            if size == NOTIFY_BYTES:
                function.transport.legacy_notify(value)
            function.notify(value, size)

    pio_read, pio_write = read, write


class ModernBlock:
    """The register block in BAR 2 or 4.  `notify` is the offset of its notify words."""

    def __init__(self, function: VirtioFunction, notify: int) -> None:
        self.function = function
        self.notify = notify

    def read(self, offset: int, size: int) -> int:
        """Read a virtio 1.x structure."""
        function = self.function
        with function.lock:
            if offset >= DEVICE_CONFIG:
                return function.transport.read_config(offset - DEVICE_CONFIG, size)
            if offset == ISR:
                return function.take_isr()
            return function.transport.common_read(offset, size) if offset < COMMON_BYTES else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a virtio 1.x structure.  KVM handles most notifications, so they do not come here."""
        function = self.function
        with function.lock:
            transport = function.transport
            words_end = self.notify + NOTIFY_STEP * len(transport.queues)
            if offset < COMMON_BYTES:
                transport.common_write(offset, size, value)
            elif transport.separate_notify and self.notify <= offset < words_end:
                function.notify((offset - self.notify) // NOTIFY_STEP)
            elif not transport.separate_notify and offset == self.notify:
                function.notify(value, size)
            elif offset >= DEVICE_CONFIG:
                transport.write_config(offset - DEVICE_CONFIG, size, value)

    pio_read, pio_write = read, write
    mmio_read, mmio_write = read, write


def _check_widths(state: VirtioState | QueueState, widths: dict[str, int]) -> None:
    """Raise ValueError for a number that does not fit its register."""
    for name, bits in widths.items():
        if not 0 <= getattr(state, name) < 1 << bits:
            raise ValueError(f"{name} is {getattr(state, name)}, which does not fit {bits} bits")
