"""A virtio function as seen by good and hostile drivers (hostile-input 1, 4-10, 57).

These tests compare the calls to KVM with the registers.  `tests/guest/test_virtio_kvm.py` does the same with real KVM.
"""

import os
import threading
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given

from tests.support.virtiopci import (
    ACKNOWLEDGE,
    ACTIONS,
    AVAIL,
    CONFIG,
    CONFIG_MSIX,
    CONFIG_VECTOR,
    DESC,
    DEVICE_FEATURE,
    DEVICE_SELECT,
    DRIVER,
    DRIVER_FEATURE,
    DRIVER_OK,
    DRIVER_SELECT,
    FEATURES,
    FEATURES_OK,
    GENERATION,
    IRQ,
    LEGACY,
    LEGACY_ISR,
    LEGACY_NOTIFY,
    LEGACY_PFN,
    LEGACY_SELECT,
    LEGACY_SIZE,
    LEGACY_STATUS,
    MAPPED,
    MEMORY,
    MODERN,
    NO_VECTOR,
    NUM_QUEUES,
    QUEUE_ENABLE,
    QUEUE_MSIX,
    QUEUE_NOTIFY_OFF,
    QUEUE_SELECT,
    QUEUE_SIZE,
    STATUS,
    TABLE,
    USED,
    VERSION_1,
    Kvm,
    Machine,
    Process,
    act,
)
from vmd.config.model import VirtioMode
from vmd.log import log
from vmd.readable import readable
from vmd.virtio import spec
from vmd.virtio.transport import COMMON_BYTES
from vmd.vm import virtio
from vmd.vm.kinds import KINDS, Kind
from vmd.vm.slots import LAYOUT_FIRST

NOTIFY = MODERN + virtio.NOTIFY
ROWS = [(256, True, 0x10000, 0x11000, 0x12000, 0, 0), (64, True, 0x20000, 0x21000, 0x22000, 0, 0)]
RUNNING = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
NEEDS_RESET = spec.DEVICE_NEEDS_RESET
EVERY_PORT = {(LEGACY + LEGACY_NOTIFY, 2, 0), (LEGACY + LEGACY_NOTIFY, 2, 1), (NOTIFY, 2, 0), (NOTIFY, 2, 1)}
PCI_CFG = spec.VIRTIO_PCI_CAP_PCI_CFG


