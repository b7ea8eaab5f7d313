"""The transmit queue (virtio 1.2, 5.1.6.1-2): frames go from the guest to the tap.

The kernel reads a frame straight from the guest's memory, together with the guest's own virtio header.  The kernel
reads the header once, checks it, and refuses a header that does not fit the frame.  This process inspects all frames of
a `locked` or `local` interface.  Of other interfaces it inspects only frames that may tell an address of the guest.
"""

import posix as os
import select
import time
from struct import error as StructError

from vmd.devices.vionet.addresses import LENGTHS, LOOK_BYTES
from vmd.devices.vionet.ethernet import HEADER_BYTES, SOURCE
from vmd.devices.vionet.tap import DOWN, GONE
from vmd.devices.vionet.worker import GSO_FRAME_MAX, Worker
from vmd.errors import GuestError
from vmd.ipc import devmsg
from vmd.log import RateLimit
from vmd.units import IOV_MAX
from vmd.virtio import spec
from vmd.virtio.queue import CHAIN_BYTES_MAX, DESC, TABLE_BYTES_MAX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    from vmd.devices.vionet.addresses import Addresses
    from vmd.devices.vionet.tap import Tap
    from vmd.devices.vionet.worker import Services
    from vmd.virtio.queue import Queue

    class Answers(Protocol):
        """The part of `local.LocalNetwork` that is used here: it answers the guest in place of the network."""

        look_bytes: int
        frame_max: int

        def concerns(self, start: bytes) -> bool:
            """Return whether a frame may be for us; `start` is its first `look_bytes`, or the whole frame."""

        def answer(self, frame: bytes, sum_missing: bool) -> bool:
            """Answer a frame if it is for us; return whether it is.

            `sum_missing`: the guest has left the frame's checksum to the device.
            """


NUMBER = 1  # the queue's number
BUDGET = 128  # frames of one turn
GIVE_BYTES = 256 << 10  # bytes after which frames are given back: the guest makes new ones while others are sent
STEPS = range(IOV_MAX - 1)  # descriptors of a chain; `_cached` may put one more view in front
CACHED_TABLES = range(8 * DESC.size, 64 * DESC.size + 1)  # sizes in bytes of the indirect tables that are cached
WINDOWS_MAX = 1024  # views of guest memory in the cache; about 200 bytes each
FRAME_MAX = 16384 + HEADER_BYTES  # the longest frame that a tap of OpenBSD takes (*cat. 6.5*)
GSO_TYPE = 1  # offset of gso_type in the header
BUSY_S = 1.0  # a frame is dropped if the tap takes nothing during this time

PACKETS, BYTES = (devmsg.COUNTER_NAMES.index(name) for name in ("tx_packets", "tx_bytes"))

NEXT, WRITE, INDIRECT = spec.VIRTQ_DESC_F_NEXT, spec.VIRTQ_DESC_F_WRITE, spec.VIRTQ_DESC_F_INDIRECT


