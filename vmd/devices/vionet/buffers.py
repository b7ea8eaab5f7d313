"""Buffers of the receive queue: descriptor chains that are read from the ring ahead of their use.

Until a frame is written to them, the chains stay available in the ring.  So the device can forget them at any time, to
stop, or to read them again in the other way.  There are two ways.  `Run` is for chains of one buffer each, often
adjacent in memory, as drivers offer them that can merge buffers.  `Chains` is for all others.
"""

from _operator import add, sub
from itertools import accumulate
from struct import pack

from vmd.errors import GuestError
from vmd.units import IOV_MAX
from vmd.virtio import spec
from vmd.virtio.queue import CHAIN_BYTES_MAX, DESC, U16

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmd.virtio.queue import Queue

    # head, views of its buffers followed by the spill, bytes of its buffers
    Buffers = tuple[int, list[memoryview], int]

RUN = 256  # chains of a run that are read ahead at most
STOCK = 64  # the same for `Chains`, which cost more

NEXT, WRITE, INDIRECT = spec.VIRTQ_DESC_F_NEXT, spec.VIRTQ_DESC_F_WRITE, spec.VIRTQ_DESC_F_INDIRECT


class Columns:
    """A queue's memory as columns: one field of all descriptors, or of all elements of the used ring."""

    def __init__(self, queue: "Queue") -> None:
        self.gpas = queue.table.cast("Q")[::2]
        self.lengths = queue.table.cast("I")[2::4]
        self.flags = queue.table.cast("H")[6::8]
        words = queue.used_ring.cast("B").cast("I")
        self.used_heads, self.used_lengths = words[::2], words[1::2]


class Run:
    """Chains of one buffer each, read ahead.  Their buffers form a stream of bytes.

        base      ends[0]   ends[1]   ends[2]       places in the stream
        |   chain    |   chain    |   chain    |
        |  a piece of memory      |  another   |
                            stops[0]     stops[1]

    A byte at a place of the stream, within piece N, is in memory at place + shifts[N].  The elements of all these
    chains are in the used ring already, as if their buffers were full; the driver reads them only after the used index
    has moved.
    """

    def __init__(self) -> None:
        self.base = 0
        self.ends: list[int] = []
        self.stops: list[int] = []
        self.shifts: list[int] = []
        self.queue: Queue | None = None  # the queue that `columns` belongs to
        self.columns: Columns | None = None

    def begin(self) -> None:
        """Forget the queue and all chains."""
        self.forget()
        self.queue = self.columns = None

    def forget(self) -> None:
        """Forget all chains."""
        self.base = 0
        for known in (self.ends, self.stops, self.shifts):
            known.clear()

    def use(self, count: int, piece: int) -> None:
        """Remove the first `count` chains, which are used.  The stream goes on in piece number `piece`."""
        if count == len(self.ends):
            self.forget()
        elif count:
            self.base = self.ends[count - 1]
            del self.ends[:count], self.stops[:piece], self.shifts[:piece]

    def _columns(self, queue: "Queue") -> Columns:
        if self.queue is not queue or self.columns is None:
            self.queue, self.columns = queue, Columns(queue)
        return self.columns

    def used_lengths(self, queue: "Queue") -> memoryview:
        """Return the column of lengths in the used ring.  A frame's last chain is not full: its length is corrected."""
        return self._columns(queue).used_lengths

    def stock(self, queue: "Queue", least: int) -> bool:
        """Read available chains ahead.

        Returns False, and reads none, if one of them is not a single writable buffer of at least `least` bytes.
        """
        known = len(self.ends)
        waiting = min(queue.available(), RUN) - known
        if waiting <= 0:
            return True
        columns = self._columns(queue)
        heads = queue.heads(waiting, known)
        try:
            flags = pick(columns.flags, heads)
            lengths = pick(columns.lengths, heads)
            gpas = pick(columns.gpas, heads)
        except IndexError:  # a head outside the table
            return False
        if flags.count(WRITE) != waiting or min(lengths) < least:
            return False
        begin = self.ends[-1] if known else self.base
        if not self._find(queue, begin, gpas, list(map(add, gpas, lengths))):
            return False
        slot = queue.next_used + known & queue.mask
        store(columns.used_heads, slot, heads)
        store(columns.used_lengths, slot, lengths)
        lengths[0] += begin
        self.ends += accumulate(lengths)
        return True

    def _find(self, queue: "Queue", place: int, begins: list[int], ends: list[int]) -> bool:
        """Add the pieces of memory of buffers, which follow `place` of the stream.

        Returns False if a buffer is not in writable memory.
        """
        if begins[1:] == ends[:-1]:
            begins, ends = begins[:1], ends[-1:]
        else:
            cuts = [at for at, (begin, end) in enumerate(zip(begins[1:], ends, strict=False), 1) if begin != end]
            begins = begins[:1] + [begins[at] for at in cuts]
            ends = [ends[at - 1] for at in cuts] + ends[-1:]
        deltas = find(queue.memory.ranges, [min(begins)], [max(ends)]) * len(ends)
        if not deltas:
            deltas = find(queue.memory.ranges, begins, ends)
        if len(deltas) != len(ends):
            return False
        stops = list(accumulate(map(sub, ends, begins), initial=place))[1:]
        self.shifts += [end + delta - stop for end, delta, stop in zip(ends, deltas, stops, strict=True)]
        self.stops += stops
        return True


