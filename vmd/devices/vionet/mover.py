"""The thread that moves frames, both ways, and the discipline between it and the main thread.

One thread serves both queues: two would hand the interpreter's lock to and fro with each system call, which costs more
than a second processor gives.

It holds `serving` while it may touch a ring, or change what it waits for.  The main thread, which takes rings away and
brings new ones, first clears `wanted`, which the thread looks at each time it has taken the lock, and then takes the
lock once: from there until `go` the thread touches no ring.
"""

import _thread
import errno
import posix as os
import select
import time

from vmd.devices.process import QUIESCE_TIMEOUT_S
from vmd.devices.vionet.worker import NEVER
from vmd.errors import GuestError, HostError
from vmd.privsep.title import name_thread
from vmd.tasks import start_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.devices.vionet.worker import Services, Worker

NAME = "frames"
# Of an eventfd each write is news, whether or not anybody has read what was written before.  So nobody does.
BELL = select.EPOLLIN | select.EPOLLET
EVENTS_MAX = 8  # there are no more descriptors


class Mover:
    """The thread.  `_run` and what it calls run on it; all else is the main thread's."""

    def __init__(self, services: "Services", tap: int, workers: "tuple[Worker, Worker]") -> None:
        """Wait for a tap and for what rings for each worker; stand until `go`."""
        self.services = services
        self.tap = tap
        self.tap_events = 0
        self.workers = workers
        self.wanted = False
        self.begun = False  # since `go`
        self.serving = _thread.allocate_lock()
        self.control = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.standing = select.epoll()
        self.standing.register(self.control, BELL)
        self.epoll = select.epoll()
        self.epoll.register(self.control, BELL)
        self.wakes: dict[int, tuple[Worker, ...]] = {self.control: workers}
        for worker in workers:
            for bell in worker.bells:
                self.epoll.register(bell, BELL)
                self.wakes[bell] = (worker,)

    def start(self) -> None:
        """Start the thread, standing.  Raises HostError."""
        start_thread("that moves frames", lambda: _thread.start_new_thread(self._run, ()))

    def go(self) -> None:
        """Have the thread look at both queues, and go on."""
        self.wanted = True
        self.look()

    def look(self) -> None:
        """Have the thread, if it does not stand, look at what has changed."""
        os.eventfd_write(self.control, 1)

    def stop(self) -> None:
        """Have the thread stand; it touches no ring when this returns.  Raises HostError if it does not get there."""
        self.wanted = False
        self.look()
        if not self.serving.acquire(timeout=QUIESCE_TIMEOUT_S):
            raise HostError(f"thread {NAME}", errno.ETIMEDOUT)
        # The thread may not notice that it had to stand, if `go` comes soon.
        self.begun = False
        self.serving.release()

    # --- its own -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        name_thread(NAME)
        try:
            while True:
                self._stand()
                self._move()
        except BaseException as error:  # raised again where it ends the process
            failure = error

            def fail() -> None:
                raise failure

            self.services.post(fail)

    def _stand(self) -> None:
        """Wait for `go`."""
        for worker in self.workers:
            worker.stand()
        while not self.wanted:
            self.standing.poll()
        for worker in self.workers:
            worker.more = True

    def _move(self) -> None:
        """Serve both queues until told to stand, or a ring is broken."""
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
        """Serve each queue that has something to do, if it is still wanted; holding the lock."""
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
        """Return how long to wait for events; a worker whose time has come has more to do, whatever the other has."""
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
        """Wait for what the workers want of the tap, but not for nothing: it would still say that it is gone."""
        if not self.tap_events:
            self.epoll.register(self.tap, events)
        elif events:
            self.epoll.modify(self.tap, events)
        else:
            self.epoll.unregister(self.tap)
        self.tap_events = events
        self.wakes[self.tap] = tuple(worker for worker in self.workers if worker.tap_events)
