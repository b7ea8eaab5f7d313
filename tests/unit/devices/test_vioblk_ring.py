"""The hot loop of vioblk does what the slow walk does, on any ring."""

import os
import random
import struct
from collections.abc import Callable, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fakedriver import DATA, EVENT_IDX, EXTRA, INDIRECT, INDIRECT_DESC, LAYOUT, NEXT, ROM, WRITE, Ring
from vmd.devices.vioblk.device import Vioblk, Workers
from vmd.devices.vioblk.request import Limits, carry_out, parse
from vmd.errors import GuestError
from vmd.guestmem import GuestMemory
from vmd.virtio import spec
from vmd.virtio.queue import Queue

# (gpa or the next free place, length, flags, next or the following) each; type, sector, in a table of its own
Requests = list[tuple[list[tuple[int | None, int, int, int | None]], int, int, bool]]

SIZE = 16
DISK = 64 * 512
FEATURES = INDIRECT_DESC | EVENT_IDX | 1 << spec.VIRTIO_BLK_F_DISCARD | 1 << spec.VIRTIO_BLK_F_FLUSH
HEADERS = DATA - 0x8000
TABLES = DATA - 0x4000


class MemoryDisk:
    """A disk in memory."""

    def __init__(self, writable: bool) -> None:
        self.path = "disk"
        self.size = DISK
        self.writable = writable
        self.bytes = bytearray(random.Random(2).randbytes(DISK))

    def preadv(self, offset: int, views: Sequence[memoryview]) -> None:
        """Read."""
        for view in views:
            view[:] = self.bytes[offset : offset + len(view)]
            offset += len(view)

    def pwritev(self, offset: int, views: Sequence[memoryview]) -> None:
        """Write."""
        for view in views:
            self.bytes[offset : offset + len(view)] = view
            offset += len(view)

    def flush(self) -> None:
        """Nothing is behind it."""

    def discard(self, offset: int, length: int) -> None:
        """Be seen."""
        self.bytes[offset : offset + length] = b"\xdd" * length

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Be seen."""
        self.bytes[offset : offset + length] = bytes((unmap,)) * length

    def span(self, offset: int) -> tuple[bool, int]:
        """Data everywhere."""
        return True, DISK - offset

    def close(self) -> None:
        """Nothing is held."""


class Now(Workers):
    """Workers that are done when they are asked."""

    def __init__(self) -> None:
        self.done = os.eventfd(0, os.EFD_NONBLOCK)

    def submit(self, job: Callable[[], None]) -> None:
        """Do it."""
        job()
        os.eventfd_write(self.done, 1)


class Services:
    """A process that counts interrupts."""

    def __init__(self) -> None:
        self.interrupts = 0

    def interrupt(self, queue: int) -> None:
        """Count."""
        self.interrupts += 1

    def watch(self, fd: int, handler: Callable[[], None]) -> None:
        """Nothing is waited for."""

    def serve(self, number: int) -> None:
        """Nothing stays behind."""


# Mostly what drivers do, and from everything else something.
GPAS = st.sampled_from([None] * 8 + [0, EXTRA - 5, EXTRA + (1 << 20) - 1, ROM, 1 << 40, (1 << 64) - 1])
LENGTHS = st.sampled_from([512, 512, 512, 1024, 1, 1, 16, 16, 0, 3, 509, 4096, 0xFFFFFFFF])
FLAGS = st.sampled_from([NEXT, NEXT | WRITE, NEXT | WRITE, WRITE, WRITE, 0, INDIRECT, INDIRECT | NEXT, 8 | NEXT])
DESCRIPTORS = st.tuples(GPAS, LENGTHS, FLAGS, st.sampled_from([None] * 9 + [0, 3, SIZE - 1, SIZE, 0xFFFF]))
KINDS = st.sampled_from([0, 0, 0, 1, 1, 1, 4, 8, 11, 13, 2, 99])
SECTORS = st.sampled_from([0, 1, 7, 60, 62, 63, 64, 65, 1 << 55, (1 << 64) - 1])
USUAL = st.builds(
    lambda kind, lengths: [
        (None, 16, NEXT, None),
        *[(None, length, NEXT | (0 if kind else WRITE), None) for length in lengths],
        (None, 1, WRITE, None),
    ],
    st.sampled_from([0, 1]),
    st.lists(st.sampled_from([512, 1024, 500, 12]), max_size=4),
)
CHAINS = st.one_of(USUAL, USUAL, st.lists(DESCRIPTORS, min_size=1, max_size=7))
REQUESTS = st.tuples(CHAINS, KINDS, SECTORS, st.booleans())


def build(memory: GuestMemory, requests: Requests) -> Ring:
    """Lay requests out; no two descriptors share memory, except where they are wrong."""
    ring = Ring(memory, SIZE)
    at, place = 0, DATA
    memory.load(DATA, random.Random(3).randbytes(256 * 1024))
    for number, (parts, kind, sector, indirect) in enumerate(requests):
        header = HEADERS + 64 * number
        memory.load(header, struct.pack("<IIQ", kind, 0, sector) + struct.pack("<QII", sector, 3, number & 1))
        first = 0 if indirect else at
        rows = b""
        for position, (gpa, length, flags, following) in enumerate(parts):
            where = gpa if gpa is not None else header if position == 0 else place
            place += 4096
            rows += struct.pack("<QIHH", where, length, flags, first + position + 1 if following is None else following)
        if indirect:
            memory.load(TABLES + 256 * number, rows)
            rows = struct.pack("<QIHH", TABLES + 256 * number, len(rows), INDIRECT, 0)
        if at + len(rows) // 16 > SIZE:
            break
        memory.load(ring.desc + 16 * at, rows)
        ring.offer(at)
        at += len(rows) // 16
    return ring


def queue_of(memory: GuestMemory, ring: Ring) -> Queue:
    """Return the device's side."""
    return Queue(memory, FEATURES, SIZE, ring.desc, ring.avail, ring.used)


