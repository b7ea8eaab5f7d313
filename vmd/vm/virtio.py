"""A virtio device on the PCI bus: registers here, rings in its device process, KVM between guest and process.

Notifications and interrupts of a running queue pass this process by (arch. 5): the guest's write to the notify
port signals the queue's kick eventfd in the kernel, and the process's write to its call eventfd interrupts the
guest there.  This module only keeps those two registrations in step with what the guest programs.

A device that this process serves itself (`vm/entropy.py`) has both eventfds, too.  It differs in one thing only: where
KVM tells of the end of each interrupt on a line of INTx, whosever that was, is `config_resample`, which we listen to.

    BAR 0   i/o, 128 bytes   legacy register block    (with `virtio transitional` or `legacy`)
    BAR 1   memory, 4 KiB    MSI-X table and pending bits
    BAR 2   i/o, 256 bytes   virtio 1.x structures    (with `virtio transitional` or `modern`)
    BAR 4   memory, 4 KiB    the same structures      (not with `virtio legacy`)

BARs 2 and 4 hold common configuration at 0, ISR at 44h, device configuration from 80h on, and reach the same registers.
The notify word is at 40h in BAR 2, and at 800h in BAR 4.

A machine of layout 1, which was sent by an earlier version, has no BAR 4.

Drivers take the first set of structures that they can use.  The i/o set comes first, because an access to it costs
less: the kernel has no instruction to decode.  Of the drivers that know memory BARs only, some go on to the second set
and some give up.  `virtio memory`, which has no i/o BAR at all, is for the latter.

Several drivers mix the two sets up.  SeaBIOS takes the first notification structure and the multiplier of the last one,
so both multipliers are 0.  Redox refuses a multiplier of 0, so `virtio memory` has another one.
"""

import os

from vmd.config.model import VirtioMode
from vmd.errors import PeerError
from vmd.ipc.devmsg import OWN_MAX, PAUSE, RESET
from vmd.log import RateLimit, log
from vmd.record import Part, Record
from vmd.virtio import spec
from vmd.virtio.transport import Transport
from vmd.vm import layout
from vmd.vm.devproc import are_addresses
from vmd.vm.eventfd import drain, eventfd, readable
from vmd.vm.kinds import INTERFACE
from vmd.vm.pci import COMMAND_INTX_DISABLE, Msix, PciFunction
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
COMMON, COMMON_BYTES = 0x00, 0x3C
NOTIFY = 0x40
ISR = 0x44
DEVICE_CONFIG = 0x80
NOTIFY_BYTES = 2

MEMORY_BYTES = 0x1000  # a page, which a driver can map by itself
MEMORY_NOTIFY = 0x800
NOTIFY_STEP = 4  # between the words of two queues, where each has its own

# virtio_pci_cap after id and next pointer: length, type, bar, id, padding, offset, length (virtio 1.2, 4.1.4)
CAP_BYTES = 16
PCI_CFG_DATA = 14  # in the body of the PCI_CFG capability: pci_cfg_data, behind the cap's own fields


# Attributes that go into a saved state as they are, under the same names, and how wide they are in bits.
QUEUE_REGISTERS = {"size": 16, "enabled": 1, "desc": 64, "avail": 64, "used": 64, "pfn": 32, "vector": 16}
QUEUE_INDICES = {"next_avail": 16, "next_used": 16}
REGISTERS = {
    "status": 8, "driver_features": 64, "features_locked": 1, "active": 1, "device_feature_select": 32,
    "driver_feature_select": 32, "queue_select": 16, "config_vector": 16, "generation": 8,
}  # fmt: skip


if TYPE_CHECKING:
    NotifyAddress = tuple[int, int, int | None, bool]  # port or address, width or 0 for any, value or any, is a port

    class Server(Protocol):
        """What serves the rings of a device: a `DeviceProcess`, whose methods say more, or this process."""

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
            """The eventfd that it hears of ends of INTx interrupts by; None: it is in this process."""

        def activate(self, features: int, queues: Sequence[tuple[int, bool, int, int, int, int, int]]) -> bool:
            """Take the rings."""

        def command(self, kind: int) -> bool:
            """Do RESET, PAUSE, RESUME, MARK or UNMARK."""

        def write_config(self, offset: int, data: bytes) -> bytes:
            """Take a write of the driver to configuration space."""

        def export(self) -> tuple[list[tuple[int, int]], bytes]:
            """Say how far it is in its rings."""

        def restore(self, own: bytes) -> bool:
            """Take what its like has kept besides."""

        def addresses(self) -> bytes:
            """Of an interface: say which addresses its guest has told its neighbours."""

        def tell_direct(self, direct: bool) -> None:
            """Of an interface: hear whether each queue has a vector."""


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
    called: bool  # an interrupt that has not been delivered, behind a masked vector
    unseen: bool  # INTx: the guest has yet to read ISR


