"""A guest's view of a virtio PCI function: the real bus, registers and MSI-X, with a fake KVM and device that record.

`Kvm` refuses the same calls as the kernel.  Give `Machine` a real `kvmapi.vm.Vm` to test with the kernel itself.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Iterable
from typing import Any, Self

from hypothesis import strategies as st

from tests.support.fakedriver import DEADLINE_S, Ring
from vmd.config.model import VirtioMode
from vmd.errors import PeerError
from vmd.guestmem import GuestMemory
from vmd.ipc import devmsg
from vmd.memfile import sealed_file
from vmd.units import MIB
from vmd.virtio import spec
from vmd.vm import layout, virtio
from vmd.vm.bus import Bus
from vmd.vm.devproc import DeviceProcess, Interrupts
from vmd.vm.kinds import DISK, Kind
from vmd.vm.pci import HostBridge, PciBus
from vmd.vm.routing import Routing
from vmd.vm.slots import LAYOUT, Slot
from vmd.vm.virtio import VirtioFunction

MEMORY = 128 * MIB
ADDRESS, DATA = layout.PORT_PCI_ADDRESS, layout.PORT_PCI_DATA
SLOT = 1
IRQ = layout.pci_irq(SLOT, 1)
LEGACY, MODERN, TABLE, MAPPED = 0xC000, 0xC100, 0x80000000, 0x80001000  # the addresses of a machine's BARs
CONFIG = bytes(range(1, 61))
FEATURES = 1 << spec.VIRTIO_BLK_F_FLUSH | 1 << spec.VIRTIO_F_RING_EVENT_IDX | spec.LEGACY_ONLY
VERSION_1 = 1 << spec.VIRTIO_F_VERSION_1
QUEUES = (256, 64)
NO_VECTOR = spec.VIRTIO_MSI_NO_VECTOR
CONFIG_VECTOR = 2  # this driver's vector numbers: first the queues, then configuration

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK = spec.ACKNOWLEDGE, spec.DRIVER, spec.DRIVER_OK, spec.FEATURES_OK

# Offsets in the common structure (4.1.4.3) and the legacy block (4.1.4.10)
DEVICE_SELECT, DEVICE_FEATURE, DRIVER_SELECT, DRIVER_FEATURE = 0, 4, 8, 12
CONFIG_MSIX, NUM_QUEUES, STATUS, GENERATION, QUEUE_SELECT = 16, 18, 20, 21, 22
QUEUE_SIZE, QUEUE_MSIX, QUEUE_ENABLE, QUEUE_NOTIFY_OFF, DESC, AVAIL, USED = 24, 26, 28, 30, 32, 40, 48
LEGACY_PFN, LEGACY_SIZE, LEGACY_SELECT, LEGACY_NOTIFY, LEGACY_STATUS, LEGACY_ISR = 8, 12, 14, 16, 18, 19


class Kvm:
    """Records eventfds and routes.  Raises OSError where KVM does."""

    def __init__(self) -> None:
        self.irqfds: dict[int, tuple[int, int | None]] = {}  # eventfd -> gsi, resample eventfd
        self.ioeventfds: dict[tuple[int, int, int | None], int] = {}  # port, size, value -> eventfd
        self.mapped_ioeventfds: dict[tuple[int, int, int | None], int] = {}  # the same for memory addresses
        self.messages: dict[int, tuple[int, int]] = {}  # gsi -> address, data
        self.injected: list[int] = []

    def set_gsi_routing(self, routes: Iterable[Any]) -> None:
        """Replace the whole routing table."""
        self.messages = {
            route.gsi: (route.u.msi.address_lo | route.u.msi.address_hi << 32, route.u.msi.data)
            for route in routes
            if route.type == 2
        }

    def assign_irqfd(self, fd: int, gsi: int, resample_fd: int | None = None) -> None:
        """Let an eventfd raise a GSI; at once if its count is not 0."""
        if fd in self.irqfds:
            raise OSError(errno.EBUSY, "irqfd is assigned")
        self.irqfds[fd] = (gsi, resample_fd)
        self.deliver()

    def deassign_irqfd(self, fd: int, gsi: int) -> None:
        """Undo `assign_irqfd`.  Unlike KVM, fail if it is not assigned."""
        assert self.irqfds.pop(fd)[0] == gsi

    def assign_ioeventfd(
        self, fd: int, address: int, size: int, datamatch: int | None = None, *, pio: bool = False
    ) -> None:
        """Let a write to a port or an address signal an eventfd."""
        assert size in (1, 2, 4, 8) or (size == 0 and datamatch is None)
        registered = self._ioeventfds(pio=pio)
        # One for any value or width conflicts with every other one at its address.
        if any(at == address and (None in (value, datamatch) or (width, value) == (size, datamatch))
               for at, width, value in registered):  # fmt: skip
            raise OSError(errno.EEXIST, "ioeventfd is taken")
        registered[address, size, datamatch] = fd

    def deassign_ioeventfd(
        self, fd: int, address: int, size: int, datamatch: int | None = None, *, pio: bool = False
    ) -> None:
        """Undo `assign_ioeventfd`."""
        registered = self._ioeventfds(pio=pio)
        if registered.get((address, size, datamatch)) != fd:
            raise OSError(errno.ENOENT, "no such ioeventfd")
        del registered[address, size, datamatch]

    def _ioeventfds(self, *, pio: bool) -> dict[tuple[int, int, int | None], int]:
        return self.ioeventfds if pio else self.mapped_ioeventfds

    def deliver(self) -> None:
        """Inject the interrupts of signalled eventfds, as KVM does at once when they are written."""
        for fd, (gsi, _) in list(self.irqfds.items()):
            if taken(fd):
                self.injected.append(gsi)


class Process:
    """A fake device process that records requests; `failing` makes every request fail with PeerError."""

    def __init__(self, kind: Kind = DISK) -> None:
        self.kind = kind.replace(queues=QUEUES)
        self.title = "vm/test/vioblk0"
        self.name = "vioblk0"
        self.features = FEATURES
        self.config = CONFIG
        self.kicks = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in QUEUES]
        self.calls = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in QUEUES]
        self.resample = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.interrupts = Interrupts(memoryview(bytearray(8 * devmsg.QUEUES_MAX)).cast("I"))
        self.activations = 0
        self.lives: list[tuple[int, list[tuple[int, ...]]]] = []  # features and rows of each ACTIVATE
        self.resets = 0
        self.running = False
        self.usable = True
        self.failing = False
        self.written: list[tuple[int, bytes]] = []
        self.answer = CONFIG
        self.during_reset: Callable[[], object] = dict
        self.direct = False
        self.on_direct: Callable[[bool], object] = bool  # called when `direct` changes

    def activate(self, features: int, queues: list[tuple[int, ...]]) -> bool:
        """Record an activation."""
        self.activations += 1
        self._answer()
        assert not self.running
        self.running = True
        self.lives.append((features, queues))
        return self.usable

    def command(self, kind: int) -> bool:
        """Record a reset."""
        self._answer()
        assert kind == devmsg.RESET
        assert self.running or self.written
        self.during_reset()
        self.running = False
        self.resets += 1
        return True

    def tell_direct(self, direct: bool) -> None:
        """Record the setting."""
        if direct != self.direct:
            self.direct = direct
            self._answer()
            self.on_direct(direct)

    def write_config(self, offset: int, data: bytes) -> bytes:
        """Record a driver's write."""
        self._answer()
        self.written.append((offset, data))
        return self.answer

    def _answer(self) -> None:
        if self.failing:
            raise PeerError(self.title, "no answer in 10 s")

    def raise_queue(self, queue: int) -> None:
        """Interrupt as the device process does."""
        self.interrupts.add(queue)
        os.eventfd_write(self.calls[queue], 1)

    def close(self) -> None:
        """Let go of everything."""
        for fd in (*self.kicks, *self.calls, self.resample):
            os.close(fd)


