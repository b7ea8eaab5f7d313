"""A thread that owns one queue, and the discipline between it and the main thread.

The thread holds `serving` while it may touch its ring.  The main thread, which takes rings away and brings new ones,
first clears `wanted`, which the thread looks at each time it has taken the lock, and then takes the lock once: from
there until `go` the thread touches no ring, and polls nothing that could wake it.
"""

import _thread
import errno
import posix as os
import select

from vmd.devices.bucket import Bucket, Throttled
from vmd.devices.process import QUIESCE_TIMEOUT_S
from vmd.errors import GuestError, HostError
from vmd.ipc import devmsg
from vmd.privsep.title import name_thread
from vmd.tasks import start_thread

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


POLLIN = select.POLLIN
BUDGET = 64  # frames of one wake-up
GSO_FRAME_MAX = 65550  # bytes of a frame that is to be segmented: an IP packet of 64 KiB
TURN_S = 0.05  # of a limited queue: what one wake-up may take of it, if all frames are as large
THREADS = ("rx", "tx")  # by number of the queue


class Worker:
    """One queue's thread.  `serve`, `begin`, `give` and what they call run on it; all else is the main thread's."""

    def __init__(self, services: "Services", number: int, kick: int) -> None:
        self.services = services
        self.figures = services.figures
        self.number = number
        self.kick = kick
        self.queue: Queue | None = None
        self.link_up = False
        self.wanted = False
        self.begun = False  # since `go`
        self.more = False  # look again before waiting
        self.timeout_ms: int | None = None
        self.timed_out = False
        self.bytes = 0  # of frames that have passed
        self.budget = BUDGET
        self.bucket: Bucket | None = None  # where there is a limit
        self.throttled = Throttled(services.figures, devmsg.COUNTER_NAMES.index(f"{THREADS[number]}_throttled"))
        self.throttled_ms = 0  # it waits for so long before it looks again
        self.serving = _thread.allocate_lock()
        self.control = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.standing = select.poll()
        self.standing.register(self.control, POLLIN)
        self.poll = select.poll()
        self.poll.register(self.control, POLLIN)
        self.poll.register(kick, POLLIN)
        self.bells = {kick, self.control}  # of what is polled, the eventfds

    def start(self) -> None:
        """Start the thread, standing.  Raises HostError."""
        start_thread(f"of queue {self.number}", lambda: _thread.start_new_thread(self._run, ()))

    def go(self) -> None:
        """Have the thread look at its queue, and go on."""
        self.more = True
        self.wanted = True
        os.eventfd_write(self.control, 1)

    def look(self) -> None:
        """Have the thread, if it does not stand, look at what has changed."""
        os.eventfd_write(self.control, 1)

    def limit(self, rate: int) -> None:
        """Let no more bytes a second pass than these; 0: as many as come."""
        self.bucket = Bucket(rate) if rate else None
        self.budget = min(BUDGET, max(1, int(rate * TURN_S / GSO_FRAME_MAX))) if rate else BUDGET
        self.look()

    def stop(self) -> None:
        """Have the thread stand; it touches no ring when this returns.  Raises HostError if it does not get there."""
        self.wanted = False
        os.eventfd_write(self.control, 1)
        if not self.serving.acquire(timeout=QUIESCE_TIMEOUT_S):
            raise HostError(f"thread of queue {self.number}", errno.ETIMEDOUT)
        # The thread may not notice that it had to stand, if `go` comes soon.
        self.begun = False
        self.serving.release()

    def serve(self, queue: "Queue") -> bool:
        """Serve the queue, up to a budget; return whether to look again at once.  Raises GuestError."""
        raise NotImplementedError

    def show(self) -> None:
        """Store what has been counted where others see it; called after each `serve`, before the guest hears of it."""
        raise NotImplementedError

    def begin(self) -> None:
        """Be as after a start: called before the first `serve` after a `go`."""

    def give(self, queue: "Queue") -> None:
        """Let the guest have what was put."""
        queue.publish()
        if queue.wants_interrupt():
            self.services.interrupt(self.number)

    def _run(self) -> None:
        name_thread(THREADS[self.number])
        try:
            while True:
                self._stand()
                self._work()
        except BaseException as error:  # raised again where it ends the process
            failure = error

            def fail() -> None:
                raise failure

            self.services.post(fail)

    def _stand(self) -> None:
        self.throttled_ms = 0
        self.throttled.end()
        while not self.wanted:
            self.standing.poll()
            drain(self.control)

    def _work(self) -> None:
        """Serve until told to stand, or the ring is broken."""
        bells, serving = self.bells, self.serving
        while self.wanted:
            if self.throttled_ms:  # what comes meanwhile is found behind that
                ready = self.standing.poll(self.throttled_ms)
                self.timed_out = False
            else:
                ready = self.poll.poll(0 if self.more else self.timeout_ms)
                self.timed_out = not ready and not self.more
            for fd, _ in ready:
                if fd in bells:
                    drain(fd)  # before the ring is looked at: what comes later is news
            with serving:
                self._turn()

    def _turn(self) -> None:
        """Serve once, if it is still wanted; holding the lock."""
        self.more = False
        if not self.wanted:
            return
        if not self.begun:
            self.begin()
            self.begun = True
        queue = self.queue
        if queue is None:
            return
        bucket = self.bucket
        if (bucket is not None or self.throttled_ms) and self._must_wait(bucket):
            return
        before = self.bytes
        try:
            self.more = self.serve(queue)
        except GuestError as error:
            self.wanted = False
            self.services.broke(str(error))
        if bucket is not None:
            bucket.take(self.bytes - before)

    def _must_wait(self, bucket: Bucket | None) -> bool:
        """Return whether the queue has to wait for its limit."""
        wait_s = bucket.wait_s() if bucket is not None else 0.0
        self.throttled_ms = int(wait_s * 1000) + 1 if wait_s else 0
        if wait_s:
            self.throttled.begin()
        else:
            self.throttled.end()
        return bool(wait_s)


def drain(fd: int) -> None:
    """Take what an eventfd has."""
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        return
