"""The entropy device (virtio 1.2, 5.4), which the VM process serves itself.

All others have processes of their own, because they hold something of the host.  This one holds nothing: its bytes come
from getrandom(2), which every process may call.  docs/security.md says why that is as safe.

The event thread serves the ring, some requests at a time, between its other work; no vCPU waits for that, but one that
resets the device waits until the requests at hand are done.  What a guest gets in a second is limited, and while it has
to wait its notifications are not heard, so that one that asks for ever takes little of the event thread's time.

Unlike vmd (*cat. 6.3*) it takes the request it has not seen yet, honours chains and flags, and no length is fatal.
"""

import os
import time

from vmd import threads
from vmd.errors import GuestError
from vmd.ipc import devmsg
from vmd.ipc.devfigures import take_slot
from vmd.ipc.loop import READ
from vmd.log import RateLimit
from vmd.virtio.queue import FEATURES, Queue
from vmd.vm.devproc import Interrupts
from vmd.vm.eventfd import drain, eventfd
from vmd.vm.kinds import ENTROPY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmd.guestmem import GuestMemory
    from vmd.ipc.loop import Loop
    from vmd.virtio.queue import Chain
    from vmd.vm.slots import Slot

REQUEST_MAX = 64 << 10  # bytes given for one request; a driver that wants more asks again
TURN_REQUESTS = 16  # after so many requests, or so many bytes, others have their turn on the event thread
TURN_BYTES = 64 << 10
BYTES_PER_S = 4 << 20  # a guest that does nothing but ask must not keep a processor busy
BURST_BYTES = 1 << 20
COST = 256  # bytes: a notification without a request, or a piece of one byte, is not free either
REST_S = 0.01  # at least, when a guest has to wait
REQUESTS, BYTES, DELAYED = range(len(devmsg.FIGURES[ENTROPY.process]))


