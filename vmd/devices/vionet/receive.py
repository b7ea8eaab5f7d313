"""The receive queue (virtio 1.2, 5.1.6.3-4): frames from the tap, and answers of this process, go to the guest.

The kernel writes frames straight into the guest's buffers (`buffers`).  Each read also has a last buffer in our own
memory, `spill`.  It receives the rest of a frame that is larger than the guest's buffers.  With mergeable buffers that
frame is continued in further buffers; otherwise it is dropped.  A guest never sees a part of a frame.
"""

import posix as os
import select
import time
from _bisect import bisect_left, bisect_right

from vmd.devices.vionet.buffers import STOCK, Chains, Run
from vmd.devices.vionet.ethernet import GROUP, HEADER_BYTES
from vmd.devices.vionet.tap import DOWN, GONE
from vmd.devices.vionet.worker import NEVER, Worker
from vmd.enums import Enum
from vmd.eventfd import eventfd
from vmd.ipc import devmsg
from vmd.virtio import spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.devices.vionet.tap import Tap
    from vmd.devices.vionet.worker import Services
    from vmd.virtio.queue import Queue

NUMBER = 0  # the queue's number
ALONE = 128, 1 << 20  # the most frames, and about the most bytes, of one turn
SHARED = 64, 256 << 10  # the same if the guest has frames to send; frames that arrive meanwhile wait in the tap
GIVE_BYTES = 64 << 10  # bytes after which frames are given: the guest takes them while the next ones are read
FEW = 4  # after a turn of fewer frames, give the next turn's first frame at once: the guest probably waits for it
FRAME_MAX = 65536 + 64  # the largest frame of the kernel, unsegmented, with its headers
INJECTED_MAX = 16  # answers of this process that may wait; each answers a packet, which the guest can send again

# Normally a read is offered one contiguous piece of memory, because views of many pieces cost more than a small frame.
# After a frame that took several buffers, the next LARGE_READS reads are offered room for the largest frame.
LARGE_READS = 32

HOLD_S = 1.0  # how long a frame waits for more buffers, if the driver has offered too few for it

PACKETS, BYTES = (devmsg.COUNTER_NAMES.index(name) for name in ("rx_packets", "rx_bytes"))
INJECTED_LOST = devmsg.COUNTER_NAMES.index("rx_injected_lost")  # stored by the thread that calls `inject`

NUM_BUFFERS = 10  # offset of num_buffers in the header


class Ended(Enum):
    """Why reading ended."""

    NO_FRAMES = 0  # the tap has no more frames
    NO_BUDGET = 1  # the budget of the turn is used up
    NO_BUFFERS = 2  # the ring has too few buffers
    OTHER_KIND = 3  # reading goes on with the other kind of chains, `Run` or `Chains`; a turn never ends with that


