"""Queues on the device's side, with good and bad rings (hostile-input 1, 2, 11-14, 16-19, 21, 25)."""

import os
import struct
from collections.abc import Iterator

import pytest

from tests.support.fakedriver import (
    DATA,
    EVENT_IDX,
    EXTRA,
    INDIRECT,
    INDIRECT_DESC,
    LAYOUT,
    NEXT,
    RAM_END,
    ROM,
    WRITE,
    Desc,
    Ring,
    chained,
)
from vmd.errors import GuestError
from vmd.guestmem import GuestMemory
from vmd.virtio import spec
from vmd.virtio.queue import CHAIN_MAX, Queue

SIZE = 16
TABLE = DATA + 0x10000


FDS: list[int] = []  # descriptors of the memories of a test


@pytest.fixture(autouse=True)
def close_memories() -> Iterator[None]:
    """Close the memories of a test.  A mapping ends with its last user."""
    yield
    while FDS:
        os.close(FDS.pop())


def new_memory() -> GuestMemory:
    """Return memory that is closed after the test."""
    memory = GuestMemory.create(LAYOUT)
    FDS.append(memory.fd)
    return memory


class Pair:
    """A driver's ring, and the device's queue for it."""

    def __init__(self, features: int = INDIRECT_DESC, start: int = 0) -> None:
        self.memory = new_memory()
        self.ring = Ring(self.memory, SIZE)
        self.ring.avail_idx = start
        self.ring.set_avail_idx(start)
        ring = self.ring
        self.queue = Queue(self.memory, features, SIZE, ring.desc, ring.avail, ring.used, start, start)

    def walk(self, *parts: Desc) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Write descriptors unchanged.  Return the readable and writable parts of the chain from the first one."""
        self.ring.describe(0, parts)
        chain = self.queue.walk(0)
        return chain.readable, chain.writable


def make(size: int = SIZE, desc: int = 0x1000, avail: int = 0x2000, used: int = 0x3000) -> Queue:
    """Return a queue in new memory."""
    return Queue(new_memory(), 0, size, desc, avail, used)


def test_chain_is_followed_in_order() -> None:
    """The readable parts come first, then the writable ones."""
    parts = chained([Desc(DATA, 16), Desc(DATA + 64, 8), Desc(DATA + 128, 512, WRITE), Desc(DATA + 4096, 1, WRITE)])

    assert Pair().walk(*parts) == ([(DATA, 16), (DATA + 64, 8)], [(DATA + 128, 512), (DATA + 4096, 1)])


def test_indirect_chain_is_followed_after_direct_descriptors() -> None:
    """2.7.5.3.1: a chain may have direct descriptors before the indirect one."""
    pair = Pair()
    inside = chained([Desc(DATA + 1, 2, WRITE), Desc(DATA + 8, 3, WRITE)])
    pair.memory.write(TABLE, b"".join(struct.pack("<QIHH", *part) for part in inside))

    walked = pair.walk(Desc(DATA, 16, NEXT, 1), Desc(TABLE, 32, INDIRECT))

    assert walked == ([(DATA, 16)], [(DATA + 1, 2), (DATA + 8, 3)])


@pytest.mark.parametrize("size", [0, 3, 0xFFFF, 1 << 16])
def test_size_that_is_no_power_of_two_is_refused_1(size: int) -> None:
    """Hostile input 1: the size of a queue is a power of two, at most 32768."""
    with pytest.raises(GuestError, match="queue size"):
        make(size=size)


@pytest.mark.parametrize(
    ("desc", "avail", "used"),
    [
        (0x1008, 0x2000, 0x3000),
        (0x1000, 0x2001, 0x3000),
        (0x1000, 0x2000, 0x3002),
        (RAM_END - 16, 0x2000, 0x3000),
        (0x1000, RAM_END + (1 << 20), 0x3000),
        (0x1000, 0x2000, (1 << 64) - 4),
        ((1 << 64) - 16, 0x2000, 0x3000),
        (0x1000, 0x2000, ROM),
    ],
)
def test_ring_that_is_not_in_memory_is_refused_2_25(desc: int, avail: int, used: int) -> None:
    """Hostile input 2: a part is unaligned, in two regions, outside, or wraps; 25: the used ring is read-only."""
    with pytest.raises(GuestError):
        make(desc=desc, avail=avail, used=used)


def test_available_index_ahead_of_the_ring_is_refused_11() -> None:
    """Hostile input 11: more chains are available than the queue has entries."""
    pair = Pair()
    pair.ring.set_avail_idx(SIZE + 1)

    with pytest.raises(GuestError, match="17 ahead, in a queue of 16"):
        pair.queue.take()


def test_head_outside_the_table_is_refused_12() -> None:
    """Hostile input 12: the head is no index of the descriptor table."""
    pair = Pair()
    pair.ring.offer(SIZE)

    with pytest.raises(GuestError, match="descriptor 16 outside"):
        pair.queue.take()


LOOP = [Desc(DATA, 1, NEXT, (i + 1) % SIZE) for i in range(SIZE)]


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([Desc(DATA, 1, NEXT, SIZE)], id="13-next-outside"),
        pytest.param([Desc(DATA, 1, NEXT, 0xFFFF)], id="13-next-far-outside"),
        pytest.param([Desc(DATA, 1, NEXT, 0)], id="14-to-itself"),
        pytest.param([Desc(DATA, 1, NEXT, 1), Desc(DATA, 1, NEXT, 0)], id="14-loop"),
        pytest.param(LOOP, id="14-loop-of-all"),
        pytest.param([Desc(DATA, 0xFFFFFFFF, NEXT, 1), Desc(DATA, 2)], id="17-more-than-4-GiB"),
        pytest.param([Desc(DATA, 1, WRITE | NEXT, 1), Desc(DATA, 1)], id="18-order"),
        pytest.param([Desc(TABLE, 0, INDIRECT)], id="19-empty"),
        pytest.param([Desc(TABLE, 17, INDIRECT)], id="19-no-multiple-of-16"),
        pytest.param([Desc(TABLE, 16 * 32769, INDIRECT)], id="19-too-long"),
        pytest.param([Desc(RAM_END + (2 << 20), 16, INDIRECT)], id="19-outside"),
        pytest.param([Desc(EXTRA - 16, 32, INDIRECT)], id="19-in-two-regions"),
        pytest.param([Desc((1 << 64) - 16, 32, INDIRECT)], id="19-wrapping"),
        pytest.param([Desc(TABLE, 16, INDIRECT | NEXT, 1), Desc(DATA, 1)], id="19-and-next"),
    ],
)
def test_broken_chain_is_refused(parts: list[Desc]) -> None:
    """Hostile input 13, 14, 17, 18, 19: the id of each case begins with its number."""
    with pytest.raises(GuestError):
        Pair().walk(*parts)


@pytest.mark.parametrize("length", [0, 17, 16 * 32769])
def test_error_names_the_length_of_a_bad_indirect_table_19(length: int) -> None:
    """Hostile input 19: the table itself is wrong, not its content."""
    with pytest.raises(GuestError, match=f"table of {length} bytes"):
        Pair().walk(Desc(TABLE, length, INDIRECT))


def test_nested_indirect_table_is_refused_19() -> None:
    """Hostile input 19: an indirect table must not have indirect descriptors."""
    pair = Pair()
    pair.memory.write(TABLE, struct.pack("<QIHH", TABLE, 16, INDIRECT, 0))

    with pytest.raises(GuestError, match="indirect"):
        pair.walk(Desc(TABLE, 16, INDIRECT))


def test_indirect_descriptor_that_was_not_negotiated_is_refused_19() -> None:
    """Hostile input 19: the driver has not accepted INDIRECT_DESC."""
    with pytest.raises(GuestError, match="indirect"):
        Pair(features=0).walk(Desc(TABLE, 16, INDIRECT))


def test_long_indirect_chain_is_cut_off_24() -> None:
    """Hostile input 24: a table may be long, but the length of a chain has a limit."""
    pair = Pair()
    count = CHAIN_MAX + 1
    pair.memory.write(TABLE, b"".join(struct.pack("<QIHH", *p) for p in chained([Desc(DATA, 1)] * count)))

    with pytest.raises(GuestError, match="does not end"):
        pair.walk(Desc(TABLE, 16 * count, INDIRECT))


def test_indices_wrap_around() -> None:
    """In both rings 0 follows 65535."""
    pair = Pair(start=0xFFFE)
    heads = []
    for _ in range(4):
        pair.ring.add([Desc(DATA, 4, WRITE)])
        chain = pair.queue.take()
        assert chain is not None
        pair.queue.put(chain.head, 4)
        heads.append(chain.head)
    pair.queue.publish()

    assert heads == [0, 1, 2, 3]
    assert pair.ring.device_idx == 2
    assert pair.queue.take() is None


@pytest.mark.parametrize("start", [0, SIZE - 3, 0xFFFF])
def test_many_chains_are_taken_and_given_back_at_once(start: int) -> None:
    """This works across the ring's end and the wrap of the indices.  Nothing is used before the index is published."""
    pair = Pair(start=start)
    heads = [(7 * number) % SIZE for number in range(SIZE)]
    for head in heads:
        pair.ring.offer(head)

    pair.ring.used_idx = start
    assert pair.queue.heads(SIZE) == heads
    assert pair.queue.heads(3) == heads[:3]
    pair.queue.lay(heads)
    pair.queue.publish()
    assert pair.ring.reap() == []

    pair.queue.next_used = start + SIZE & 0xFFFF
    pair.queue.publish()
    assert pair.ring.reap() == [(head, 0) for head in heads]


