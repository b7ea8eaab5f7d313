"""The thread that moves frames in both directions, and how the main thread stops it.

One thread serves both queues.  With two threads the interpreter's lock would change hands at each system call, which
costs more than a second processor gains.

The thread holds the lock `serving` while it may touch a ring, or change what it waits for.  The main thread takes rings
away and brings new ones.  Before that it clears `wanted`, then takes the lock once.  The thread checks `wanted` each
time it has taken the lock.  So from then until `go` the thread touches no ring.
"""

import _thread
import errno
import posix as os
import select
import time

from vmd.devices.process import QUIESCE_TIMEOUT_S
from vmd.devices.vionet.worker import NEVER
from vmd.errors import GuestError, HostError
from vmd.eventfd import eventfd
from vmd.privsep.title import name_thread
from vmd.tasks import start_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.devices.vionet.worker import Services, Worker

NAME = "frames"
# Edge-triggered: each write to an eventfd is an event, even if the value is never read.  So nobody reads it.
BELL = select.EPOLLIN | select.EPOLLET
EVENTS_MAX = 8  # no more descriptors are watched


class Mover:
    """The thread.  `_run` and the methods below it run on it; all others are called on the main thread."""

    def __init__(self, services: "Services", tap: int, workers: "tuple[Worker, Worker]") -> None:
        """Prepare to wait for the tap, and for each worker's bells.  Nothing is served until `go`."""
        self.services = services
        self.tap = tap
        self.tap_events = 0
        self.workers = workers
        self.wanted = False
        self.begun = False  # a turn was made since `go`
        self.serving = _thread.allocate_lock()
        self.control = eventfd()
        self.stop_epoll = select.epoll()
        self.stop_epoll.register(self.control, BELL)
        self.epoll = select.epoll()
        self.epoll.register(self.control, BELL)
        self.wakes: dict[int, tuple[Worker, ...]] = {self.control: workers}
        for worker in workers:
            for bell in worker.bells:
                self.epoll.register(bell, BELL)
                self.wakes[bell] = (worker,)

    def start(self) -> None:
        """Start the thread; it serves nothing until `go`.  Raises HostError."""
        start_thread("that moves frames", lambda: _thread.start_new_thread(self._run, ()))

    def go(self) -> None:
        """Let the thread look at both queues, and serve them from now on."""
        self.wanted = True
        self.look()

    def look(self) -> None:
        """Wake the thread, so that it notices what the main thread has changed.  No effect while it is stopped."""
        os.eventfd_write(self.control, 1)

    def stop(self) -> None:
        """Stop the thread.  When this returns, it touches no ring.

        Raises:
            HostError: the thread does not stop in time.
        """
        self.wanted = False
        self.look()
        if not self.serving.acquire(timeout=QUIESCE_TIMEOUT_S):
            raise HostError(f"stop thread {NAME}", errno.ETIMEDOUT)
        # If `go` comes soon, the thread may not notice this stop.  Then `_turn` sees from `begun` that it was one.
        self.begun = False
        self.serving.release()

    # --- on the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        name_thread(NAME)
        try:
            while True:
                self._wait_for_go()
                self._move()
        except BaseException as error:  # raised again on the main thread, where it ends the process
            failure = error

            def fail() -> None:
                raise failure

            self.services.post(fail)

    def _wait_for_go(self) -> None:
        """Wait for `go`."""
        for worker in self.workers:
            worker.stopped()
        while not self.wanted:
            self.stop_epoll.poll()

    def _move(self) -> None:
        """Serve both queues until told to stop, or until a ring is broken."""
        poll, serving, wakes = self.epoll.poll, self.serving, self.wakes
        first, second = self.workers
        while self.wanted:
            for fd, _ in poll(self._timeout_s(), EVENTS_MAX):
                for worker in wakes[fd]:
                    worker.more = True
            with serving:
                self._turn(first, second)
                events = first.tap_events | second.tap_events
                if events != self.tap_events:
                    self._watch_tap(events)

    def _turn(self, first: "Worker", second: "Worker") -> None:
        """Serve each queue that has work, unless told to stop.  The caller holds the lock."""
        if not self.wanted:
            return
        if not self.begun:
            self.begun = True
            for worker in self.workers:
                worker.begin()
                worker.more = True
        try:
            if first.more:
                first.shared = second.more
                first.turn()
            if second.more:
                second.turn()
        except GuestError as error:
            self.wanted = False
            self.services.broke(str(error))

    def _timeout_s(self) -> float:
        """Return how long to wait for events; 0.0 if a worker has work.

        A worker whose `until_s` has passed has work from now on, even if the other has some already.
        """
        first, second = self.workers
        until_s = min(first.until_s, second.until_s)
        left_s = -1.0
        if until_s != NEVER:
            now_s = time.monotonic()
            left_s = max(0.0, until_s - now_s)
            for worker in self.workers:
                worker.more |= worker.until_s <= now_s
        return 0.0 if first.more or second.more else left_s

    def _watch_tap(self, events: int) -> None:
        """Wait for `events` of the tap.  Without events unregister it, because epoll always reports a deleted tap."""
        if not self.tap_events:
            self.epoll.register(self.tap, events)
        elif events:
            self.epoll.modify(self.tap, events)
        else:
            self.epoll.unregister(self.tap)
        self.tap_events = events
        self.wakes[self.tap] = tuple(worker for worker in self.workers if worker.tap_events)
