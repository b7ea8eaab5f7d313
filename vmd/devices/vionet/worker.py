"""The thread that owns both queues, and the discipline between it and the main thread.

One thread, not one for each queue: of two that both have much to do only one at a time can run Python, and what they
spend on handing that right to and fro at each system call is more than what the other gains meanwhile.

The thread holds `serving` while it may touch a ring.  The main thread, which takes rings away and brings new ones,
first clears `wanted`, which the thread looks at each time it has taken the lock, and then takes the lock once: from
there until `go` the thread touches no ring, and polls nothing that could wake it.
"""

import _thread
import errno
import os
import select
import time

from vmd.devices.process import QUIESCE_TIMEOUT_S
from vmd.errors import GuestError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    from vmd.virtio.queue import Queue

    class Services(Protocol):
        """What of `process.ThreadedProcess` is used here."""

        def interrupt(self, queue: int) -> None:
            """Tell the guest."""

        def post(self, job: Callable[[], None]) -> None:
            """Have something done on the main thread."""

        def broke(self, text: str) -> None:
            """The driver broke a ring."""


POLLIN, POLLOUT = select.POLLIN, select.POLLOUT
ALWAYS = select.POLLERR | select.POLLHUP | select.POLLNVAL  # what poll tells unasked


class Server:
    """One queue.  `begin`, `serve` and what they call run on the worker's thread; the rest is the main thread's."""

    def __init__(self, services: "Services", number: int, kick: int) -> None:
        self.services = services
        self.number = number
        self.kick = kick
        self.queue: Queue | None = None
        self.link_up = False
        self.due = False  # is served before anything is waited for
        self.wants = {kick: POLLIN}  # what it is served for
        self.wants_changed = True
        self.deadline_s: float | None = None  # ... and when, if nothing of that comes
        self.timed_out = False

    def want(self, fd: int, events: int) -> None:
        """Be served when something happens to a descriptor, or no longer, with no events."""
        if events:
            self.wants[fd] = events
        else:
            self.wants.pop(fd, None)
        self.wants_changed = True

    def serve(self, queue: "Queue") -> bool:
        """Serve the queue, up to a budget; return whether to do it again at once.  Raises GuestError."""
        raise NotImplementedError

    def begin(self) -> None:
        """Be as after a start: called before the first `serve` after a `go`."""


class Worker:
    """The thread.  `_run` and what it calls run on it; everything else is the main thread's."""

    def __init__(self, services: "Services", servers: "Sequence[Server]") -> None:
        self.services = services
        self.servers = servers
        self.wanted = False
        self.begun = False  # since `go`
        self.serving = _thread.allocate_lock()
        self.control = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.standing = select.poll()
        self.standing.register(self.control, POLLIN)
        self.poll = select.poll()
        self.poll.register(self.control, POLLIN)
        self.polled: set[int] = set()  # besides `control`

    def start(self) -> None:
        """Start the thread, standing."""
        _thread.start_new_thread(self._run, ())

    def go(self) -> None:
        """Have the thread look at its queues, and go on."""
        self.wanted = True
        os.eventfd_write(self.control, 1)

    def look(self) -> None:
        """Have the thread, if it does not stand, look at what has changed."""
        os.eventfd_write(self.control, 1)

    def stop(self) -> None:
        """Have the thread stand; it touches no ring when this returns.  Raises HostError if it does not get there."""
        self.wanted = False
        os.eventfd_write(self.control, 1)
        if not self.serving.acquire(timeout=QUIESCE_TIMEOUT_S):
            raise HostError("thread of the queues", errno.ETIMEDOUT)
        # The thread may not notice that it had to stand, if `go` comes soon.
        self.begun = False
        self.serving.release()

    def _run(self) -> None:
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
        while not self.wanted:
            self.standing.poll()
            drain(self.control)

    def _work(self) -> None:
        """Serve until told to stand, or a ring is broken."""
        serving = self.serving
        while self.wanted:
            self._wait()
            with serving:
                self._turn()

    def _wait(self) -> None:
        """Find out what is to be served next; wait for it if nothing is yet."""
        servers = self.servers
        timeout_ms: int | None = None if self.begun else 0
        for server in servers:
            if server.wants_changed:
                self._register()
            if server.due:
                timeout_ms = 0
            elif server.deadline_s is not None and timeout_ms != 0:
                left_ms = max(0, int((server.deadline_s - time.monotonic()) * 1000) + 1)
                timeout_ms = left_ms if timeout_ms is None else min(timeout_ms, left_ms)
        ready = self.poll.poll(timeout_ms)
        for fd, events in ready:
            if fd == self.control:
                drain(fd)
                for server in servers:
                    server.due = True
                continue
            for server in servers:
                wanted = server.wants.get(fd)
                if wanted is not None and events & (wanted | ALWAYS):
                    server.due = True
                    if fd == server.kick:
                        drain(fd)  # before the ring is looked at: what comes later is news
        for server in servers:
            if server.deadline_s is not None and not server.due and time.monotonic() >= server.deadline_s:
                server.due = server.timed_out = True

    def _register(self) -> None:
        """Have poll look for what the servers want."""
        wanted: dict[int, int] = {}
        for server in self.servers:
            server.wants_changed = False
            for fd, events in server.wants.items():
                wanted[fd] = wanted.get(fd, 0) | events
        for fd in self.polled - wanted.keys():
            self.poll.unregister(fd)
        for fd, events in wanted.items():
            self.poll.register(fd, events)
        self.polled = set(wanted)

    def _turn(self) -> None:
        """Serve what is due, if that is still wanted; holding the lock."""
        if not self.wanted:
            return
        if not self.begun:
            for server in self.servers:
                server.begin()
                server.due = True
            self.begun = True
        for server in self.servers:
            if not server.due:
                continue
            server.due = False
            queue = server.queue
            if queue is None:
                continue
            try:
                server.due = server.serve(queue)
            except GuestError as error:
                self.wanted = self.begun = False
                self.services.broke(str(error))
                return
            server.timed_out = False


def drain(fd: int) -> None:
    """Take what an eventfd has."""
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        return
