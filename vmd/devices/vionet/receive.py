"""From the tap, and from our own answers, to the guest: the receive queue (virtio 1.2, 5.1.6.3-4).

Chains are looked at some time before they are used; as long as none of their bytes is a frame's, they still count as
available, so that to stop, or to look at them in the other of two ways, is to forget them.  What drivers offer whose
buffers can be merged, chains of one buffer each, often side by side in memory, is a `Run`; everything else is a list
of chains (`Receiver.chains`).

Frames go from the kernel straight into the guest's buffers.  Behind these stands one buffer of ours, `spill`: what
arrives there is a frame larger than the buffers; it is either taken on to further ones (mergeable buffers) or dropped
whole.  No guest ever sees half a frame.
"""

import posix as os
import select
import time
from _bisect import bisect_left
from _queue import Empty, SimpleQueue

from vmd.devices.vionet.ethernet import GROUP, HEADER_BYTES
from vmd.devices.vionet.tap import DOWN, GONE
from vmd.devices.vionet.worker import NEVER, Worker
from vmd.errors import GuestError
from vmd.ipc import devmsg
from vmd.virtio import spec
from vmd.virtio.queue import CHAIN_BYTES_MAX, DESC, U16

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.devices.vionet.tap import Tap
    from vmd.devices.vionet.worker import Services
    from vmd.virtio.queue import Queue

    # head, windows on its buffers with `spill` behind them, bytes in the former
    Buffers = tuple[int, list[memoryview], int]

NUMBER = 0  # of the queue
BUDGET = 64  # frames of one turn
GIVE_BYTES = 64 << 10  # so much is given at a time: the guest looks at it, and offers new buffers, meanwhile
STOCK = 64  # chains looked at ahead of their use
RUN = 256  # ... where that is cheap
IOV_MAX = 1024
FRAME_MAX = 65536 + 64  # of the kernel, unsegmented, with its headers
INJECTED_MAX = 16  # answers of ours that wait; each answers a packet of the guest, which may send another

# A read is given what lies side by side, and so many such pieces that any frame fits for the next LARGE_READS after one
# that took several buffers: windows on many pieces cost more than a small frame.
LARGE_READS = 32

HOLD_S = 1.0  # for so long a frame waits for a driver that has offered too few buffers for it

PACKETS, BYTES = (devmsg.COUNTER_NAMES.index(name) for name in ("rx_packets", "rx_bytes"))
INJECTED_LOST = devmsg.COUNTER_NAMES.index("rx_injected_lost")  # any thread's

NEXT, WRITE, INDIRECT = spec.VIRTQ_DESC_F_NEXT, spec.VIRTQ_DESC_F_WRITE, spec.VIRTQ_DESC_F_INDIRECT
LENGTH_AND_FLAGS = 0xFFFF_FFFF_FFFF  # in a descriptor's second half
NUM_BUFFERS = 10  # offset in the header


class Run:
    """Chains of one buffer each that were looked at: what they hold together is a stream of bytes, cut into buffers.

    Their elements are in the used ring already, as if they were full: nobody looks at them before the index says so.
    """

    def __init__(self) -> None:
        self.base = 0  # where in the stream the first buffer begins
        self.ends: list[int] = []  # ... and each ends
        self.heads: list[int] = []
        self.pieces: list[tuple[int, int]] = []  # places in memory, from and to, that the stream goes through

    def forget(self) -> None:
        """Know of no chains."""
        self.ends.clear()
        self.heads.clear()
        self.pieces.clear()

    def use(self, count: int, piece: int, place: int) -> None:
        """Drop the first chains; the stream goes on at a place in a piece."""
        if not count:
            return
        self.base = self.ends[count - 1]
        if count == len(self.ends):
            self.forget()
        else:
            del self.ends[:count], self.heads[:count], self.pieces[:piece]
            self.pieces[0] = place, self.pieces[0][1]

    def stock(self, queue: "Queue", least: int) -> bool:
        """Look at waiting chains ahead; False if not all of them are such, of so many bytes at least.

        The hot loop's half that knows descriptors.
        """
        ends = self.ends
        known = len(ends)
        waiting = min(queue.available(), RUN) - known
        if waiting <= 0:
            return True
        raw, ranges = queue.memory.memory, queue.memory.ranges
        table = raw[queue.desc : queue.desc + 16 * queue.size].cast("Q")
        ring = raw[queue.avail + 4 : queue.avail + 4 + 2 * queue.size].cast("H")
        first = queue.next_avail + known & queue.mask
        heads = ring[first : first + waiting].tolist()
        heads += ring[: waiting - len(heads)].tolist()
        self.heads += heads
        used_ring, mask, slot, add_end = queue.used_ring, queue.mask, queue.next_used + known, ends.append
        total = ends[-1] if ends else self.base
        begin = end = length = full = 0
        form = -1  # of the descriptor before: length and flags
        found: list[tuple[int, int]] = []  # what is adjacent, from and to
        try:
            for head in heads:
                gpa, rest = table[head + head], table[head + head + 1] & LENGTH_AND_FLAGS
                if rest != form:
                    length, flags, form = rest & 0xFFFF_FFFF, rest >> 32, rest
                    if flags != WRITE or length < least:
                        return False
                    full = length << 32
                if gpa != end:
                    if end:
                        found.append((begin, end))
                    begin = end = gpa
                end += length
                total += length
                add_end(total)
                used_ring[slot & mask] = head | full
                slot += 1
        except IndexError:  # of a head outside the table
            return False
        found.append((begin, end))
        for begin, end in found:
            for start, stop, offset, writable in ranges:
                if start <= begin and end <= stop and writable:
                    self.pieces.append((begin + offset - start, end + offset - start))
                    break
            else:
                return False
        return True


