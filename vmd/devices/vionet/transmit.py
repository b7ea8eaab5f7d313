"""From the guest to the tap: the thread of the transmit queue (virtio 1.2, 5.1.6.1-2).

A frame goes from the guest's memory straight into the kernel, with the guest's own virtio header before it: the
kernel reads that once, checks it, and refuses what does not fit the frame.  Only an interface that is `locked` or
`local` has its frames looked at here.
"""

import os
import select

from vmd.devices.vionet.ethernet import HEADER_BYTES, SOURCE
from vmd.devices.vionet.tap import DOWN, GONE
from vmd.devices.vionet.worker import POLLIN, Worker
from vmd.errors import GuestError
from vmd.log import RateLimit
from vmd.virtio import spec
from vmd.virtio.queue import CHAIN_BYTES_MAX, DESC, U16

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

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
BUDGET = 64  # frames of one wake-up
BUDGET_BYTES = 512 << 10  # large frames may be all that the guest has: it makes new ones while others are sent
IOV_MAX = 1024
FRAME_MAX = 16384 + HEADER_BYTES  # as long as a tap of OpenBSD's takes (*cat. 6.5*)
GSO_FRAME_MAX = 65550  # to be segmented: an IP packet of 64 KiB
GSO_TYPE = 1  # offset in the header
BUSY_TIMEOUT_MS = 1000  # a tap that takes nothing for so long loses the frame

NEXT, WRITE, INDIRECT = spec.VIRTQ_DESC_F_NEXT, spec.VIRTQ_DESC_F_WRITE, spec.VIRTQ_DESC_F_INDIRECT


class Transmitter(Worker):
    """The transmit queue's thread."""

    def __init__(self, services: "Services", kick: int, tap: "Tap", failed: "Callable[[OSError], None]") -> None:
        """`failed` is called on this thread when the tap is gone or down."""
        super().__init__(services, NUMBER, kick)
        self.tap = tap
        self.failed = failed
        self.header = spec.NET_HDR_BYTES_LEGACY
        self.allowed = b""  # of a locked interface: the one address it sends from; empty: any
        self.answers: Answers | None = None
        self.busy = False  # the tap takes nothing at the moment
        self.complaints = RateLimit()
        self.packets = self.bytes = 0
        self.short = self.long = self.spoofed = self.refused = self.no_link = self.dropped_busy = self.answered = 0

    def begin(self) -> None:
        """Wait for notifications, not for the tap."""
        self._set_busy(False)

    def _set_busy(self, busy: bool) -> None:
        """Wait for the tap instead of the guest, or the other way round."""
        if busy != self.busy:
            self.busy = busy
            if busy:
                self.poll.unregister(self.kick)
                self.poll.register(self.tap.fd, select.POLLOUT)
            else:
                self.poll.unregister(self.tap.fd)
                self.poll.register(self.kick, POLLIN)
            self.timeout_ms = BUSY_TIMEOUT_MS if busy else None

    def serve(self, queue: "Queue") -> bool:
        """Send what waits, up to a budget."""
        queue.suppress()
        self._set_busy(False)
        try:
            more = self._drain(queue)
        finally:  # of a ring that breaks half-way, too
            queue.publish()
            if queue.wants_interrupt():
                self.services.interrupt(NUMBER)
        if self.busy:
            return False
        return more or queue.rearm()

    def _drain(self, queue: "Queue") -> bool:
        """Take frames and send them; return whether some are left.

        The hot loop.  It knows chains as drivers lay them out, each descriptor in one region of memory; anything
        else is left to `Queue.walk`.
        """
        memory = queue.memory
        raw, ranges = memory.memory, memory.ranges
        table, ring, mask, table_size = queue.desc, queue.avail + 4, queue.mask, queue.size
        indirect, header, tap = queue.indirect, self.header, self.tap.fd
        descriptor, descriptors, word, writev = DESC.unpack_from, DESC.iter_unpack, U16.unpack_from, os.writev
        used_ring, next_avail, next_used = queue.used_ring, queue.next_avail, queue.next_used
        low = high = delta = 0  # the region that was met last, and the way from its addresses to places in `raw`
        look = bool(self.allowed) or self.answers is not None
        waiting = queue.available()
        left = min(waiting, BUDGET)
        more = waiting > left
        packets = total = 0
        try:
            while left:
                left -= 1
                head = following = word(raw, ring + 2 * (next_avail & mask))[0]
                views: list[memoryview] = []
                length = 0
                usual = False
                steps = IOV_MAX - 1  # one more piece may be put in front
                while following < table_size and steps:  # `break` is for the last, and for what is of no usual form
                    steps -= 1
                    gpa, part, flags, following = descriptor(raw, table + 16 * following)
                    if flags == INDIRECT and indirect and not views:
                        if not part or part & 15 or part >= 16 * IOV_MAX:
                            break
                        for start, end, offset, _ in ranges:
                            if start <= gpa and gpa + part <= end:
                                gpa += offset - start
                                break
                        else:
                            break
                        position = 0
                        for gpa, part, flags, following in descriptors(raw[gpa : gpa + part]):
                            position += 1
                            if not part:
                                break
                            if gpa < low or gpa + part > high:
                                for start, end, offset, _ in ranges:
                                    if start <= gpa and gpa + part <= end:
                                        low, high, delta = start, end, offset - start
                                        break
                                else:
                                    break
                            gpa += delta
                            views.append(raw[gpa : gpa + part])
                            length += part
                            if flags != NEXT or following != position:  # tables are laid out in order
                                usual = not flags
                                break
                        break
                    if not part:
                        break
                    if gpa < low or gpa + part > high:
                        for start, end, offset, _ in ranges:
                            if start <= gpa and gpa + part <= end:
                                low, high, delta = start, end, offset - start
                                break
                        else:
                            break
                    gpa += delta
                    views.append(raw[gpa : gpa + part])
                    length += part
                    if flags != NEXT:
                        usual = not flags
                        break
                if not usual or length > CHAIN_BYTES_MAX:
                    views, length = self._gather(queue, head)
                length -= header
                if length < HEADER_BYTES:
                    if length < 0:
                        raise GuestError(f"frame without a header: {length + header} of {header} bytes")
                    self.short += 1
                elif length > FRAME_MAX and not (length <= GSO_FRAME_MAX and peek(views, GSO_TYPE)):
                    self.long += 1
                elif not self.link_up:
                    self.no_link += 1
                else:
                    chosen: Sequence[memoryview | bytes] = views
                    if look:
                        chosen = self._look(views, length)
                    if chosen:
                        try:
                            writev(tap, chosen)
                        except OSError as error:
                            if not self._not_sent(error):
                                return False
                        else:
                            packets += 1
                            total += length
                used_ring[next_used & mask] = head
                next_used += 1
                next_avail += 1
                if total > BUDGET_BYTES:
                    return True
            return more
        finally:
            queue.next_avail, queue.next_used = next_avail & 0xFFFF, next_used & 0xFFFF
            self.packets += packets
            self.bytes += total

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

    def _not_sent(self, error: OSError) -> bool:
        """Take an error of a write; return whether the frame is lost, or stays where it is."""
        if isinstance(error, BlockingIOError):
            if not self.timed_out:
                self._set_busy(True)
                return False
            self.timed_out = False
            self.dropped_busy += 1
        elif error.errno in GONE or error.errno in DOWN:
            self.link_up = False
            self.no_link += 1
            self.failed(error)
        else:
            self.refused += 1
            self.complaints.warn(f"{self.tap.name}: frame refused: {error.strerror}")
        return True

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
