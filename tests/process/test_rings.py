"""The properties of all split rings, tested with each queue of each device (hostile-input 1-3, 6, 11-21, 23-26).

The device processes are real and confined.  The entropy device runs on an event thread.  Module
`tests/support/ringdevices.py` makes the requests of each queue.  What a single device does with its requests is tested
in the tests of that device.
"""

import os
import random
import struct
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.support.fakedriver import (
    DATA,
    EVENT_IDX,
    EXTRA,
    EXTRA_END,
    INDIRECT,
    INDIRECT_DESC,
    KIB,
    MIB,
    MODERN,
    NEXT,
    RING_BASE,
    ROM,
    WRITE,
    Desc,
    Ring,
    chained,
)
from tests.support.ringdevices import (
    ADAPTERS,
    ALL,
    LONG_TABLE,
    STRIDE,
    TABLE,
    Adapter,
    Devices,
    FramesIn,
    FramesOut,
    RingDriver,
)
from vmd.ipc import devmsg
from vmd.virtio import spec
from vmd.virtio.fence import full_fence
from vmd.virtio.queue import CHAIN_MAX
from vmd.vm.kinds import ENTROPY, INTERFACE

NOWHERE = 64 * MIB
START = 0xFFF9  # an index that soon wraps to 0
SIZE_MAX = 1 << 15


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Devices]:
    """Give one device of each kind, for all tests.  A device that breaks also fails the next test."""
    with Devices(tmp_path_factory.mktemp("rings")) as made:
        yield made


@pytest.fixture
def driver(devices: Devices, request: pytest.FixtureRequest) -> RingDriver:
    """Give the driver of the queue that `adapters` names.  Its device was reset and has new rings."""
    made = devices.driver(request.param)
    made.device.read_log()
    return made


def adapters(condition: Callable[[type[Adapter]], bool] = lambda _adapter: True) -> pytest.MarkDecorator:
    """Run a test for all queues that fulfil a condition."""
    return pytest.mark.parametrize(
        "driver",
        [
            pytest.param(adapter, id=adapter.name, marks=[pytest.mark.root] if adapter.kind is INTERFACE else [])
            for adapter in ADAPTERS
            if condition(adapter)
        ],
        indirect=True,
    )


each_queue = adapters()
each_queue_that_is_served = adapters(lambda adapter: adapter.gives_back)
each_queue_that_yields_to_the_vm = adapters(lambda adapter: adapter.kind is not INTERFACE and adapter.gives_back)
each_receive_queue = adapters(lambda adapter: adapter.kind is INTERFACE and adapter.queue == 0)
each_transmit_queue = adapters(lambda adapter: adapter.kind is INTERFACE and adapter.queue == 1)
each_queue_of_a_process = adapters(lambda adapter: adapter.kind is not ENTROPY and adapter.gives_back)


# --- setting up ------------------------------------------------------------------------------------------------------


def activate(driver: RingDriver, **changed: int) -> int:
    """Activate all rings, the tested one with changed fields; return the status."""
    driver.reset()
    rings = driver.rings()
    rows = [ring.row() for ring in rings]
    ring = driver.ring = rings[driver.queue]
    fields = {"size": ring.size, "enabled": 1, "desc": ring.desc, "avail": ring.avail, "used": ring.used} | changed
    size, enabled, *places = fields.values()
    rows[driver.queue] = devmsg.QUEUE.pack(size, enabled, 0, *places, 0, 0)
    return driver.device.activate_rows(ALL | driver.adapter.features, *rows)


UNUSABLE = {
    "1-size-0": {"size": 0},
    "1-size-100": {"size": 100},
    "1-size-65535": {"size": 0xFFFF},
    "2-desc-unaligned": {"desc": RING_BASE + 8},
    "2-avail-unaligned": {"avail": RING_BASE + 1},
    "2-used-unaligned": {"used": RING_BASE + 2},
    "2-nowhere": {"avail": NOWHERE},
    "2-across-the-end": {"used": EXTRA_END - 64},
    "2-across-two-regions": {"desc": EXTRA - 16},
    "2-wrapping": {"desc": (1 << 64) - 16},
    "25-read-only": {"used": ROM},
}


@each_queue
@pytest.mark.parametrize("changed", UNUSABLE.values(), ids=UNUSABLE)
def test_ring_that_cannot_be_used(driver: RingDriver, changed: dict[str, int]) -> None:
    """Hostile input 1, 2, 25: ACTIVATE is refused, and notifications have no effect."""
    assert activate(driver, **changed) == 1
    for kick in driver.device.kicks:
        os.eventfd_write(kick, 1)
    driver.pause_and_resume()
    assert driver.reset_requests() == []
    assert driver.works()


