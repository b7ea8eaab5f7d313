"""/dev/vhost-net (linux/vhost.h): the kernel moves frames between a tap and the rings of a guest.

Meanwhile this process must not touch the rings.  When the kernel gives them back, the next available index is asked
from the kernel, and the used index is read from the ring.  After that the kernel moves no frame and raises no
interrupt.
"""

import errno
import fcntl
import posix as os
from struct import Struct

from vmd.errors import GuestError, HostError
from vmd.eventfd import eventfd
from vmd.virtio import spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmd.guestmem import GuestMemory
    from vmd.virtio.queue import Queue

VHOST_SET_OWNER = 0xAF01
VHOST_GET_FEATURES = 0x8008AF00
VHOST_SET_FEATURES = 0x4008AF00
VHOST_SET_MEM_TABLE = 0x4008AF03
VHOST_SET_VRING_NUM = 0x4008AF10
VHOST_SET_VRING_ADDR = 0x4028AF11
VHOST_SET_VRING_BASE = 0x4008AF12
VHOST_GET_VRING_BASE = 0xC008AF12
VHOST_SET_VRING_KICK = 0x4008AF20
VHOST_SET_VRING_CALL = 0x4008AF21
VHOST_SET_VRING_ERR = 0x4008AF22
VHOST_NET_SET_BACKEND = 0x4008AF30

FEATURES = Struct("=Q")
MEMORY = Struct("=II")  # vhost_memory: nregions, padding; then a vhost_memory_region for each
REGION = Struct("=QQQQ")  # guest_phys_addr, memory_size, userspace_addr, padding
STATE = Struct("=II")  # vhost_vring_state: index, num
FILE = Struct("=Ii")  # vhost_vring_file: index, fd
ADDR = Struct("=IIQQQQ")  # vhost_vring_addr: index, flags, desc, used, avail, log
NONE = -1  # in place of a descriptor: remove it

# The negotiated features that the kernel has to know.  Bit 27 must not be among them: for a driver it is ANY_LAYOUT,
# for vhost it is VHOST_NET_F_VIRTIO_NET_HDR, which makes the kernel create the headers.  Our headers come from the tap.
# The kernel accepts any layout without the bit.
OF_RINGS = (
    1 << spec.VIRTIO_F_NOTIFY_ON_EMPTY
    | 1 << spec.VIRTIO_F_RING_INDIRECT_DESC
    | 1 << spec.VIRTIO_F_RING_EVENT_IDX
    | 1 << spec.VIRTIO_F_VERSION_1
    | 1 << spec.VIRTIO_NET_F_MRG_RXBUF
)


class Vhost:
    """The rings of one interface.  The kernel has them between `start` and `stop`.  Used on the main thread only.

    The kernel writes to the eventfd `failed` when it has found an error in a ring, and has stopped there.
    """

    def __init__(
        self, fd: int, memory: "GuestMemory", tap: int, kicks: "Sequence[int]", calls: "Sequence[int]"
    ) -> None:
        """Take ownership of `fd`, which is /dev/vhost-net.  No request is made to it yet."""
        self.fd = fd
        self.memory = memory
        self.tap = tap
        self.kicks = kicks
        self.calls = calls
        self.failed = eventfd()
        self.offered = 0  # features of OF_RINGS that the kernel has
        self.owned = False  # `_begin` has called VHOST_SET_OWNER
        self.serving: list[tuple[int, Queue]] = []

    def start(self, features: int, queues: "Sequence[Queue]") -> None:
        """Hand the rings to the kernel.

        Raises:
            GuestError: the driver has changed an index that belongs to the device.
            OSError: the kernel refuses the rings; they are ours as before.
            HostError: the kernel refuses the rings, and does not give them back.
        """
        for number, queue in enumerate(queues):
            if queue.visible != queue.next_used:
                raise GuestError(f"used index of queue {number} is {queue.visible}, and was left at {queue.next_used}")
        self.take_failure()  # an event left from a previous driver's rings
        try:
            if not self.owned:
                self._begin()
            wanted = features & OF_RINGS
            if wanted & ~self.offered:
                raise OSError(errno.EOPNOTSUPP, f"it lacks the features {wanted & ~self.offered:#x}")
            self._ask(VHOST_SET_FEATURES, FEATURES.pack(wanted))
            for number, queue in enumerate(queues):
                self._describe(number, queue)
            for number, queue in enumerate(queues):
                self._ask(VHOST_NET_SET_BACKEND, FILE.pack(number, self.tap))
                self.serving.append((number, queue))
                self._ask(VHOST_SET_VRING_KICK, FILE.pack(number, self.kicks[number]))
        except OSError:
            self.stop()
            raise
        # The guest may have notified before the kernel watched the kicks.
        for kick in self.kicks:
            os.eventfd_write(kick, 1)

    def stop(self) -> None:
        """Take the rings back.  The kernel first finishes the frames that it has begun.

        Raises:
            HostError: the kernel does not give them back.
        """
        serving, self.serving = self.serving, []
        try:
            for number, _ in serving:
                self._ask(VHOST_NET_SET_BACKEND, FILE.pack(number, NONE))
            for number, queue in serving:
                self._ask(VHOST_SET_VRING_KICK, FILE.pack(number, NONE))
                _, next_avail = STATE.unpack(self._ask(VHOST_GET_VRING_BASE, STATE.pack(number, 0)))
                queue.go_on_at(next_avail)
        except OSError as error:
            raise HostError("take rings back from /dev/vhost-net", error) from error

    def take_failure(self) -> bool:
        """Read `failed`; return whether the kernel has written to it."""
        try:
            os.eventfd_read(self.failed)
        except BlockingIOError:
            return False
        return True

    def _begin(self) -> None:
        """Make the requests that are needed once: owner, memory, call and error eventfds.  Raises OSError."""
        self._ask(VHOST_SET_OWNER, 0)
        self.owned = True
        (offered,) = FEATURES.unpack(self._ask(VHOST_GET_FEATURES, bytes(FEATURES.size)))
        self.offered = offered & OF_RINGS
        # Memory that devices must not write is left out, because the kernel would write to all memory in this table.
        regions = [region for region in self.memory.regions if not region.read_only]
        rows = [REGION.pack(each.gpa, each.size, self.memory.base + each.offset, 0) for each in regions]
        self._ask(VHOST_SET_MEM_TABLE, MEMORY.pack(len(rows), 0) + b"".join(rows))
        for number, call in enumerate(self.calls):
            self._ask(VHOST_SET_VRING_CALL, FILE.pack(number, call))
            self._ask(VHOST_SET_VRING_ERR, FILE.pack(number, self.failed))

    def _describe(self, number: int, queue: "Queue") -> None:
        """Tell the kernel where a ring is, and the index to go on at.  Raises OSError."""
        self._ask(VHOST_SET_VRING_NUM, STATE.pack(number, queue.size))
        self._ask(VHOST_SET_VRING_BASE, STATE.pack(number, queue.next_avail))
        base = self.memory.base
        places = base + queue.desc, base + queue.used, base + queue.avail
        self._ask(VHOST_SET_VRING_ADDR, ADDR.pack(number, 0, *places, 0))

    def _ask(self, request: int, argument: "bytes | int") -> bytes:
        """Make a request; return the argument as the kernel has changed it.  Raises OSError."""
        answer = fcntl.ioctl(self.fd, request, argument)
        return answer if isinstance(answer, bytes) else b""