class Receiver(Worker):
    """The receive queue."""

    def __init__(self, services: "Services", kick: int, tap: "Tap", failed: "Callable[[OSError], None]") -> None:
        """`failed` is called, on the thread that serves, when the tap is gone or down."""
        super().__init__(services, NUMBER, kick, ALONE[0])
        self.tap = tap
        self.failed = failed
        self.configure(spec.NET_HDR_BYTES_LEGACY, mergeable=False, sums=False)
        self.accepted = b""  # of a locked interface: the guest gets frames to this address only; empty: all frames
        self.spill = memoryview(bytearray(FRAME_MAX))
        self.run = Run()
        self.chains = Chains(self.spill)  # empty while `run` has chains
        self.placed = False  # `chains` was filled for a frame in our own memory; the rest of it may fit a run
        self.turn_frames, self.turn_bytes = ALONE  # the budget of this turn
        self.few = True  # the last turn had fewer than FEW frames
        self.large = 0  # number of reads, from now on, that are offered room for the largest frame
        self.held = bytearray()  # a frame, with its header, that waits for buffers
        self.held_until_s = 0.0
        self.injected: list[bytes] = []
        self.injection = eventfd()
        self.bells.append(self.injection)
        self.others: tuple[int, ...] = ()  # the rarely changing figures, as they were stored last
        self.packets = self.no_room = self.filtered = self.malformed = self.injected_lost = 0

    # --- on the main thread --------------------------------------------------------------------------------------

    def configure(self, header: int, *, mergeable: bool, sums: bool) -> None:
        """Take the negotiated features; `sums`: the guest accepts frames without checksums."""
        self.header = header
        self.mergeable = mergeable
        self.sums = sums
        self.room_least = header if mergeable else header + HEADER_BYTES  # of a chain
        # 5.1.6.4.1: the kernel does not fill in num_buffers, and fills in flags as if GUEST_CSUM were negotiated.
        self.patch = header == spec.NET_HDR_BYTES or not sums

    def forget(self) -> None:
        """Drop the frames that wait for the guest."""
        self.held = bytearray()
        self.large = 0
        self.take_injected()

    def finish(self) -> None:
        """Finish work on the ring, because the kernel is about to serve it.  Raises GuestError.

        A frame that waits for buffers is put into the available ones, or is dropped.
        """
        queue = self.queue
        if self.held and queue is not None:
            self.run.forget()
            self.chains.forget()
            if not self._place(queue, self.held):
                self.no_room += 1
                self.held = bytearray()
            self.show()
            self.give(queue)

    def take_injected(self) -> list[bytes]:
        """Remove and return the frames of this process that wait in `injected`."""
        found = []
        while self.injected:
            found.append(self.injected.pop(0))
        return found

    # --- on any thread -------------------------------------------------------------------------------------------

    def inject(self, frame: bytes) -> None:
        """Queue a frame of this process for the guest; drop it if too many wait."""
        if len(self.injected) >= INJECTED_MAX:
            self.lose_injected()
            return
        self.injected.append(frame)
        os.eventfd_write(self.injection, 1)

    def lose_injected(self) -> None:
        """Count a frame of this process that was dropped."""
        self.injected_lost += 1
        self.figures[INJECTED_LOST] = self.injected_lost

    # --- on the thread that moves frames ---------------------------------------------------------------------------

    def begin(self) -> None:
        """Forget the chains that were read ahead.  They are still available in the ring."""
        super().begin()
        self.run.begin()
        self.chains.forget()
        self.few = True

    def serve(self, queue: "Queue") -> bool:
        """Give frames to the guest while there are frames, buffers for them, and budget."""
        frames, self.turn_bytes = SHARED if self.shared else ALONE
        self.turn_frames = min(frames, self.budget)
        before = self.packets
        try:
            ended = self._fill(queue)
        finally:  # also when the ring turns out to be broken
            self.show()
            self.give(queue)
        self.few = self.packets - before < FEW
        if ended is Ended.NO_BUFFERS:
            self.tap_events = 0  # without buffers, frames stay in the tap; its queue drops them when it is full
            return queue.rearm(self.chains.left)
        queue.suppress()
        self.tap_events = select.EPOLLIN if self.link_up else 0
        return ended is Ended.NO_BUDGET

    def show(self) -> None:
        """Store the figures, in the order of devmsg.FIGURES."""
        self.figures[PACKETS] = self.packets
        self.figures[BYTES] = self.bytes
        others = (self.no_room, self.filtered, self.malformed)
        if others != self.others:  # seldom
            self.others = others
            for place, value in enumerate(others, BYTES + 1):
                self.figures[place] = value

    def _fill(self, queue: "Queue") -> Ended:
        """Move frames, up to the turn's budget; return why that ended."""
        if self.held:
            if time.monotonic() >= self.held_until_s:
                self.no_room += 1
                self.held = bytearray()
            elif not self._place(queue, self.held):
                return Ended.NO_BUFFERS
        while self.injected:
            if not self._stock(queue, STOCK):
                return Ended.NO_BUFFERS
            if not self._place(queue, bytearray(self.header) + self.injected.pop(0)):
                return Ended.NO_BUFFERS
        if not self.link_up:
            return Ended.NO_FRAMES
        if self.accepted:
            return self._receive_filtered(queue)
        return self._receive(queue)

    # --- frames in our own memory ----------------------------------------------------------------------------------

    def _stock(self, queue: "Queue", most: int) -> bool:
        """Read up to `most` available chains of any form ahead; return whether there are any.  Raises GuestError."""
        self.run.forget()
        return self.chains.stock(queue, most, self.room_least)

    def _hold(self, data: bytearray) -> bool:
        """Keep a frame until there are more buffers, for at most HOLD_S: the driver may never offer more.

        Always returns False, for the caller to return.
        """
        if data is not self.held:
            self.held = data
            self.held_until_s = time.monotonic() + HOLD_S
        self.until_s = self.held_until_s
        return False

    def _place(self, queue: "Queue", data: bytearray) -> bool:
        """Copy a frame with its header into buffers.  If there are too few, hold the frame and return False."""
        if not self._fits(queue, data):
            return self._hold(data)
        self.held = bytearray()
        self.until_s = NEVER
        self.placed = True
        return True

    def _fits(self, queue: "Queue", data: bytearray) -> bool:
        """Copy a frame into buffers; return False if there are too few.

        The frame is dropped, and the result is True, if it can never fit: it is larger than one buffer that cannot be
        merged, or than a ring full of mergeable buffers.
        """
        chains = self.chains
        if not self.mergeable:
            if not self._stock(queue, STOCK):
                return False
            if chains.known[0][2] < len(data):
                self.no_room += 1
            else:
                self._put_spread(queue, data, 1)
            return True
        most = STOCK
        while True:
            self._stock(queue, most)
            room = count = 0
            for _, _, capacity in chains.known:
                room += capacity
                count += 1
                if room >= len(data):
                    self._put_spread(queue, data, count)
                    return True
            if count < most:  # these are all available chains; the guest may add more
                break
            most *= 2
        if count >= queue.size:
            self.no_room += 1
            return True
        return False

    def _put_spread(self, queue: "Queue", data: bytearray, count: int) -> None:
        """Copy a frame into the first `count` chains, and give them back."""
        if not self.sums:
            data[0] = 0
        if self.header == spec.NET_HDR_BYTES:
            data[NUM_BUFFERS : NUM_BUFFERS + 2] = count.to_bytes(2, "little")
        source = memoryview(data)
        for _, views, _ in self.chains.known[:count]:
            for view in views[:-1]:
                part = source[: len(view)]
                view[: len(part)] = part
                source = source[len(part) :]
        self.chains.put(queue, len(data))
        self._count(len(data))

    def _count(self, length: int) -> None:
        """Count a frame of `length` bytes with its header, given to the guest."""
        self.packets += 1
        self.bytes += length - self.header

    # --- the tap -------------------------------------------------------------------------------------------------

    def _failed(self, error: OSError) -> bool:
        """Handle an error of a read from the tap; return whether to read again."""
        if isinstance(error, BlockingIOError):
            return False
        if error.errno in GONE or error.errno in DOWN:
            self.link_up = False
            self.failed(error)
            return False
        self.malformed += 1  # the kernel has removed the frame from the tap, so it is lost
        return True

    def _receive(self, queue: "Queue") -> Ended:
        """Read frames into the offered chains, of either kind."""
        for _ in range(self.turn_frames):
            if self.placed:
                self.placed = False
                if self.chains.are_simple:
                    self.chains.forget()
            ended = self._read_chains(queue) if self.chains.left else self._read_run(queue)
            if ended is not Ended.OTHER_KIND:
                return ended
        return Ended.NO_BUDGET

    def _read_run(self, queue: "Queue") -> Ended:
        """Read frames into chains of one buffer each.  A frame takes several buffers if they can be merged, else one.

        This is the hot loop.  The buffers of a run form a stream of bytes, which lies in pieces of memory.  The locals:

            chains      | at - 1 |    at    | at + 1 |  ...           cut at `ends`
            stream               base       end
            pieces  ... piece                   stop  piece + 1  |    cut at `stops`, in memory by `shifts` further on
            frame                |length -->
            views                [ the buffer, or the rest of the piece, or pieces enough for all frames ] [ spill ]
        """
        tap, header, sums, mergeable, spill = self.tap.fd, self.header, self.sums, self.mergeable, self.spill
        least, counted = header + HEADER_BYTES, header == spec.NET_HDR_BYTES
        readv, raw, run = os.readv, queue.memory.memory, self.run
        used_lengths, mask = run.used_lengths(queue), queue.mask
        next_avail, next_used = queue.next_avail, queue.next_used  # of the run's first chain
        ends, stops, shifts = run.ends, run.stops, run.shifts
        large, base, at, piece = self.large, run.base, 0, 0
        stop, shift = (stops[0], shifts[0]) if stops else (0, 0)
        packets = total = 0
        limit = 1 if self.few else GIVE_BYTES
        try:
            for _ in range(self.turn_frames):
                if at == len(ends) or (large and ends[-1] - base < FRAME_MAX):
                    run.use(at, piece)
                    queue.next_avail = next_avail = next_avail + at & 0xFFFF
                    queue.next_used = next_used = next_used + at & 0xFFFF
                    base, at, piece = run.base, 0, 0
                    if not run.stock(queue, self.room_least):
                        return Ended.OTHER_KIND if self._stock(queue, STOCK) else Ended.NO_BUFFERS
                    if not ends:
                        return Ended.NO_BUFFERS
                    stop, shift = stops[0], shifts[0]
                end = ends[at]
                room = stop - base
                place = base + shift
                if not mergeable:
                    room = end - base
                    views = [raw[place : place + room], spill]
                elif not large or room >= FRAME_MAX:
                    views = [raw[place : place + room], spill]
                else:
                    behind = bisect_left(stops, base + FRAME_MAX, piece) + 1
                    views = [raw[place : place + room]]
                    for further in range(piece + 1, min(behind, len(stops))):
                        begin, stop, shift = stop, stops[further], shifts[further]
                        views.append(raw[begin + shift : stop + shift])
                    views.append(spill)
                    room = stop - base
                    stop, shift = stops[piece], shifts[piece]
                try:
                    length = readv(tap, views)
                except OSError as error:
                    if self._failed(error):
                        continue
                    return Ended.NO_FRAMES
                if not least <= length <= room:
                    if length > room and mergeable:
                        break
                    if not length:
                        self._ended()
                        return Ended.NO_FRAMES
                    self._drop(length, least)
                    continue
                if base + length <= end:
                    used_lengths[next_used + at & mask] = length
                    at += 1
                    if counted:
                        raw[place + NUM_BUFFERS] = 1
                        raw[place + NUM_BUFFERS + 1] = 0
                    if large:
                        large -= 1
                else:
                    last = bisect_left(ends, base + length, at)
                    used_lengths[next_used + last & mask] = base + length - ends[last - 1]
                    end = ends[last]
                    raw[place + NUM_BUFFERS] = last + 1 - at & 0xFF
                    raw[place + NUM_BUFFERS + 1] = last + 1 - at >> 8
                    at = last + 1
                    large = LARGE_READS
                if not sums:
                    raw[place] = 0
                base = end
                if end >= stop and at < len(ends):
                    piece = bisect_right(stops, end, piece)
                    stop, shift = stops[piece], shifts[piece]
                packets += 1
                total += length
                if total >= limit:
                    limit = total + GIVE_BYTES
                    queue.next_avail, queue.next_used = next_avail + at & 0xFFFF, next_used + at & 0xFFFF
                    self.figures[PACKETS] = self.packets + packets
                    self.figures[BYTES] = self.bytes + total - packets * header
                    self.give(queue)
                    if total >= self.turn_bytes:
                        return Ended.NO_BUDGET
            else:
                return Ended.NO_BUDGET
        finally:
            run.use(at, piece)
            queue.next_avail, queue.next_used = next_avail + at & 0xFFFF, next_used + at & 0xFFFF
            self.large = large
            self.packets += packets
            self.bytes += total - packets * header
        self.large = LARGE_READS
        return Ended.OTHER_KIND if self._go_on(queue, views, room, length) else Ended.NO_BUFFERS

    def _read_chains(self, queue: "Queue") -> Ended:
        """Read one frame into chains of any form.  Returns OTHER_KIND if the tap may have more frames."""
        chains = self.chains
        if self.mergeable:
            if chains.left < STOCK:
                self._stock(queue, 2 * STOCK)
            views, room = chains.together(FRAME_MAX)
        else:
            _, views, room = chains.known[chains.at]
        first = chains.known[chains.at][1]
        least = self.header + HEADER_BYTES
        try:
            length = os.readv(self.tap.fd, views)
        except OSError as error:
            return Ended.OTHER_KIND if self._failed(error) else Ended.NO_FRAMES
        if length > room and self.mergeable:
            return Ended.OTHER_KIND if self._go_on(queue, views, room, length) else Ended.NO_BUFFERS
        if not least <= length <= room:
            if not length:
                self._ended()
                return Ended.NO_FRAMES
            self._drop(length, least)
            return Ended.OTHER_KIND
        used = chains.put(queue, length)
        if self.patch:
            self._patch_header(first, used)
        self._count(length)
        return Ended.OTHER_KIND

    def _patch_header(self, views: list[memoryview], count: int) -> None:
        """Correct the frame's header, which is at the start of `views`, before the guest sees it."""
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

    def _go_on(self, queue: "Queue", views: list[memoryview], room: int, length: int) -> bool:
        """Place a frame whose last part is in `spill`; return False if there are too few buffers for it."""
        if length - room >= len(self.spill):
            self.no_room += 1  # `spill` is full, so the frame may have been longer than what was read
            return True
        data = bytearray().join(views[:-1])
        data += self.spill[: length - room]
        return self._place(queue, data)

    def _receive_filtered(self, queue: "Queue") -> Ended:
        """Read frames into our own memory; give the guest those that are addressed to it, or to a group."""
        spill, header, accepted = self.spill, self.header, self.accepted
        least = header + HEADER_BYTES
        for _ in range(self.turn_frames):
            if not self._stock(queue, STOCK):
                return Ended.NO_BUFFERS
            try:
                length = os.readv(self.tap.fd, [spill])
            except OSError as error:
                if self._failed(error):
                    continue
                return Ended.NO_FRAMES
            if not length:
                self._ended()
                return Ended.NO_FRAMES
            if length < least or length >= len(spill):
                self._drop(length, least)
            elif not spill[header] & GROUP and spill[header : header + 6] != accepted:
                self.filtered += 1
            elif not self._place(queue, bytearray(spill[:length])):
                return Ended.NO_BUFFERS
        return Ended.NO_BUDGET

    def _drop(self, length: int, least: int) -> None:
        """Count a frame that is dropped.  Its chain is used for the next frame."""
        if length < least:
            self.malformed += 1
        else:
            self.no_room += 1

    def _ended(self) -> None:
        """Handle an end of file as if the tap were deleted.  Only a descriptor that is not a tap has one."""
        self.link_up = False
        self.failed(OSError(min(GONE), "end of file"))


def poke(views: list[memoryview], offset: int, value: int) -> None:
    """Store a byte at an offset of a chain's buffers."""
    for view in views:
        if offset < len(view):
            view[offset] = value
            return
        offset -= len(view)
