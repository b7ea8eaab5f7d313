"""The base of the two queues of a network interface: the events that a queue waits for, and its limit."""

from vmd.devices.bucket import Bucket, Throttled
from vmd.ipc import devmsg

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from vmd.virtio.queue import Queue

    class Services(Protocol):
        """The part of `process.ThreadedProcess` that is used here."""

        figures: memoryview

        def interrupt(self, queue: int) -> None:
            """Interrupt the guest."""

        def post(self, job: Callable[[], None]) -> None:
            """Call `job` on the main thread."""

        def broke(self, text: str) -> None:
            """Report that the driver broke a ring."""


GSO_FRAME_MAX = 65550  # bytes of a frame that is to be segmented: an IP packet of 64 KiB, and its Ethernet header
TURN_S = 0.05  # a turn of a limited queue takes at most the limit of this time, even if all frames are the largest
WAYS = ("rx", "tx")  # direction, by the queue's number
NEVER = float("inf")


class Worker:
    """One queue of the device, served by the thread that moves frames (`mover`).

    The attributes that say what the thread waits for: `bells`, the eventfds of this queue; `tap_events`; `until_s`.
    """

    def __init__(self, services: "Services", number: int, kick: int, budget: int) -> None:
        """`budget` is how many frames may pass in one turn, before it is the other queue's turn."""
        self.services = services
        self.figures = services.figures
        self.number = number
        self.bells = [kick]
        self.queue: Queue | None = None
        self.link_up = False
        self.more = False  # the queue has work
        self.tap_events = 0  # epoll events of the tap to wait for
        self.until_s = NEVER  # serve the queue at this time, even without an event
        self.bytes = 0  # of frames that have passed
        self.budget = self.most = budget
        self.shared = False  # in this round the other queue has work, too
        self.bucket: Bucket | None = None  # the limit, if there is one
        self.throttled = Throttled(services.figures, devmsg.COUNTER_NAMES.index(f"{WAYS[number]}_throttled"))

    def limit(self, rate: int) -> None:
        """Limit the bytes that pass each second; 0: no limit.  Called on any thread."""
        self.bucket = Bucket(rate) if rate else None
        self.budget = min(self.most, max(1, int(rate * TURN_S / GSO_FRAME_MAX))) if rate else self.most

    def serve(self, queue: "Queue") -> bool:
        """Serve the queue, up to a budget; return whether to look again at once.  Raises GuestError."""
        raise NotImplementedError

    def show(self) -> None:
        """Store the figures in shared memory.  Called after each `serve`, before the last `give` of it.

        Frames that have passed are counted there before each `give`, also within a turn.
        """
        raise NotImplementedError

    def begin(self) -> None:
        """Return to the state after a start.  Called before the first turn after the thread was stopped."""
        self.wait_for_bells()

    def wait_for_bells(self) -> None:
        """Wait for bells only: not for the tap, and for no time."""
        self.tap_events = 0
        self.until_s = NEVER

    def stopped(self) -> None:
        """The thread is stopped: wait for nothing."""
        self.wait_for_bells()
        self.throttled.end()

    def give(self, queue: "Queue") -> None:
        """Publish the used ring; interrupt the guest if it wants that."""
        queue.publish()
        if queue.wants_interrupt():
            self.services.interrupt(self.number)

    def turn(self) -> None:
        """Serve the queue once, if the driver uses it and its limit allows it.  Raises GuestError."""
        self.more = False
        self.until_s = NEVER
        queue = self.queue
        if queue is None:
            return
        bucket = self.bucket
        if (bucket is not None or self.throttled.now) and self._must_wait(bucket):
            return
        before = self.bytes
        self.more = self.serve(queue)
        if bucket is not None:
            bucket.take(self.bytes - before)

    def _must_wait(self, bucket: Bucket | None) -> bool:
        """Return whether the queue has to wait for its limit.  Frames that come meanwhile are served after the wait."""
        wait_s = bucket.wait_s() if bucket is not None else 0.0
        if bucket is None or not wait_s:
            self.throttled.end()
            return False
        self.wait_for_bells()
        self.until_s = bucket.filled_s + wait_s
        self.throttled.begin()
        return True
