"""A virtio entropy device (virtio 1.2, 5.4), bounded in what a request and a wake-up cost.

Unlike vmd (*cat. 6.3*) it takes the request it has not seen yet, honours chains and flags, and no length is fatal.
"""

import posix as os
import time

from vmd.errors import GuestError
from vmd.ipc import devmsg

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from vmd.virtio.queue import Chain, Queue

    class Services(Protocol):
        """What of `process.Process` is used here."""

        figures: memoryview

        def interrupt(self, queue: int) -> None:
            """Tell the guest."""

        def call_after(self, delay_s: float, handler: Callable[[], None]) -> None:
            """Set the timer."""

        def serve(self, number: int) -> None:
            """Serve a queue as if notified."""


REQUEST_MAX = 64 * 1024  # bytes given for one request; a driver that wants more asks again
BUDGET = 16  # requests of one wake-up
BYTES_PER_S = 4 << 20  # a guest that does nothing but ask must not keep a processor busy
BURST_BYTES = 1 << 20
REQUEST_COST = 256  # a request of one byte is not free either
REQUESTS, BYTES, DELAYED = range(len(devmsg.FIGURES["viornd"]))


class Viornd:
    """Fills whatever the driver offers with random bytes of the host's kernel."""

    features = 0
    config = b""

    def __init__(self, services: "Services") -> None:
        self.services = services
        self.figures = services.figures
        self.queue: Queue | None = None
        self.allowance = float(BURST_BYTES)
        self.filled_s = time.monotonic()

    def activate(self, _features: int, queues: "list[Queue | None]") -> None:
        """Take the ring."""
        self.queue = queues[0] if queues else None

    def on_notify(self, _number: int) -> bool:
        """Serve some requests, as far as the allowance goes."""
        queue = self.queue
        if queue is None:
            return False
        now_s = time.monotonic()
        self.allowance = min(BURST_BYTES, self.allowance + (now_s - self.filled_s) * BYTES_PER_S)
        self.filled_s = now_s
        more = True
        try:
            for _ in range(BUDGET):
                if self.allowance <= 0:
                    self.services.call_after(-self.allowance / BYTES_PER_S + 0.01, lambda: self.services.serve(0))
                    self.figures[DELAYED] += 1
                    more = False
                    break
                chain = queue.take()
                if chain is None:
                    more = queue.rearm()
                    break
                written = self.fill(queue, chain)
                queue.put(chain.head, written)
                self.figures[REQUESTS] += 1
                self.figures[BYTES] += written
                self.allowance -= written + REQUEST_COST
        finally:
            queue.publish()
            if queue.wants_interrupt():
                self.services.interrupt(0)
        return more

    @staticmethod
    def fill(queue: "Queue", chain: "Chain") -> int:
        """Fill a chain; return how many bytes it got.  Raises GuestError."""
        if chain.readable:
            raise GuestError("entropy request with a part for reading")
        left = REQUEST_MAX
        for gpa, length in chain.writable:
            wanted = min(length, left)
            if wanted:
                queue.memory.write(gpa, os.urandom(wanted))
                left -= wanted
            if wanted < length:
                break
        return REQUEST_MAX - left

    def quiesce(self, *, forget: bool) -> None:
        """Nothing is ever in flight."""
        if forget:
            self.queue = None

    def write_config(self, offset: int, data: bytes) -> None:
        """There is no configuration."""

    def close(self) -> None:
        """There is nothing to let go."""
