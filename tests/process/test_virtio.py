"""Both halves of a device: registers in the test, rings in the real process, and an event loop between them."""

import os
import select
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.accesses import LEGACY_PORTS, MEMORY, PORTS, WINDOW, Driver
from tests.support.diskprocess import BUFFER, IN, OK, content
from tests.support.fakedriver import DATA, DEADLINE_S, MIB, WRITE, Desc, Ring
from tests.support.virtiopci import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    FEATURES_OK,
    GENERATION,
    IRQ,
    STATUS,
    VERSION_1,
    BothHalves,
)
from tests.unit.virtio.orders import LEGACY, MODERN, ORDERS, Order
from vmd.guestmem import GuestMemory, RegionSpec
from vmd.ipc.loop import Loop
from vmd.log import log
from vmd.virtio import spec
from vmd.vm import virtio
from vmd.vm.kinds import DISK

pytestmark = pytest.mark.root

RUNNING = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
WRITEBACK = virtio.DEVICE_CONFIG + 32


class Disk(BothHalves):
    """A raw disk, and an event loop for the messages of its process."""

    def __init__(self, memory: GuestMemory, fd: int) -> None:
        super().__init__(DISK, memory, fd)
        self.injected = 0  # number of interrupts before the last read was offered
        self.loop = Loop()
        function = self.machine.function
        self.process.serve(
            self.loop,
            on_failed=self.machine.failures.append,
            on_needs_reset=function.on_needs_reset,
            on_config=function.on_config,
            on_ask_resolvers=lambda: None,
            on_lock_lost=pytest.fail,
            on_event=lambda _what, _text: None,
        )
        self.loop.add(function.config_resample, function.on_config_resample)

    def listen(self, until: Callable[[], bool]) -> None:
        """Run the loop until a condition holds."""
        overdue = self.loop.call_later(DEADLINE_S, lambda: pytest.fail("the condition does not hold"))
        while not until():
            self.loop.call_later(0.01, self.loop.stop)
            self.loop.run()
        overdue.cancel()

    def offer_read(self) -> None:
        """Offer a read of the first sector, without notifying."""
        self.injected = len(self.machine.kvm.injected)
        self.memory.write(BUFFER, bytes(512))
        self.memory.write(DATA, struct.pack("<IIQ", IN, 0, 0) + b"\xee")
        self.ring.add([Desc(DATA, 16), Desc(BUFFER, 512, WRITE), Desc(DATA + 16, 1, WRITE)])

    def wait_interrupt(self) -> None:
        """Wait for the queue's interrupt, and deliver it to KVM."""
        assert select.select([self.process.calls[0]], [], [], DEADLINE_S)[0]
        self.machine.kvm.deliver()

    def works(self) -> bool:
        """Return whether a read is served."""
        self.offer_read()
        self.machine.notify(0)
        return self.was_served()

    def was_served(self) -> bool:
        """Return whether the offered read is served."""
        if len(self.machine.kvm.injected) == self.injected:  # there was no interrupt yet when KVM got the eventfd
            self.wait_interrupt()
        return (
            self.ring.reap() == [(self.ring.free - 3, 513)]
            and self.memory.read(DATA + 16, 1)[0] == OK
            and self.memory.read(BUFFER, 512) == content()[:512]
        )

    def close(self) -> None:
        """Close the loop, and end the device."""
        self.loop.close()
        super().close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk before a driver sets it up."""
    path = tmp_path / "disk"
    path.write_bytes(content())
    with GuestMemory.create([RegionSpec(gpa=0, size=16 * MIB, name="ram")]) as memory, path.open("rb+") as file:
        made = Disk(memory, file.fileno())
        yield made
        made.close()


def views(order: Order) -> list[str]:
    """Return the ways by which this driver could access a device that has all of them."""
    return {LEGACY: [LEGACY_PORTS], MODERN: [PORTS, MEMORY, WINDOW]}.get(order.interface, [MEMORY])


@pytest.mark.parametrize(
    ("order", "view"),
    [
        pytest.param(order, view, id=f"{order.driver}-{view}")
        for order in ORDERS
        if order.device == "blk"
        for view in views(order)
    ],
)
def test_the_disk_works_after_each_known_order_of_a_driver(disk: Disk, order: Order, view: str) -> None:
    """A request before the last notification is served by it, or when the device starts."""
    disk.ring = Ring(disk.memory, order.sizes[0], disk.RING)
    if view == LEGACY_PORTS:
        disk.ring.used = -(-(disk.ring.avail + 6 + 2 * disk.ring.size) // 4096) * 4096
    symbols = {"DESC0": disk.ring.desc, "AVAIL0": disk.ring.avail, "USED0": disk.ring.used, "PFN0": disk.RING >> 12}
    driver = Driver(disk.machine, view, symbols)
    if "notify=" in order.steps:
        disk.offer_read()
        driver.run(order.steps)
        assert disk.was_served()
    else:
        driver.run(order.steps)
    disk.offer_read()
    driver.notify(0)

    assert disk.was_served()
    assert disk.machine.failures == []


def test_device_is_used_until_it_is_reset_and_again(disk: Disk) -> None:
    """It is set up three times, each time with a new ring."""
    for _ in range(3):
        disk.renew()
        disk.start()
        assert disk.works()
        assert disk.machine.read(virtio.ISR, 1) == spec.ISR_QUEUE
        assert disk.machine.read(virtio.ISR, 1) == 0
        disk.machine.write(STATUS, 1, 0)
        assert disk.machine.status == 0
    assert disk.machine.failures == []


@pytest.mark.parametrize(
    ("serial", "told"),
    [(b"", b"vioblk0"), (b"db1-63bcf2c0b6-0", b"db1-63bcf2c0b6-0"), (b"x" * 20, b"x" * 20)],
)
def test_the_serial_number_of_a_disk(tmp_path: Path, serial: bytes, told: bytes) -> None:
    """It has up to 20 bytes, padded with zeroes.  The default is the device's name."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(512))
    with GuestMemory.create([RegionSpec(gpa=0, size=16 * MIB, name="ram")]) as memory, path.open("rb+") as file:
        disk = BothHalves(DISK, memory, file.fileno(), serial=serial)
        disk.start()
        memory.write(DATA, struct.pack("<IIQ", spec.VIRTIO_BLK_T_GET_ID, 0, 0) + b"\xee")
        disk.ring.add([Desc(DATA, 16), Desc(BUFFER, 20, WRITE), Desc(DATA + 16, 1, WRITE)])
        disk.machine.notify(0)
        assert select.select([disk.process.calls[0]], [], [], DEADLINE_S)[0]
        found = memory.read(BUFFER, 20)
        disk.close()

    assert found == told.ljust(20, b"\0")