class Entropy:
    """Fills whatever the driver offers with random bytes of the host's kernel.

    `activate`, `command` and `export` are called on vCPU threads, the event thread and the sender's, as those of a
    `DeviceProcess` are; the ring is served on the event thread.
    """

    features = FEATURES
    config = b""
    resample = None
    arrived_with = b""

    def __init__(self, slot: "Slot", memory: "GuestMemory", figures_fd: int, figures_slot: int) -> None:
        """`figures_fd` stays the caller's.  Raises PeerError, OSError or ValueError if it is no file of figures."""
        self.kind = slot.kind
        self.name = self.title = slot.name
        self.kicks = [eventfd()]
        self.calls = [eventfd()]
        self.interrupts = Interrupts(memoryview(bytearray(8 * devmsg.QUEUES_MAX)).cast("I"))
        self.activations = 0
        self._memory = memory
        self._figures = take_slot(figures_fd, figures_slot, slot.kind.process, slot.index)
        self._complaints = RateLimit()
        self._lock = threads.Lock()  # of the ring and what is known of it; never taken before a function's
        self._queue: Queue | None = None
        self._paused = False
        self._broken = False  # by the driver, until the next life of the device
        self._allowance = float(BURST_BYTES)
        self._filled_s = time.monotonic()

    def serve(
        self,
        loop: "Loop",
        *,
        on_interrupt: "Callable[[], None]",
        on_needs_reset: "Callable[[str, int], None]",
        on_event: "Callable[[str, str], None]",
    ) -> None:
        """Listen to the guest's notifications; what is called is called on the event thread.

        `on_interrupt`: the guest is to be told of its ring; the others are as of `DeviceProcess.serve`.
        """
        self._loop = loop
        self._on_interrupt, self._on_needs_reset, self._on_event = on_interrupt, on_needs_reset, on_event
        loop.add(self.kicks[0], self._on_kick)

    # --- what is asked of a device -----------------------------------------------------------------------------

    def activate(self, features: int, queues: "Sequence[tuple[int, bool, int, int, int, int, int]]") -> bool:
        """Take the ring; False if it is unusable."""
        ((size, enabled, desc, avail, used, next_avail, next_used),) = queues
        with self._lock:
            self._forget()
            self.activations = self.activations + 1 & 0xFFFFFFFF
            if enabled:
                try:
                    self._queue = Queue(self._memory, features, size, desc, avail, used, next_avail, next_used)
                except GuestError as error:
                    self._complaints.warn(f"{self.name}: {error}")
                    return False
        self._look()
        return True

    def command(self, kind: int) -> bool:
        """RESET, PAUSE, RESUME, MARK or UNMARK: when this returns it is done, and no request of before is at hand."""
        with self._lock:
            if kind == devmsg.RESET:
                self._forget()
                self._paused = False
            elif kind == devmsg.PAUSE:
                self._mark()
                self._paused = True
            elif kind == devmsg.RESUME:
                self._paused = False
                self._look()
        return True

    def write_config(self, _offset: int, _data: bytes) -> bytes:
        """There is no configuration."""
        return self.config

    def export(self) -> tuple[list[tuple[int, int]], bytes]:
        """Return (next avail, next used) of its queue while it stands still, if it has one."""
        queue = self._queue
        return ([] if queue is None else [(queue.next_avail, queue.next_used)]), b""

    def restore(self, own: bytes) -> bool:
        """It keeps nothing besides its ring."""
        return not own

    def addresses(self) -> bytes:
        """It has none, unlike an interface."""
        return b""

    def tell_direct(self, direct: bool) -> None:
        """It has no use for that, unlike an interface."""

    def _forget(self) -> None:
        self._mark()
        self._queue = None
        self._broken = False

    def _mark(self) -> None:
        if self._queue is not None and self._memory.marking:
            self._queue.mark_used()

    def _look(self) -> None:
        """Serve the ring as if it had been notified: it may have been before we could hear it."""
        os.eventfd_write(self.kicks[0], 1)

    # --- on the event thread -----------------------------------------------------------------------------------

    def _on_kick(self, _events: int) -> None:
        """The guest has notified, or there is more to do than one turn's."""
        drain(self.kicks[0])
        text = ""
        with self._lock:
            queue, life = self._queue, self.activations
            if queue is None or self._paused or self._broken:
                return
            try:
                more = self._turn(queue)
            except GuestError as error:
                self._broken, more, text = True, False, str(error)
            queue.publish()
            interrupt = queue.wants_interrupt()
            if interrupt:
                self.interrupts.add(0)
        # Whoever is called takes the lock of the function, under which others ask us to reset.
        if interrupt:
            self._on_interrupt()
        if text:
            self._on_needs_reset(text, life)
            self._on_event("fault", text)
        if more:
            self._look()

    def _turn(self, queue: Queue) -> bool:
        """Serve some requests, as far as the allowance goes; return whether there is more.  Raises GuestError."""
        now_s = time.monotonic()
        self._allowance = min(BURST_BYTES, self._allowance + (now_s - self._filled_s) * BYTES_PER_S) - COST
        self._filled_s = now_s
        served = 0
        for _ in range(TURN_REQUESTS):
            if self._allowance <= 0:
                self._rest(-self._allowance / BYTES_PER_S + REST_S)
                return False
            if served >= TURN_BYTES:
                break
            chain = queue.take()
            if chain is None:
                return queue.rearm()
            written = self._fill(chain)
            queue.put(chain.head, written)
            self._figures[REQUESTS] += 1
            self._figures[BYTES] += written
            self._allowance -= written + COST * len(chain.writable)
            served += written
        return True

    def _fill(self, chain: "Chain") -> int:
        """Fill a chain; return how many bytes it got.  Raises GuestError."""
        if chain.readable:
            raise GuestError("entropy request with a part for reading")
        left = REQUEST_MAX
        for gpa, length in chain.writable:
            wanted = min(length, left)
            if wanted:
                self._memory.write(gpa, os.urandom(wanted))
                left -= wanted
            if wanted < length:
                break
        return REQUEST_MAX - left

    def _rest(self, delay_s: float) -> None:
        """Hear nothing of the guest for some time."""
        self._figures[DELAYED] += 1
        self._loop.modify(self.kicks[0], 0)
        self._loop.call_later(delay_s, self._go_on)

    def _go_on(self) -> None:
        self._loop.modify(self.kicks[0], READ)
        self._look()