@each_queue
def test_parts_of_a_ring_in_one_place_3(driver: RingDriver) -> None:
    """Hostile input 3: the guest corrupts only its own ring.  After a reset the device works."""
    driver.memory.load(DATA, bytes(64 * KIB))
    driver.memory.load(DATA + 2, struct.pack("<H", 20))
    assert activate(driver, desc=DATA, avail=DATA, used=DATA) == 0
    driver.kick()
    driver.adapter.prompt(1)
    driver.pause_and_resume()
    assert driver.works()


@each_queue
def test_notification_of_a_queue_without_a_ring_6(driver: RingDriver) -> None:
    """Hostile input 6: a notification has no effect after a reset, nor for a queue that is not enabled."""
    driver.reset()
    driver.put(driver.adapter.request(0))
    driver.kick()
    driver.pause_and_resume()
    assert driver.ring.device_idx == 0

    assert activate(driver, enabled=0, desc=3) == 0
    driver.put(driver.adapter.request(0))
    driver.kick()
    driver.pause_and_resume()
    assert driver.ring.device_idx == 0
    assert driver.reset_requests() == []
    assert driver.works()


@each_queue
def test_impossible_indices_of_a_stream_26(driver: RingDriver) -> None:
    """Hostile input 26: a stream has indices that do not fit the ring, so the device asks for a reset."""
    driver.reset()
    rings = driver.rings()
    rows = [ring.row() for ring in rings]
    rows[driver.queue] = rings[driver.queue].row(True, 5000, 9)
    assert driver.device.activate_rows(ALL | driver.adapter.features, *rows) == 0
    driver.kick()
    assert "ahead" in driver.device.needs_reset()
    assert driver.works()


@each_queue_that_is_served
@pytest.mark.parametrize("size", [1, 2, 32, "usual", SIZE_MAX])
def test_every_size_of_a_ring_is_served(driver: RingDriver, size: int | str) -> None:
    """2.7: requests are indirect, so a ring of one descriptor works, too.  The end of a large ring is also used."""
    entries = driver.size_max if isinstance(size, str) else size
    driver.renew(size=entries)
    for _ in range(3):
        driver.serve(min(entries, 8), indirect=True)
    if entries > 8:
        last = entries - 3
        driver.ring.describe(last, chained(driver.adapter.request(0), last))
        driver.ring.offer(last)
        driver.adapter.prompt(1)
        driver.finish({last: 0})


# --- layouts of chains -----------------------------------------------------------------------------------------------


def halves(parts: list[Desc]) -> list[Desc]:
    """Cut each buffer in two."""
    cut = []
    for part in parts:
        first = part.length // 2
        cut += [part._replace(length=first), part._replace(gpa=part.gpa + first, length=part.length - first)]
    return cut


def with_empty_ones(parts: list[Desc]) -> list[Desc]:
    """Put an empty buffer before and behind each buffer."""
    mixed = []
    for part in parts:
        mixed += [part._replace(length=0), part, part._replace(gpa=part.gpa + 1, length=0)]
    return mixed


def backwards(driver: RingDriver, parts: list[Desc]) -> int:
    """Write a chain from high indices to low ones; return its head."""
    top = driver.size_max - 1
    for place, part in enumerate(parts):
        last = place == len(parts) - 1
        link = part._replace(flags=part.flags | (0 if last else NEXT), next=0 if last else top - place - 1)
        driver.ring.describe(top - place, [link])
    driver.ring.offer(top)
    return top


LAYOUTS: dict[str, Callable[[RingDriver, list[Desc]], int]] = {
    "direct": lambda driver, parts: driver.ring.add(parts),
    "backwards": backwards,
    "indirect": lambda driver, parts: driver.ring.add([driver.table(parts)]),
    "indirect-behind-direct": lambda driver, parts: driver.ring.add(
        [halves(parts)[0], driver.table(halves(parts)[1:])]
    ),
    "cut": lambda driver, parts: driver.ring.add(halves(parts)),
    "cut-indirect": lambda driver, parts: driver.ring.add([driver.table(halves(parts))]),
    "16-empty": lambda driver, parts: driver.ring.add(with_empty_ones(parts)),
    "16-empty-indirect": lambda driver, parts: driver.ring.add([driver.table(with_empty_ones(parts))]),
}


@each_queue_that_is_served
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_a_chain(driver: RingDriver, layout: str) -> None:
    """Hostile input 16: a driver may divide its buffers into any number of descriptors."""
    head = LAYOUTS[layout](driver, driver.adapter.request(0))
    driver.adapter.prompt(1)
    driver.finish({head: 0})