def test_an_element_is_not_visible_before_it_is_published() -> None:
    """The driver does not see an element before the index includes it."""
    pair = Pair()
    pair.queue.put(3, 7)

    assert pair.ring.reap() == []
    pair.queue.publish()
    assert pair.ring.reap() == [(3, 7)]


def put(queue: Queue, count: int) -> bool:
    """Give some chains back.  Return whether the guest wants an interrupt."""
    for _ in range(count):
        queue.put(0, 0)
    queue.publish()
    return queue.wants_interrupt()


@pytest.mark.parametrize(
    ("start", "event", "count", "wanted"),
    [
        (0, 0, 1, True),
        (0, 1, 1, False),
        (0, 2, 3, True),
        (0, 0xFFFF, 1, False),
        (0xFFFF, 0xFFFF, 1, True),
        (0xFFFE, 0, 3, True),
        (0xFFFE, 1, 3, False),
        (5, 4, 4, False),
    ],
)
def test_interrupt_comes_when_the_event_index_is_passed_21(start: int, event: int, count: int, wanted: bool) -> None:
    """Hostile input 21: the event index is behind, equal, ahead, or on the other side of the wrap."""
    pair = Pair(EVENT_IDX, start)
    pair.ring.set_used_event(event)

    assert put(pair.queue, count) is wanted


