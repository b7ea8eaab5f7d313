"""The entropy device with good and hostile drivers (hostile-input 9, 18, 44)."""

import os
import struct
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.support.fakedriver import (
    DATA,
    DEADLINE_S,
    EXTRA,
    FIGURES_SLOT,
    INDIRECT,
    INDIRECT_DESC,
    KIB,
    LAYOUT,
    MIB,
    NEXT,
    RING_BASE,
    WRITE,
    Desc,
    Ring,
    chained,
)  # fmt: skip
from tests.support.marks import pages_that_differ
from tests.support.virtiopci import (
    IRQ,
    MODERN,
    QUEUE_MSIX,
    STATUS,
    VERSION_1,
    Kvm,
    Machine,
)  # fmt: skip
from vmd.guestmem import GuestMemory
from vmd.ipc import devmsg
from vmd.ipc.loop import Loop
from vmd.memfile import sealed_file
from vmd.parent.figures import slots
from vmd.readable import readable
from vmd.virtio.queue import CHAIN_MAX
from vmd.vm import entropy as module
from vmd.vm import virtio
from vmd.vm.entropy import BURST_BYTES, COST, REQUEST_MAX, TURN_REQUESTS, Entropy
from vmd.vm.kinds import ENTROPY
from vmd.vm.slots import Slot

(SIZE,) = ENTROPY.queues
ISR = virtio.ISR
NEEDS_RESET = 0x40


class Driver:
    """A driver with its half of the ring.  KVM is a fake that records calls.  The test's thread is the event thread."""

    def __init__(self) -> None:
        self.memory = GuestMemory.create(LAYOUT)
        self.figures_fd = sealed_file("figures", devmsg.FIGURES_BYTES)
        slot = Slot(kind=ENTROPY, index=0, number=1)
        self.device = Entropy(slot, self.memory, self.figures_fd, FIGURES_SLOT)
        self.kvm = Kvm()
        self.machine = Machine(self.kvm, self.device)
        self.function = self.machine.function
        self.loop = Loop()
        self.loop.add(self.function.config_resample, self.function.on_config_resample)
        self.events: list[tuple[str, str]] = []
        self.device.serve(
            self.loop,
            on_interrupt=self.on_interrupt,
            on_needs_reset=self.function.on_needs_reset,
            on_event=self.on_event,
        )
        self.interrupts = 0
        self.renew()

    def on_interrupt(self) -> None:
        """Count an interrupt, and return to `run`."""
        self.interrupts += 1
        self.function.on_interrupt()
        self.kvm.deliver()
        self.loop.stop()

    def on_event(self, what: str, text: str) -> None:
        """Record an event, and return to `run`."""
        self.events.append((what, text))
        self.loop.stop()

    def renew(self, features: int = VERSION_1) -> None:
        """Reset, and start with a new ring."""
        self.machine.write(STATUS, 1, 0)
        self.ring = Ring(self.memory, SIZE)
        self.machine.come_up(self.ring, features)

    def run(self, enough: Callable[[], bool]) -> None:
        """Run the event loop until `enough` returns True.  It is called after each interrupt or fault."""
        watchdog = self.loop.call_later(DEADLINE_S, lambda: pytest.fail("nothing happened"))
        while not enough():
            self.loop.run()
        watchdog.cancel()

    def run_once(self) -> None:
        """Handle the present events only."""
        self.loop.call_later(0, lambda: self.loop.call_from_thread(self.loop.stop))
        self.loop.run()

    def collect(self, count: int) -> list[tuple[int, int]]:
        """Notify the device, and return (head, length) of `count` used elements."""
        found: list[tuple[int, int]] = []

        def enough() -> bool:
            found.extend(self.ring.reap())
            return len(found) >= count

        self.machine.notify(0)
        self.run(enough)
        return found

    def works(self) -> bool:
        """Reset the device, and return whether it serves a good request."""
        self.renew()
        self.memory.load(DATA, bytes(64))
        self.ring.add([Desc(DATA, 64, WRITE)])
        return self.collect(1)[0][1] == 64 and any(self.memory.read(DATA, 64))

    def needs_reset(self) -> str:
        """Notify the device, and return why it needs a reset."""
        self.events.clear()
        self.machine.notify(0)
        self.run(lambda: bool(self.events))
        assert self.machine.status & NEEDS_RESET
        ((what, text),) = self.events
        assert what == "fault"
        return text

    def figures(self) -> dict[str, int]:
        """Return the counters of the device."""
        return slots(self.figures_fd)["viornd", 0]

    def close(self) -> None:
        """Release all resources."""
        assert self.machine.failures == []
        self.loop.close()
        for fd in (*self.device.kicks, *self.device.calls, self.figures_fd, self.memory.fd,
                   self.function.config_call, self.function.config_resample):  # fmt: skip
            os.close(fd)