@pytest.fixture
def machine() -> Iterator[Machine]:
    """Yield a transitional device with two queues, in slot 1."""
    made = Machine.fake()
    yield made
    made.close()


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list that collects log lines."""
    written: list[str] = []
    monkeypatch.setattr(log, "write", lambda _severity, text: written.append(text))
    return written


def queue_registers(machine: Machine, queue: int) -> list[int]:
    """Return all registers of a queue."""
    machine.write(QUEUE_SELECT, 2, queue)
    wide = [machine.read(offset, 4) for offset in range(DESC, USED + 8, 4)]
    return [*(machine.read(offset, 2) for offset in (QUEUE_SIZE, QUEUE_MSIX, QUEUE_ENABLE, QUEUE_NOTIFY_OFF)), *wide]


# --- good drivers -------------------------------------------------------------------------------------------------


def test_device_has_the_ids_and_structures_that_drivers_look_for(machine: Machine) -> None:
    """It has the ids of a transitional block device, structures in BARs, and one notify word for all queues (4.1.4)."""
    assert machine.config_read(0, 4) == 0x10011AF4
    assert machine.config_read(0x2C, 4) == 0x00020B5D
    assert structures(machine) == [
        (1, 2, 0, 60, 0), (2, 2, 0x40, 2, 0), (3, 2, 0x44, 1, 0), (4, 2, 0x80, 60, 0),
        (1, 4, 0, 60, 0), (2, 4, 0x800, 2, 0), (3, 4, 0x44, 1, 0), (4, 4, 0x80, 60, 0),
    ]  # fmt: skip


def structures(machine: Machine) -> list[tuple[int, int, int, int, int]]:
    """Return type, BAR, offset, length and multiplier (0 if there is none) of each structure, in order of the list."""
    return [
        (kind, machine.config_read(at + 4, 1), machine.config_read(at + 8, 4), machine.config_read(at + 12, 4),
         machine.config_read(at + 16, 4) if kind == spec.VIRTIO_PCI_CAP_NOTIFY_CFG else 0)
        for kind, at in machine.all_capabilities()
        if kind <= spec.VIRTIO_PCI_CAP_DEVICE_CFG
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "device", "revision", "subsystem", "bars"),
    [
        (VirtioMode.TRANSITIONAL, 0x1001, 0, 2, {0, 1, 2, 4}),
        (VirtioMode.LEGACY, 0x1001, 0, 2, {0, 1}),
        (VirtioMode.MODERN, 0x1042, 1, 0x42, {1, 2, 4}),
        (VirtioMode.MEMORY, 0x1042, 1, 0x42, {1, 4}),
    ],
)
def test_each_mode_has_its_ids_and_bars(
    mode: VirtioMode, device: int, revision: int, subsystem: int, bars: set[int]
) -> None:
    """Ids follow 4.1.2.1.  edk2 needs a subsystem id of 40h or more, and legacy drivers find the device type there."""
    machine = Machine.fake(mode)

    assert machine.config_read(2, 2) == device
    assert machine.config_read(8, 1) == revision
    assert machine.config_read(0x2E, 2) == subsystem
    assert set(machine.function.bars) == bars
    assert (PCI_CFG in machine.capabilities()) == (mode is not VirtioMode.LEGACY)
    machine.close()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_subsystem_of_every_modern_device_is_beyond_the_legacy_ones(kind: Kind) -> None:
    """PCI device id and subsystem id both have the device type plus a constant (4.1.2.1)."""
    machine = Machine(Kvm(), Process(kind), VirtioMode.MODERN)

    assert machine.config_read(0x2E, 2) == 0x40 + kind.device_type == machine.config_read(2, 2) - 0x1000
    machine.close()


# The configuration space of a disk before structures in memory existed, up to the last byte that is not 0.
PORTS_ONLY = {
    VirtioMode.TRANSITIONAL:
        "f41a011007001000000000010000000001c000000000008001c10000000000000000000000000000000000005d0b020000000000"
        "4000000000000000000100000950100102000000000000003c000000096414020200000040000000020000000000000009741003"
        "0200000044000000010000000984100402000000800000003c000000099814050000000000000000000000000000000011000200"
        "010000000108",
    VirtioMode.LEGACY:
        "f41a011007001000000000010000000001c000000000008000000000000000000000000000000000000000005d0b020000000000"
        "40000000000000000001000011000200010000000108",
    VirtioMode.MODERN:
        "f41a4210070010000100000100000000000000000000008001c10000000000000000000000000000000000005d0b020000000000"
        "4000000000000000000100000950100102000000000000003c000000096414020200000040000000020000000000000009741003"
        "0200000044000000010000000984100402000000800000003c000000099814050000000000000000000000000000000011000200"
        "010000000108",
}  # fmt: skip


@pytest.mark.parametrize("mode", PORTS_ONLY)
def test_layout_of_earlier_machines_is_kept(mode: VirtioMode) -> None:
    """A guest that was started with the earlier layout finds the same configuration space and BARs."""
    machine = Machine.fake(mode, function_layout=LAYOUT_FIRST)
    space = bytes(machine.config_read(at, 1) for at in range(256))

    assert space == bytes.fromhex(PORTS_ONLY[mode]).ljust(256, b"\0")
    assert {index: bar.size for index, bar in machine.function.bars.items()} == {
        index: size for index, size in ((0, 0x80), (1, 0x1000), (2, 0x100)) if index in machine.function.bars
    }
    machine.start() if mode is not VirtioMode.LEGACY else machine.start_legacy()
    assert machine.kvm.mapped_ioeventfds == {}
    machine.close()


@pytest.mark.parametrize("mode", [VirtioMode.TRANSITIONAL, VirtioMode.MODERN, VirtioMode.MEMORY])
def test_capabilities_do_not_overlap(mode: VirtioMode) -> None:
    """They overlap neither each other nor the header."""
    machine = Machine.fake(mode)
    lengths = {0x11: 12}
    taken = sorted(
        (at, at + lengths.get(kind, machine.config_read(at + 2, 1))) for kind, at in machine.all_capabilities()
    )

    assert taken[0][0] >= 0x40
    assert taken[-1][1] <= 256
    assert all(end <= start for (_, end), (start, _) in pairwise(taken))
    machine.close()


# --- structures in memory -----------------------------------------------------------------------------------------


def test_both_sets_reach_the_same_registers(machine: Machine) -> None:
    """A write to a port is read in memory, and a write to memory at a port, in all four structures."""
    machine.start()
    for offset in (*range(COMMON_BYTES), *range(virtio.DEVICE_CONFIG, virtio.DEVICE_CONFIG + len(CONFIG))):
        assert machine.bus.mmio_read(MAPPED + offset, 1) == machine.bus.pio_read(MODERN + offset, 1), offset
    machine.process.raise_queue(0)
    assert machine.bus.mmio_read(MAPPED + virtio.ISR, 1) == spec.ISR_QUEUE
    assert machine.read(virtio.ISR, 1) == 0
    machine.bus.mmio_write(MAPPED + STATUS, 1, 0)
    assert machine.status == 0
    machine.bus.mmio_write(MAPPED + virtio.DEVICE_CONFIG + 4, 4, 7)
    assert machine.process.written[-1] == (4, (7).to_bytes(4, "little"))


def test_driver_that_uses_memory_starts(machine: Machine) -> None:
    """The driver uses memory for every step.  KVM gets the notification address in memory, and the ports."""
    machine.mapped = True
    machine.start()

    assert machine.process.lives == [(VERSION_1, ROWS)]
    assert set(machine.kvm.ioeventfds) == EVERY_PORT
    assert set(machine.kvm.mapped_ioeventfds) == {(MAPPED + virtio.MEMORY_NOTIFY, 2, queue) for queue in (0, 1)}
    machine.notify(1)
    assert machine.kicked() == [1]


def test_mode_memory_has_a_notification_address_for_each_queue() -> None:
    """`virtio memory`: Redox and others refuse a multiplier of 0.  No other structures have to agree here."""
    machine = Machine.fake(VirtioMode.MEMORY)
    assert structures(machine) == [(1, 4, 0, 60, 0), (2, 4, 0x800, 8, 4), (3, 4, 0x44, 1, 0), (4, 4, 0x80, 60, 0)]
    machine.notify(1)
    assert machine.kicked() == []
    machine.start()
    for queue in (0, 1):
        machine.write(QUEUE_SELECT, 2, queue)
        assert machine.read(QUEUE_NOTIFY_OFF, 2) == queue
    machine.write(QUEUE_SELECT, 2, 2)
    assert machine.read(QUEUE_NOTIFY_OFF, 2) == 0

    assert set(machine.kvm.mapped_ioeventfds) == {(MAPPED + 0x800 + 4 * queue, 0, None) for queue in (0, 1)}
    machine.notify(1)
    assert machine.kicked() == [1]
    machine.bus.mmio_write(MAPPED + 0x800 + 4, 2, 1)  # a write with data, as through the window
    machine.bus.mmio_write(MAPPED + 0x800 + 8, 2, 0)
    assert machine.kicked() == [1]
    machine.close()


def test_notification_address_moves_with_its_bar_8(machine: Machine) -> None:
    """Hostile input 8: it follows BAR 4, and is removed when memory decoding is off.  The ports stay."""
    machine.start()
    machine.set_bar(4, MAPPED + 0x10000)
    assert {at for at, _, _ in machine.kvm.mapped_ioeventfds} == {MAPPED + 0x10800}
    machine.config_write(4, 2, 5)
    assert machine.kvm.mapped_ioeventfds == {}
    assert set(machine.kvm.ioeventfds) == EVERY_PORT
    machine.set_bar(4, TABLE)  # the vector table has this address already
    machine.config_write(4, 2, 7)
    assert machine.kvm.mapped_ioeventfds == {}


@pytest.mark.parametrize(("mode", "bar"), [(VirtioMode.TRANSITIONAL, 4), (VirtioMode.MEMORY, 4)])
def test_window_reaches_memory(mode: VirtioMode, bar: int) -> None:
    """It reaches ports too (4.1.4.9).  It works while decoding is off, and does not reach the vector table."""
    machine = Machine.fake(mode)
    at = machine.capabilities()[PCI_CFG]
    machine.config_write(4, 2, 0)
    for word, size, value in ((4, 1, bar), (8, 4, STATUS), (12, 4, 1)):
        machine.config_write(at + word, size, value)
    machine.config_write(at + 16, 1, ACKNOWLEDGE)
    assert machine.config_read(at + 16, 1) == ACKNOWLEDGE
    machine.config_write(at + 4, 1, 1)
    machine.config_write(at + 16, 1, 0x55)
    machine.config_write(4, 2, 7)

    assert machine.status == ACKNOWLEDGE
    assert machine.bus.mmio_read(TABLE + STATUS, 1) == 0
    machine.close()


def test_driver_of_virtio_1_starts(machine: Machine) -> None:
    """The process gets the rings.  KVM gets the ports, and the interrupt line with an eventfd for its end."""
    assert machine.kvm.irqfds == {}  # the driver may still enable MSI-X

    machine.start()

    assert machine.process.lives == [(VERSION_1, ROWS)]
    assert set(machine.kvm.ioeventfds) == EVERY_PORT
    assert {fd: gsi for fd, (gsi, _) in machine.kvm.irqfds.items()} == dict.fromkeys(machine.process.calls, IRQ)
    assert all(resample is not None for _, resample in machine.kvm.irqfds.values())


def test_legacy_driver_starts(machine: Machine) -> None:
    """Page numbers give the layout of the rings (2.7.2)."""
    machine.start_legacy(features=0xFFFFFFFF)

    rows = [(256, True, 0x10000, 0x11000, 0x12000, 0, 0), (64, True, 0x20000, 0x20400, 0x21000, 0, 0)]
    assert machine.process.lives == [(FEATURES, rows)]


def test_line_interrupt_is_acknowledged_by_reading_isr(machine: Machine) -> None:
    """ISR has a bit for queues and one for the configuration, until it is read.  Then STATUS shows no interrupt."""
    machine.start()
    machine.process.raise_queue(1)
    machine.kvm.deliver()
    assert machine.config_read(6, 2) & 8
    assert machine.read(virtio.ISR, 1) == spec.ISR_QUEUE

    machine.function.on_config(bytes(len(CONFIG)))
    machine.process.raise_queue(0)
    machine.kvm.deliver()
    assert machine.legacy_read(LEGACY_ISR, 1) == spec.ISR_QUEUE | spec.ISR_CONFIG
    assert machine.read(virtio.ISR, 1) == 0
    assert not machine.config_read(6, 2) & 8
    assert machine.kvm.injected == [IRQ] * 3


def test_unread_configuration_interrupt_is_raised_again(machine: Machine) -> None:
    """It is raised when the guest ends an interrupt on the shared line.  For queues the device process does that."""
    machine.start()
    machine.function.on_config(CONFIG)
    machine.kvm.deliver()
    machine.function.on_config_resample(0)
    machine.kvm.deliver()
    assert machine.kvm.injected == [IRQ] * 2

    machine.read(virtio.ISR, 1)
    machine.function.on_config_resample(0)
    machine.kvm.deliver()
    assert machine.kvm.injected == [IRQ] * 2


def test_unread_interrupt_is_raised_when_the_line_is_enabled_again(machine: Machine) -> None:
    """While the line is disabled, it is not asserted (PCI 3.0, 6.2.2)."""
    machine.start()
    machine.process.raise_queue(0)
    machine.kvm.deliver()
    machine.config_write(4, 2, 7 | 0x400)
    machine.config_write(4, 2, 7)
    machine.kvm.deliver()
    assert machine.kvm.injected == [IRQ] * 2

    machine.read(virtio.ISR, 1)
    machine.config_write(4, 2, 7 | 0x400)
    machine.config_write(4, 2, 7)
    machine.kvm.deliver()
    assert machine.kvm.injected == [IRQ] * 2


def test_vectors_give_messages(machine: Machine) -> None:
    """With MSI-X each source has its own vector, and ISR is not used."""
    machine.enable_msix()
    for vector in range(3):
        machine.set_vector(vector, 0x40 + vector)
    machine.negotiate()
    machine.write(CONFIG_MSIX, 2, CONFIG_VECTOR)
    for queue in (0, 1):
        machine.write(QUEUE_SELECT, 2, queue)
        machine.write(QUEUE_MSIX, 2, queue)
        assert machine.read(QUEUE_MSIX, 2) == queue
    machine.start()
    machine.process.raise_queue(1)
    machine.process.raise_queue(0)
    machine.kvm.deliver()
    machine.function.on_config(CONFIG)
    machine.kvm.deliver()

    assert [machine.kvm.messages[gsi] for gsi in machine.kvm.injected] == [
        (0xFEE00000, 0x40), (0xFEE00000, 0x41), (0xFEE00000, 0x42),
    ]  # fmt: skip
    assert not machine.config_read(6, 2) & 8


def test_window_reaches_every_structure(machine: Machine) -> None:
    """VIRTIO_PCI_CAP_PCI_CFG (4.1.4.9): registers, device configuration, and notifications."""
    at = machine.capabilities()[PCI_CFG]

    def point(bar: int, offset: int, length: int) -> None:
        machine.config_write(at + 4, 1, bar)
        machine.config_write(at + 8, 4, offset)
        machine.config_write(at + 12, 4, length)

    point(2, STATUS, 1)
    machine.config_write(at + 16, 4, ACKNOWLEDGE)
    assert machine.config_read(at + 16, 1) == ACKNOWLEDGE
    point(2, virtio.DEVICE_CONFIG + 4, 4)
    assert machine.config_read(at + 16, 4) == int.from_bytes(CONFIG[4:8], "little")
    machine.start()
    point(2, virtio.NOTIFY, 2)
    machine.config_write(at + 16, 2, 1)
    assert machine.kicked() == [1]


@pytest.mark.parametrize(("bar", "last"), [(2, virtio.MODERN_BYTES - 1), (4, virtio.MEMORY_BYTES - 1)])
def test_window_ends_where_the_bar_ends(machine: Machine, bar: int, last: int) -> None:
    """Beyond it, and with a width that no register has, the data register keeps its value."""
    at = machine.capabilities()[PCI_CFG]

    def read(bar: int, offset: int, length: int) -> int:
        machine.config_write(at + 4, 1, bar)
        for word, value in ((8, STATUS), (12, 1)):
            machine.config_write(at + word, 4, value)
        machine.config_write(at + 16, 1, ACKNOWLEDGE)  # the value that stays if the next read is refused
        machine.config_write(at + 8, 4, offset)
        machine.config_write(at + 12, 4, length)
        return machine.config_read(at + 16, 1)

    assert [read(bar, last + beyond, 1) for beyond in (0, 1)] == [0, ACKNOWLEDGE]
    assert [read(bar, last + 1 - length, length) for length in (2, 4)] == [0, 0]
    assert [read(bar, last + 2 - length, length) for length in (2, 4)] == [ACKNOWLEDGE] * 2
    assert [read(bar, last - 7, length) for length in (0, 3, 5, 8)] == [ACKNOWLEDGE] * 4
    assert [read(bar, 1 << shift | last, 1) for shift in (16, 24, 31)] == [ACKNOWLEDGE] * 3
    machine.write(DEVICE_SELECT, 4, 1)
    assert read(bar, DEVICE_FEATURE, 4) == 1
    assert machine.config_read(at + 16, 4) == VERSION_1 >> 32


def test_only_the_data_register_of_the_window_reaches_registers(machine: Machine) -> None:
    """An access beside it does not read ISR, which would clear it."""
    machine.start()
    at = machine.capabilities()[PCI_CFG]
    for word, value in ((4, 2), (8, virtio.ISR), (12, 1)):
        machine.config_write(at + word, 4, value)
    machine.process.raise_queue(0)
    for beside in (at + 12, at + 15, at + 20, at + 23):
        machine.config_read(beside, 1)
        machine.config_write(beside, 1, 0 if beside > at + 15 else machine.config_read(beside, 1))

    assert machine.config_read(at + 16, 1) == spec.ISR_QUEUE
    assert machine.read(virtio.ISR, 1) == 0


def test_a_device_without_configuration_has_a_structure_of_one_word() -> None:
    """A structure of no bytes would be refused by drivers that map it."""
    process = Process()
    process.config = b""
    machine = Machine(Kvm(), process)
    assert [each for each in structures(machine) if each[0] == 4] == [(4, 2, 0x80, 4, 0), (4, 4, 0x80, 4, 0)]
    machine.close()


def test_reading_isr_loses_no_message(machine: Machine) -> None:
    """With MSI-X, ISR is not needed.  A driver that reads it while a vector is masked still gets the message."""
    machine.enable_msix()
    machine.set_vector(CONFIG_VECTOR, 0x42, masked=True)
    machine.start()
    machine.write(CONFIG_MSIX, 2, CONFIG_VECTOR)
    machine.function.on_config(CONFIG)

    assert machine.read(virtio.ISR, 1) == spec.ISR_CONFIG
    assert machine.pending() == 1 << CONFIG_VECTOR
    machine.set_vector(CONFIG_VECTOR, 0x42)
    machine.kvm.deliver()
    assert machine.kvm.injected == [machine.function.first_gsi + CONFIG_VECTOR]


def test_an_interrupt_that_was_read_from_isr_does_not_come_later(machine: Machine) -> None:
    """The guest reads ISR while the line is disabled.  Afterwards the next event gives one interrupt."""
    machine.start()
    machine.config_write(4, 2, 7 | 0x400)
    machine.function.on_config(CONFIG)
    assert machine.read(virtio.ISR, 1) == spec.ISR_CONFIG
    assert not readable(machine.function.config_call)
    machine.config_write(4, 2, 7)
    machine.kvm.deliver()
    assert machine.kvm.injected == []

    machine.function.on_config(CONFIG)
    machine.kvm.deliver()
    assert machine.kvm.injected == [IRQ]


def test_ends_of_interrupts_are_taken_from_their_eventfd(machine: Machine) -> None:
    """Otherwise the event thread would be called again and again."""
    machine.start()
    os.eventfd_write(machine.function.config_resample, 3)
    machine.function.on_config_resample(1)
    assert not readable(machine.function.config_resample)


def test_interrupts_are_detached_while_the_machine_is_paused(machine: Machine) -> None:
    """They come when the interrupts are attached again."""
    machine.start()
    machine.process.raise_queue(0)
    machine.function.detach_interrupts()
    assert machine.kvm.irqfds == {}
    machine.function.on_config(CONFIG)
    machine.config_write(4, 2, 7)
    assert machine.kvm.irqfds == {}
    machine.kvm.deliver()
    assert machine.kvm.injected == []

    machine.function.attach_interrupts()
    machine.kvm.deliver()
    assert set(machine.kvm.injected) == {IRQ}
    assert machine.read(virtio.ISR, 1) == spec.ISR_QUEUE | spec.ISR_CONFIG


# --- hostile-input 1, 4, 5 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 3, 0x1FF, 512, 0x8000, 0xFFFF])
def test_impossible_queue_size_1(machine: Machine, size: int) -> None:
    """Hostile input 1: such a size is ignored, so the device gets a possible one."""
    machine.negotiate()
    machine.place_queue(0, 0x10000, size)
    machine.place_queue(1, 0x20000, size)
    machine.write(STATUS, 1, RUNNING)

    assert machine.process.lives == [(VERSION_1, ROWS)]


def test_queue_registers_do_not_change_once_enabled_4(machine: Machine) -> None:
    """Hostile input 4: neither after queue_enable nor after DRIVER_OK, through either interface."""
    machine.negotiate()
    machine.place_queue(0, 0x10000)
    for running in (False, True):
        before = queue_registers(machine, 0)
        for offset, size, value in (
            *((offset, 4, 0xFFFFF000) for offset in range(DESC, USED + 8, 4)),
            (QUEUE_SIZE, 2, 8), (QUEUE_ENABLE, 2, 0), (QUEUE_ENABLE, 2, 0xFFFF), (QUEUE_NOTIFY_OFF, 2, 7),
        ):  # fmt: skip
            machine.write(offset, size, value)
        if running:
            machine.legacy_write(LEGACY_SELECT, 2, 0)
            machine.legacy_write(LEGACY_PFN, 4, 0x77)
        assert queue_registers(machine, 0) == before
        machine.place_queue(1, 0x20000)
        machine.write(STATUS, 1, RUNNING)

    assert machine.process.lives == [(VERSION_1, ROWS)]


def test_queue_is_not_enabled_while_the_device_runs_4(machine: Machine) -> None:
    """Hostile input 4: DRIVER_OK ends configuration (3.1.1), also for a queue that was not enabled."""
    machine.negotiate()
    machine.place_queue(0, 0x10000)
    machine.write(STATUS, 1, RUNNING)
    before = queue_registers(machine, 1)
    machine.place_queue(1, 0x20000, 8)

    assert queue_registers(machine, 1) == before
    assert machine.process.lives == [(VERSION_1, [ROWS[0], (64, False, 0, 0, 0, 0, 0)])]


def test_absent_queue_5(machine: Machine) -> None:
    """Hostile input 5: an absent queue has size 0, ignores writes, and cannot be notified."""
    for number in (2, 0x7FFF, 0x8000, 0xFFFF):
        before = [queue_registers(machine, queue) for queue in (0, 1)]
        machine.write(QUEUE_SELECT, 2, number)
        machine.place_queue(number, 0x30000, 8)
        machine.legacy_write(LEGACY_PFN, 4, 0x77)
        assert queue_registers(machine, number) == [0, NO_VECTOR, 0, 0, *[0] * 6]
        assert machine.legacy_read(LEGACY_SIZE, 2) == 0
        assert machine.legacy_read(LEGACY_PFN, 4) == 0
        assert [queue_registers(machine, queue) for queue in (0, 1)] == before
    machine.start()
    for number in (2, 0x7FFF, 0x8000, 0xFFFF):
        machine.notify(number)
        machine.notify(number, LEGACY + LEGACY_NOTIFY)
    assert machine.kicked() == []


# --- hostile-input 6 --------------------------------------------------------------------------------------------


def test_notification_before_driver_ok_6(machine: Machine) -> None:
    """Hostile input 6: it is ignored for a queue that is not set up, and from a driver of virtio 1.x."""
    machine.notify(0)
    machine.notify(0, LEGACY + LEGACY_NOTIFY)
    machine.negotiate()
    machine.place_queue(0, 0x10000)
    machine.notify(0)
    machine.notify(0, LEGACY + LEGACY_NOTIFY)

    assert machine.kvm.ioeventfds == {}
    assert machine.process.lives == []
    assert machine.kicked() == []


def test_legacy_driver_may_notify_early_6(machine: Machine) -> None:
    """Hostile input 6: some legacy drivers do I/O before DRIVER_OK, which then changes nothing (3.1.2)."""
    machine.legacy_write(LEGACY_STATUS, 1, ACKNOWLEDGE | DRIVER)
    machine.legacy_write(LEGACY_PFN, 4, 0x10)
    for number in (1, 2, 0xFFFF):
        machine.notify(number, LEGACY + LEGACY_NOTIFY)
    assert machine.process.lives == []
    machine.notify(0, LEGACY + LEGACY_NOTIFY)
    assert machine.kicked() == [0]
    machine.legacy_write(LEGACY_STATUS, 1, ACKNOWLEDGE | DRIVER | DRIVER_OK)

    assert len(machine.process.lives) == 1
    assert set(machine.kvm.ioeventfds) == EVERY_PORT


def test_notification_during_reset_and_after_6(machine: Machine) -> None:
    """Hostile input 6: during a reset no queue is notified.  Earlier notifications do not reach the next life."""
    machine.start()

    def while_resetting() -> None:
        assert machine.kvm.ioeventfds == {}
        machine.notify(0)
        machine.notify(1, LEGACY + LEGACY_NOTIFY)

    machine.process.during_reset = while_resetting
    machine.notify(1)
    machine.process.raise_queue(0)
    machine.write(STATUS, 1, 0)
    machine.notify(0)

    assert machine.process.resets == 1
    assert machine.kicked() == []
    assert machine.read(virtio.ISR, 1) == 0


@pytest.mark.parametrize("size", [1, 4])
def test_notification_of_another_width_is_ignored_6(machine: Machine, size: int) -> None:
    """Hostile input 6: only a word is a notification (4.1.5.2)."""
    machine.start()
    machine.notify(0, size=size)
    machine.notify(0, LEGACY + LEGACY_NOTIFY, size=size)

    assert machine.kicked() == []


def test_device_that_failed_6_57(machine: Machine) -> None:
    """Hostile input 6, 57: the failure is reported, which ends the VM.  Until then no access raises an exception."""
    machine.process.failing = True
    machine.start()
    assert machine.failures == ["vm/test/vioblk0: no answer in 10 s"]
    assert machine.status & NEEDS_RESET
    machine.notify(0)
    machine.write(virtio.DEVICE_CONFIG, 1, 7)
    machine.write(STATUS, 1, 0)
    machine.start_legacy()

    assert set(machine.failures) == {"vm/test/vioblk0: no answer in 10 s"}


def test_configuration_that_changes_its_length_57(machine: Machine, lines: list[str]) -> None:
    """Hostile input 57: a process must not change the length of its configuration."""
    machine.function.on_config(bytes(61))
    assert machine.read(virtio.DEVICE_CONFIG, 4) == int.from_bytes(CONFIG[:4], "little")
    assert len(lines) == 1
    machine.process.answer = bytes(61)
    machine.write(virtio.DEVICE_CONFIG, 4, 7)

    assert machine.failures == ["vm/test/vioblk0: configuration has 61 bytes after a write to it"]
    assert machine.read(virtio.DEVICE_CONFIG, 4) == int.from_bytes(CONFIG[:4], "little")


# --- hostile-input 7 --------------------------------------------------------------------------------------------


def test_reset_storm_7(machine: Machine) -> None:
    """Hostile input 7: each life is like the first one, and nothing accumulates."""
    for round_ in range(200):
        start = (machine.start, machine.start_legacy)[round_ % 2]
        start()
        machine.notify(round_ % 2)
        machine.process.raise_queue(round_ % 2)
        machine.kvm.deliver()
        if round_ % 3:
            machine.write(STATUS, 1, 0)
        else:
            machine.legacy_write(LEGACY_STATUS, 1, 0)
        machine.write(STATUS, 1, 0)
        assert machine.kvm.ioeventfds == {}
        assert machine.kvm.irqfds == {}
        assert machine.status == machine.read(virtio.ISR, 1) == 0

    assert machine.process.resets == len(machine.process.lives) == 200
    assert machine.process.lives[-2] == machine.process.lives[0]
    assert machine.failures == []


def test_status_does_not_go_backwards_7(machine: Machine) -> None:
    """Hostile input 7: only a reset clears bits, and the driver cannot set NEEDS_RESET."""
    machine.start()
    for value in (ACKNOWLEDGE, DRIVER, FEATURES_OK, NEEDS_RESET | 1):
        machine.write(STATUS, 1, value)
        machine.legacy_write(LEGACY_STATUS, 1, value)
        assert machine.status == RUNNING

    assert (len(machine.process.lives), machine.process.resets) == (1, 0)


def test_features_that_were_not_offered_7(machine: Machine) -> None:
    """Hostile input 7, 22: FEATURES_OK stays clear, so nothing starts.  Packed rings are one of these features."""
    offered = FEATURES & ~spec.LEGACY_ONLY | VERSION_1
    for bit in (bit for bit in range(64) if not offered >> bit & 1):
        machine.negotiate(VERSION_1 | 1 << bit)
        machine.write(STATUS, 1, RUNNING)
        assert machine.status == ACKNOWLEDGE | DRIVER
        machine.write(STATUS, 1, 0)
    machine.negotiate(FEATURES & ~spec.LEGACY_ONLY)  # VERSION_1 is missing
    assert machine.status == ACKNOWLEDGE | DRIVER
    assert machine.process.lives == []


def test_features_do_not_change_after_features_ok_7(machine: Machine) -> None:
    """Hostile input 7: the rule holds for both interfaces."""
    machine.negotiate()
    for select in (0, 1):
        machine.write(DRIVER_SELECT, 4, select)
        machine.write(DRIVER_FEATURE, 4, 0xFFFFFFFF)
    machine.legacy_write(4, 4, 0xFFFFFFFF)
    machine.place_queue(0, 0x10000)
    machine.place_queue(1, 0x20000)
    machine.write(STATUS, 1, RUNNING)

    assert machine.process.lives == [(VERSION_1, ROWS)]


@pytest.mark.parametrize("select", [2, 3, 4, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_feature_words_beyond_the_second_7(machine: Machine, select: int) -> None:
    """Hostile input 7: they read as 0 and ignore writes."""
    machine.write(DEVICE_SELECT, 4, select)
    machine.write(DRIVER_SELECT, 4, select)
    machine.write(DRIVER_FEATURE, 4, 0xFFFFFFFF)
    assert machine.read(DEVICE_FEATURE, 4) == machine.read(DRIVER_FEATURE, 4) == 0
    machine.write(DRIVER_SELECT, 4, 0)
    assert machine.read(DRIVER_FEATURE, 4) == 0
    machine.start()

    assert machine.process.lives == [(VERSION_1, ROWS)]


def test_rings_that_cannot_be_used(machine: Machine) -> None:
    """The process refuses the rings, so the driver is asked for a reset (2.1.2), after which it can start."""
    machine.process.usable = False
    machine.start()
    machine.kvm.deliver()
    assert machine.status == RUNNING | NEEDS_RESET
    assert machine.read(virtio.ISR, 1) == spec.ISR_CONFIG
    assert machine.kvm.injected == [IRQ]
    machine.process.usable = True
    machine.write(STATUS, 1, 0)
    machine.start()

    assert machine.status == RUNNING


def test_broken_ring_asks_for_a_reset(machine: Machine, lines: list[str]) -> None:
    """The process reports it: bit 6 of status, a configuration interrupt, and a limited number of log lines."""
    machine.start()
    for _ in range(100):
        machine.function.on_needs_reset("available index runs 9 ahead", life=1)
    machine.kvm.deliver()

    assert machine.status == RUNNING | NEEDS_RESET
    assert machine.read(virtio.ISR, 1) == spec.ISR_CONFIG
    assert 1 <= len(lines) <= 5
    assert lines[0] == "vioblk0: available index runs 9 ahead"


def test_broken_ring_of_an_earlier_life_is_ignored(machine: Machine, lines: list[str]) -> None:
    """The process sent the report before the driver reset it, and the report arrives after the reset."""
    machine.start()
    machine.write(STATUS, 1, 0)
    machine.function.on_needs_reset("descriptor 9 outside a table of 8", life=1)
    assert machine.status == 0
    machine.start()
    machine.function.on_needs_reset("descriptor 9 outside a table of 8", life=1)

    assert machine.status == RUNNING
    assert lines


# --- hostile-input 8 --------------------------------------------------------------------------------------------

UNUSABLE_PORTS = {"null": 0, "uart": 0x3F8, "reset": 0xCF8, "top": 0xFFFFFF00, "above-ports": 0x10000}
UNUSABLE_MEMORY = {"ram": 0x100000, "bios": 0xF0000, "end-of-ram": MEMORY - 4096, "ioapic": 0xFEC00000,
                   "lapic": 0xFEE00000, "tss": 0xFEFFD000, "top": 0xFFFFF000, "null": 0}  # fmt: skip


@pytest.mark.parametrize("base", UNUSABLE_PORTS.values(), ids=UNUSABLE_PORTS)
def test_ports_moved_to_an_unusable_address_8(machine: Machine, base: int) -> None:
    """Hostile input 8: no notification works there.  After a move back they work again."""
    machine.start()
    machine.set_bar(0, base)
    machine.set_bar(2, base)
    assert machine.kvm.ioeventfds == {}
    assert machine.bus.pio_read(NOTIFY, 2) == 0xFFFF
    machine.set_bar(0, LEGACY)
    machine.set_bar(2, MODERN)

    assert set(machine.kvm.ioeventfds) == EVERY_PORT
    machine.notify(1)
    assert machine.kicked() == [1]


@pytest.mark.parametrize("base", UNUSABLE_MEMORY.values(), ids=UNUSABLE_MEMORY)
def test_vector_table_moved_to_an_unusable_address_8(machine: Machine, base: int) -> None:
    """Hostile input 8: RAM stays RAM.  The table keeps its content and still works."""
    machine.enable_msix()
    machine.set_vector(0, 0x41)
    machine.start()
    machine.write(QUEUE_SELECT, 2, 0)
    machine.write(QUEUE_MSIX, 2, 0)
    machine.set_bar(1, base)
    assert machine.function.bars[1].mapped is None
    machine.process.raise_queue(0)
    machine.kvm.deliver()

    assert [machine.kvm.messages[gsi] for gsi in machine.kvm.injected] == [(0xFEE00000, 0x41)]


def test_overlapping_port_bars_8(machine: Machine) -> None:
    """Hostile input 8: one of the two BARs has the ports, and KVM gets each port once."""
    machine.start()
    machine.set_bar(2, LEGACY)
    assert set(machine.kvm.ioeventfds) == {(LEGACY + LEGACY_NOTIFY, 2, queue) for queue in (0, 1)}
    machine.set_bar(0, MODERN)
    machine.set_bar(2, LEGACY)
    assert set(machine.kvm.ioeventfds) == {
        (base, 2, queue) for base in (MODERN + LEGACY_NOTIFY, LEGACY + virtio.NOTIFY) for queue in (0, 1)
    }


def test_ports_follow_the_bars_8(machine: Machine) -> None:
    """Hostile input 8: the old notify port does not work any more."""
    machine.start()
    machine.set_bar(2, MODERN + 0x100)
    assert {port for port, _, _ in machine.kvm.ioeventfds} == {LEGACY + LEGACY_NOTIFY, NOTIFY + 0x100}
    machine.notify(0)
    assert machine.kicked() == []
    machine.notify(0, NOTIFY + 0x100)
    assert machine.kicked() == [0]


def test_sizing_while_decoding_8(machine: Machine) -> None:
    """Hostile input 8: all ones and the old value are written while the device runs."""
    machine.start()
    for index, size in ((0, 0x80), (1, 0x1000), (2, 0x100)):
        old = machine.config_read(0x10 + 4 * index, 4)
        machine.set_bar(index, 0xFFFFFFFF)
        found = machine.config_read(0x10 + 4 * index, 4)
        assert -(found & ~3) & 0xFFFFFFFF == size
        machine.set_bar(index, old)

    assert set(machine.kvm.ioeventfds) == EVERY_PORT
    assert machine.status == RUNNING


def test_disabled_decoding_8(machine: Machine) -> None:
    """Hostile input 8: without I/O decoding there are no notify ports, and without memory decoding no vector table.

    "Interrupt disable" disconnects the line.
    """
    machine.start()
    machine.config_write(4, 2, 6)
    assert machine.kvm.ioeventfds == {}
    machine.config_write(4, 2, 5)
    assert set(machine.kvm.ioeventfds) == EVERY_PORT
    assert machine.bus.mmio_read(TABLE, 4) == 0xFFFFFFFF
    machine.config_write(4, 2, 0x407)
    assert machine.kvm.irqfds == {}
    machine.process.raise_queue(0)
    machine.kvm.deliver()
    assert machine.config_read(6, 2) & 8
    machine.config_write(4, 2, 7)

    assert machine.kvm.injected == [IRQ]


# --- hostile-input 9 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4])
def test_configuration_is_read_at_any_place_9(machine: Machine, size: int) -> None:
    """Hostile input 9: reads may be unaligned, across fields and past the end.  A PC has no port access of 8 bytes."""
    for offset in range(0x80 - size + 1):
        expected = int.from_bytes(CONFIG[offset : offset + size], "little")
        assert machine.read(virtio.DEVICE_CONFIG + offset, size) == expected
    for offset in range(20, 0x80 - size + 1):
        assert machine.legacy_read(offset, size) == int.from_bytes(CONFIG[offset - 20 : offset - 20 + size], "little")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_configuration_is_written_inside_only_9(machine: Machine, size: int) -> None:
    """Hostile input 9: a write across the end is ignored."""
    for offset in range(0x80):
        machine.write(virtio.DEVICE_CONFIG + offset, size, 0)
        machine.legacy_write(20 + offset, size, 0)
    inside = [(offset, bytes(size)) for offset in range(60 - size + 1)]

    assert sorted(machine.process.written) == sorted(2 * inside)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_registers_are_read_at_any_place_9(machine: Machine, size: int) -> None:
    """Hostile input 9: gaps read as zero, and reads of every size and alignment are answered."""
    machine.start()
    image = b"".join(machine.read(offset, 1).to_bytes(1, "little") for offset in range(0x40))
    for offset in range(0x40 - size + 1):
        assert machine.read(offset, size) == int.from_bytes(image[offset : offset + size], "little")
    for offset in range(0x3C, 0x80):
        assert machine.read(offset, 1) == 0
    for offset in range(20):
        assert 0 <= machine.legacy_read(offset, size) < 1 << 8 * size


def test_register_writes_of_a_wrong_width_9(machine: Machine) -> None:
    """Hostile input 9: a field accepts writes of its own width only (4.1.3.1)."""
    fields = {DEVICE_SELECT: 4, DRIVER_SELECT: 4, DRIVER_FEATURE: 4, CONFIG_MSIX: 2, STATUS: 1, QUEUE_SELECT: 2,
              QUEUE_SIZE: 2, QUEUE_MSIX: 2, QUEUE_ENABLE: 2, DESC: 4, AVAIL: 4, USED: 4}  # fmt: skip
    before = [machine.read(offset, 1) for offset in range(0x40)]
    for offset in range(0x40):
        for size in (1, 2, 4):
            if fields.get(offset) != size and not (size == 4 and DESC <= offset < USED + 8 and offset % 4 == 0):
                machine.write(offset, size, 0x01010101 & (1 << 8 * size) - 1)

    assert [machine.read(offset, 1) for offset in range(0x40)] == before


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_vector_table_is_accessed_at_any_place_9(machine: Machine, size: int) -> None:
    """Hostile input 9: beside its three entries and its pending bits, everything reads as zero."""
    for offset in range(4096 - size + 1):
        machine.bus.mmio_write(TABLE + offset, size, (1 << 8 * size) - 1)
        assert 0 <= machine.bus.mmio_read(TABLE + offset, size) < 1 << 8 * size
    image = bytes(machine.bus.mmio_read(TABLE + offset, 1) for offset in range(4096))

    assert image[:48] == bytes.fromhex("fcffffff ffffffff ffffffff 01000000") * 3
    assert image[48:] == bytes(4096 - 48)


@pytest.mark.parametrize("vector", [3, 4, 0x7FF, 0xFFFE, 0xFFFF])
def test_absent_vector_9(machine: Machine, vector: int) -> None:
    """Hostile input 9: the register reads as "no vector", and the interrupt is lost."""
    machine.enable_msix()
    machine.set_vector(0, 0x41)
    machine.start()
    for offset in (CONFIG_MSIX, QUEUE_MSIX):
        machine.write(offset, 2, 0)
        assert machine.read(offset, 2) == 0
        machine.write(offset, 2, vector)
        assert machine.read(offset, 2) == NO_VECTOR
    machine.function.on_config(CONFIG)
    machine.process.raise_queue(1)
    machine.kvm.deliver()

    assert machine.kvm.irqfds == {}
    assert machine.pending() == 0
    assert machine.kvm.injected == []


def test_vector_changes_while_an_interrupt_is_pending_9(machine: Machine) -> None:
    """Hostile input 9: the interrupt is delivered once, through the vector that its source has at that time."""
    machine.enable_msix()
    for vector in range(3):
        machine.set_vector(vector, 0x40 + vector, masked=True)
    machine.start()
    machine.write(QUEUE_SELECT, 2, 0)
    machine.write(QUEUE_MSIX, 2, 0)
    machine.process.raise_queue(0)
    machine.process.raise_queue(0)
    assert machine.pending() == 1
    machine.write(QUEUE_MSIX, 2, 2)
    assert machine.pending() == 4
    machine.write(QUEUE_MSIX, 2, NO_VECTOR)
    assert machine.pending() == 0
    machine.write(QUEUE_MSIX, 2, 1)
    machine.set_vector(0, 0x40)
    machine.set_vector(1, 0x51)

    assert [machine.kvm.messages[gsi] for gsi in machine.kvm.injected] == [(0xFEE00000, 0x51)]
    assert machine.pending() == 0


def test_masked_function_holds_interrupts_back_9(machine: Machine) -> None:
    """Hostile input 9: the function is masked, and MSI-X is disabled while an interrupt is pending."""
    machine.enable_msix()
    machine.set_vector(0, 0x41)
    machine.start()
    machine.write(QUEUE_SELECT, 2, 0)
    machine.write(QUEUE_MSIX, 2, 0)
    machine.enable_msix(0xC000)
    machine.process.raise_queue(0)
    machine.kvm.deliver()
    assert machine.pending() == 1
    machine.enable_msix(0x8000)
    machine.enable_msix(0)
    machine.process.raise_queue(0)
    machine.kvm.deliver()

    assert machine.kvm.injected == [machine.function.first_gsi, IRQ]


def test_a_process_is_told_whether_eventfds_are_enough(machine: Machine) -> None:
    """They are enough while MSI-X is on and each queue has a vector, masked or not.  The end is told beforehand."""
    changes: list[tuple[bool, list[int]]] = []
    queues = machine.process.calls

    def note(direct: bool) -> None:
        changes.append((direct, [fd for fd in queues if machine.kvm.irqfds.get(fd) == (machine.function.first_gsi, 0)]))

    machine.process.on_direct = note
    machine.set_vector(0, 0x41)
    machine.enable_msix()
    machine.start()
    for queue in (0, 1):
        assert not machine.process.direct
        machine.write(QUEUE_SELECT, 2, queue)
        machine.write(QUEUE_MSIX, 2, 0)
    assert machine.process.direct
    machine.enable_msix(0xC000)  # masked
    machine.function.detach_interrupts()
    assert machine.process.direct
    machine.function.attach_interrupts()
    machine.enable_msix(0x8000)
    assert [direct for direct, _ in changes] == [True]

    machine.write(QUEUE_MSIX, 2, NO_VECTOR)
    machine.write(QUEUE_MSIX, 2, 0)
    machine.enable_msix(0)
    machine.enable_msix()
    machine.write(STATUS, 1, 0)
    assert [direct for direct, _ in changes] == [True, False, True, False, True, False]
    assert machine.failures == []


def test_a_process_that_does_not_answer_direct_ends_the_vm(machine: Machine) -> None:
    """The process may still serve rings in the way that no longer works."""
    machine.set_vector(0, 0x41)
    machine.process.failing = True
    for queue in (0, 1):
        machine.write(QUEUE_SELECT, 2, queue)
        machine.write(QUEUE_MSIX, 2, 0)
    machine.enable_msix()

    assert machine.failures == ["vm/test/vioblk0: no answer in 10 s"]


# --- hostile-input 10 -------------------------------------------------------------------------------------------


def test_read_only_registers_10(machine: Machine) -> None:
    """Hostile input 10: writes of every width do not change them."""
    machine.start()
    machine.process.raise_queue(0)
    fields = ((DEVICE_FEATURE, 4), (NUM_QUEUES, 2), (GENERATION, 1), (QUEUE_NOTIFY_OFF, 2))
    before = [machine.read(offset, size) for offset, size in fields]
    for offset in (DEVICE_FEATURE, NUM_QUEUES, GENERATION, QUEUE_NOTIFY_OFF, virtio.ISR):
        for size in (1, 2, 4):
            machine.write(offset, size, (1 << 8 * size) - 1)
    for offset in (0, LEGACY_SIZE, LEGACY_ISR):
        for size in (1, 2, 4):
            machine.legacy_write(offset, size, (1 << 8 * size) - 1)

    assert [machine.read(offset, size) for offset, size in fields] == before
    assert machine.legacy_read(LEGACY_SIZE, 2) == 64
    assert machine.legacy_read(0, 4) == FEATURES
    assert machine.read(virtio.ISR, 1) == spec.ISR_QUEUE  # a write does not acknowledge
    assert machine.status == RUNNING


# --- all of these together ---------------------------------------------------------------------------------------

def check(machine: Machine) -> None:
    """Raise AssertionError unless KVM's registrations are exactly those of the registers."""
    function, process, kvm = machine.function, machine.process, machine.kvm
    assert function.transport.active == process.running
    ports = {
        (bar.mapped + offset, 2, queue): process.kicks[queue]
        for bar, offset in ((function.bars.get(0), LEGACY_NOTIFY), (function.bars.get(2), virtio.NOTIFY))
        if bar is not None and bar.mapped is not None and process.running
        for queue in (0, 1)
    }
    assert kvm.ioeventfds == ports
    base = function.bars[4].mapped
    apart = 0 not in function.bars and 2 not in function.bars
    assert kvm.mapped_ioeventfds == {
        (base + virtio.MEMORY_NOTIFY + 4 * queue * apart, 0 if apart else 2, None if apart else queue): kick
        for queue, kick in enumerate(process.kicks)
        if base is not None and process.running
    }
    vectors = [queue.vector for queue in function.transport.queues] + [function.transport.config_vector]
    sources = dict(zip((*process.calls, function.config_call), vectors, strict=True))
    msix = function.msix
    assert msix is not None
    if msix.enabled:
        open_ = {vector for vector in range(3) if not msix.message(vector)[2]}
        wanted = {fd: function.first_gsi + vector for fd, vector in sources.items() if vector in open_}
        for vector in open_:
            assert kvm.messages[function.first_gsi + vector] == msix.message(vector)[:2]
    else:
        raising = [fd for fd in process.calls if process.running or fd in kvm.irqfds]  # without rings none is raised
        raising += [function.config_call] if function.config_pending else []
        wanted = {} if function.command & 0x400 else dict.fromkeys(raising, IRQ)
    assert {fd: gsi for fd, (gsi, _) in kvm.irqfds.items()} == wanted
    assert all((resample is None) == msix.enabled for _, resample in kvm.irqfds.values())
    assert machine.failures == []


