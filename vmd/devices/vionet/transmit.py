"""From the guest to the tap: the transmit queue (virtio 1.2, 5.1.6.1-2).

A frame goes from the guest's memory straight into the kernel, with the guest's own virtio header before it: the
kernel reads that once, checks it, and refuses what does not fit the frame.  Only an interface that is `locked` or
`local` has its frames looked at here; of others those that may tell an address of the guest.
"""

import posix as os
import select
import time

from vmd.devices.vionet.addresses import LENGTHS, LOOK_BYTES
from vmd.devices.vionet.ethernet import HEADER_BYTES, SOURCE
from vmd.devices.vionet.tap import DOWN, GONE
from vmd.devices.vionet.worker import GSO_FRAME_MAX, Worker
from vmd.errors import GuestError
from vmd.ipc import devmsg
from vmd.log import RateLimit
from vmd.virtio import spec
from vmd.virtio.queue import CHAIN_BYTES_MAX, DESC

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    from vmd.devices.vionet.addresses import Addresses
    from vmd.devices.vionet.tap import Tap
    from vmd.devices.vionet.worker import Services
    from vmd.virtio.queue import Queue

    class Answers(Protocol):
        """What answers the guest in place of the network."""

        look_bytes: int
        frame_max: int

        def concerns(self, start: bytes) -> bool:
            """Return whether a frame with this start may be for us; `start` is `look_bytes` long, or all of it."""

        def answer(self, frame: bytes, sum_missing: bool) -> bool:
            """Take a frame if it is for us, and answer it; `sum_missing`: its checksum was left to the device."""


NUMBER = 1  # of the queue
BUDGET = 256  # frames of one turn: all that a ring holds; what arrives meanwhile waits in the tap
GIVE_BYTES = 256 << 10  # so much is given back at a time: the guest makes new frames while others are sent
IOV_MAX = 1024
FRAME_MAX = 16384 + HEADER_BYTES  # as long as a tap of OpenBSD's takes (*cat. 6.5*)
GSO_TYPE = 1  # offset in the header
BUSY_S = 1.0  # a tap that takes nothing for so long loses the frame

PACKETS, BYTES = (devmsg.COUNTER_NAMES.index(name) for name in ("tx_packets", "tx_bytes"))

NEXT, WRITE, INDIRECT = spec.VIRTQ_DESC_F_NEXT, spec.VIRTQ_DESC_F_WRITE, spec.VIRTQ_DESC_F_INDIRECT