def test_a_broken_ring_shows_in_status_until_a_reset(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """DEVICE_NEEDS_RESET, a configuration interrupt, and a log line with the device; a reset repairs it (2.1.2)."""
    lines: list[str] = []
    monkeypatch.setattr(log, "write", lambda _severity, text: lines.append(text))
    disk.start()
    disk.ring.set_avail_idx(999)
    disk.machine.notify(0)
    disk.listen(lambda: disk.machine.status != RUNNING)
    disk.machine.kvm.deliver()
    assert disk.machine.status == RUNNING | spec.DEVICE_NEEDS_RESET
    assert disk.machine.kvm.injected == [IRQ]
    assert disk.machine.read(virtio.ISR, 1) == spec.ISR_CONFIG
    assert lines == ["vioblk0: available index is 999 ahead, in a queue of 256"]
    disk.machine.write(STATUS, 1, 0)
    disk.renew()
    disk.start()

    assert disk.works()
    assert disk.machine.status == RUNNING


def test_rings_outside_memory_ask_for_a_reset_2(disk: Disk) -> None:
    """Hostile input 2: the process refuses them, and the driver is told at once."""
    disk.ring.desc = 64 * MIB
    disk.start()
    assert disk.machine.status == RUNNING | spec.DEVICE_NEEDS_RESET
    disk.machine.notify(0)
    disk.machine.write(STATUS, 1, 0)
    disk.renew()
    disk.start()

    assert disk.works()


def test_driver_writes_configuration(disk: Disk) -> None:
    """The write reaches the process, and later reads return the process's value."""
    disk.start(VERSION_1 | 1 << spec.VIRTIO_BLK_F_CONFIG_WCE | 1 << spec.VIRTIO_BLK_F_FLUSH)
    generation = disk.machine.read(GENERATION, 1)
    for value, kept in ((0, 0), (1, 1), (0xFE, 0)):
        disk.machine.write(WRITEBACK, 1, value)
        assert disk.machine.read(WRITEBACK, 1) == kept
    before = [disk.machine.read(virtio.DEVICE_CONFIG + offset, 4) for offset in range(0, 32, 4)]
    for offset in range(0, 32, 4):
        disk.machine.write(virtio.DEVICE_CONFIG + offset, 4, 0xFFFFFFFF)

    assert [disk.machine.read(virtio.DEVICE_CONFIG + offset, 4) for offset in range(0, 32, 4)] == before
    assert disk.machine.read(GENERATION, 1) == generation  # a driver's own write does not change the generation
    assert disk.works()


@pytest.mark.parametrize("started", [False, True])
def test_reset_undoes_the_configuration_of_the_driver(disk: Disk, started: bool) -> None:
    """The register agrees with the process, whether the device was in use or not."""
    features = VERSION_1 | 1 << spec.VIRTIO_BLK_F_CONFIG_WCE | 1 << spec.VIRTIO_BLK_F_FLUSH
    if started:
        disk.start(features)
    disk.machine.write(WRITEBACK, 1, 0)
    assert disk.machine.read(WRITEBACK, 1) == 0
    disk.machine.write(STATUS, 1, 0)
    assert disk.machine.read(WRITEBACK, 1) == 1
    disk.renew()
    disk.start(features)

    assert disk.machine.read(WRITEBACK, 1) == 1
    assert disk.process.write_config(0, b"")[32] == 1
    assert disk.works()


@pytest.mark.parametrize(("features", "kept"), [(0, 1), (1 << spec.VIRTIO_BLK_F_CONFIG_WCE, 0)])
def test_driver_configures_before_it_starts(disk: Disk, features: int, kept: int) -> None:
    """The write counts only if the driver then negotiates CONFIG_WCE."""
    disk.machine.write(WRITEBACK, 1, 0)
    disk.start(VERSION_1 | 1 << spec.VIRTIO_BLK_F_FLUSH | features)

    assert disk.machine.read(WRITEBACK, 1) == kept
    assert disk.process.write_config(0, b"")[32] == kept
    assert disk.works()


def test_a_line_interrupt_is_raised_again_until_isr_is_read(disk: Disk) -> None:
    """When KVM signals the end of the interrupt, the process raises it again if the driver has not read ISR."""
    disk.start()
    assert disk.works()
    for _ in range(3):
        assert disk.machine.config_read(6, 2) & 8
        os.eventfd_write(disk.process.resample, 1)  # as KVM does
        disk.wait_interrupt()
    assert disk.machine.read(virtio.ISR, 1) == spec.ISR_QUEUE
    os.eventfd_write(disk.process.resample, 1)
    assert disk.works()  # the process serves this read after the resample event

    assert disk.machine.kvm.injected == [IRQ] * 5


def test_the_vm_hears_of_a_process_that_dies(disk: Disk) -> None:
    """The VM is told how the process ended.  The registers still answer until the VM ends."""
    disk.start()
    disk.process.child.kill()
    disk.listen(lambda: bool(disk.machine.failures))
    disk.machine.notify(0)
    disk.machine.write(WRITEBACK, 1, 0)
    disk.machine.write(STATUS, 1, 0)
    disk.start()

    assert disk.machine.failures[0] == "vm/test/vioblk0: was killed by SIGKILL"
