"""A split virtqueue from the device's side, in memory that a running guest writes (virtio 1.2, 2.7).

`Queue` is the slow and obvious one: it takes one chain at a time, checks each descriptor in a place of its own,
and says what is wrong with it.  Devices with few requests use it as it is; the hot loops of others inline it
and are held equal to it by tests.

Reads go through one bound `Struct.unpack_from`, which copies: what was checked is what is used.  Stores go
through cast views only, because `struct.pack_into` would show the guest a zero in between.
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

FEATURES = (  # of rings, which all devices offer
    1 << VIRTIO_F_RING_INDIRECT_DESC
    | 1 << VIRTIO_F_RING_EVENT_IDX
    | 1 << VIRTIO_F_ANY_LAYOUT
    | 1 << VIRTIO_F_NOTIFY_ON_EMPTY
)
DESC = Struct("<QIHH")
U16 = Struct("<H")
CHAIN_BYTES_MAX = 1 << 32  # one chain may not describe more (2.7.5.2: lengths add up to 2^32 at most)
CHAIN_MAX = 1024  # descriptors; a driver may not go beyond its queue's size (2.7.5.3.1), some do in indirect tables


class Chain:
    """One descriptor chain: (gpa, length) of what the device may read, then of what it may write."""

    __slots__ = ("head", "readable", "writable")

    def __init__(self, head: int, readable: list[tuple[int, int]], writable: list[tuple[int, int]]) -> None:
        self.head = head
        self.readable = readable
        self.writable = writable


class Queue:
    """One queue of an active device; owned by one thread."""

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
        """Check that the three parts lie in memory, each in one region.  Raises GuestError."""
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
        # Stores: `id | len << 32` of an element in one go, then the index that announces it.
        self.used_ring = raw[self.used + 4 : self.used + 4 + 8 * size].cast("Q")
        self.used_bytes = raw[self.used + 4 : self.used + 4 + 8 * size]
        self._used_idx = raw[self.used + 2 : self.used + 4].cast("H")
        self._avail_event = raw[self.used + 4 + 8 * size : self.used + 6 + 8 * size].cast("H")
        self.next_avail = next_avail & 0xFFFF
        self.next_used = next_used & 0xFFFF
        self.published = self.next_used  # what the guest can see
        self.signalled_used = self.next_used  # what the guest had been told of when it was last interrupted

    # --- while the kernel serves it ------------------------------------------------------------------------

    @property
    def visible(self) -> int:
        """The used index as it stands in the ring, where a driver could have changed it."""
        index: int = self._used_idx[0]
        return index

    def go_on_at(self, next_avail: int) -> None:
        """Go on where another has stopped, who has given back and told the guest of all that the ring says."""
        self.next_avail = next_avail
        self.next_used = self.published = self.signalled_used = self.visible

    # --- taking ------------------------------------------------------------------------------------------

    def available(self) -> int:
        """Return how many chains wait.  Raises GuestError if the index is beyond reason."""
        raw = self.memory.memory
        waiting: int = U16.unpack_from(raw, self.avail + 2)[0] - self.next_avail & 0xFFFF
        if waiting > self.size:
            raise GuestError(f"available index runs {waiting} ahead in a queue of {self.size}")
        return waiting

    def take(self) -> Chain | None:
        """Take the next chain, if there is one.  Raises GuestError; the queue can then no longer be trusted."""
        if not self.available():
            return None
        head: int = U16.unpack_from(self.memory.memory, self.avail + 4 + 2 * (self.next_avail & self.mask))[0]
        chain = self.walk(head)
        self.next_avail = self.next_avail + 1 & 0xFFFF
        return chain

    def heads(self, count: int, behind: int = 0) -> list[int]:
        """Return the heads of chains, not checked: so many that wait, behind those that are known already."""
        first = self.next_avail + behind & self.mask
        heads: list[int] = self.avail_ring[first : first + count].tolist()
        if len(heads) < count:
            heads += self.avail_ring[: count - len(heads)].tolist()
        return heads

    def walk(self, head: int) -> Chain:
        """Follow a chain from its head (2.7.5), indirect or not."""
        raw = self.memory.memory
        base, size, nested = self.desc, self.size, False
        longest = size
        index, steps, total = head, 0, 0
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        while True:
            if index >= size:
                raise GuestError(f"descriptor {index} outside a table of {size}")
            # A chain longer than its table visits an entry twice: the guest built a loop.
            if steps >= longest:
                raise GuestError(f"descriptor chain from {head} does not end")
            steps += 1
            gpa, length, flags, following = DESC.unpack_from(raw, base + DESC_BYTES * index)
            if flags & VIRTQ_DESC_F_INDIRECT:
                if not self.indirect or nested or flags & VIRTQ_DESC_F_NEXT:
                    raise GuestError(f"indirect descriptor {index} where none is allowed")
                if length == 0 or length % DESC_BYTES or length > DESC_BYTES * 32768:
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
                raise GuestError(f"descriptor {index} is for reading, behind one for writing")
            else:
                readable.append((gpa, length))
            if not flags & VIRTQ_DESC_F_NEXT:
                return Chain(head, readable, writable)
            index = following

    # --- giving back ---------------------------------------------------------------------------------------

    def put(self, head: int, written: int) -> None:
        """Give a chain back, with the number of bytes written into it; `publish` makes it known."""
        self.used_ring[self.next_used & self.mask] = head | written << 32
        self.next_used = self.next_used + 1 & 0xFFFF

    def lay(self, heads: list[int]) -> None:
        """Store the elements of the next chains to be given back, into which nothing is written, ahead of time.

        Nobody looks at them before the index says so; to give them back is to let `next_used` go on.
        """
        elements = pack(f"<{len(heads)}Q", *heads)
        first = 8 * (self.next_used & self.mask)
        room = 8 * self.size - first
        self.used_bytes[first : first + len(elements)] = elements[:room]
        if len(elements) > room:
            self.used_bytes[: len(elements) - room] = elements[room:]

    def publish(self) -> None:
        """Let the guest see everything that was put."""
        if self.memory.marking:
            self._mark_given()
        # The elements must be in memory before the index that announces them.  x86 keeps stores in order, so plain
        # stores in this order are enough.
        self._used_idx[0] = self.published = self.next_used

    def _mark_given(self) -> None:
        """Mark what was written into the chains that are about to be published.

        A driver that changes a chain it has not got back misleads nobody but itself.
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
        """Mark the used ring: we store into it at other times than when we publish, too."""
        self.memory.mark_file(self.used, 6 + 8 * self.size)

    def wants_interrupt(self) -> bool:
        """Return whether the guest is to be told of what was published since it was last told (2.7.7.2)."""
        new, old = self.next_used, self.signalled_used
        if new == old:
            return False
        full_fence()  # our used index must be visible before we look at what the guest wants
        raw = self.memory.memory
        if self.event_idx:
            event = U16.unpack_from(raw, self.avail + 4 + 2 * self.size)[0]
            wanted = (new - event - 1 & 0xFFFF) < (new - old & 0xFFFF)
        else:
            wanted = not U16.unpack_from(raw, self.avail)[0] & VIRTQ_AVAIL_F_NO_INTERRUPT
        self.signalled_used = new
        if self.notify_on_empty and new == self.next_avail:  # nothing is in flight; and is nothing waiting?
            wanted |= U16.unpack_from(raw, self.avail + 2)[0] == self.next_avail
        return bool(wanted)

    def suppress(self) -> None:
        """Ask not to be notified, until `rearm`; a driver may do it all the same (2.7.10.1)."""
        if not self.event_idx:  # else it is not asked to again before the index has gone round
            self.memory.memory[self.used] = VIRTQ_USED_F_NO_NOTIFY

    def rearm(self, waiting: int = 0) -> bool:
        """Ask to be notified of the next chain; return whether one has come meanwhile (2.7.10.1).

        `waiting` chains are known to be there, and not enough to go on.
        """
        raw = self.memory.memory
        if self.event_idx:
            self._avail_event[0] = self.next_avail + waiting & 0xFFFF
            full_fence()  # the event index must be visible before we look whether we missed something
        elif raw[self.used] & VIRTQ_USED_F_NO_NOTIFY:
            raw[self.used] = 0
            full_fence()  # ... and so must the flag
        return self.available() > waiting