def reference(queue: Queue, disk: MemoryDisk) -> str:
    """Serve all requests the obvious way; return what stopped it."""
    try:
        while (chain := queue.take()) is not None:
            request = parse(chain, queue.memory, Limits(disk.size, writable=disk.writable, discard=True))
            status, written = carry_out(request, disk, b"vioblk0".ljust(20, b"\0"))
            queue.memory.memory[request.status] = status
            queue.put(chain.head, written)
    except GuestError as error:
        return str(error)
    finally:
        queue.publish()
    return ""


def hot(queue: Queue, disk: MemoryDisk) -> tuple[str, int]:
    """Serve all requests as the device does; return what stopped it, and the interrupts."""
    services = Services()
    device = Vioblk(disk, services, Now())
    device.activate(FEATURES, [queue])
    error = ""
    try:
        while device.on_notify(0):
            pass
    except GuestError as stopped:
        error = str(stopped)
    device.on_done()
    os.close(device.workers.done)
    return error, services.interrupts


@settings(max_examples=300, deadline=None)
@given(st.lists(REQUESTS, min_size=1, max_size=8), st.booleans())
def test_hot_loop_does_what_the_walk_does(
    requests: Requests, writable: bool
) -> None:
    """The same memory, disk, used elements and sentence; only the order of completion is free."""
    outcomes = []
    for fast in (False, True):
        disk = MemoryDisk(writable)
        with GuestMemory.create(LAYOUT) as memory:
            ring = build(memory, requests)
            queue = queue_of(memory, ring)
            error = hot(queue, disk)[0] if fast else reference(queue, disk)
            used = sorted(ring.reap())
            guest = memory.read(HEADERS, DATA + 256 * 1024 - HEADERS) + memory.read(EXTRA - 4096, 8192)
            # Of a broken ring, how far it was read does not matter: only a reset follows.
            outcomes.append((error, used, error or queue.next_avail, bytes(disk.bytes), guest))
            for view in (queue.used_ring, queue._used_idx, queue._avail_event):
                view.release()
            del queue
    assert outcomes[0] == outcomes[1]
