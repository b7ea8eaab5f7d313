"""Every order of `orders.ORDERS` has its expected results, through each view of the registers."""

import pytest

from tests.support.accesses import LEGACY_PORTS, MEMORY, PORTS, WINDOW, Driver
from tests.support.virtiopci import NO_VECTOR, VERSION_1, Machine
from tests.unit.virtio.orders import LEGACY, MODERN, ORDERS, Order
from vmd.config.model import VirtioMode
from vmd.log import log

SYMBOLS = {
    f"{part}{queue}": 0x10000 * (queue + 1) + 0x1000 * number
    for queue in (0, 1)
    for number, part in enumerate(("DESC", "AVAIL", "USED"))
} | {"PFN0": 0x10, "PFN1": 0x20}
# The parts of legacy queues, whose size and page determine the places of all parts.
LEGACY_PARTS = [(256, 0x10000, 0x11000, 0x12000), (64, 0x20000, 0x20400, 0x21000)]


def views(order: Order) -> list[tuple[VirtioMode, str]]:
    """Return the modes and views that a driver with this order could use."""
    if order.interface == LEGACY:
        return [(VirtioMode.TRANSITIONAL, LEGACY_PORTS), (VirtioMode.LEGACY, LEGACY_PORTS)]
    mapped = [(VirtioMode.TRANSITIONAL, MEMORY), (VirtioMode.MODERN, MEMORY), (VirtioMode.MEMORY, MEMORY)]
    if order.interface != MODERN:
        return mapped
    return [
        *mapped, (VirtioMode.TRANSITIONAL, PORTS), (VirtioMode.MODERN, PORTS),
        (VirtioMode.TRANSITIONAL, WINDOW), (VirtioMode.MEMORY, WINDOW),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("order", "mode", "view"),
    [
        pytest.param(order, *view, id=f"{order.driver}-{view[0].name.lower()}-{view[1]}")
        for order in ORDERS
        for view in views(order)
    ],
)
def test_order_is_served(order: Order, mode: VirtioMode, view: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queues that the driver has set up work, and ignored accesses are logged."""
    lines: list[str] = []
    monkeypatch.setattr(log, "write", lambda _severity, text: lines.append(text))
    machine = Machine.fake(mode)
    try:
        driver = Driver(machine, view, SYMBOLS)
        driver.run(order.steps)
        assert machine.process.running == bool(order.queues)
        if order.queues:
            check_rings(machine, order, legacy=driver.legacy)
            check_queues(machine, order, driver)
        assert driver.early == order.early
        assert lines == [f"vioblk0: the driver {complaint}" for complaint in order.complaints]
        assert machine.failures == []
    finally:
        machine.close()


def check_rings(machine: Machine, order: Order, *, legacy: bool) -> None:
    """Raise AssertionError unless the device process got exactly the driver's values."""
    features, rows = machine.process.lives[-1]
    assert features == (0 if legacy else VERSION_1)
    for queue, row in enumerate(rows):
        enabled = queue in order.queues
        assert row[1] == enabled
        if enabled and legacy:
            assert (row[0], *row[2:5]) == LEGACY_PARTS[queue]
        elif enabled:
            parts = [SYMBOLS[f"{part}{queue}"] for part in ("DESC", "AVAIL", "USED")]
            assert [row[0], *row[2:5]] == [order.sizes[queue], *parts]


def check_queues(machine: Machine, order: Order, driver: Driver) -> None:
    """Raise AssertionError unless notifications reach each queue, and its interrupts reach the guest."""
    machine.kicked()
    for queue in order.queues:
        driver.step(f"notify={queue}")
        assert machine.kicked() == [queue]
        machine.kvm.injected.clear()
        machine.process.raise_queue(queue)
        machine.kvm.deliver()
        vector = machine.function.transport.queues[queue].vector
        arrives = not machine.function.transport.msix_enabled or vector in driver.vectors - {NO_VECTOR}
        assert len(machine.kvm.injected) == arrives


def test_rows_are_of_many_drivers() -> None:
    """There are at least 15 source files, and at least three drivers for each interface."""
    for interface in ("legacy", "modern", "mapped"):
        assert len({order.driver.split(",")[0] for order in ORDERS if order.interface == interface}) >= 3
    assert len({order.source for order in ORDERS}) >= 15