def taken(fd: int) -> int:
    """Return an eventfd's count and reset it."""
    with contextlib.suppress(BlockingIOError):
        return os.eventfd_read(fd)
    return 0


class Machine:
    """A bus with the function in slot 1, its BARs assigned and decoding on, accessed as by a guest."""

    def __init__(
        self, kvm: Any, process: Any, mode: VirtioMode = VirtioMode.TRANSITIONAL,  # noqa: ANN401
        function_layout: int = LAYOUT,
    ) -> None:  # fmt: skip
        self.mapped = mode is VirtioMode.MEMORY  # whether the driver uses the mapped structures instead of ports
        self.kvm = kvm
        self.process = process
        self.failures: list[str] = []
        self.bus = Bus()
        self.pci = PciBus(self.bus, MEMORY)
        self.pci.complaints.burst = 0
        self.bus.add_pio(ADDRESS, 8, self.pci)
        self.pci.add(0, HostBridge())
        self.function = VirtioFunction(process, kvm, Routing(kvm), mode, self.failures.append, function_layout)
        self.pci.add(SLOT, self.function)
        for index, base in ((0, LEGACY), (1, TABLE), (2, MODERN), (4, MAPPED)):
            if index in self.function.bars:
                self.set_bar(index, base)
        self.config_write(4, 2, 7)

    @classmethod
    def fake(cls, mode: VirtioMode = VirtioMode.TRANSITIONAL, **given: Any) -> Self:  # noqa: ANN401
        """Make a machine with the fake KVM and process."""
        return cls(Kvm(), Process(), mode, **given)

    def close(self) -> None:
        """Close the eventfds."""
        self.process.close()
        os.close(self.function.config_call)
        os.close(self.function.config_resample)

    # --- configuration space

    def config_read(self, register: int, size: int) -> int:
        """Read by mechanism 1."""
        self.bus.pio_write(ADDRESS, 4, 1 << 31 | SLOT << 11 | register & 0xFC)
        return self.bus.pio_read(DATA + (register & 3), size)

    def config_write(self, register: int, size: int, value: int) -> None:
        """Write by mechanism 1."""
        self.bus.pio_write(ADDRESS, 4, 1 << 31 | SLOT << 11 | register & 0xFC)
        self.bus.pio_write(DATA + (register & 3), size, value)

    def set_bar(self, index: int, base: int) -> None:
        """Write a BAR."""
        self.config_write(0x10 + 4 * index, 4, base)

    def capabilities(self) -> dict[int, int]:
        """Return the offset of the first capability of each virtio cfg_type; MSI-X has the key 0x11."""
        found: dict[int, int] = {}
        for kind, at in self.all_capabilities():
            found.setdefault(kind, at)
        return found

    def all_capabilities(self) -> list[tuple[int, int]]:
        """Return virtio cfg_type (0x11 for MSI-X) and offset of each capability, in list order."""
        found = []
        at = self.config_read(0x34, 1)
        while at:
            kind = self.config_read(at, 1)
            found.append((self.config_read(at + 3, 1) if kind == spec.PCI_CAP_ID_VENDOR else kind, at))
            at = self.config_read(at + 1, 1)
        return found

    def enable_msix(self, control: int = 0x8000) -> None:
        """Write MSI-X message control."""
        self.config_write(self.capabilities()[0x11] + 2, 2, control)

    def set_vector(self, vector: int, data: int, *, masked: bool = False, address: int = 0xFEE00000) -> None:
        """Write an entry of the MSI-X table."""
        for offset, value in ((12, 1), (0, address), (4, 0), (8, data), (12, int(masked))):
            self.bus.mmio_write(TABLE + 16 * vector + offset, 4, value)

    def pending(self) -> int:
        """Read the pending bits."""
        return self.bus.mmio_read(TABLE + self.function.msix.pba_offset, 8)  # type: ignore[union-attr]

    # --- registers

    def read(self, offset: int, size: int) -> int:
        """Read a virtio 1.x structure."""
        if self.mapped:
            return self.bus.mmio_read(MAPPED + offset, size)
        return self.bus.pio_read(MODERN + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a virtio 1.x structure."""
        if self.mapped:
            self.bus.mmio_write(MAPPED + offset, size, value)
        else:
            self.bus.pio_write(MODERN + offset, size, value)

    def legacy_read(self, offset: int, size: int) -> int:
        """Read the legacy block."""
        return self.bus.pio_read(LEGACY + offset, size)

    def legacy_write(self, offset: int, size: int, value: int) -> None:
        """Write the legacy block."""
        self.bus.pio_write(LEGACY + offset, size, value)

    @property
    def status(self) -> int:
        """Device status."""
        return self.read(STATUS, 1)

    def negotiate(self, features: int = VERSION_1) -> None:
        """Initialise the device up to FEATURES_OK."""
        self.write(STATUS, 1, ACKNOWLEDGE)
        self.write(STATUS, 1, ACKNOWLEDGE | DRIVER)
        for select_, half in ((0, features & 0xFFFFFFFF), (1, features >> 32)):
            self.write(DRIVER_SELECT, 4, select_)
            self.write(DRIVER_FEATURE, 4, half)
        self.write(STATUS, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK)

    def come_up(self, ring: Ring, features: int = VERSION_1) -> None:
        """Come up with one queue."""
        self.negotiate(features)
        self.write(QUEUE_SELECT, 2, 0)
        for offset, gpa in ((DESC, ring.desc), (AVAIL, ring.avail), (USED, ring.used)):
            self.write(offset, 4, gpa)
        self.write(QUEUE_ENABLE, 2, 1)
        self.write(STATUS, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)

    def place_queue(self, queue: int, base: int, size: int = 0) -> None:
        """Write the addresses of a queue, and enable it."""
        self.write(QUEUE_SELECT, 2, queue)
        if size:
            self.write(QUEUE_SIZE, 2, size)
        for offset, gpa in ((DESC, base), (AVAIL, base + 0x1000), (USED, base + 0x2000)):
            self.write(offset, 4, gpa)
            self.write(offset + 4, 4, 0)
        self.write(QUEUE_ENABLE, 2, 1)

    def start(self, features: int = VERSION_1) -> None:
        """Bring the device up as a driver of virtio 1.x."""
        self.negotiate(features)
        self.place_queue(0, 0x10000)
        self.place_queue(1, 0x20000)
        self.write(STATUS, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)

    def start_legacy(self, features: int = 0) -> None:
        """Bring the device up as a legacy driver."""
        self.legacy_write(LEGACY_STATUS, 1, ACKNOWLEDGE | DRIVER)
        self.legacy_write(4, 4, features)
        for queue in (0, 1):
            self.legacy_write(LEGACY_SELECT, 2, queue)
            self.legacy_write(LEGACY_PFN, 4, 0x10 + 0x10 * queue)
        self.legacy_write(LEGACY_STATUS, 1, ACKNOWLEDGE | DRIVER | DRIVER_OK)

    def notify(self, queue: int, port: int | None = None, size: int = 2) -> None:
        """Notify by a port or a mapped address, as the guest does.  A registered ioeventfd takes the write first."""
        by_port = port is not None or not self.mapped
        at = MODERN + virtio.NOTIFY if port is None else port
        if not by_port:
            multiplier = self.config_read(self.capabilities()[spec.VIRTIO_PCI_CAP_NOTIFY_CFG] + 16, 4)
            at = MAPPED + virtio.MEMORY_NOTIFY + queue * multiplier
        registered = self.kvm._ioeventfds(pio=by_port)
        kick = registered.get((at, size, queue)) or registered.get((at, 0, None))
        if kick is not None:
            os.eventfd_write(kick, 1)
        elif by_port:
            self.bus.pio_write(at, size, queue)
        else:
            self.bus.mmio_write(at, size, queue)

    def kicked(self) -> list[int]:
        """Return the queues that were notified since the last call."""
        return [queue for queue, fd in enumerate(self.process.kicks) if taken(fd)]


# Actions of a driver, its other processors and the device process, in any order.
VALUES = st.one_of(
    st.integers(0, 0xFFFFFFFF),
    st.sampled_from((0, 1, 2, 3, 4, 7, 0xF, 0x8000, 0xC000, 0xC080, 0xC100, 0xFFFF, 0x10000, 0x80000000, 0x407)),
)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("config"), st.integers(0, 0xBF), st.sampled_from((1, 2, 4)), VALUES),
        st.tuples(st.just("modern"), st.integers(0, 0xFF), st.sampled_from((1, 2, 4)), VALUES),
        st.tuples(st.just("legacy"), st.integers(0, 0x7F), st.sampled_from((1, 2, 4)), VALUES),
        st.tuples(st.just("table"), st.integers(0, 0x3F), st.sampled_from((1, 2, 4, 8)), VALUES),
        st.tuples(st.just("mapped"), st.integers(0, 0xFF), st.sampled_from((1, 2, 4, 8)), VALUES),
        st.tuples(st.just("mapped"), st.integers(0x7FC, 0x80C), st.sampled_from((1, 2, 4, 8)), VALUES),
        st.tuples(st.sampled_from(("start", "start_legacy", "msix", "interrupt", "broken")), *[st.just(0)] * 3),
    ),
    max_size=40,
)


def act(machine: Machine, what: str, at: int, size: int, value: int) -> None:
    """Do one action of ACTIONS."""
    value &= (1 << 8 * size) - 1
    match what:
        case "config":
            machine.config_write(at, size, value)
            assert 0 <= machine.config_read(at, size) < 1 << 8 * size
        case "modern":
            machine.write(at, size, value)
            assert 0 <= machine.read(at, size) < 1 << 8 * size
        case "legacy":
            machine.legacy_write(at, size, value)
            assert 0 <= machine.legacy_read(at, size) < 1 << 8 * size
        case "table":
            machine.bus.mmio_write(TABLE + at, size, value)
        case "mapped":
            machine.bus.mmio_write(MAPPED + at, size, value)
            assert 0 <= machine.bus.mmio_read(MAPPED + at, size) < 1 << 8 * size
        case "start":
            machine.start()
        case "start_legacy":
            machine.start_legacy()
        case "msix":
            machine.enable_msix()
        case "interrupt":
            machine.process.raise_queue(0)
        case "broken":
            machine.function.on_needs_reset("", machine.process.activations)


class BothHalves:
    """A device in slot 1 with its real process and the fake KVM, and the driver's half of its first queue."""

    RING = 0x10000

    def __init__(self, kind: Kind, memory: GuestMemory, *fds: int, serial: bytes = b"") -> None:
        names = ("/vm/image",) * len(fds)
        self.memory = memory
        self.process = DeviceProcess(kind)
        slot = Slot(kind=kind, index=0, number=SLOT, fds=fds, notes=(0,) * len(fds), names=names, serial=serial)
        figures = sealed_file("figures", devmsg.FIGURES_BYTES)
        self.process.begin("vm/test", slot, memory, figures, 0)
        os.close(figures)
        self.process.wait_ready()
        self.machine = Machine(Kvm(), self.process)
        self.renew()

    def renew(self) -> None:
        """Make a new, empty ring."""
        self.ring = Ring(self.memory, self.process.kind.queues[0], self.RING)

    def start(self, features: int = VERSION_1) -> None:
        """Come up with one queue."""
        self.machine.come_up(self.ring, features)

    def close(self) -> None:
        """End the process, in any state."""
        self.process.child.kill()
        self.process.reap(DEADLINE_S)
        self.process.interrupts._words.release()
        for channel in (self.process._sync, self.process._async):
            channel.close()
        for fd in (*self.process.kicks, *self.process.calls, self.process.resample, self.process.page):
            os.close(fd)
        os.close(self.machine.function.config_call)
        os.close(self.machine.function.config_resample)