class VirtioState(Part):
    """A saved device: its registers, and where its process was in the rings."""

    kind: str = ""  # of the device; "": as the header says, as before a part named its kind
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
    own: bytes = b""  # what its process keeps besides its rings
    queues: tuple[QueueState, ...]
    addresses: bytes = b""  # that the guest of an interface has told its neighbours, devmsg.ANNOUNCED each


class VirtioFunction(PciFunction):
    """One transitional virtio device; also the `Backend` of its registers."""

    def __init__(
        self,
        process: "Server",
        kvm: "Vm",
        routing: "Routing",
        mode: VirtioMode,
        fail: "Callable[[str], None]",
        function_layout: int = LAYOUT,
    ) -> None:
        modern_only = mode in (VirtioMode.MODERN, VirtioMode.MEMORY)
        kind = process.kind
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
        self.pci_cfg = 0  # where in configuration space the window is
        self.process = process
        self.kvm = kvm
        self.routing = routing
        self.fail = fail
        self.complaints = RateLimit()
        self.remarks = RateLimit()  # of its own, so that they keep no complaint out of the log
        vectors = len(kind.queues) + 1
        apart = mode is VirtioMode.MEMORY
        self.transport = Transport(process.features, kind.queues, process.config, vectors, self, notify_apart=apart)
        self.config_call = eventfd()
        self.config_resample = eventfd()
        self.config_pending = False
        self.detached = False  # while the machine stands still
        self.first_gsi = routing.allocate(vectors)
        self.irqfds: dict[int, tuple[int, bool]] = {}  # eventfd -> gsi, with resample
        self.ioeventfds: set[tuple[NotifyAddress, int]] = set()  # and the queue
        self.structures: dict[int, LegacyBlock | ModernBlock] = {}  # what the window reaches, by BAR
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
        """Add the capabilities that say where in a BAR each structure is (4.1.4)."""
        apart = self.transport.notify_apart
        multiplier = NOTIFY_STEP if apart else 0  # 0: one word for all queues
        notify_bytes = NOTIFY_STEP * len(self.transport.queues) if apart else NOTIFY_BYTES
        structures = (
            (spec.VIRTIO_PCI_CAP_COMMON_CFG, COMMON, COMMON_BYTES, b""),
            (spec.VIRTIO_PCI_CAP_NOTIFY_CFG, notify, notify_bytes, multiplier.to_bytes(4, "little")),
            (spec.VIRTIO_PCI_CAP_ISR_CFG, ISR, 1, b""),
            (spec.VIRTIO_PCI_CAP_DEVICE_CFG, DEVICE_CONFIG, max(len(self.process.config), 4), b""),
        )
        for cap_type, offset, length, extra in structures:
            body = bytes((CAP_BYTES + len(extra), cap_type, bar, 0, 0, 0))
            body += offset.to_bytes(4, "little") + length.to_bytes(4, "little") + extra
            self.add_capability(spec.PCI_CAP_ID_VENDOR, body)

    def _add_window(self) -> None:
        """Add a window for drivers that can reach BARs through configuration space only (4.1.4.9)."""
        body = bytes((CAP_BYTES + 4, spec.VIRTIO_PCI_CAP_PCI_CFG, 0, 0, 0, 0)) + bytes(8) + bytes(4)
        writable = bytes((0, 0, 0xFF, 0, 0, 0)) + b"\xff" * 12
        self.pci_cfg = self.add_capability(spec.PCI_CAP_ID_VENDOR, body, writable)

    # --- PCI -----------------------------------------------------------------------------------------------

    def config_read(self, offset: int, size: int) -> int:
        """Read configuration space; pci_cfg_data reads what its capability points to."""
        self._window(offset, size, None)
        return super().config_read(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Write configuration space; pci_cfg_data writes through."""
        super().config_write(offset, size, value)
        self._window(offset, size, value)

    def _window(self, offset: int, size: int, value: int | None) -> None:
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
        """A BAR moved: the notify ports move with it."""
        super().bar_changed(index, base)
        self._place_notifications()

    def command_changed(self, command: int) -> None:
        """INTx may have been switched off, or on again: then for what came before, too."""
        silent = not self.irqfds
        self._place_interrupts()
        if silent and self.irqfds:
            self._raise_unseen()

    def interrupt_pending(self) -> bool:
        """Return whether INTx would be asserted."""
        if self.transport.msix_enabled:
            return False
        queues = range(len(self.transport.queues))
        return self.config_pending or any(self.process.interrupts.pending(queue) for queue in queues)

    # --- interrupts ----------------------------------------------------------------------------------------

    def _calls(self) -> "list[tuple[int, int]]":
        """Return (eventfd, MSI-X vector) of each source of interrupts: the queues, then configuration."""
        sources = [(fd, queue.vector) for fd, queue in zip(self.process.calls, self.transport.queues, strict=True)]
        return [*sources, (self.config_call, self.transport.config_vector)]

    def _place_interrupts(self) -> None:
        """Assign every call eventfd to where the guest wants it now; one that is masked counts up meanwhile."""
        assert self.msix is not None
        self._tell_direct()  # before: what the kernel has raised until now goes where its interrupts went
        wanted: dict[int, tuple[int, bool]] = {}
        if self.detached:
            pass
        elif self.transport.msix_enabled:
            for fd, vector in self._calls():
                if vector < self.msix.vectors and not self.msix.message(vector)[2]:
                    wanted[fd] = (self.first_gsi + vector, False)
        elif self.slot > 0 and not self.command & COMMAND_INTX_DISABLE:
            # Ours only as long as they are needed: every end of an interrupt on this line, whosever, wakes our event
            # thread then.  Those of a process once it has rings: each takes the kernel a millisecond, and most drivers
            # enable MSI-X before.
            gsi, pending = layout.pci_irq(self.slot, 1), self.process.interrupts.pending
            serves = self.process.resample is not None and self.transport.active
            for queue, fd in enumerate(self.process.calls):
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
                ours = fd == self.config_call or self.process.resample is None
                resample = self.config_resample if ours else self.process.resample
                self.kvm.assign_irqfd(fd, gsi, resample if level else None)
                self.irqfds[fd] = (gsi, level)

    def _tell_direct(self) -> None:
        """Tell the process whether each queue has a vector, masked or not: else of each interrupt ISR has to know."""
        vectors = [queue.vector for queue in self.transport.queues]
        try:
            self.process.tell_direct(self.transport.msix_enabled and spec.VIRTIO_MSI_NO_VECTOR not in vectors)
        except PeerError as error:
            self.fail(str(error))

    def detach_interrupts(self) -> None:
        """Let nothing reach the interrupt controllers; when this returns, nothing is on its way to them."""
        with self.lock:
            self.detached = True
            self._place_interrupts()

    def attach_interrupts(self) -> None:
        """Undo `detach_interrupts`; what was counted meanwhile is injected, and INTx raised for what is unseen."""
        with self.lock:
            self.detached = False
            self._place_interrupts()
            self._raise_unseen()

    def _raise_unseen(self) -> None:
        """Assert INTx for what the guest has yet to read from ISR."""
        if self.transport.msix_enabled:
            return
        for queue, call in enumerate(self.process.calls):
            if self.process.interrupts.pending(queue):
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
        """The guest ended an INTx interrupt: raise it again if ISR is still unread."""
        drain(self.config_resample)
        with self.lock:
            self._raise_unseen()

    # --- notifications ---------------------------------------------------------------------------------------

    def notify(self, number: int, size: int = NOTIFY_BYTES) -> None:
        """Take a notification that came here: through the window, or before its address was registered."""
        if size != NOTIFY_BYTES:
            self.complain(f"notifies by {size} bytes, not {NOTIFY_BYTES}")
        elif number >= len(self.process.kicks):
            self.complain(f"notifies queue {number}, which is not there")
        elif self.transport.active:
            os.eventfd_write(self.process.kicks[number], 1)

    def _place_notifications(self) -> None:
        """Register each queue's kick at the addresses where the guest notifies now; elsewhere it is ignored."""
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
            self.kvm.deassign_ioeventfd(self.process.kicks[queue], address, size, datamatch, pio=pio)
        for (address, size, datamatch, pio), queue in wanted - self.ioeventfds:
            self.kvm.assign_ioeventfd(self.process.kicks[queue], address, size, datamatch, pio=pio)
        self.ioeventfds = wanted

    def _notify_address(self, base: int, queue: int, *, pio: bool) -> "NotifyAddress":
        if self.transport.notify_apart:
            # Whatever is written there means this queue, which saves KVM decoding the instruction.
            return base + NOTIFY_STEP * queue, 0, None, pio
        return base, NOTIFY_BYTES, queue, pio

    # --- Backend ---------------------------------------------------------------------------------------------

    def activate(self, features: int, queues: "list[QueueRegisters]") -> bool:
        """Start the rings in the device process."""
        rows = [(q.size, q.enabled, q.desc, q.avail, q.used, 0, 0) for q in queues]
        try:
            usable = self.process.activate(features, rows)
        except PeerError as error:
            self.fail(str(error))
            return False
        self._place_notifications()
        self._place_interrupts()
        return usable

    def reset(self) -> None:
        """Take the rings from the device process; a process that cannot let go ends the VM."""
        self.transport.active = False
        self._place_notifications()
        try:
            self.process.command(RESET)
        except PeerError as error:
            self.fail(str(error))
        for fd in (*self.process.kicks, *self.process.calls, self.config_call):
            drain(fd)
        self._place_interrupts()

    def write_config(self, offset: int, data: bytes) -> bytes:
        """Pass a write to device configuration on."""
        try:
            config = self.process.write_config(offset, data)
            if len(config) != len(self.transport.config):
                raise PeerError(self.process.title, f"configuration has {len(config)} bytes after a write to it")
        except PeerError as error:
            self.fail(str(error))
            return self.transport.config
        return config

    def take_isr(self) -> int:
        """Return and clear ISR."""
        queue = self.process.interrupts.take(len(self.transport.queues))
        config, self.config_pending = self.config_pending, False
        ours = [self.config_call] if config else []
        if queue and self.process.resample is None:
            ours += self.process.calls
        if ours and not self.transport.msix_enabled:
            for fd in ours:
                drain(fd)  # in case it was not let through
            self._place_interrupts()
        return (spec.ISR_QUEUE if queue else 0) | (spec.ISR_CONFIG if config else 0)

    def vectors_changed(self) -> None:
        """A queue or the configuration has another vector."""
        self._place_interrupts()

    def complain(self, text: str) -> None:
        """Log what the driver did in vain."""
        self.remarks.warn(f"{self.process.name}: the driver {text}")

    def raise_config(self) -> None:
        """Interrupt the guest because configuration has changed, or the device wants a reset."""
        self.config_pending = True
        self._place_interrupts()
        os.eventfd_write(self.config_call, 1)

    # --- saving ----------------------------------------------------------------------------------------------

    def save(self) -> VirtioState:
        """Return the state of a device that stands still.  Raises PeerError."""
        with self.lock:
            registers = self.transport
            indices, own = self.process.export() if registers.active else ([], b"")
            indices += [(0, 0)] * (len(registers.queues) - len(indices))
            queues = tuple(
                QueueState(
                    **{name: getattr(queue, name) for name in QUEUE_REGISTERS},
                    next_avail=next_avail,
                    next_used=next_used,
                    called=readable(call),
                    unseen=self.process.interrupts.pending(number),
                )
                for number, (queue, (next_avail, next_used), call) in enumerate(
                    zip(registers.queues, indices, self.process.calls, strict=True)
                )
            )
            return VirtioState(
                kind=self.process.kind.name,
                **{name: getattr(registers, name) for name in REGISTERS},
                config=registers.config,
                config_pending=self.config_pending,
                config_called=readable(self.config_call),
                own=own,
                queues=queues,
                addresses=self.process.addresses() if self.process.kind is INTERFACE else b"",
            )

    def check_registers(self, state: VirtioState, offered: int) -> None:
        """Raise ValueError unless this is the state of such a device, whose process `offered` these features."""
        name, queues = self.process.name, self.transport.queues
        if state.kind not in ("", self.process.kind.name):
            raise ValueError(f"a device of kind {state.kind!r} where {name} is")
        if len(state.queues) != len(queues) or len(state.config) != len(self.transport.config):
            raise ValueError(f"another {name} than this machine has")
        if not are_addresses(state.addresses):
            raise ValueError(f"addresses of {name} that no guest has")
        if len(state.own) > OWN_MAX:
            raise ValueError(f"{len(state.own)} bytes besides the rings of {name}")
        _check_widths(state, REGISTERS)
        for queue, saved in zip(queues, state.queues, strict=True):
            _check_widths(saved, QUEUE_REGISTERS | QUEUE_INDICES)
            if not 0 < saved.size <= queue.max_size or saved.size & saved.size - 1:
                raise ValueError(f"a queue of {saved.size} in {name}")
        missing = state.driver_features & offered & ~self.process.features
        if missing:
            raise ValueError(f"its driver of {name} uses features {missing:#x}, which are not here")

    def restore_registers(self, state: VirtioState) -> None:
        """Become such a device, standing still, of a state that was checked; `restore_rings` comes next."""
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
        """Hand the rings to the device process, which stands still too.  Raises PeerError or ValueError."""
        with self.lock:
            registers = self.transport
            self.process.command(PAUSE)
            self.process.arrived_with = state.addresses
            if state.config != self.process.config:
                registers.config = self.process.write_config(0, state.config)
                registers.configured = True
            if state.active:
                modern = bool(state.driver_features >> spec.VIRTIO_F_VERSION_1 & 1)
                rows = [
                    (q.size, q.enabled, q.desc, q.avail, q.used, q.next_avail, q.next_used) for q in state.queues
                ]
                usable = self.process.activate(registers.negotiated(modern=modern), rows)
                if usable and registers.config != state.config and not self.process.kind.config_may_differ:
                    raise ValueError(f"{self.process.name} is another one here, such as a disk of another size")
                self._place_notifications()
                if not usable:
                    registers.needs_reset()
                if state.own:
                    self.process.restore(state.own)
            for number, queue in enumerate(state.queues):
                if queue.unseen:
                    self.process.interrupts.restore_pending(number)
                if queue.called:
                    os.eventfd_write(self.process.calls[number], 1)
            if state.config_called:
                os.eventfd_write(self.config_call, 1)

    # --- from whoever serves the rings, on the event thread ------------------------------------------------------

    def on_interrupt(self) -> None:
        """A device that this process serves has counted an interrupt of its one queue: tell the guest."""
        with self.lock:
            if self.transport.msix_enabled:
                os.eventfd_write(self.process.calls[0], 1)
            else:
                self._place_interrupts()
                self._raise_unseen()

    def on_needs_reset(self, text: str, life: int) -> None:
        """The driver broke a ring of this life of the device, or of one before it."""
        self.complaints.warn(f"{self.process.name}: {text}")
        with self.lock:
            if self.transport.active and life == self.process.activations:
                self.transport.needs_reset()

    def on_config(self, config: bytes) -> None:
        """The device's configuration has changed by itself."""
        with self.lock:
            if len(config) == len(self.transport.config):
                self.transport.config_changed(config)
            else:
                log.error(f"{self.process.name}: configuration changed its length")


class LegacyBlock:
    """BAR 0."""

    def __init__(self, function: VirtioFunction) -> None:
        self.function = function

    def read(self, offset: int, size: int) -> int:
        """Read a legacy register."""
        with self.function.lock:
            return self.function.transport.legacy_read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a legacy register; most notifications never come here."""
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
    """BAR 2 or 4, whose notifications are at `notify`."""

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
        """Write a virtio 1.x structure; most notifications never come here."""
        function = self.function
        with function.lock:
            transport = function.transport
            if offset < COMMON_BYTES:
                transport.common_write(offset, size, value)
            elif transport.notify_apart and self.notify <= offset < self.notify + NOTIFY_STEP * len(transport.queues):
                function.notify((offset - self.notify) // NOTIFY_STEP)
            elif not transport.notify_apart and offset == self.notify:
                function.notify(value, size)
            elif offset >= DEVICE_CONFIG:
                transport.write_config(offset - DEVICE_CONFIG, size, value)

    pio_read, pio_write = read, write
    mmio_read, mmio_write = read, write


def _check_widths(state: VirtioState | QueueState, widths: dict[str, int]) -> None:
    """Raise ValueError for a number that no register holds."""
    for name, bits in widths.items():
        if not 0 <= getattr(state, name) < 1 << bits:
            raise ValueError(f"{getattr(state, name)} in the {bits} bits of {name}")