@pytest.fixture
def driver() -> Iterator[Driver]:
    """Yield a driver of a running device."""
    made = Driver()
    yield made
    made.close()


def test_each_life_has_its_own_number(driver: Driver) -> None:
    """So a fault of an earlier life is not taken for one of the present.  The number has 32 bits."""
    driver.device.activations = 0xFFFFFFFE
    lives = []
    for _ in range(4):
        driver.renew()
        lives.append(driver.device.activations)
    assert lives == [0xFFFFFFFF, 0, 1, 2]


def test_exactly_the_buffers_of_a_chain_are_filled(driver: Driver) -> None:
    """Every buffer is filled to its last byte.  Two requests get different bytes, and both are counted."""
    driver.ring.add([Desc(DATA, 100, WRITE), Desc(DATA + 200, 0, WRITE), Desc(DATA + 300, 33, WRITE)])
    driver.ring.add([Desc(DATA + 4096, 100, WRITE)])

    assert [length for _, length in driver.collect(2)] == [133, 100]
    raw = driver.memory.read(DATA, 8192)
    assert raw[100:300] == bytes(200)
    assert raw[333:4096] == bytes(3763)
    assert len({raw[:33], raw[300:333], raw[4096:4129], bytes(33)}) == 4
    assert driver.figures() == {"requests": 2, "bytes": 233, "delayed": 0}


@pytest.mark.parametrize("length", [REQUEST_MAX + 1, 8 * MIB])
def test_huge_request_gets_the_bytes_of_one_request_44(driver: Driver, length: int) -> None:
    """Hostile input 44: a huge length does no harm, and is not served in full."""
    driver.ring.add([Desc(DATA, length, WRITE)])

    assert driver.collect(1)[0][1] == REQUEST_MAX
    assert driver.works()


def test_other_events_are_handled_in_between(driver: Driver) -> None:
    """After some requests, or many bytes, the event thread handles its other events."""
    done: list[int] = []
    for length, at_once in ((8, TURN_REQUESTS), (REQUEST_MAX, 1)):
        driver.renew()
        for _ in range(2 * TURN_REQUESTS):
            driver.ring.add([Desc(DATA, length, WRITE)])
        driver.machine.notify(0)
        driver.run(lambda: driver.ring.device_idx > 0)
        done.append(driver.ring.device_idx)
        assert done[-1] == at_once
        driver.run(lambda: driver.ring.device_idx == 2 * TURN_REQUESTS)


