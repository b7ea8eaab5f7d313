"""The device's side of a split virtqueue, in memory that a running guest writes (virtio 1.2, 2.7).

`Queue` is the slow and simple implementation: it takes one chain at a time, checks each descriptor, and says what is
wrong with it.  Devices with few requests use it.  The hot loops of other devices inline it, and tests compare them with
it.

Reads use one bound `Struct.unpack_from`, which copies: the values that are used are the ones that were checked.  Stores
use cast views only, because `struct.pack_into` clears its target first, and the guest would see that.
"""

from struct import Struct, pack

from vmd.errors import GuestError
from vmd.virtio.fence import full_fence
from vmd.virtio.spec import (
    DESC_BYTES,
    VIRTIO_F_ANY_LAYOUT,
    VIRTIO_F_NOTIFY_ON_EMPTY,
    VIRTIO_F_RING_EVENT_IDX,
    VIRTIO_F_RING_INDIRECT_DESC,
    VIRTQ_AVAIL_F_NO_INTERRUPT,
    VIRTQ_DESC_F_INDIRECT,
    VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_WRITE,
    VIRTQ_USED_F_NO_NOTIFY,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.guestmem import GuestMemory

FEATURES = (  # features of rings, which all devices offer
    1 << VIRTIO_F_RING_INDIRECT_DESC
    | 1 << VIRTIO_F_RING_EVENT_IDX
    | 1 << VIRTIO_F_ANY_LAYOUT
    | 1 << VIRTIO_F_NOTIFY_ON_EMPTY
)
DESC = Struct("<QIHH")
U16 = Struct("<H")
CHAIN_BYTES_MAX = 1 << 32  # largest sum of the lengths in a chain (2.7.5.2)
TABLE_BYTES_MAX = DESC_BYTES << 15  # largest indirect table: as many descriptors as the largest queue has
# Longest chain in an indirect table.  A driver may not exceed the size of its queue (2.7.5.3.1), but some drivers do.
CHAIN_MAX = 1024


class Chain:
    """One descriptor chain: (gpa, length) of the buffers that the device reads, and of those that it writes."""

    __slots__ = ("head", "readable", "writable")

    def __init__(self, head: int, readable: list[tuple[int, int]], writable: list[tuple[int, int]]) -> None:
        self.head = head
        self.readable = readable
        self.writable = writable


class Queue:
    """One queue of an active device.  Only one thread uses it."""

    def __init__(
        self,
        memory: "GuestMemory",
        features: int,
        size: int,
        desc: int,
        avail: int,
        used: int,
        next_avail: int = 0,
        next_used: int = 0,
    ) -> None:
        """Raises GuestError unless each of the three parts is in one region of memory."""
        if size == 0 or size & size - 1 or size > 1 << 15:
            raise GuestError(f"queue size {size} is not a power of two up to 32768")
        for what, gpa, align in (("descriptor table", desc, 16), ("available ring", avail, 2), ("used ring", used, 4)):
            if gpa % align:
                raise GuestError(f"{what} at {gpa:#x} is not aligned to {align}")
        self.memory = memory
        self.size = size
        self.mask = size - 1
        self.indirect = bool(features >> VIRTIO_F_RING_INDIRECT_DESC & 1)
        self.event_idx = bool(features >> VIRTIO_F_RING_EVENT_IDX & 1)
        self.notify_on_empty = bool(features >> VIRTIO_F_NOTIFY_ON_EMPTY & 1)
        self.desc = memory.offset(desc, DESC_BYTES * size)
        self.avail = memory.offset(avail, 6 + 2 * size)
        self.used = memory.offset(used, 6 + 8 * size, write=True)
        raw = memory.memory
        self.table = raw[self.desc : self.desc + DESC_BYTES * size]
        self.avail_ring = raw[self.avail + 4 : self.avail + 4 + 2 * size].cast("H")
        # An element is stored as one number, `id | len << 32`; then the index, which announces it, is stored.
        self.used_ring = raw[self.used + 4 : self.used + 4 + 8 * size].cast("Q")
        self.used_bytes = raw[self.used + 4 : self.used + 4 + 8 * size]
        self._used_idx = raw[self.used + 2 : self.used + 4].cast("H")
        self._avail_event = raw[self.used + 4 + 8 * size : self.used + 6 + 8 * size].cast("H")
        self.next_avail = next_avail & 0xFFFF
        self.next_used = next_used & 0xFFFF
        self.published = self.next_used  # the used index that the guest can see
        self.signalled_used = self.next_used  # the used index at the last decision whether to interrupt

    # --- while the kernel serves the queue -----------------------------------------------------------------

    @property
    def visible(self) -> int:
        """The used index in the ring.  A driver may have changed it."""
        index: int = self._used_idx[0]
        return index

    def go_on_at(self, next_avail: int) -> None:
        """Take the queue over from the kernel: it has told the guest of all chains before the ring's used index."""
        self.next_avail = next_avail
        self.next_used = self.published = self.signalled_used = self.visible

    # --- taking ------------------------------------------------------------------------------------------

    def available(self) -> int:
        """Return how many chains wait.  Raises GuestError if the index is impossible."""
        raw = self.memory.memory
        waiting: int = U16.unpack_from(raw, self.avail + 2)[0] - self.next_avail & 0xFFFF
        if waiting > self.size:
            raise GuestError(f"available index is {waiting} ahead, in a queue of {self.size}")
        return waiting

    def take(self) -> Chain | None:
        """Take the next chain, or return None.  Raises GuestError: then the queue cannot be used any more."""
        if not self.available():
            return None
        head: int = U16.unpack_from(self.memory.memory, self.avail + 4 + 2 * (self.next_avail & self.mask))[0]
        chain = self.walk(head)
        self.next_avail = self.next_avail + 1 & 0xFFFF
        return chain

    def heads(self, count: int, behind: int = 0) -> list[int]:
        """Return the unchecked heads of `count` waiting chains.  The first `behind` waiting chains are skipped."""
        first = self.next_avail + behind & self.mask
        heads: list[int] = self.avail_ring[first : first + count].tolist()
        if len(heads) < count:
            heads += self.avail_ring[: count - len(heads)].tolist()
        return heads

    def walk(self, head: int) -> Chain:
        """Follow a chain from its head, also through an indirect table (2.7.5).  Raises GuestError."""
        raw = self.memory.memory
        base, size, nested = self.desc, self.size, False
        longest = size
        index, steps, total = head, 0, 0
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        while True:
            if index >= size:
                raise GuestError(f"descriptor {index} outside a table of {size}")
            # A chain that is longer than its table visits an entry twice: it has a loop.
            if steps >= longest:
                raise GuestError(f"descriptor chain from {head} does not end")
            steps += 1
            gpa, length, flags, following = DESC.unpack_from(raw, base + DESC_BYTES * index)
            if flags & VIRTQ_DESC_F_INDIRECT:
                if not self.indirect or nested or flags & VIRTQ_DESC_F_NEXT:
                    raise GuestError(f"descriptor {index} is indirect, which is not allowed here")
                if length == 0 or length % DESC_BYTES or length > TABLE_BYTES_MAX:
                    raise GuestError(f"indirect table of {length} bytes")
                base, size, nested = self.memory.offset(gpa, length), length // DESC_BYTES, True
                index, steps = 0, 0
                longest = min(size, CHAIN_MAX)
                continue
            total += length
            if total > CHAIN_BYTES_MAX:
                raise GuestError(f"descriptor chain from {head} describes more than 4 GiB")
            if flags & VIRTQ_DESC_F_WRITE:
                writable.append((gpa, length))
            elif writable:
                raise GuestError(f"descriptor {index} is device-readable and follows a device-writable one")
            else:
                readable.append((gpa, length))
            if not flags & VIRTQ_DESC_F_NEXT:
                return Chain(head, readable, writable)
            index = following

    # --- returning chains ----------------------------------------------------------------------------------

    def put(self, head: int, written: int) -> None:
        """Return a chain, into which `written` bytes were written.  The guest sees it after `publish`."""
        self.used_ring[self.next_used & self.mask] = head | written << 32
        self.next_used = self.next_used + 1 & 0xFFFF

    def lay(self, heads: list[int]) -> None:
        """Store the elements of the next chains to return, into which nothing is written, ahead of time.

        The guest does not read them before the index announces them.  To return a chain, the caller increments
        `next_used`.
        """
        elements = pack(f"<{len(heads)}Q", *heads)
        first = 8 * (self.next_used & self.mask)
        room = 8 * self.size - first
        self.used_bytes[first : first + len(elements)] = elements[:room]
        if len(elements) > room:
            self.used_bytes[: len(elements) - room] = elements[room:]

    def publish(self) -> None:
        """Let the guest see all chains that were returned."""
        if self.memory.marking:
            self._mark_given()
        # The elements must be visible before the index that announces them.  x86 keeps stores in order, so plain stores
        # in this order are enough.
        self._used_idx[0] = self.published = self.next_used

    def _mark_given(self) -> None:
        """Mark the pages that were written through the chains that are about to be published.

        If a driver has changed the descriptors of such a chain, wrong pages are marked, which harms only its own guest.
        """
        while self.published != self.next_used:
            element = self.used_ring[self.published & self.mask]
            self.published = self.published + 1 & 0xFFFF
            if element >> 32:
                try:
                    chain = self.walk(element & 0xFFFFFFFF)
                except GuestError:
                    continue
                for gpa, length in chain.writable:
                    self.memory.mark(gpa, length)

    def mark_used(self) -> None:
        """Mark the pages of the used ring, into which `put`, `suppress` and `rearm` store, too."""
        self.memory.mark_file(self.used, 6 + 8 * self.size)

    def wants_interrupt(self) -> bool:
        """Return whether to interrupt the guest for the chains that were published since the last call (2.7.7.2)."""
        new, old = self.next_used, self.signalled_used
        if new == old:
            return False
        full_fence()  # our used index must be visible before we read whether the guest wants an interrupt
        raw = self.memory.memory
        if self.event_idx:
            event = U16.unpack_from(raw, self.avail + 4 + 2 * self.size)[0]
            wanted = (new - event - 1 & 0xFFFF) < (new - old & 0xFFFF)
        else:
            wanted = not U16.unpack_from(raw, self.avail)[0] & VIRTQ_AVAIL_F_NO_INTERRUPT
        self.signalled_used = new
        if self.notify_on_empty and new == self.next_avail:  # no chain is in flight: look whether one waits
            wanted |= U16.unpack_from(raw, self.avail + 2)[0] == self.next_avail
        return bool(wanted)

    def suppress(self) -> None:
        """Ask not to be notified until `rearm`.  A driver may ignore that (2.7.10.1)."""
        if not self.event_idx:  # with EVENT_IDX there is nothing to do: the event index stays at a chain of the past
            self.memory.memory[self.used] = VIRTQ_USED_F_NO_NOTIFY

    def rearm(self, waiting: int = 0) -> bool:
        """Ask to be notified of the next chain.  Return whether one has come meanwhile (2.7.10.1).

        `waiting` chains, which are not enough for the caller, are not counted.
        """
        raw = self.memory.memory
        if self.event_idx:
            self._avail_event[0] = self.next_avail + waiting & 0xFFFF
            full_fence()  # the event index must be visible before we look whether a chain has come
        elif raw[self.used] & VIRTQ_USED_F_NO_NOTIFY:
            raw[self.used] = 0
            full_fence()  # the same for the flag
        return self.available() > waiting
