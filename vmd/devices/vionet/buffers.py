"""Buffers for frames that arrive: chains of the receive queue, looked at some time before they are used.

As long as none of their bytes is a frame's, they still count as available.  So to stop, or to look at them in the
other of two ways, is to forget them.  What drivers offer whose buffers can be merged, chains of one buffer each, often
side by side in memory, is a `Run`; everything else is `Chains`.
"""

from _operator import add, sub
from itertools import accumulate
from struct import pack

from vmd.errors import GuestError
from vmd.virtio import spec
from vmd.virtio.queue import CHAIN_BYTES_MAX, DESC, U16

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmd.virtio.queue import Queue

    # head, windows on its buffers with the spill behind them, bytes in the former
    Buffers = tuple[int, list[memoryview], int]

RUN = 256  # chains of a run that are looked at ahead of their use
STOCK = 64  # ... of others, which are dearer
IOV_MAX = 1024

NEXT, WRITE, INDIRECT = spec.VIRTQ_DESC_F_NEXT, spec.VIRTQ_DESC_F_WRITE, spec.VIRTQ_DESC_F_INDIRECT


class Columns:
    """A queue's memory as columns: one kind of number of each descriptor, or of each element of a ring."""

    def __init__(self, queue: "Queue") -> None:
        self.gpas = queue.table.cast("Q")[::2]
        self.lengths = queue.table.cast("I")[2::4]
        self.flags = queue.table.cast("H")[6::8]
        words = queue.used_ring.cast("B").cast("I")
        self.used_heads, self.used_lengths = words[::2], words[1::2]


class Run:
    """Chains of one buffer each that were looked at: what they hold together is a stream of bytes, cut into buffers.

        base      ends[0]   ends[1]   ends[2]       places in the stream
        |   chain    |   chain    |   chain    |
        |  a piece of memory      |  another   |
                            stops[0]     stops[1]

    What is at a place of the stream, in piece N, is in memory at that place + shifts[N].  The elements of all of them
    are in the used ring already, as if they were full: nobody looks at them before the index says so.
    """

    def __init__(self) -> None:
        self.base = 0
        self.ends: list[int] = []
        self.stops: list[int] = []
        self.shifts: list[int] = []
        self.queue: Queue | None = None  # that `columns` is of
        self.columns: Columns | None = None

    def begin(self) -> None:
        """Know of no queue."""
        self.forget()
        self.queue = self.columns = None

    def forget(self) -> None:
        """Know of no chains."""
        self.base = 0
        for known in (self.ends, self.stops, self.shifts):
            known.clear()

    def use(self, count: int, piece: int) -> None:
        """Drop the first chains; the stream goes on in a piece, of which others before it may have been used."""
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
        """Return the used ring's lengths: that of a frame's last chain, which it does not fill, is to be corrected."""
        return self._columns(queue).used_lengths

    def stock(self, queue: "Queue", least: int) -> bool:
        """Look at waiting chains ahead; False if not all of them are such, of so many bytes at least."""
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
        except IndexError:  # of a head outside the table
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
        """Find the memory of buffers, which go on at a place of the stream; False if some have none to write to."""
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
    """Chains of any form that were looked at, of which those in front of `at` are used."""

    def __init__(self, spill: memoryview) -> None:
        """`spill` takes what does not fit a chain."""
        self.spill = spill
        self.known: list[Buffers] = []
        self.at = 0

    def forget(self) -> None:
        """Know of no chains."""
        self.known, self.at = [], 0

    @property
    def left(self) -> int:
        """Return how many are not used."""
        return len(self.known) - self.at

    @property
    def are_simple(self) -> bool:
        """Return whether those that are left have one buffer each; else it costs much to look at them again."""
        return all(len(views) == 2 for _, views, _ in self.known[self.at :])

    def stock(self, queue: "Queue", most: int, least: int) -> bool:
        """Look at waiting chains, up to `most` ahead; return whether there are any.

        It takes buffers as drivers lay them out, each in one region of memory; anything else is left to `Queue.walk`.

        Raises:
            GuestError: a chain is broken, or has less room than `least` bytes.
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
            while following < size and steps:  # `break` is for the last one, and for what is not of the usual form
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
        """Return windows on so many chains that they hold `room_max` bytes, if there are so many; and their bytes."""
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
        """Give back so many chains as hold a frame that was written into them; return their number."""
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
    """Return the ways from addresses of the guest to places in its memory, up to a range that may not be written to."""
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
    """Store into a ring of words from a place on; it may go on at the ring's beginning."""
    words = memoryview(pack(f"{len(values)}I", *values)).cast("I")
    behind = min(len(values), len(ring) - first)
    ring[first : first + behind] = words[:behind]
    if behind < len(values):
        ring[: len(values) - behind] = words[behind:]


def pick(column: memoryview, rows: list[int]) -> list[int]:
    """Return some rows of a column.  Raises IndexError."""
    source = column.tolist() if 4 * len(rows) > len(column) else column  # which is read faster as a whole
    return [source[row] for row in rows]


def gather(queue: "Queue", head: int) -> "tuple[list[memoryview], int]":
    """Look at a chain of any form, the obvious way; it has all the room that one read can use.  Raises GuestError."""
    chain = queue.walk(head)
    if chain.readable:
        raise GuestError("receive buffer with a part for reading")
    views = [
        window for gpa, length in chain.writable if length for window in queue.memory.slices(gpa, length, write=True)
    ][: IOV_MAX - 1]
    return views, sum(map(len, views))