class Transmitter(Worker):
    """The transmit queue."""

    def __init__(self, services: "Services", kick: int, tap: "Tap", failed: "Callable[[OSError], None]") -> None:
        """`failed` is called, on the thread that serves, when the tap is gone or down."""
        super().__init__(services, NUMBER, kick, BUDGET)
        self.tap = tap
        self.failed = failed
        self.header = spec.NET_HDR_BYTES_LEGACY
        self.allowed = b""  # of a locked interface: the only source address; empty: any
        self.answers: Answers | None = None
        self.addresses: Addresses | None = None  # learns the guest's addresses
        self.busy_until_s = 0.0  # the tap is full; the frame is dropped at this time.  0: the tap is not full
        self.complaints = RateLimit()
        self.region = (0, 0, 0)  # the last used region: start gpa, end gpa, and (offset in memory - gpa)
        self.tables: dict[bytes, tuple[list[memoryview], int]] = {}  # cache; the key omits the first descriptor
        self.windows = 0  # number of views in the cache
        self.others: tuple[int, ...] = ()  # the rarely changing figures, as they were stored last
        self.packets = 0
        self.short = self.long = self.spoofed = self.refused = self.no_link = self.dropped_busy = self.answered = 0

    def begin(self) -> None:
        """Wait for notifications only, not for the tap."""
        super().begin()
        self.busy_until_s = 0.0

    def serve(self, queue: "Queue") -> bool:
        """Send the available frames, and those that become available meanwhile, up to a budget."""
        queue.suppress()
        self.tap_events = 0
        left = self.budget
        while left > 0 and (waiting := queue.available()):
            try:
                left -= self._drain(queue, min(waiting, left))
            finally:  # also when the ring turns out to be broken
                self.show()
                self.give(queue)
            if self.tap_events:
                return False
        self.busy_until_s = 0.0
        return queue.rearm()

    def count_answered(self) -> None:
        """Count a frame that the main thread has answered, while the kernel moves the frames."""
        self.answered += 1
        self.show()

    def show(self) -> None:
        """Store the figures, in the order of devmsg.FIGURES."""
        self.figures[PACKETS] = self.packets
        self.figures[BYTES] = self.bytes
        others = (
            self.short, self.long, self.spoofed, self.refused, self.no_link, self.dropped_busy, self.answered,
        )  # fmt: skip
        if others != self.others:  # seldom
            self.others = others
            for place, value in enumerate(others, BYTES + 1):
                self.figures[place] = value

    def _drain(self, queue: "Queue", waiting: int) -> int:
        """Send the next `waiting` frames; return how many were sent or dropped: all, unless the tap is full.

        This is the hot loop.  It sends a frame that need not be inspected; `_filter` decides about the others.  Its
        locals:

            heads                of the chains of this turn; `done` of them are finished, `lost` of these were dropped
            table, descriptor    the descriptor table, and the function that reads one: gpa, length, flags, following
            low, high, delta     the last used region: start gpa, end gpa, and (offset in `raw` - gpa)
            shortest, longest    lengths of frames that need not be inspected, except the lengths in `telling`
            largest              the longest of them that is to be segmented
            total, limit         bytes that were sent; when `total` reaches `limit`, finished chains are given back
        """
        raw, table, tap, header = queue.memory.memory, queue.table, self.tap.fd, self.header
        descriptor, pieces, write, writev = DESC.unpack_from, self._pieces, os.write, os.writev
        low, high, delta = self.region
        plain = self.link_up and not self.inspects
        shortest = header + HEADER_BYTES
        longest, largest = (header + FRAME_MAX, header + GSO_FRAME_MAX) if plain else (0, 0)
        telling = () if self.addresses is None else [header + length for length in LENGTHS]
        heads = queue.heads(waiting)
        queue.lay(heads)
        next_avail, next_used = queue.next_avail, queue.next_used
        done = lost = total = 0
        limit = GIVE_BYTES
        try:
            for head in heads:
                try:
                    gpa, length, flags, following = descriptor(table, head << 4)
                except StructError:
                    queue.walk(head)  # raises GuestError: the head is outside the table
                    raise
                try:
                    if (
                        not flags and low <= gpa and gpa + length <= high
                        and shortest <= length <= longest and length not in telling
                    ):  # fmt: skip
                        gpa += delta
                        write(tap, raw[gpa : gpa + length])
                        total += length
                    else:
                        views, length = pieces(queue, head, gpa, length, flags, following)
                        low, high, delta = self.region
                        if (
                            (shortest <= length <= longest and length not in telling)
                            or (longest < length <= largest and len(views[0]) > GSO_TYPE and views[0][GSO_TYPE])
                        ):  # fmt: skip
                            writev(tap, views)
                            total += length
                        elif chosen := self._filter(views, length - header):
                            writev(tap, chosen)
                            total += length
                        else:
                            lost += 1
                except OSError as error:
                    if not self._not_sent(error, done - lost):
                        break
                    lost += 1
                    if not self.link_up:
                        longest = largest = 0
                done += 1
                if total >= limit:
                    limit = total + GIVE_BYTES
                    queue.next_avail, queue.next_used = next_avail + done & 0xFFFF, next_used + done & 0xFFFF
                    self.figures[PACKETS] = self.packets + done - lost
                    self.figures[BYTES] = self.bytes + total - (done - lost) * header
                    self.give(queue)
        finally:
            queue.next_avail, queue.next_used = next_avail + done & 0xFFFF, next_used + done & 0xFFFF
            self.packets += done - lost
            self.bytes += total - (done - lost) * header
        return done

    def _pieces(
        self, queue: "Queue", head: int, gpa: int, length: int, flags: int, following: int
    ) -> "tuple[list[memoryview], int]":
        """Return views of a chain's buffers, and their total length.  The caller has read the first descriptor."""
        try:
            table: memoryview | bytes = queue.table
            if flags == INDIRECT and queue.indirect and 0 < length <= TABLE_BYTES_MAX and not length & 15:
                low, high, delta = self.region
                if gpa < low or gpa + length > high:
                    low, high, delta = self._find_region(queue, gpa, length)
                table = queue.memory.memory[gpa + delta : gpa + delta + length]
                if length in CACHED_TABLES:
                    return self._cached(queue, table)
                gpa, length, flags, following = DESC.unpack_from(table)
            return self._follow(queue, table, gpa, length, flags, following)
        except (StructError, GuestError):
            return self._gather(queue, head)  # it accepts every valid chain, and says what is wrong with others

    def _follow(
        self, queue: "Queue", table: memoryview | bytes, gpa: int, length: int, flags: int, following: int
    ) -> "tuple[list[memoryview], int]":
        """Do what `_pieces` does, from a descriptor on that the caller has read.

        Buffers that are adjacent in memory get one view.

        Raises:
            GuestError, struct.error: the chain is broken or unusual; `_gather` has to look at it.
        """
        raw, descriptor = queue.memory.memory, DESC.unpack_from
        low, high, delta = self.region
        views: list[memoryview] = []
        total = 0
        begin = end = gpa
        for _ in STEPS:
            if gpa != end:
                if begin < low or end > high:
                    low, high, delta = self._find_region(queue, begin, end - begin)
                views.append(raw[begin + delta : end + delta])
                total += end - begin
                begin = end = gpa
            end += length
            if flags != NEXT:
                break
            gpa, length, flags, following = descriptor(table, following << 4)
        else:
            raise GuestError(f"more than {len(STEPS)} pieces")
        if begin < low or end > high:
            low, high, delta = self._find_region(queue, begin, end - begin)
        views.append(raw[begin + delta : end + delta])
        total += end - begin
        if flags or total > CHAIN_BYTES_MAX:
            raise GuestError("a chain that is unusual, or broken")
        return views, total

    def _find_region(self, queue: "Queue", gpa: int, length: int) -> tuple[int, int, int]:
        """Return the region that contains a buffer, and remember it.  Raises GuestError if there is none."""
        for start, stop, offset, _ in queue.memory.ranges:
            if start <= gpa and gpa + length <= stop:
                self.region = start, stop, offset - start
                return self.region
        raise GuestError(f"guest address {gpa:#x}: not {length} bytes in one region")

    def _cached(self, queue: "Queue", table: memoryview) -> "tuple[list[memoryview], int]":
        """Do what `_pieces` does for a table of many descriptors, with a cache.  Raises as `_follow`.

        Such frames consist of headers, and of pages of a file or of a program's memory.  When the same pages are sent
        again, their table is the same, except the first descriptor, which is for the headers.
        """
        copy = bytes(table)
        gpa, length, flags, following = DESC.unpack_from(copy)
        # If the first descriptor leads to the second, the others describe the rest of the chain completely: a chain
        # that came back to the first would never end.
        if flags != NEXT or following != 1:
            return self._follow(queue, copy, gpa, length, flags, following)
        rest = copy[DESC.size :]
        known = self.tables.get(rest)
        if known is None:
            known = self._follow(queue, copy, *DESC.unpack_from(copy, DESC.size))
            self.windows += len(known[0])
            if self.windows > WINDOWS_MAX:
                self.tables.clear()
                self.windows = len(known[0])
            self.tables[rest] = known
        low, high, delta = self.region
        if gpa < low or gpa + length > high:
            low, high, delta = self._find_region(queue, gpa, length)
        views, total = known
        return [queue.memory.memory[gpa + delta : gpa + delta + length], *views], length + total

    def _gather(self, queue: "Queue", head: int) -> "tuple[list[memoryview], int]":
        """Do what `_pieces` does for a chain of any form, the slow way.  Raises GuestError."""
        chain = queue.walk(head)
        if chain.writable:
            raise GuestError("frame with a writable descriptor")
        length = sum(part for _, part in chain.readable)
        views = [
            window for gpa, part in chain.readable if part for window in queue.memory.slices(gpa, part)
        ]
        if len(views) >= IOV_MAX and length <= self.header + GSO_FRAME_MAX:
            views = [memoryview(b"".join(views))]  # writev takes no more than IOV_MAX
        return views, length

    def _not_sent(self, error: OSError, sent: int) -> bool:
        """Handle an error of a write, after `sent` frames without one.

        Returns True if the frame is dropped, False if it stays in the ring because the tap is full.
        """
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

    def _filter(self, views: list[memoryview], length: int) -> "Sequence[memoryview | bytes]":
        """Return the views to send, or nothing if the frame is not to be sent.  `length` excludes the header."""
        if length < HEADER_BYTES:
            if length < 0:
                raise GuestError(f"frame without a header: {self.header + length} of {self.header} bytes")
            self.short += 1
        elif length > FRAME_MAX and not (length <= GSO_FRAME_MAX and peek(views, GSO_TYPE)):
            self.long += 1
        elif not self.link_up:
            self.no_link += 1
        else:
            if self.addresses is not None and length in LENGTHS:
                self._learn(views)
            return self._inspect(views, length) if self.inspects else views
        return ()

    @property
    def inspects(self) -> bool:
        """Whether each frame is inspected."""
        return bool(self.allowed) or self.answers is not None

    def _learn(self, views: list[memoryview]) -> None:
        """Learn the guest's address, if the frame tells one."""
        assert self.addresses is not None
        self.addresses.learn(take(views, self.header + LOOK_BYTES)[self.header :])

    def _inspect(self, views: list[memoryview], length: int) -> "Sequence[memoryview | bytes]":
        """Inspect a frame; return the views to send, or nothing if it is not to be sent.

        Of a locked interface the inspected bytes are copied first, and the copy is sent: the guest cannot change them
        in between.
        """
        header, allowed, answers = self.header, self.allowed, self.answers
        frame = b""
        start = take(views, header + (answers.look_bytes if answers else HEADER_BYTES))
        if answers is not None and length <= answers.frame_max and answers.concerns(start[header:]):
            frame = start = b"".join(views)
        if allowed and start[header:][SOURCE] != allowed:
            self.spoofed += 1
            source = start[header:][SOURCE].hex(":")
            self.complaints.warn(f"frame dropped: its source address {source} is not the guest's")
            return ()
        if frame:
            assert answers is not None
            if answers.answer(frame[header:], bool(frame[0] & spec.VIRTIO_NET_HDR_F_NEEDS_CSUM)):
                self.answered += 1
                return ()
            return (frame,)
        if allowed:
            start = start[: header + HEADER_BYTES]
            return (start, *rest(views, len(start)))
        return views


def peek(views: list[memoryview], offset: int) -> int:
    """Return the byte at an offset of a chain."""
    for view in views:
        if offset < len(view):
            return view[offset]
        offset -= len(view)
    return 0


def take(views: list[memoryview], size: int) -> bytes:
    """Return a copy of the first `size` bytes of a chain."""
    if len(views[0]) >= size:
        return bytes(views[0][:size])
    found = b""
    for view in views:
        found += view[: size - len(found)]
        if len(found) == size:
            break
    return found


def rest(views: list[memoryview], size: int) -> list[memoryview]:
    """Return views of a chain without its first `size` bytes."""
    for position, view in enumerate(views):
        if size < len(view):
            return [view[size:], *views[position + 1 :]]
        size -= len(view)
    return []