@each_queue_that_is_served
def test_buffer_across_two_regions_16(driver: RingDriver) -> None:
    """Hostile input 16: a buffer may begin in one region of memory and end in the adjacent one."""
    for place, part in enumerate(driver.adapter.request(0)):
        driver.renew()
        parts = driver.adapter.request(0)
        parts[place] = moved = part._replace(gpa=EXTRA - part.length // 2)
        driver.memory.write(moved.gpa, driver.memory.read(part.gpa, part.length))
        driver.memory.write(part.gpa, bytes(part.length))
        driver.ring.add(parts)
        driver.adapter.prompt(1)
        ((_, length),) = driver.device.collect(driver.ring, 1, driver.queue)
        driver.memory.write(part.gpa, driver.memory.read(moved.gpa, part.length))
        assert driver.adapter.is_served(0, length)


# --- broken indices and chains ---------------------------------------------------------------------------------------


@each_queue
@pytest.mark.parametrize("ahead", ["size", 0x7FFF, 0xFFFF])
def test_available_index_ahead_of_the_ring_11(driver: RingDriver, ahead: int | str) -> None:
    """Hostile input 11: the device asks for a reset, and serves no request."""
    driver.ring.set_avail_idx(driver.size_max + 1 if isinstance(ahead, str) else ahead)
    driver.kick()
    assert f"{driver.ring.avail_idx} ahead, in a queue of {driver.size_max}" in driver.device.needs_reset()
    assert driver.ring.device_idx == 0
    assert driver.works()


@each_queue_that_is_served
@pytest.mark.parametrize("head", ["size", 0xFFFF])
def test_head_outside_the_table_12(driver: RingDriver, head: int | str) -> None:
    """Hostile input 12: the device asks for a reset.  It serves the good request before, or leaves it in the ring."""
    outside = driver.size_max if isinstance(head, str) else head
    good = driver.ring.add(driver.adapter.request(0))
    driver.ring.offer(outside)
    driver.kick()
    assert f"descriptor {outside} outside a table of {driver.size_max}" in driver.device.needs_reset()
    driver.pause_and_resume()  # a thread may have the good request still
    found = driver.ring.reap()
    assert [used for used, _ in found] == ([] if driver.adapter.name.startswith("vionet-rx") else [good])
    assert all(driver.adapter.is_served(0, length) for _, length in found)
    assert driver.works()


def linked(parts: list[Desc], last: int) -> list[Desc]:
    """Link a chain, and link its last descriptor to an index."""
    chain = chained(parts)
    return [*chain[:-1], chain[-1]._replace(flags=chain[-1].flags | NEXT, next=last)]


def around(driver: RingDriver, parts: list[Desc]) -> list[Desc]:
    """Return a loop of all descriptors of the ring."""
    size = driver.size_max
    return [parts[0]._replace(length=1, flags=parts[0].flags | NEXT, next=(i + 1) % size) for i in range(size)]


def huge(parts: list[Desc]) -> list[Desc]:
    """Return a chain one byte longer than 4 GiB.  The additional buffers have the direction of the last one."""
    rest = (1 << 32) - sum(part.length for part in parts)
    last = parts[-1]
    return chained([*parts, last._replace(length=rest), last._replace(length=1)])


def wrong_order() -> list[Desc]:
    """Return a chain with a readable buffer behind a writable one.  Each is large enough for any request."""
    return chained([Desc(DATA, 4 * KIB, WRITE), Desc(DATA + 4 * KIB, 4 * KIB)])


def nested(driver: RingDriver, parts: list[Desc]) -> list[Desc]:
    """Return an indirect table whose only entry is the indirect table of a good request."""
    return [driver.raw_table([driver.table(parts)], TABLE + STRIDE)]


def nested_behind(driver: RingDriver, parts: list[Desc]) -> list[Desc]:
    """Return an indirect table whose last entry is another indirect table."""
    first = parts[0]._replace(length=parts[0].length // 2)
    second = first._replace(gpa=first.gpa + first.length, length=parts[0].length - first.length)
    return [driver.table([first, driver.table([second, *parts[1:]])], TABLE + STRIDE)]


def long_table(driver: RingDriver, parts: list[Desc]) -> list[Desc]:
    """Return an indirect table with one descriptor more than a device follows in a queue of any size."""
    one = parts[-1]._replace(length=1)
    return [driver.table([*parts, *[one] * (CHAIN_MAX + 1 - len(parts))], LONG_TABLE)]


def table_at(gpa: int, length: int) -> Callable[[RingDriver, list[Desc]], list[Desc]]:
    """Return a function that makes one indirect descriptor.  A good request is at `TABLE`."""

    def make(driver: RingDriver, parts: list[Desc]) -> list[Desc]:
        driver.table(parts)
        return [Desc(gpa, length, INDIRECT)]

    return make


END, OUTSIDE, TABLE_OF = "does not end", "outside a table of", "indirect table of"
NO_MEMORY, NOT_HERE = "no memory for", "is indirect, which is not allowed here"
BROKEN: dict[str, tuple[str, Callable[[RingDriver, list[Desc]], list[Desc]]]] = {
    "13-last-outside": (OUTSIDE, lambda driver, parts: linked(parts, driver.size_max)),
    "13-last-far-outside": (OUTSIDE, lambda _driver, parts: linked(parts, 0xFFFF)),
    "13-first-outside": (OUTSIDE, lambda driver, parts: linked(parts[:1], driver.size_max)),
    "13-last-outside-its-table": (OUTSIDE, lambda d, parts: [d.raw_table(linked(parts, len(parts)))]),
    "13-last-far-outside-its-table": (OUTSIDE, lambda d, parts: [d.raw_table(linked(parts, 0xFFFF))]),
    "14-last-to-itself": (END, lambda _driver, parts: linked(parts, len(parts) - 1)),
    "14-first-to-itself": (END, lambda _driver, parts: linked(parts[:1], 0)),
    "14-of-all": (END, around),
    "14-last-to-itself-in-a-table": (END, lambda d, parts: [d.raw_table(linked(parts, len(parts) - 1))]),
    "14-first-to-itself-in-a-table": (END, lambda d, parts: [d.raw_table(linked(parts[:1], 0))]),
    "14-longer-than-is-followed": (END, long_table),
    "17-more-than-4-gib": ("more than 4 GiB", lambda _driver, parts: huge(parts)),
    "17-more-than-4-gib-in-a-table": ("more than 4 GiB", lambda d, parts: [d.raw_table(huge(parts))]),
    "18-order": ("follows a device-writable one", lambda _driver, _parts: wrong_order()),
    "18-order-in-a-table": ("follows a device-writable one", lambda d, _parts: [d.raw_table(wrong_order())]),
    "19-empty": (TABLE_OF, table_at(TABLE, 0)),
    "19-no-multiple-of-16": (TABLE_OF, table_at(TABLE, 56)),
    "19-too-long": (TABLE_OF, table_at(TABLE, 16 * 32769)),
    "19-nowhere": (NO_MEMORY, table_at(NOWHERE, 48)),
    "19-across-the-end": (NO_MEMORY, table_at(EXTRA_END - 16, 48)),
    "19-wrapping": (NO_MEMORY, table_at((1 << 64) - 16, 48)),
    "19-and-next": (NOT_HERE, lambda d, parts: [d.table(parts)._replace(flags=INDIRECT | NEXT, next=1), Desc(DATA, 1)]),
    "19-nested": (NOT_HERE, nested),
    "19-nested-behind-another": (NOT_HERE, nested_behind),
    "19-in-the-descriptor-table": (NOT_HERE, lambda driver, _parts: [Desc(driver.ring.desc, 16, INDIRECT)]),
}


def asks_for_a_reset(driver: RingDriver, text: str) -> bool:
    """Notify; check that the device wants a reset with this text and serves nothing.  Return whether it works again."""
    driver.kick()
    said = driver.device.needs_reset()
    assert text in said, said
    driver.put(driver.adapter.request(0))
    driver.kick()
    driver.adapter.prompt(1)
    driver.pause_and_resume()
    driver.pause_and_resume()
    assert driver.ring.device_idx == 0
    assert driver.reset_requests() == []
    return driver.works()


@each_queue_that_is_served
@pytest.mark.parametrize("name", BROKEN)
def test_broken_chain_asks_for_a_reset(driver: RingDriver, name: str) -> None:
    """Hostile input 13, 14, 17, 18, 19.  The id of a case has its number."""
    text, make = BROKEN[name]
    driver.put(make(driver, driver.adapter.request(0)))
    assert asks_for_a_reset(driver, text)


@each_queue_that_is_served
def test_indirect_descriptor_that_was_not_negotiated_19(driver: RingDriver) -> None:
    """Hostile input 19: the device asks for a reset."""
    driver.renew(ALL & ~INDIRECT_DESC)
    driver.put([driver.table(driver.adapter.request(0))])
    assert asks_for_a_reset(driver, NOT_HERE)


PLACES: dict[str, Callable[[int], int]] = {
    "nowhere": lambda _length: NOWHERE,
    "wrapping": lambda length: (1 << 64) - max(1, length // 2),
    "across-the-end": lambda length: EXTRA_END - length // 2,
    "read-only": lambda _length: ROM,
}


@each_queue_that_is_served
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("place", PLACES)
def test_buffer_outside_memory_16(driver: RingDriver, place: str, indirect: bool) -> None:
    """Hostile input 16: if a part of a request is outside memory, the request fails, or the device asks for a reset."""
    for number, part in enumerate(driver.adapter.request(0)):
        if place == "read-only" and not part.flags & WRITE:
            continue  # a device may read from read-only memory
        driver.renew()
        parts = driver.adapter.request(0)
        parts[number] = part._replace(gpa=PLACES[place](part.length))
        driver.ring.add([driver.table(parts)] if indirect else parts)
        came = driver.outcome()
        assert isinstance(came, str) or driver.adapter.is_refused(0), f"part {number}: {came}"
        assert driver.works()


@each_queue_that_is_served
def test_buffers_in_the_ring_itself_23(driver: RingDriver) -> None:
    """Hostile input 23: the device serves the request or asks for a reset.  After a reset it works."""
    for number in range(len(driver.adapter.request(0))):
        for name in ("desc", "avail", "used"):
            ring = driver.renew()
            parts = driver.adapter.request(0)
            parts[number] = parts[number]._replace(gpa=getattr(ring, name))
            driver.put(chained(parts))
            driver.kick()
            driver.adapter.prompt(1)
            driver.pause_and_resume()
            assert driver.works()


@each_queue_that_is_served
def test_descriptors_that_change_while_they_are_read_20(driver: RingDriver) -> None:
    """Hostile input 20: the device uses the values that it has checked.  After a reset it works."""
    choice = random.Random(20)
    good = driver.adapter.request(0)
    rows = [
        struct.pack("<QIHH", *part)
        for part in (
            *chained(good), good[0], good[-1], Desc(NOWHERE, 100, NEXT, 1), Desc(DATA, 0xFFFFFFFF, WRITE | NEXT, 2),
            driver.table(good), Desc(TABLE, 16, INDIRECT), Desc(DATA, 0, NEXT, 0xFFFF), Desc(ROM, 64, WRITE),
        )
    ]  # fmt: skip
    memory = driver.memory.memory
    for _ in range(20):
        ring = driver.renew()
        ring.describe(0, chained(driver.adapter.request(0)))
        for _ in range(driver.size_max):
            ring.offer(0)
        driver.kick()
        for _ in range(200):
            at = ring.desc + 16 * choice.randrange(3)
            memory[at : at + 16] = choice.choice(rows)
        driver.adapter.prompt(1)
    driver.reset()
    assert driver.works()


@each_queue_that_is_served
def test_any_garbage_in_any_place_11_to_19(driver: RingDriver) -> None:
    """Hostile input 11-19: an invalid chain makes the device ask for a reset.  After a reset it works."""
    choice = random.Random(44)
    for _ in range(60):
        ring = driver.renew(MODERN | choice.choice((0, INDIRECT_DESC)))
        driver.memory.load(DATA, choice.randbytes(4 * KIB))
        for index in range(ring.size):
            place = choice.choice((DATA, DATA + 256, ROM, EXTRA_END - 8))
            flags = choice.choice((0, NEXT, WRITE, WRITE | NEXT, INDIRECT, choice.randrange(1 << 16)))
            length = choice.choice((0, 1, 12, 16, 48, choice.randrange(1 << 32)))
            ring.describe(index, [Desc(place, length, flags, choice.randrange(ring.size))])
        for _ in range(choice.randrange(16)):
            ring.offer(choice.randrange(ring.size))
        ring.offer(choice.randrange(ring.size, 1 << 16))
        driver.kick()
        assert driver.device.needs_reset()
    assert driver.works()


# --- number of requests ----------------------------------------------------------------------------------------------


@each_queue_that_is_served
@pytest.mark.parametrize("features", [ALL, MODERN], ids=["event-index", "flags"])
def test_indices_wrap_around_21(driver: RingDriver, features: int) -> None:
    """Hostile input 21: the indices of both rings wrap from 65535 to 0, with one request at a time and with several."""
    driver.renew(features, start=START)
    for count in (1, 1, 1, 5, 1, 9, 16):
        driver.serve(count)
    assert driver.ring.device_idx == START + 34 & 0xFFFF
    driver.device.command(devmsg.PAUSE)
    assert driver.device.export()[driver.queue] == (START + 34 & 0xFFFF,) * 2
    driver.device.command(devmsg.RESUME)


@each_queue_that_is_served
@pytest.mark.parametrize("start", [0, START])
def test_same_head_fills_the_ring_15(driver: RingDriver, start: int) -> None:
    """Hostile input 15: a request that is offered many times is served exactly as many times."""
    size = driver.size_max
    driver.renew(start=start)
    parts = driver.adapter.request(0)
    driver.ring.describe(0, chained(parts))
    for _ in range(size):
        driver.ring.offer(0)
    driver.adapter.prompt(size)
    found = driver.device.collect(driver.ring, size, driver.queue)
    driver.pause_and_resume()
    assert found == [found[0]] * size
    assert found[0][0] == 0
    assert driver.ring.device_idx == start + size & 0xFFFF
    assert driver.works()


@each_queue_that_is_served
def test_vm_is_answered_while_the_driver_refills_its_ring_24_35(driver: RingDriver) -> None:
    """Hostile input 24, 35: a driver that always refills its ring does not keep the device from answering its VM."""
    ring = driver.renew()
    ring.describe(0, chained(driver.adapter.request(0)))
    over = threading.Event()
    rounds = [0]

    def refill() -> None:
        while not over.is_set():
            ring.set_avail_idx(ring.device_idx + ring.size)
            rounds[0] += 1

    filler = threading.Thread(target=refill)
    filler.start()
    try:
        driver.kick()
        for _ in range(10):
            driver.adapter.prompt(1)
            driver.device.export()
            driver.pause_and_resume()
    finally:
        over.set()
        filler.join()
    assert rounds[0] > 10
    driver.reset()
    assert driver.works()


@each_queue_that_yields_to_the_vm
def test_vm_waits_for_the_budget_of_one_notification_24_35(driver: RingDriver) -> None:
    """Hostile input 24, 35: the ring is full when the VM sends PAUSE.  Before the answer, one budget is served."""
    served = 0
    while not served:  # the device may read PAUSE before it serves a request
        ring = driver.renew()
        chain = longest(driver) if driver.adapter.counts_descriptors else driver.adapter.request(0)
        ring.describe(0, [driver.table(chain, LONG_TABLE)])
        with driver.device.held():
            for _ in range(ring.size):
                ring.offer(0)
            driver.kick()
            driver.device.sync.send(devmsg.TYPE.pack(devmsg.PAUSE))
        assert driver.device.sync.recv(devmsg.PACKET_MAX) == devmsg.STATUS.pack(devmsg.PAUSE, 0)
        served = driver.device.export()[driver.queue][0]
    assert served <= driver.adapter.budget
    driver.device.command(devmsg.RESUME)
    driver.wait_used(ring.size)


def fill(driver: RingDriver, adapter: Adapter, count: int) -> Ring:
    """Put the same request `count` times into the ring of an adapter's queue."""
    ring = driver.all_rings[adapter.queue]
    ring.describe(0, chained(adapter.request(0)))
    for _ in range(count):
        ring.offer(0)
    return ring


@each_receive_queue
def test_receive_queue_leaves_turns_to_the_transmit_queue_24(driver: RingDriver) -> None:
    """Hostile input 24: both queues have work.  After one budget the device finds that the transmit queue is broken."""
    budget = driver.adapter.budget
    driver.device.command(devmsg.PAUSE)
    ring = fill(driver, driver.adapter, driver.size_max)
    driver.all_rings[1].offer(driver.all_rings[1].size)
    driver.adapter.prompt(2 * budget)
    driver.device.command(devmsg.RESUME)
    driver.device.needs_reset()
    assert 0 < ring.device_idx <= budget
    assert driver.works()


@each_transmit_queue
def test_transmit_queue_leaves_turns_to_the_receive_queue_24(driver: RingDriver) -> None:
    """Hostile input 24: both queues have work.  The device receives frames between two budgets of frames to send."""
    assert isinstance(driver.adapter, FramesOut)
    frames = FramesIn(driver.device, driver.adapter.wire)
    frames.begin()
    driver.device.command(devmsg.PAUSE)
    ring = fill(driver, driver.adapter, driver.adapter.budget)
    ring.offer(ring.size)  # the first request of the second budget
    others = fill(driver, frames, driver.all_rings[0].size)
    frames.prompt(3 * frames.budget)
    driver.device.command(devmsg.RESUME)
    driver.device.needs_reset()
    assert ring.device_idx == driver.adapter.budget
    assert others.device_idx > frames.budget
    assert driver.works()


def longest(driver: RingDriver) -> list[Desc]:
    """Return the longest chain that a driver may make: empty buffers in front of those of a request."""
    parts = driver.adapter.request(0)
    most = min(driver.size_max, CHAIN_MAX)
    return [*[parts[0]._replace(length=0)] * (most - len(parts)), *parts]


@each_queue_that_is_served
def test_ring_full_of_long_chains_24(driver: RingDriver) -> None:
    """Hostile input 24: the ring has the longest valid chain, eight times."""
    ring = driver.ring
    ring.describe(0, [driver.table(longest(driver), LONG_TABLE)])
    for _ in range(8):
        ring.offer(0)
    driver.adapter.prompt(8)
    found = driver.device.collect(ring, 8, driver.queue)
    assert found == [found[0]] * 8
    assert driver.works()


@each_queue_of_a_process
def test_broken_rings_cost_no_memory_and_few_log_lines(driver: RingDriver) -> None:
    """A driver that breaks its ring often makes the process neither grow nor fill the log."""

    def break_rings(count: int) -> None:
        for _ in range(count):
            driver.ring.offer(driver.size_max)
            driver.kick()
            driver.device.needs_reset()
            driver.renew()

    break_rings(50)
    before = driver.device.own_kib()
    break_rings(200)
    assert driver.device.own_kib() < before + 512
    assert driver.device.read_log().count("\n") <= 6


# --- interrupts and notifications ------------------------------------------------------------------------------------


def offer(driver: RingDriver, count: int) -> None:
    """Offer requests and wait until they are served, without waiting for interrupts."""
    for number in range(count):
        driver.ring.add(driver.adapter.request(number))
    driver.kick()
    driver.adapter.prompt(count)
    driver.wait_used(driver.ring.avail_idx)
    driver.device.command(devmsg.PAUSE)  # the index is stored before the interrupt is raised
    driver.device.command(devmsg.RESUME)


@each_queue_that_is_served
@pytest.mark.parametrize("start", [0, START])
def test_interrupt_comes_when_the_event_index_is_passed_21(driver: RingDriver, start: int) -> None:
    """2.7.7.2: an interrupt comes when used_event is passed, and not before or after, until the driver moves it."""
    driver.renew(start=start)
    driver.ring.set_used_event(start + 9)
    for number in range(9):
        offer(driver, 1)
        assert driver.interrupts() == 0, number
    offer(driver, 1)
    assert driver.interrupts() == 1
    offer(driver, 3)
    assert driver.interrupts() == 0
    driver.ring.set_used_event(start + 13)
    offer(driver, 1)
    assert driver.interrupts() == 1


@each_queue_that_is_served
@pytest.mark.parametrize("event", [1, 255, 0x7FFF, 0x8000, 0xFFFF])
def test_absurd_event_index_21(driver: RingDriver, event: int) -> None:
    """Hostile input 21: requests are served, with or without an interrupt."""
    driver.ring.set_used_event(event)
    offer(driver, 8)
    assert len(driver.ring.reap()) == 8
    assert driver.works()


@each_queue_that_is_served
def test_driver_that_polls_gets_no_interrupts(driver: RingDriver) -> None:
    """2.7.7: VIRTQ_AVAIL_F_NO_INTERRUPT counts only if event indices were not negotiated."""
    driver.renew(MODERN)
    driver.ring.set_flags(spec.VIRTQ_AVAIL_F_NO_INTERRUPT)
    offer(driver, 8)
    assert driver.interrupts() == 0
    driver.ring.set_flags(0)
    offer(driver, 1)
    assert driver.interrupts() == 1

    driver.renew(MODERN | EVENT_IDX)
    driver.ring.set_flags(spec.VIRTQ_AVAIL_F_NO_INTERRUPT)
    offer(driver, 1)
    assert driver.interrupts() == 1


@each_queue_of_a_process
def test_interrupt_that_was_not_seen_is_raised_again(driver: RingDriver) -> None:
    """INTx: the counters show which interrupt the VM has not seen.  At the next resample it is raised again."""
    device, queue = driver.device, driver.queue
    raised = list(device.counters[: devmsg.QUEUES_MAX])
    for number, count in enumerate(raised):
        device.counters[devmsg.QUEUES_MAX + number] = count
    driver.serve(1)
    driver.pause_and_resume()
    after = list(device.counters[: devmsg.QUEUES_MAX])
    assert [number for number, count in enumerate(after) if count != raised[number]] == [queue]
    driver.interrupts()
    os.eventfd_write(device.resample, 1)
    device.wait_interrupt(queue)

    device.counters[devmsg.QUEUES_MAX + queue] = after[queue]
    os.eventfd_write(device.resample, 1)
    driver.pause_and_resume()
    driver.pause_and_resume()
    assert driver.interrupts() == 0


def wants_to_hear(ring: Ring, before: int, features: int) -> bool:
    """Return whether the device wants a notification of requests offered since an available index (2.7.10)."""
    full_fence()
    if features & EVENT_IDX:
        return (ring.avail_idx - ring.avail_event - 1 & 0xFFFF) < (ring.avail_idx - before & 0xFFFF)
    return not ring.memory.read(ring.used, 2)[0] & spec.VIRTQ_USED_F_NO_NOTIFY


@each_queue_that_is_served
@pytest.mark.parametrize("features", [MODERN | EVENT_IDX, MODERN], ids=["event-index", "flags"])
def test_no_wake_up_is_lost_21(driver: RingDriver, features: int) -> None:
    """Hostile input 21: a driver may notify and wait only when the specification requires it (2.7.7, 2.7.10).

    Each side stores its index, and then reads the index at which the other side wants an event.  Without a fence
    between the two, either side may read an old value.  Then both wait for each other, and this test fails.
    """
    ring = driver.renew(features)
    parts = driver.adapter.request(0)
    for slot in range(4):
        ring.describe(4 * slot, chained(parts, 4 * slot))
    offered = done = 0
    while done < 600:
        for _ in range(1 + done % 4):
            before = ring.avail_idx
            ring.offer(4 * (offered % 4))
            offered += 1
            if wants_to_hear(ring, before, features):
                driver.kick()
            driver.adapter.prompt(1)
        while done < offered:
            ring.set_used_event(ring.used_idx)
            full_fence()
            if not (found := ring.reap()):
                driver.device.wait_interrupt(driver.queue)
                found = ring.reap()
            done += len(found)
    assert done == offered


# --- reset, pause, adopted indices -----------------------------------------------------------------------------------


@each_queue_that_is_served
def test_reset_while_requests_are_served_34(driver: RingDriver) -> None:
    """Hostile input 34: after the answer to a reset the device does not write to the old ring any more."""
    for _ in range(20):
        ring = driver.renew()
        ring.describe(0, chained(driver.adapter.request(0)))
        for _ in range(ring.size):
            ring.offer(0)
        driver.kick()
        driver.adapter.prompt(4)
        driver.device.command(devmsg.RESET)
        before = driver.memory.read(RING_BASE, DATA - RING_BASE)
        driver.kick()
        driver.adapter.prompt(1)
        for _ in range(4):
            driver.device.export()
        assert driver.memory.read(RING_BASE, DATA - RING_BASE) == before
    assert driver.works()


@each_queue
def test_pause_leaves_requests_in_the_ring(driver: RingDriver) -> None:
    """A paused device takes no request from the ring.  After resume it serves all of them."""
    driver.device.command(devmsg.PAUSE)
    state = driver.device.export()
    heads = {driver.ring.add(driver.adapter.request(number)): number for number in range(5)}
    driver.kick()
    driver.adapter.prompt(5)
    for _ in range(4):
        assert driver.device.export() == state
    assert driver.ring.device_idx == 0

    driver.device.command(devmsg.RESUME)
    if driver.adapter.gives_back:
        driver.finish(heads)
    driver.pause_and_resume()
    assert driver.ring.device_idx == (5 if driver.adapter.gives_back else 0)
    assert driver.works()


@each_queue_that_is_served
def test_pause_while_requests_are_served(driver: RingDriver) -> None:
    """The device finishes all requests that it has taken before it answers, so both indices are equal."""
    ring = driver.ring
    ring.describe(0, chained(driver.adapter.request(0)))
    for _ in range(20):
        while ring.avail_idx - ring.device_idx & 0xFFFF < ring.size:
            ring.offer(0)
        driver.kick()
        driver.adapter.prompt(4)
        driver.device.command(devmsg.PAUSE)
        assert driver.device.export()[driver.queue] == (ring.device_idx, ring.device_idx)
        driver.device.command(devmsg.RESUME)
    assert driver.works()


@each_queue_that_is_served
def test_rings_that_are_activated_during_a_pause(driver: RingDriver) -> None:
    """They are served after resume.  A received machine activates its rings in this way."""
    driver.reset()
    driver.device.command(devmsg.PAUSE)
    rings = driver.rings()
    ring = driver.ring = rings[driver.queue]
    rows = [each.row() for each in rings]
    assert driver.device.activate_rows(ALL | driver.adapter.features, *rows) == 0
    heads = {ring.add(driver.adapter.request(number)): number for number in range(3)}
    driver.kick()
    driver.adapter.prompt(3)
    for _ in range(4):
        driver.device.export()
    assert ring.device_idx == 0

    driver.device.command(devmsg.RESUME)
    driver.finish(heads)
    assert driver.works()


@each_queue_that_is_served
def test_ring_continues_at_exported_indices(driver: RingDriver) -> None:
    """A device that is activated with exported indices continues with the next request."""
    driver.serve(5)
    driver.device.command(devmsg.PAUSE)
    indices = driver.device.export()
    assert indices[driver.queue] == (5, 5)
    ring = driver.ring
    driver.reset()
    heads = {ring.add(driver.adapter.request(number)): number for number in (7, 8)}
    rows = [each.row(True, *where) for each, where in zip(driver.all_rings, indices, strict=True)]
    assert driver.device.activate_rows(ALL | driver.adapter.features, *rows) == 0
    driver.adapter.prompt(2)
    driver.finish(heads)
    assert ring.device_idx == 7