class Receiver(Worker):
    """The receive queue's half."""

    def __init__(self, services: "Services", kick: int, tap: "Tap", failed: "Callable[[OSError], None]") -> None:
        """`failed` is called, on the thread that serves, when the tap is gone or down."""
        super().__init__(services, NUMBER, kick, BUDGET)
        self.tap = tap
        self.failed = failed
        self.configure(spec.NET_HDR_BYTES_LEGACY, mergeable=False, sums=False)
        self.accepted = b""  # of a locked interface: the one address whose frames it gets; empty: all
        self.spill = memoryview(bytearray(FRAME_MAX))
        self.run = Run()
        self.chains: list[Buffers] = []  # empty as long as `run` is not
        self.at = 0  # of those in front of it, all bytes are used
        self.placed = False  # chains were looked at for a frame that was in our own memory: they may make a run
        self.large = 0
        self.held = bytearray()  # a frame, with its header, that waits for buffers
        self.held_until_s = 0.0
        self.injected: SimpleQueue[bytes] = SimpleQueue()
        self.injection = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.bells.append(self.injection)
        self.others: tuple[int, ...] = ()  # figures that were shown last
        self.packets = self.no_room = self.filtered = self.malformed = self.injected_lost = 0

    # --- the main thread's ---------------------------------------------------------------------------------------

    def configure(self, header: int, *, mergeable: bool, sums: bool) -> None:
        """Take what was negotiated; `sums`: the guest knows frames without checksums."""
        self.header = header
        self.mergeable = mergeable
        self.sums = sums
        # 5.1.6.4.1: the kernel fills in all but num_buffers, and flags as for a driver with GUEST_CSUM.
        self.patch = header == spec.NET_HDR_BYTES or not sums

    def forget(self) -> None:
        """Throw away what waits for the guest."""
        self.held = bytearray()
        self.large = 0
        try:
            while True:
                self.injected.get_nowait()
        except Empty:
            return

    def finish(self) -> None:
        """Have nothing of the ring under way, because another is about to serve it.  Raises GuestError.

        A frame that waits for buffers gets what there is, or is dropped, as it would be soon.
        """
        queue = self.queue
        if self.held and queue is not None:
            self.run.forget()
            self.chains, self.at = [], 0
            if not self._place(queue, self.held):
                self.no_room += 1
                self.held = bytearray()
            self.show()
            self.give(queue)

    def take_injected(self) -> list[bytes]:
        """Return the frames of ours that wait, which another sends now."""
        found = []
        while not self.injected.empty():
            found.append(self.injected.get_nowait())
        return found

    # --- any thread's --------------------------------------------------------------------------------------------

    def inject(self, frame: bytes) -> None:
        """Have the guest receive a frame of ours; it is lost if too many wait."""
        if self.injected.qsize() >= INJECTED_MAX:
            self.lose_injected()
            return
        self.injected.put(frame)
        os.eventfd_write(self.injection, 1)

    def lose_injected(self) -> None:
        """Count a frame of ours that the guest does not get."""
        self.injected_lost += 1
        self.figures[INJECTED_LOST] = self.injected_lost

    # --- its own -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Forget the chains that were looked at: they are in the ring."""
        super().begin()
        self.run.forget()
        self.chains, self.at = [], 0

    def serve(self, queue: "Queue") -> bool:
        """Give frames to the guest as long as there are some, and buffers for them."""
        try:
            fed = self._fill(queue)
        finally:  # of a ring that breaks half-way, too
            self.show()
            self.give(queue)
        if fed:
            queue.suppress()
            self.tap_events = select.EPOLLIN if self.link_up else 0
            return False
        self.tap_events = 0  # without buffers frames stay in the tap, whose queue drops what is too much
        return queue.rearm(len(self.chains) - self.at)

    def show(self) -> None:
        """Store what has been counted, in the order of devmsg.FIGURES."""
        self.figures[PACKETS] = self.packets
        self.figures[BYTES] = self.bytes
        others = (self.no_room, self.filtered, self.malformed)
        if others != self.others:  # seldom
            self.others = others
            for place, value in enumerate(others, BYTES + 1):
                self.figures[place] = value

    def _fill(self, queue: "Queue") -> bool:
        """Move frames, up to a budget; False if it took more buffers than there are."""
        if self.held:
            if time.monotonic() >= self.held_until_s:
                self.no_room += 1
                self.held = bytearray()
            elif not self._place(queue, self.held):
                return False
        while not self.injected.empty():
            if not self._stock(queue, STOCK):
                return False
            if not self._place(queue, bytearray(self.header) + self.injected.get_nowait()):
                return False
        if not self.link_up:
            return True
        if self.accepted:
            return self._receive_filtered(queue)
        return self._receive(queue)

    # --- chains --------------------------------------------------------------------------------------------------

    def _stock(self, queue: "Queue", most: int) -> bool:
        """Look at waiting chains, up to `most` ahead; return whether there are any.  Raises GuestError.

        It takes buffers as drivers lay them out, each in one region of memory; anything else is left to `Queue.walk`.
        """
        self.run.forget()
        del self.chains[: self.at]
        self.at = 0
        chains = self.chains
        waiting = min(queue.available(), most) - len(chains)
        if waiting <= 0:
            return bool(chains)
        memory = queue.memory
        raw, ranges = memory.memory, memory.ranges
        table, ring, mask, table_size = queue.desc, queue.avail + 4, queue.mask, queue.size
        indirect, spill = queue.indirect, self.spill
        least = self.header if self.mergeable else self.header + HEADER_BYTES
        descriptor, word = DESC.unpack_from, U16.unpack_from
        position = queue.next_avail + len(chains)
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
                views, room = self._gather(queue, head)
            if room < least:
                raise GuestError(f"receive buffer of {room} bytes, too small for any frame")
            views.append(spill)
            chains.append((head, views, room))
        return True

    def _gather(self, queue: "Queue", head: int) -> "tuple[list[memoryview], int]":
        """Look at a chain of any form, the obvious way; it has all the room that one read can use."""
        chain = queue.walk(head)
        if chain.readable:
            raise GuestError("receive buffer with a part for reading")
        views = [
            window
            for gpa, length in chain.writable
            if length
            for window in queue.memory.slices(gpa, length, write=True)
        ][: IOV_MAX - 1]
        return views, sum(map(len, views))

    def _hold(self, data: bytearray) -> bool:
        """Keep a frame until there are more buffers, but not for ever: a driver may have no more.  Returns False."""
        if data is not self.held:
            self.held = data
            self.held_until_s = time.monotonic() + HOLD_S
        self.until_s = self.held_until_s
        return False

    def _place(self, queue: "Queue", data: bytearray) -> bool:
        """Copy a frame with its header into buffers; False, and it is held, if there are not enough of them."""
        if not self._fits(queue, data):
            return self._hold(data)
        self.held = bytearray()
        self.until_s = NEVER
        self.placed = True
        return True

    def _fits(self, queue: "Queue", data: bytearray) -> bool:
        """Copy a frame into buffers, or drop one for which they are too small; False if there are too few."""
        if not self.mergeable:
            if not self._stock(queue, STOCK):
                return False
            if self.chains[self.at][2] < len(data):
                self.no_room += 1
            else:
                self._put_spread(queue, data, 1)
            return True
        most = STOCK
        while True:
            self._stock(queue, most)
            room = count = 0
            for _, _, capacity in self.chains:
                room += capacity
                count += 1
                if room >= len(data):
                    self._put_spread(queue, data, count)
                    return True
            if count < most:  # all that wait; the guest may have more
                break
            most *= 2
        if count >= queue.size:
            self.no_room += 1
            return True
        return False

    def _put_spread(self, queue: "Queue", data: bytearray, count: int) -> None:
        """Copy a frame into `count` chains, and give them back."""
        if not self.sums:
            data[0] = 0
        if self.header == spec.NET_HDR_BYTES:
            data[NUM_BUFFERS : NUM_BUFFERS + 2] = count.to_bytes(2, "little")
        source = memoryview(data)
        for head, views, _ in self.chains[self.at : self.at + count]:
            written = 0
            for view in views[:-1]:
                part = source[: len(view)]
                view[: len(part)] = part
                source = source[len(part) :]
                written += len(part)
            queue.put(head, written)
        queue.next_avail = queue.next_avail + count & 0xFFFF
        self.at += count
        self.packets += 1
        self.bytes += len(data) - self.header

    def _patch_header(self, views: list[memoryview], count: int) -> None:
        """Correct the header at the start of a chain, before the guest is told of it."""
        first = views[0]
        if not self.sums:
            first[0] = 0
        if self.header == spec.NET_HDR_BYTES:
            if len(first) >= spec.NET_HDR_BYTES:
                first[NUM_BUFFERS] = count & 0xFF
                first[NUM_BUFFERS + 1] = count >> 8
            else:
                poke(views, NUM_BUFFERS, count & 0xFF)
                poke(views, NUM_BUFFERS + 1, count >> 8)

    # --- the tap -------------------------------------------------------------------------------------------------

    def _failed(self, error: OSError) -> bool:
        """Take an error of a read; return whether it is worth another one."""
        if isinstance(error, BlockingIOError):
            return False
        if error.errno in GONE or error.errno in DOWN:
            self.link_up = False
            self.failed(error)
            return False
        self.malformed += 1  # it was taken from the tap, and is lost
        return True

    def _receive(self, queue: "Queue") -> bool:
        """Read frames into what was offered, whatever its form."""
        for _ in range(self.budget):
            if self.placed:
                self.placed = False
                self.chains, self.at = [], 0
            fed = self._read_chains(queue) if self.at < len(self.chains) else self._read_run(queue)
            if fed is not None:
                return fed
        return True

    def _read_run(self, queue: "Queue") -> bool | None:
        """Read frames into chains of one buffer each: as many as it takes, or one if buffers cannot be merged.

        The hot loop's other half.  Returns True if there is no frame, or the budget is spent; False if it takes more
        chains than there are; None if it goes on with a chain that is none of these.
        """
        tap, header, sums, mergeable, spill = self.tap.fd, self.header, self.sums, self.mergeable, self.spill
        least, counted = header + HEADER_BYTES, header == spec.NET_HDR_BYTES
        readv, raw, run = os.readv, queue.memory.memory, self.run
        used_ring, mask, next_avail, next_used = queue.used_ring, queue.mask, queue.next_avail, queue.next_used
        ends, heads, pieces = run.ends, run.heads, run.pieces
        large, base, at, piece = self.large, run.base, 0, 0
        place, stop = pieces[0] if pieces else (0, 0)
        packets = total = 0
        limit = GIVE_BYTES
        try:
            for _ in range(self.budget):
                if at == len(ends) or (large and ends[-1] - base < FRAME_MAX):
                    run.use(at, piece, place)
                    queue.next_avail, queue.next_used = next_avail & 0xFFFF, next_used & 0xFFFF
                    at = piece = 0
                    if not run.stock(queue, header if mergeable else least):
                        return None if self._stock(queue, STOCK) else False
                    if not ends:
                        return False
                    place, stop = pieces[0]
                end = ends[at]
                room = stop - place
                if not mergeable:
                    room = end - base
                    views = [raw[place : place + room], spill]
                elif not large or room >= FRAME_MAX:
                    views = [raw[place:stop], spill]
                else:
                    views = [raw[place:stop]]
                    for begin, behind in pieces[piece + 1 :]:
                        views.append(raw[begin:behind])
                        room += behind - begin
                        if room >= FRAME_MAX:
                            break
                    views.append(spill)
                try:
                    length = readv(tap, views)
                except OSError as error:
                    if self._failed(error):
                        continue
                    return True
                if not least <= length <= room:
                    if length > room and mergeable:
                        break
                    if not length:
                        self._ended()
                        return True
                    self._drop(length, least)
                    continue
                if base + length <= end:
                    count = 1
                    if large:
                        large -= 1
                    used_ring[next_used & mask] = heads[at] | length << 32
                else:
                    last = bisect_left(ends, base + length, at)
                    count = last + 1 - at
                    end = ends[last]
                    large = LARGE_READS
                    used_ring[next_used + last - at & mask] = heads[last] | base + length - ends[last - 1] << 32
                if counted:
                    raw[place + NUM_BUFFERS] = count & 0xFF
                    raw[place + NUM_BUFFERS + 1] = count >> 8
                if not sums:
                    raw[place] = 0
                next_avail += count
                next_used += count
                at += count
                place += end - base
                base = end
                while place >= stop and at < len(ends):
                    over = place - stop
                    piece += 1
                    place, stop = pieces[piece]
                    place += over
                packets += 1
                total += length
                if total >= limit:
                    limit = total + GIVE_BYTES
                    queue.next_avail, queue.next_used = next_avail & 0xFFFF, next_used & 0xFFFF
                    self.give(queue)
            else:
                return True
        finally:
            run.use(at, piece, place)
            queue.next_avail, queue.next_used = next_avail & 0xFFFF, next_used & 0xFFFF
            self.large = large
            self.packets += packets
            self.bytes += total - packets * header
        self.large = LARGE_READS
        return None if self._go_on(queue, views, room, length) else False

    def _read_chains(self, queue: "Queue") -> bool | None:
        """Read a frame into chains of any form.

        Returns True if there is none, False if it takes more chains than there are.
        """
        if self.mergeable:
            views, room, count = self._window(queue)
        else:
            _, views, room = self.chains[self.at]
            count = 1
        least = self.header + HEADER_BYTES
        try:
            length = os.readv(self.tap.fd, views)
        except OSError as error:
            return None if self._failed(error) else True
        if length > room and self.mergeable:
            return None if self._go_on(queue, views, room, length) else False
        if not least <= length <= room:
            if not length:
                self._ended()
                return True
            self._drop(length, least)
            return None
        at, left, used = self.at, length, 0
        for head, _, capacity in self.chains[at : at + count]:
            queue.put(head, min(left, capacity))
            used += 1
            left -= capacity
            if left <= 0:
                break
        if self.patch:
            self._patch_header(self.chains[at][1], used)
        queue.next_avail = queue.next_avail + used & 0xFFFF
        self.at = at + used
        self.packets += 1
        self.bytes += length - self.header
        return None

    def _window(self, queue: "Queue") -> "tuple[list[memoryview], int, int]":
        """Return windows on so many chains that any frame fits, if there are so many; their bytes and number."""
        if len(self.chains) - self.at < STOCK:
            self._stock(queue, 2 * STOCK)
        views: list[memoryview] = []
        room = count = 0
        for _, buffers, capacity in self.chains[self.at :]:
            if len(views) + len(buffers) > IOV_MAX:
                break
            views += buffers[:-1]
            room += capacity
            count += 1
            if room >= FRAME_MAX:
                break
        views.append(self.spill)
        return views, room, count

    def _go_on(self, queue: "Queue", views: list[memoryview], room: int, length: int) -> bool:
        """Place a frame of which a part is in `spill`; False if it takes more buffers than there are."""
        if length - room >= len(self.spill):
            self.no_room += 1  # it may even have been longer
            return True
        data = bytearray().join(views[:-1])
        data += self.spill[: length - room]
        return self._place(queue, data)

    def _receive_filtered(self, queue: "Queue") -> bool:
        """Read frames into our own memory, and give the guest those that are for it."""
        spill, header, accepted = self.spill, self.header, self.accepted
        least = header + HEADER_BYTES
        for _ in range(self.budget):
            if not self._stock(queue, STOCK):
                return False
            try:
                length = os.readv(self.tap.fd, [spill])
            except OSError as error:
                if self._failed(error):
                    continue
                return True
            if not length:
                self._ended()
                return True
            if length < least or length >= len(spill):
                self._drop(length, least)
            elif not spill[header] & GROUP and spill[header : header + 6] != accepted:
                self.filtered += 1
            elif not self._place(queue, bytearray(spill[:length])):
                return False
        return True

    def _drop(self, length: int, least: int) -> None:
        """Count a frame that the guest does not get; its chain is used for the next."""
        if length < least:
            self.malformed += 1
        else:
            self.no_room += 1

    def _ended(self) -> None:
        """Take the end of what is no tap for the end of a tap."""
        self.link_up = False
        self.failed(OSError(min(GONE), "end of file"))


def poke(views: list[memoryview], offset: int, value: int) -> None:
    """Store a byte somewhere in a chain."""
    for view in views:
        if offset < len(view):
            view[offset] = value
            return
        offset -= len(view)
