"""The entropy device (virtio 1.2, 5.4), which the VM process serves itself.

All other devices have processes of their own, because they hold resources of the host.  This device holds none: its
bytes come from getrandom(2), which every process may call.  docs/security.md says why this is as safe.

The event thread serves the ring, a few requests at a time, between its other work.  No vCPU waits for that, except a
vCPU that resets the device: it waits until the present requests are done.  The rate is limited.  While a guest has
used up its rate, its notifications are ignored, so a guest that never stops asking takes little time of the event
thread.

Unlike vmd (*cat. 6.3*), this device takes the next unseen request and follows chains and flags; no length is fatal.
"""

import os
import time

from vmd import threads
from vmd.errors import GuestError
from vmd.eventfd import drain, eventfd
from vmd.ipc import devmsg
from vmd.ipc.devfigures import take_slot
from vmd.ipc.loop import READ
from vmd.log import RateLimit
from vmd.virtio.queue import FEATURES, Queue
from vmd.vm.devproc import Interrupts
from vmd.vm.kinds import ENTROPY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmd.guestmem import GuestMemory
    from vmd.ipc.loop import Loop
    from vmd.virtio.queue import Chain
    from vmd.vm.slots import Slot

REQUEST_MAX = 64 << 10  # most bytes for one request; a driver that wants more asks again
TURN_REQUESTS = 16  # after so many requests, or so many bytes, the event thread does its other work
TURN_BYTES = 64 << 10
BYTES_PER_S = 4 << 20  # a guest that only asks for entropy must not keep a processor busy
BURST_BYTES = 1 << 20
COST = 256  # bytes that a notification, and each piece of a request, count for: they take time, too
REST_S = 0.01  # shortest time for which notifications are ignored
REQUESTS, BYTES, DELAYED = range(len(devmsg.FIGURES[ENTROPY.process]))


class Entropy:
    """Fills the driver's buffers with random bytes of the host's kernel.

    `activate`, `command` and `export` are called on vCPU threads, the event thread and the sender's thread, as those of
    a `DeviceProcess`.  The ring is served on the event thread.
    """

    features = FEATURES
    config = b""
    resample = None
    arrived_with = b""

    def __init__(self, slot: "Slot", memory: "GuestMemory", figures_fd: int, figures_slot: int) -> None:
        """The caller still owns `figures_fd`.  Raises PeerError, OSError or ValueError if it is no file of figures."""
        self.kind = slot.kind
        self.name = self.title = slot.name
        self.kicks = [eventfd()]
        self.calls = [eventfd()]
        self.interrupts = Interrupts(memoryview(bytearray(8 * devmsg.QUEUES_MAX)).cast("I"))
        self.activations = 0
        self._memory = memory
        self._figures = take_slot(figures_fd, figures_slot, slot.kind.process, slot.index)
        self._complaints = RateLimit()
        self._lock = threads.Lock()  # of the ring and its state; never held while a function's lock is taken
        self._queue: Queue | None = None
        self._paused = False
        self._broken = False  # the driver has broken the ring; until the next activation
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
        """Listen to the guest's notifications.  The callbacks run on the event thread.

        `on_interrupt()`: interrupt the guest.  The others are as in `DeviceProcess.serve`.
        """
        self._loop = loop
        self._on_interrupt, self._on_needs_reset, self._on_event = on_interrupt, on_needs_reset, on_event
        loop.add(self.kicks[0], self._on_kick)

    # --- commands ----------------------------------------------------------------------------------------------

    def activate(self, features: int, queues: "Sequence[tuple[int, bool, int, int, int, int, int]]") -> bool:
        """Take the ring.  Return False if it is unusable."""
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
        self._kick()
        return True

    def command(self, kind: int) -> bool:
        """Execute RESET, PAUSE, RESUME, MARK or UNMARK.  When this returns, no earlier request is being served."""
        with self._lock:
            if kind == devmsg.RESET:
                self._forget()
                self._paused = False
            elif kind == devmsg.PAUSE:
                self._mark()
                self._paused = True
            elif kind == devmsg.RESUME:
                self._paused = False
                self._kick()
        return True

    def write_config(self, _offset: int, _data: bytes) -> bytes:
        """Ignore the write: this device has no configuration."""
        return self.config

    def export(self) -> tuple[list[tuple[int, int]], bytes]:
        """Return (next avail, next used) of the queue, if there is one.  The device is paused."""
        queue = self._queue
        return ([] if queue is None else [(queue.next_avail, queue.next_used)]), b""

    def restore(self, own: bytes) -> bool:
        """Return whether there is nothing to restore: this device has no own state besides its ring."""
        return not own

    def addresses(self) -> bytes:
        """Return nothing: only interfaces have addresses."""
        return b""

    def tell_direct(self, direct: bool) -> None:
        """Do nothing: only interfaces use this."""

    def _forget(self) -> None:
        self._mark()
        self._queue = None
        self._broken = False

    def _mark(self) -> None:
        if self._queue is not None and self._memory.marking:
            self._queue.mark_used()

    def _kick(self) -> None:
        """Serve the ring as if it was notified: a notification may have come before we listened."""
        os.eventfd_write(self.kicks[0], 1)

    # --- on the event thread -----------------------------------------------------------------------------------

    def _on_kick(self, _events: int) -> None:
        """Serve the ring: the guest has notified it, or the last turn has left requests."""
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
        # Without our lock: the callbacks take the lock of the function, and a reset comes with that lock held.
        if interrupt:
            self._on_interrupt()
        if text:
            self._on_needs_reset(text, life)
            self._on_event("fault", text)
        if more:
            self._kick()

    def _turn(self, queue: Queue) -> bool:
        """Serve some requests, within the allowance.  Return whether there are more to serve.  Raises GuestError."""
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
        """Fill a chain.  Return the number of bytes that were written.  Raises GuestError."""
        if chain.readable:
            raise GuestError("entropy request with a device-readable part")
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
        """Ignore notifications for some time."""
        self._figures[DELAYED] += 1
        self._loop.modify(self.kicks[0], 0)
        self._loop.call_later(delay_s, self._go_on)

    def _go_on(self) -> None:
        self._loop.modify(self.kicks[0], READ)
        self._kick()
