"""What the two queues of a network interface have in common: what one waits for, and its limit."""

from vmd.devices.bucket import Bucket, Throttled
from vmd.ipc import devmsg

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from vmd.virtio.queue import Queue

    class Services(Protocol):
        """What of `process.ThreadedProcess` is used here."""

        figures: memoryview

        def interrupt(self, queue: int) -> None:
            """Tell the guest."""

        def post(self, job: Callable[[], None]) -> None:
            """Have something done on the main thread."""

        def broke(self, text: str) -> None:
            """The driver broke a ring."""


GSO_FRAME_MAX = 65550  # bytes of a frame that is to be segmented: an IP packet of 64 KiB
TURN_S = 0.05  # of a limited queue: what one turn may take of it, if all frames are as large
WAYS = ("rx", "tx")  # by number of the queue
NEVER = float("inf")


class Worker:
    """One queue's half of the device, served by the thread that moves frames (`mover`).

    What that waits for it finds here: `bells`, eventfds that ring for this queue, `tap_events` and `until_s`.
    """

    def __init__(self, services: "Services", number: int, kick: int, budget: int) -> None:
        """`budget` is how many frames may pass in one turn, before the other queue may have its own."""
        self.services = services
        self.figures = services.figures
        self.number = number
        self.bells = [kick]
        self.queue: Queue | None = None
        self.link_up = False
        self.more = False  # there is something to do
        self.tap_events = 0  # of the tap, that are waited for
        self.until_s = NEVER  # look again then, whatever happens
        self.bytes = 0  # of frames that have passed
        self.budget = self.most = budget
        self.shared = False  # this turn, as the other queue has something to do, too
        self.bucket: Bucket | None = None  # where there is a limit
        self.throttled = Throttled(services.figures, devmsg.COUNTER_NAMES.index(f"{WAYS[number]}_throttled"))

    def limit(self, rate: int) -> None:
        """Let no more bytes a second pass than these; 0: as many as come.  Any thread's."""
        self.bucket = Bucket(rate) if rate else None
        self.budget = min(self.most, max(1, int(rate * TURN_S / GSO_FRAME_MAX))) if rate else self.most

    def serve(self, queue: "Queue") -> bool:
        """Serve the queue, up to a budget; return whether to look again at once.  Raises GuestError."""
        raise NotImplementedError

    def show(self) -> None:
        """Store what has been counted where others see it; called after each `serve`, before the guest hears of it.

        What has passed is there before each `give`, also within a turn.
        """
        raise NotImplementedError

    def begin(self) -> None:
        """Be as after a start: called before the first turn after the thread stood."""
        self.rest()

    def rest(self) -> None:
        """Wait for bells only."""
        self.tap_events = 0
        self.until_s = NEVER

    def stand(self) -> None:
        """Wait for nothing."""
        self.rest()
        self.throttled.end()

    def give(self, queue: "Queue") -> None:
        """Let the guest have what was put."""
        queue.publish()
        if queue.wants_interrupt():
            self.services.interrupt(self.number)

    def turn(self) -> None:
        """Serve the queue once, if there is one and its limit allows it.  Raises GuestError."""
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
        """Return whether the queue has to wait for its limit; what comes meanwhile is found behind that."""
        wait_s = bucket.wait_s() if bucket is not None else 0.0
        if bucket is None or not wait_s:
            self.throttled.end()
            return False
        self.rest()
        self.until_s = bucket.filled_s + wait_s
        self.throttled.begin()
        return True