def test_flood_is_slowed_down_44(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hostile input 44: after its share a driver waits.  Its notifications wait, and it is served later."""
    monkeypatch.setattr(module, "REST_S", 0.2)
    driver.ring.describe(0, [Desc(DATA, REQUEST_MAX, WRITE)])
    for _ in range(SIZE):
        driver.ring.offer(0)
    driver.machine.notify(0)
    driver.run(lambda: driver.figures()["delayed"] > 0)
    served = driver.figures()["bytes"]
    driver.machine.notify(0)
    driver.run_once()
    assert served >= BURST_BYTES
    assert driver.figures()["bytes"] == served
    assert readable(driver.device.kicks[0])

    driver.device.command(devmsg.PAUSE)  # does not wait for the delayed requests
    driver.device.command(devmsg.RESUME)
    driver.run(lambda: driver.ring.device_idx == SIZE)
    assert driver.ring.reap() == [(0, REQUEST_MAX)] * SIZE
    assert driver.works()


@pytest.mark.parametrize("length", [0, 1])
def test_a_flood_of_pieces_is_slowed_down_44(driver: Driver, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """Hostile input 44: pieces of a request count too, not only bytes, because they take time."""
    monkeypatch.setattr(module, "BYTES_PER_S", 10 * COST)  # a slow host does not catch up
    driver.renew(VERSION_1 | INDIRECT_DESC)
    pieces = chained([Desc(DATA, length, WRITE)] * CHAIN_MAX)
    driver.memory.load(EXTRA, b"".join(struct.pack("<QIHH", *piece) for piece in pieces))
    driver.ring.describe(0, [Desc(EXTRA, 16 * CHAIN_MAX, INDIRECT)])
    for _ in range(SIZE):
        driver.ring.offer(0)
    driver.machine.notify(0)
    driver.run(lambda: driver.figures()["delayed"] > 0)
    assert driver.figures()["requests"] <= 2 * TURN_REQUESTS


def test_a_flood_of_notifications_is_slowed_down_44(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hostile input 44: notifications without a request are slowed down too."""
    monkeypatch.setattr(module, "BYTES_PER_S", 10 * COST)
    monkeypatch.setattr(module, "REST_S", 0.2)  # earns more bytes than one notification costs
    for _ in range(2 * BURST_BYTES // COST):
        driver.machine.notify(0)
        driver.run_once()
        if driver.figures()["delayed"]:
            break
    assert driver.figures() == {"requests": 0, "bytes": 0, "delayed": 1}
    assert driver.works()


@pytest.mark.parametrize("kind", [devmsg.PAUSE, devmsg.RESET, devmsg.MARK])
def test_a_command_waits_for_the_present_request(driver: Driver, monkeypatch: pytest.MonkeyPatch, kind: int) -> None:
    """When a command from another thread returns, no earlier request is being served."""
    seen: list[int] = []

    def tell() -> None:
        driver.device.command(kind)
        seen.append(driver.ring.device_idx)

    teller = threading.Thread(target=tell)

    def slow(count: int) -> bytes:
        if teller.ident is None:
            teller.start()
            teller.join(0.05)
        return bytes(count)

    monkeypatch.setattr(os, "urandom", slow)
    driver.ring.add([Desc(DATA, 64, WRITE)])
    driver.machine.notify(0)
    driver.run(lambda: driver.ring.device_idx == 1)
    teller.join(DEADLINE_S)

    assert seen == [1]


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([Desc(DATA, 16)], id="18-for-reading"),
        pytest.param([Desc(DATA, 0xFFFFFFFF, WRITE | NEXT, 1), Desc(DATA, 2, WRITE)], id="44-more-than-4-gib"),
    ],
)
def test_broken_request_asks_for_a_reset(driver: Driver, parts: list[Desc]) -> None:
    """Hostile input 18 and 44: the id of each case begins with its number."""
    driver.ring.describe(0, parts)
    driver.ring.offer(0)

    assert driver.needs_reset()
    driver.device.command(devmsg.PAUSE)
    driver.device.command(devmsg.RESUME)  # the device stays broken
    driver.run_once()
    assert driver.ring.device_idx == 0
    assert driver.works()


def test_changed_pages_are_marked(driver: Driver) -> None:
    """Buffers of direct and indirect chains are marked, also across regions.  PAUSE and RESET mark the ring."""
    driver.renew(VERSION_1 | INDIRECT_DESC)
    driver.ring.add([Desc(DATA + 100, 3 * 4 * KIB, WRITE), Desc(EXTRA - 10, 20, WRITE)])
    driver.ring.add_indirect([Desc(DATA + MIB, 5, WRITE)], 0x80000)
    before = bytearray(driver.memory.memory)
    driver.memory.marking = True
    driver.device.command(devmsg.MARK)
    driver.collect(2)
    driver.device.command(devmsg.PAUSE)

    changed = pages_that_differ(driver.memory.memory, before)
    marked = {page for page, mark in enumerate(driver.memory.marks) if mark}
    assert changed == marked

    driver.memory.marks[:] = bytes(len(driver.memory.marks))
    driver.device.command(devmsg.RESET)
    marked = {page for page, mark in enumerate(driver.memory.marks) if mark}
    assert marked == {driver.memory.offset(driver.ring.used, 1) >> 12}