class Transmitter(Worker):
    """The transmit queue's half."""

    def __init__(self, services: "Services", kick: int, tap: "Tap", failed: "Callable[[OSError], None]") -> None:
        """`failed` is called, on the thread that serves, when the tap is gone or down."""
        super().__init__(services, NUMBER, kick, BUDGET)
        self.tap = tap
        self.failed = failed
        self.header = spec.NET_HDR_BYTES_LEGACY
        self.allowed = b""  # of a locked interface: the one address it sends from; empty: any
        self.answers: Answers | None = None
        self.addresses: Addresses | None = None  # what learns the guest's
        self.busy_until_s = 0.0  # the tap takes nothing at the moment, and is waited for; 0: it takes what comes
        self.complaints = RateLimit()
        self.others: tuple[int, ...] = ()  # figures that were shown last
        self.packets = 0
        self.short = self.long = self.spoofed = self.refused = self.no_link = self.dropped_busy = self.answered = 0

    def begin(self) -> None:
        """Wait for notifications, not for the tap."""
        super().begin()
        self.busy_until_s = 0.0

    def serve(self, queue: "Queue") -> bool:
        """Send what waits, up to a budget."""
        queue.suppress()
        self.tap_events = 0
        try:
            more = self._drain(queue)
        finally:  # of a ring that breaks half-way, too
            self.show()
            self.give(queue)
        if self.tap_events:
            return False
        self.busy_until_s = 0.0
        return more or queue.rearm()

    def count_answered(self) -> None:
        """Count a frame that was answered elsewhere, while this thread stands."""
        self.answered += 1
        self.show()

    def show(self) -> None:
        """Store what has been counted, in the order of devmsg.FIGURES."""
        self.figures[PACKETS] = self.packets
        self.figures[BYTES] = self.bytes
        others = (
            self.short, self.long, self.spoofed, self.refused, self.no_link, self.dropped_busy, self.answered,
        )  # fmt: skip
        if others != self.others:  # seldom
            self.others = others
            for place, value in enumerate(others, BYTES + 1):
                self.figures[place] = value

    def _drain(self, queue: "Queue") -> bool:
        """Take frames and send them; return whether some are left.

        The hot loop.  It knows chains as drivers lay them out, and makes one window of descriptors whose memory is
        adjacent, if that lies in one region; anything else is left to `Queue.walk`.
        """
        memory = queue.memory
        raw, ranges = memory.memory, memory.ranges
        table, mask, table_size = queue.desc, queue.mask, queue.size
        heads = raw[queue.avail + 4 : queue.avail + 4 + 2 * table_size].cast("H")
        indirect, header, tap = queue.indirect, self.header, self.tap.fd
        descriptor, descriptors, write, writev = DESC.unpack_from, DESC.iter_unpack, os.write, os.writev
        used_ring, next_avail, next_used = queue.used_ring, queue.next_avail, queue.next_used
        low = high = delta = 0  # the region that was met last, and the way from its addresses to places in `raw`
        least, most = header + HEADER_BYTES, header + FRAME_MAX
        look = bool(self.allowed) or self.answers is not None
        telling = () if self.addresses is None else tuple(header + length for length in LENGTHS)
        waiting = queue.available()
        left = min(waiting, self.budget)
        more = waiting > left
        packets = total = 0
        limit = GIVE_BYTES
        try:
            while left:
                left -= 1
                head = heads[next_avail & mask]
                if head >= table_size:
                    queue.walk(head)  # says so
                gpa, length, flags, following = descriptor(raw, table + 16 * head)
                if not flags and low <= gpa and gpa + length <= high:
                    gpa += delta
                    views = [raw[gpa : gpa + length]]
                else:
                    base, size, following = table, table_size, head
                    if flags == INDIRECT and indirect and 0 < length < 16 * IOV_MAX and not length & 15:
                        if low <= gpa and gpa + length <= high:
                            base, size, following = gpa + delta, length >> 4, 0
                        else:
                            for start, stop, offset, _ in ranges:
                                if start <= gpa and gpa + length <= stop:
                                    low, high, delta = start, stop, offset - start
                                    base, size, following = gpa + delta, length >> 4, 0
                                    break
                    views = []
                    length = begin = end = 0  # the latter two: of what is adjacent
                    steps = IOV_MAX - 1  # one more piece may be put in front; below 0: is of no usual form
                    while following < size and steps > 0:
                        position = following
                        for gpa, part, flags, following in descriptors(raw[base + 16 * position : base + 16 * size]):
                            steps -= 1
                            position += 1
                            if gpa != end:
                                if begin != end:
                                    if begin < low or end > high:
                                        for start, stop, offset, _ in ranges:
                                            if start <= begin and end <= stop:
                                                low, high, delta = start, stop, offset - start
                                                break
                                        else:
                                            steps = -1
                                            break
                                    views.append(raw[begin + delta : end + delta])
                                    length += end - begin
                                begin = end = gpa
                            end += part
                            if flags != NEXT or following != position:  # most chains lie in a table in order
                                break
                        if flags != NEXT:
                            break
                    if begin < low or end > high:
                        for start, stop, offset, _ in ranges:
                            if start <= begin and end <= stop:
                                low, high, delta = start, stop, offset - start
                                break
                        else:
                            if begin != end:  # nothing may lie anywhere
                                steps = -1
                    if begin != end and steps >= 0:
                        views.append(raw[begin + delta : end + delta])
                        length += end - begin
                    if flags or steps < 0 or length > CHAIN_BYTES_MAX:
                        views, length = self._gather(queue, head)
                if length < least:
                    if length < header:
                        raise GuestError(f"frame without a header: {length} of {header} bytes")
                    self.short += 1
                elif length > most and not (length <= header + GSO_FRAME_MAX and peek(views, GSO_TYPE)):
                    self.long += 1
                elif not self.link_up:
                    self.no_link += 1
                else:
                    chosen: Sequence[memoryview | bytes] = views
                    if length in telling:
                        self._learn(views)
                    if look:
                        chosen = self._look(views, length - header)
                    if chosen:
                        try:
                            if len(chosen) == 1:
                                write(tap, chosen[0])
                            else:
                                writev(tap, chosen)
                        except OSError as error:
                            if not self._not_sent(error, packets):
                                return False
                        else:
                            packets += 1
                            total += length
                used_ring[next_used & mask] = head
                next_used += 1
                next_avail += 1
                if total >= limit:
                    limit = total + GIVE_BYTES
                    queue.next_avail, queue.next_used = next_avail & 0xFFFF, next_used & 0xFFFF
                    self.give(queue)
            return more
        finally:
            queue.next_avail, queue.next_used = next_avail & 0xFFFF, next_used & 0xFFFF
            self.packets += packets
            self.bytes += total - packets * header

    def _gather(self, queue: "Queue", head: int) -> "tuple[list[memoryview], int]":
        """Look at a chain of any form, the obvious way."""
        chain = queue.walk(head)
        if chain.writable:
            raise GuestError("frame with a part for writing")
        length = sum(part for _, part in chain.readable)
        views = [
            window for gpa, part in chain.readable if part for window in queue.memory.slices(gpa, part)
        ]
        if len(views) >= IOV_MAX and length <= self.header + GSO_FRAME_MAX:
            views = [memoryview(b"".join(views))]  # one write takes no more pieces than that
        return views, length

    def _not_sent(self, error: OSError, sent: int) -> bool:
        """Take an error of a write, after `sent` without; return whether the frame is lost, or stays where it is."""
        if isinstance(error, BlockingIOError):
            now_s = time.monotonic()
            if sent or not self.busy_until_s:
                self.busy_until_s = now_s + BUSY_S
            if now_s < self.busy_until_s:
                self.tap_events = select.EPOLLOUT
                self.until_s = self.busy_until_s
                return False
            self.busy_until_s = 0.0
            self.dropped_busy += 1
        elif error.errno in GONE or error.errno in DOWN:
            self.link_up = False
            self.no_link += 1
            self.failed(error)
        else:
            self.refused += 1
            self.complaints.warn(f"{self.tap.name}: frame refused: {error.strerror}")
        return True

    def _learn(self, views: list[memoryview]) -> None:
        """See whether a frame tells an address of the guest."""
        assert self.addresses is not None
        self.addresses.learn(take(views, self.header + LOOK_BYTES)[self.header :])

    def _look(self, views: list[memoryview], length: int) -> "Sequence[memoryview | bytes]":
        """Judge a frame; return what is to be sent, if anything.  What was looked at is what is sent."""
        header, allowed, answers = self.header, self.allowed, self.answers
        whole = b""
        start = take(views, header + (answers.look_bytes if answers else HEADER_BYTES))
        if answers is not None and length <= answers.frame_max and answers.concerns(start[header:]):
            whole = start = b"".join(views)
        if allowed and start[header:][SOURCE] != allowed:
            self.spoofed += 1
            source = start[header:][SOURCE].hex(":")
            self.complaints.warn(f"bad source address {source}")
            return ()
        if whole:
            assert answers is not None
            if answers.answer(whole[header:], bool(whole[0] & spec.VIRTIO_NET_HDR_F_NEEDS_CSUM)):
                self.answered += 1
                return ()
            return (whole,)
        if allowed:
            start = start[: header + HEADER_BYTES]
            return (start, *rest(views, len(start)))
        return views


def peek(views: list[memoryview], offset: int) -> int:
    """Return a byte somewhere in a chain."""
    for view in views:
        if offset < len(view):
            return view[offset]
        offset -= len(view)
    return 0


def take(views: list[memoryview], size: int) -> bytes:
    """Return a copy of the first bytes of a chain."""
    if len(views[0]) >= size:
        return bytes(views[0][:size])
    found = b""
    for view in views:
        found += view[: size - len(found)]
        if len(found) == size:
            break
    return found


def rest(views: list[memoryview], size: int) -> list[memoryview]:
    """Return what lies behind the first bytes of a chain."""
    for position, view in enumerate(views):
        if size < len(view):
            return [view[size:], *views[position + 1 :]]
        size -= len(view)
    return []