class Chains:
    """Chains of any form, read ahead.  The first `at` of `known` are used."""

    def __init__(self, spill: memoryview) -> None:
        """`spill` receives the rest of a frame that does not fit its chain."""
        self.spill = spill
        self.known: list[Buffers] = []
        self.at = 0

    def forget(self) -> None:
        """Forget all chains."""
        self.known, self.at = [], 0

    @property
    def left(self) -> int:
        """Return the number of chains that are not used."""
        return len(self.known) - self.at

    @property
    def are_simple(self) -> bool:
        """Return whether each unused chain has one buffer.  If not, it would cost much to read them again as a run."""
        return all(len(views) == 2 for _, views, _ in self.known[self.at :])

    def stock(self, queue: "Queue", most: int, least: int) -> bool:
        """Read available chains ahead, up to `most` in all; return whether there are any.

        The loop takes chains as drivers make them, with each buffer in one region of memory.  `Queue.walk` takes the
        others.

        Raises:
            GuestError: a chain is broken, or has room for less than `least` bytes.
        """
        del self.known[: self.at]
        self.at = 0
        known = self.known
        waiting = min(queue.available(), most) - len(known)
        if waiting <= 0:
            return bool(known)
        memory = queue.memory
        raw, ranges = memory.memory, memory.ranges
        table, ring, mask, table_size = queue.desc, queue.avail + 4, queue.mask, queue.size
        indirect, spill = queue.indirect, self.spill
        descriptor, word = DESC.unpack_from, U16.unpack_from
        position = queue.next_avail + len(known)
        for _ in range(waiting):
            head = word(raw, ring + 2 * (position & mask))[0]
            position += 1
            base, size, following = table, table_size, head
            views: list[memoryview] = []
            room = 0
            usual = nested = False
            steps = IOV_MAX - 1
            while following < size and steps:  # `break` ends it after the last buffer, or if the form is not usual
                steps -= 1
                gpa, length, flags, following = descriptor(raw, base + 16 * following)
                if flags == INDIRECT and indirect and not nested and not views:
                    nested = True
                    if not length or length & 15 or length > 16 * IOV_MAX:
                        break
                    for start, end, offset, _ in ranges:
                        if start <= gpa and gpa + length <= end:
                            base, size, following = offset + gpa - start, length >> 4, 0
                            break
                    else:
                        break
                    continue
                if not flags & WRITE or not length:
                    break
                for start, end, offset, writable in ranges:
                    if start <= gpa and gpa + length <= end and writable:
                        gpa += offset - start
                        views.append(raw[gpa : gpa + length])
                        break
                else:
                    break
                room += length
                if flags != WRITE | NEXT:
                    usual = flags == WRITE
                    break
            if not usual or room > CHAIN_BYTES_MAX:
                views, room = gather(queue, head)
            if room < least:
                raise GuestError(f"receive buffer of {room} bytes, too small for any frame")
            views.append(spill)
            known.append((head, views, room))
        return True

    def together(self, room_max: int) -> "tuple[list[memoryview], int]":
        """Return views of the next chains, with the spill behind them, and the room of the chains in bytes.

        Takes chains until they have room for `room_max` bytes, or until no more fit into one read.
        """
        views: list[memoryview] = []
        room = 0
        for _, buffers, capacity in self.known[self.at :]:
            if len(views) + len(buffers) > IOV_MAX:
                break
            views += buffers[:-1]
            room += capacity
            if room >= room_max:
                break
        views.append(self.spill)
        return views, room

    def put(self, queue: "Queue", length: int) -> int:
        """Give back the chains that hold a frame of `length` bytes; return their number."""
        used = 0
        for head, _, capacity in self.known[self.at :]:
            queue.put(head, min(length, capacity))
            used += 1
            length -= capacity
            if length <= 0:
                break
        queue.next_avail = queue.next_avail + used & 0xFFFF
        self.at += used
        return used


def find(
    ranges: "Sequence[tuple[int, int, int, bool]]", begins: "Sequence[int]", ends: "Sequence[int]"
) -> list[int]:
    """Return for each buffer (offset in memory - gpa).  Stops before a buffer that is not in writable memory."""
    deltas = []
    for begin, end in zip(begins, ends, strict=True):
        for start, stop, offset, writable in ranges:
            if start <= begin and end <= stop and writable:
                deltas.append(offset - start)
                break
        else:
            break
    return deltas


def store(ring: memoryview, first: int, values: list[int]) -> None:
    """Store words into a ring from place `first` on, continued at the ring's beginning."""
    words = memoryview(pack(f"{len(values)}I", *values)).cast("I")
    behind = min(len(values), len(ring) - first)
    ring[first : first + behind] = words[:behind]
    if behind < len(values):
        ring[: len(values) - behind] = words[behind:]


def pick(column: memoryview, rows: list[int]) -> list[int]:
    """Return the values of `rows` of a column.  Raises IndexError."""
    source = column.tolist() if 4 * len(rows) > len(column) else column  # for many rows, copying all of it is faster
    return [source[row] for row in rows]


def gather(queue: "Queue", head: int) -> "tuple[list[memoryview], int]":
    """Return views of a chain of any form, read the slow way, and its room in bytes.

    A chain has no more views than one read can use.  Raises GuestError.
    """
    chain = queue.walk(head)
    if chain.readable:
        raise GuestError("receive buffer with a readable descriptor")
    views = [
        window for gpa, length in chain.writable if length for window in queue.memory.slices(gpa, length, write=True)
    ][: IOV_MAX - 1]
    return views, sum(map(len, views))