def test_irqfd_is_attached_only_while_an_interrupt_is_unread(driver: Driver) -> None:
    """Otherwise each EOI for another device on this line would wake the event thread."""
    assert driver.kvm.irqfds == {}
    driver.ring.add([Desc(DATA, 64, WRITE)])
    driver.collect(1)
    assert driver.kvm.irqfds == {driver.device.calls[0]: (IRQ, driver.function.config_resample)}
    assert driver.kvm.injected == [IRQ]

    os.eventfd_write(driver.function.config_resample, 1)  # the guest ends the interrupt without reading ISR
    driver.run_once()
    driver.kvm.deliver()
    assert driver.kvm.injected == [IRQ, IRQ]

    assert driver.machine.read(ISR, 1) == 1
    assert driver.kvm.irqfds == {}
    assert driver.machine.read(ISR, 1) == 0
    assert not readable(driver.device.calls[0])


def test_unread_interrupt_is_raised_when_the_line_is_enabled(driver: Driver) -> None:
    """An interrupt during "interrupt disable" (PCI command bit 10) is raised when the guest clears that bit."""
    driver.machine.config_write(4, 2, 0x407)
    driver.ring.add([Desc(DATA, 64, WRITE)])
    driver.collect(1)
    assert driver.kvm.injected == []
    driver.machine.config_write(4, 2, 7)
    driver.kvm.deliver()
    assert set(driver.kvm.injected) == {IRQ}


def test_masked_message_waits_9(driver: Driver) -> None:
    """Hostile input 9: an interrupt while the vector is masked is delivered once, after unmasking."""
    driver.machine.enable_msix()
    driver.machine.set_vector(0, 0x4A, masked=True)
    driver.machine.write(QUEUE_MSIX, 2, 0)
    driver.ring.add([Desc(DATA, 64, WRITE)])
    driver.collect(1)
    assert driver.machine.pending() == 1
    driver.machine.set_vector(0, 0x5A)
    driver.kvm.deliver()
    assert driver.kvm.injected == [driver.function.first_gsi]
    assert driver.machine.pending() == 0


def test_saved_between_requests_and_restored(driver: Driver) -> None:
    """The restored device goes on with the next request, and raises the interrupt that the guest has not read."""
    driver.ring.add([Desc(DATA, 64, WRITE)])
    driver.collect(1)
    driver.ring.add([Desc(DATA + 4096, 64, WRITE)])
    driver.device.command(devmsg.PAUSE)
    state = driver.function.save()
    other = Driver()
    other.machine.write(STATUS, 1, 0)
    start, end = RING_BASE, driver.ring.used + 6 + 8 * SIZE
    other.memory.load(start, driver.memory.read(start, end - start))
    other.ring.used_idx = driver.ring.used_idx

    other.function.check_registers(state, driver.device.features)
    other.function.restore_registers(state)
    other.function.restore_rings(state)
    other.run_once()
    assert other.ring.device_idx == 1
    other.function.attach_interrupts()
    other.device.command(devmsg.RESUME)
    other.kvm.deliver()
    assert other.kvm.injected == [IRQ]
    other.run(lambda: other.ring.device_idx == 2)
    assert other.ring.reap() == [(1, 64)]
    other.close()


def test_notifications_go_to_an_ioeventfd(driver: Driver) -> None:
    """KVM signals a notification directly, without an access to the registers, as for other devices."""
    assert driver.kvm.ioeventfds[MODERN + virtio.NOTIFY, 2, 0] == driver.device.kicks[0]