@pytest.mark.parametrize("mode", [VirtioMode.TRANSITIONAL, VirtioMode.MEMORY])
@given(actions=ACTIONS)
def test_random_accesses_4_to_10(mode: VirtioMode, actions: list[tuple[str, int, int, int]]) -> None:
    """Hostile input 4-10: after each step KVM's registrations agree with the registers."""
    machine = Machine.fake(mode)
    machine.function.complaints.burst = machine.function.remarks.burst = 0
    try:
        for action in actions:
            act(machine, *action)
            check(machine)
        machine.config_write(4, 2, 7)
        for index, base in ((0, LEGACY), (2, MODERN), (4, MAPPED)):
            machine.set_bar(index, base)
        machine.write(STATUS, 1, 0)
        machine.start()
        assert machine.status == RUNNING
        check(machine)
    finally:
        machine.close()


def test_vcpus_that_interfere_with_each_other_4_to_10(machine: Machine) -> None:
    """Hostile input 4-10: they reset, read interrupts, and change vectors and BARs at once.  None blocks for ever."""
    started = threading.Barrier(3)
    trouble: list[BaseException] = []

    def vcpu(*rounds: tuple[str, int, int, int]) -> None:
        try:
            started.wait()
            for _ in range(100):
                for action in rounds:
                    act(machine, *action)
        except BaseException as error:
            trouble.append(error)

    vcpus = [
        threading.Thread(target=vcpu, args=actions, daemon=True)
        for actions in (
            [("start", 0, 1, 0), ("modern", STATUS, 1, 0), ("start_legacy", 0, 1, 0), ("legacy", LEGACY_STATUS, 1, 0)],
            [("interrupt", 0, 1, 0), ("modern", virtio.ISR, 1, 0)],
            [("table", 12, 4, 0), ("table", 12, 4, 1), ("modern", CONFIG_MSIX, 2, 0)],
        )
    ]
    for thread in vcpus:
        thread.start()
    # By calls, not by the ports of configuration space: two vCPUs would need their own lock for that pair of ports.
    for round_ in range(100):
        machine.function.config_write(0x10, 4, LEGACY + 0x80 * (round_ % 2))
        machine.pci.settle(machine.function)
        machine.function.config_write(machine.function.msix_control, 2, 0x8000 * (round_ % 2))
    for thread in vcpus:
        thread.join(60)
        assert not thread.is_alive()

    assert trouble == []
    machine.write(STATUS, 1, 0)
    machine.start()
    check(machine)