def test_interrupt_is_left_out_when_the_driver_asks() -> None:
    """2.7.7: the flag counts only without event indices."""
    pair = Pair(0)
    pair.ring.set_flags(spec.VIRTQ_AVAIL_F_NO_INTERRUPT)

    assert not put(pair.queue, 1)
    pair.ring.set_flags(0)
    assert put(pair.queue, 1)
    assert not put(pair.queue, 0)


@pytest.mark.parametrize("features", [0, EVENT_IDX])
def test_an_empty_ring_gives_no_interrupt_to_other_drivers(features: int) -> None:
    """A driver that has not accepted NOTIFY_ON_EMPTY does not want it."""
    pair = Pair(features)
    pair.ring.set_flags(spec.VIRTQ_AVAIL_F_NO_INTERRUPT)
    pair.ring.set_used_event(9)
    pair.ring.add([Desc(DATA, 1, WRITE)])
    pair.queue.take()

    assert not put(pair.queue, 1)


def test_legacy_driver_gets_an_interrupt_for_an_empty_ring() -> None:
    """With NOTIFY_ON_EMPTY even a driver that has disabled interrupts gets one when all chains are used."""
    pair = Pair(1 << spec.VIRTIO_F_NOTIFY_ON_EMPTY)
    pair.ring.set_flags(spec.VIRTQ_AVAIL_F_NO_INTERRUPT)
    for _ in range(2):
        pair.ring.add([Desc(DATA, 1, WRITE)])

    told = []
    for _ in range(2):
        pair.queue.take()
        told.append(put(pair.queue, 1))

    assert told == [False, True]


def test_rearming_finds_chains_that_came_in_between() -> None:
    """It also sets the index from which on the driver must notify."""
    pair = Pair(EVENT_IDX)
    assert not pair.queue.rearm()
    pair.ring.add([Desc(DATA, 1, WRITE)])
    assert pair.queue.rearm()
    pair.queue.take()
    assert not pair.queue.rearm()
    assert pair.ring.avail_event == 1


def marked(pair: Pair) -> set[int]:
    """Return the marked pages, and clear the marks."""
    marks = pair.memory.marks
    found = {page for page, mark in enumerate(marks) if mark}
    marks[:] = bytes(len(marks))
    return found


def test_used_buffers_are_marked_before_they_are_published() -> None:
    """The writable parts of each chain since the last time are marked, also when the index wraps."""
    pair = Pair(start=0xFFFE)
    queue, memory = pair.queue, pair.memory
    for number in range(4):
        parts = [Desc(DATA, 16), Desc(DATA + (number + 1) * 8192, 4097, WRITE)]
        pair.ring.describe(2 * number, chained(parts, 2 * number))
    queue.put(0, 4097)
    queue.publish()
    assert marked(pair) == set()  # marking is off

    memory.marking = True
    queue.put(2, 4097)
    queue.put(4, 1)
    queue.put(6, 0)  # nothing was written, although the chain has room
    before = memory.read(pair.ring.used + 2, 2)
    queue.publish()
    first = DATA // 4096
    assert marked(pair) == {first + 4, first + 5, first + 6, first + 7}
    assert (before, memory.read(pair.ring.used + 2, 2)) == (b"\xff\xff", b"\x02\x00")
    queue.publish()
    assert marked(pair) == set()
    queue.mark_used()
    assert marked(pair) == {memory.offset(pair.ring.used, 1) // 4096}


@pytest.mark.parametrize("size", [1, 512, 4096, 1 << 15])
def test_the_whole_used_ring_is_marked(size: int) -> None:
    """It takes 6 bytes and 8 for each element, up to the event index, and no page more."""
    memory = new_memory()
    ring = Ring(memory, size)
    queue = Queue(memory, 0, size, ring.desc, ring.avail, ring.used)
    memory.marking = True
    queue.mark_used()
    first, end = memory.offset(ring.used, 1), memory.offset(ring.used, 1) + 6 + 8 * size
    found = {page for page, mark in enumerate(memory.marks) if mark}
    assert found == set(range(first // 4096, -(-end // 4096)))


@pytest.mark.parametrize("element", [0xFFFF_FFFF_FFFF_FFFF, 1 << 32 | SIZE, 1 << 32 | 1])
def test_a_driver_that_changes_used_elements_harms_only_itself(element: int) -> None:
    """After it has changed an element, all elements are published, and the next chain is marked."""
    pair = Pair()
    queue, memory = pair.queue, pair.memory
    memory.marking = True
    pair.ring.describe(0, [Desc(DATA, 8, WRITE), Desc(DATA, 8, NEXT, 1), Desc(DATA + 8192, 8, WRITE)])
    queue.put(0, 8)
    queue.used_ring[0] = element
    queue.put(2, 8)
    queue.publish()
    assert memory.read(pair.ring.used + 2, 2) == b"\x02\x00"
    assert marked(pair) == {(DATA + 8192) // 4096}


# --- limits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 256, 1 << 15])
def test_every_size_up_to_the_largest_is_served(size: int) -> None:
    """The first and the last entry of each part are used (2.7)."""
    memory = new_memory()
    ring = Ring(memory, size)
    queue = Queue(memory, 0, size, ring.desc, ring.avail, ring.used)
    heads = [*range(size - 1, -1, -1)]
    for head in heads:
        ring.describe(head, [Desc(DATA + head, 1)])
        ring.offer(head)

    assert queue.available() == size
    for head in heads:
        chain = queue.take()
        assert chain is not None
        assert (chain.head, chain.readable) == (head, [(DATA + head, 1)])
        queue.put(head, 0)
    queue.publish()
    assert ring.reap() == [(head, 0) for head in heads]


@pytest.mark.parametrize(
    ("desc", "avail", "used", "good"),
    [
        (RAM_END - 16 * SIZE, 0x2000, 0x3000, True),
        (RAM_END - 16 * SIZE + 16, 0x2000, 0x3000, False),
        (0x1000, RAM_END - 6 - 2 * SIZE, 0x3000, True),
        (0x1000, RAM_END - 6 - 2 * SIZE + 2, 0x3000, False),
        (0x1000, 0x2000, RAM_END - 8 - 8 * SIZE, True),
        (0x1000, 0x2000, RAM_END - 8 - 8 * SIZE + 4, False),
    ],
)
def test_a_part_may_end_where_memory_ends(desc: int, avail: int, used: int, good: bool) -> None:
    """The part ends with the event index, its last field, and not one byte later."""
    if good:
        make(desc=desc, avail=avail, used=used)
    else:
        with pytest.raises(GuestError):
            make(desc=desc, avail=avail, used=used)


def test_a_part_may_begin_where_memory_begins() -> None:
    """Address 0 is a usual address."""
    assert make(desc=0).desc == 0


def test_a_chain_may_have_every_descriptor_of_its_table() -> None:
    """A direct chain may be as long as the queue, and an indirect one as long as CHAIN_MAX."""
    direct, indirect = Pair(), Pair()
    parts = chained([Desc(DATA, 1)] * SIZE)
    assert direct.walk(*parts) == ([(DATA, 1)] * SIZE, [])

    table = b"".join(struct.pack("<QIHH", *part) for part in chained([Desc(DATA, 1)] * CHAIN_MAX))
    indirect.memory.write(TABLE, table)
    assert indirect.walk(Desc(TABLE, 16 * 32768, INDIRECT)) == ([(DATA, 1)] * CHAIN_MAX, [])


def test_a_chain_may_not_have_more_descriptors_than_its_indirect_table() -> None:
    """That holds even if the queue is longer."""
    pair = Pair()
    pair.memory.write(TABLE, struct.pack("<QIHH", DATA, 1, NEXT, 0) * 2)

    with pytest.raises(GuestError, match="does not end"):
        pair.walk(Desc(TABLE, 32, INDIRECT))


def test_a_chain_may_describe_4_gib() -> None:
    """2.7.5.2: the limit is 4 GiB.  Another test has one byte more."""
    assert Pair().walk(*chained([Desc(DATA, 0xFFFFFFFF), Desc(DATA, 1)])) == ([(DATA, 0xFFFFFFFF), (DATA, 1)], [])


# --- notifications -------------------------------------------------------------------------------------------


def test_notifications_are_disabled_while_a_ring_is_served() -> None:
    """Without event indices the flag disables them, and `rearm` clears it (2.7.10)."""
    pair = Pair(0)
    flags = pair.ring.used
    pair.queue.suppress()
    assert pair.memory.read(flags, 2) == struct.pack("<H", spec.VIRTQ_USED_F_NO_NOTIFY)
    pair.ring.add([Desc(DATA, 1, WRITE)])

    assert pair.queue.rearm()
    assert pair.memory.read(flags, 2) == b"\0\0"
    assert pair.queue.rearm()

    events = Pair(EVENT_IDX)
    events.queue.suppress()
    assert events.memory.read(events.ring.used, 2) == b"\0\0"


@pytest.mark.parametrize("features", [0, EVENT_IDX])
def test_too_few_chains_do_not_count_as_new(features: int) -> None:
    """A device that waits for more chains than are available is notified of the next one."""
    pair = Pair(features, start=0xFFFF)
    for _ in range(2):
        pair.ring.add([Desc(DATA, 1, WRITE)])

    assert pair.queue.rearm(1)
    assert not pair.queue.rearm(2)
    if features:
        assert pair.ring.avail_event == 1
    pair.ring.add([Desc(DATA, 1, WRITE)])
    assert pair.queue.rearm(2)


def test_a_ring_with_waiting_chains_is_not_empty() -> None:
    """With NOTIFY_ON_EMPTY, chains that were offered and not taken yet count."""
    pair = Pair(1 << spec.VIRTIO_F_NOTIFY_ON_EMPTY)
    pair.ring.set_flags(spec.VIRTQ_AVAIL_F_NO_INTERRUPT)
    for _ in range(2):
        pair.ring.add([Desc(DATA, 1, WRITE)])
    pair.queue.take()

    assert not put(pair.queue, 1)


def test_a_ring_continues_where_another_device_stopped() -> None:
    """All its elements are published, and the guest was interrupted for them."""
    pair = Pair(EVENT_IDX)
    pair.ring.set_used_event(0)
    pair.memory.load(pair.ring.used + 2, struct.pack("<H", 7))

    pair.queue.go_on_at(9)

    assert pair.queue.visible == 7
    assert (pair.queue.next_avail, pair.queue.next_used, pair.queue.published) == (9, 7, 7)
    assert not pair.queue.wants_interrupt()
