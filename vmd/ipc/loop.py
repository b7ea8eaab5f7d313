"""The event loop of every process but the device leaves: descriptors, timers, signals, calls from threads."""

import os
import select
import time
from _heapq import heappop, heappush

from vmd import signals as signal
from vmd.closing import close
from vmd.eventfd import eventfd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.ipc.fence import Fence, Source

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
HANG_UP = select.EPOLLHUP | select.EPOLLERR  # epoll always reports these
REST_S = 0.1  # how long a descriptor is ignored after its callback has failed: the cause may still be there


class Timer:
    """A call due at a time of the monotonic clock.  `source` is the client or VM that the call is for (`Fence`)."""

    __slots__ = ("callback", "due_s", "source")

    def __init__(self, due_s: float, callback: "Callable[[], None]", source: "Source | None" = None) -> None:
        self.due_s = due_s
        self.callback: Callable[[], None] | None = callback
        self.source = source

    def cancel(self) -> None:
        """Do not make the call.  No effect if it was made already."""
        self.callback = None

    def __lt__(self, other: "Timer") -> bool:
        return self.due_s < other.due_s


class Loop:
    """One epoll set with its timers.

    Any thread may call `call_from_thread` and `schedule`; all other methods are for the loop's own thread.
    `run` raises a callback's exception, unless there is a `fence`.
    """

    def __init__(self) -> None:
        self.fence: Fence | None = None
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._events: dict[int, int] = {}  # the events to wait for
        self._resting: set[int] = set()  # descriptors that are ignored for REST_S, because their callback has failed
        self._added: set[int] = set()  # descriptors added since this round's poll
        self._timers: list[Timer] = []
        self._calls: list[Callable[[], None]] = []
        self._wake_fd = eventfd()
        self._signals: dict[int, Callable[[], None]] = {}
        self._signal_pipe: tuple[int, int] | None = None
        self._running = False
        self.add(self._wake_fd, self._on_wake)

    def add(self, fd: int, callback: "Callable[[int], None]", events: int = READ) -> None:
        """Call `callback(ready events)` whenever `fd` is ready; hang-up and error are always reported."""
        self._epoll.register(fd, events)
        self._callbacks[fd] = callback
        self._events[fd] = events
        self._added.add(fd)

    def modify(self, fd: int, events: int) -> None:
        """Change the events to wait for.  With 0 only hang-up and error are reported."""
        self._events[fd] = events
        if fd not in self._resting:
            self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Stop watching `fd`.  Call this before closing it.  No effect if `fd` was not added."""
        if self._callbacks.pop(fd, None) is not None:
            del self._events[fd]
            if fd in self._resting:
                self._resting.discard(fd)
            else:
                self._epoll.unregister(fd)

    def call_later(self, delay_s: float, callback: "Callable[[], None]", source: "Source | None" = None) -> Timer:
        """Call `callback` once, `delay_s` seconds from now."""
        timer = Timer(time.monotonic() + delay_s, callback, source)
        heappush(self._timers, timer)
        return timer

    def schedule(self, delay_s: float, callback: "Callable[[], None]") -> Timer:
        """Do what `call_later` does; on any thread."""
        timer = Timer(time.monotonic() + delay_s, callback)
        self.call_from_thread(lambda: heappush(self._timers, timer))
        return timer

    def call_from_thread(self, callback: "Callable[[], None]") -> None:
        """Call `callback` once on the loop's thread, soon.  Any thread may call this."""
        self._calls.append(callback)  # list.append and pop(0) are atomic under the interpreter's lock
        os.eventfd_write(self._wake_fd, 1)

    def on_signal(self, signum: int, callback: "Callable[[], None]") -> None:
        """Call `callback` at each signal, from the loop and not from the signal handler.  For the main thread only."""
        if self._signal_pipe is None:
            self._signal_pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            signal.set_wakeup_fd(self._signal_pipe[1], warn_on_full_buffer=False)
            self.add(self._signal_pipe[0], self._on_signal_byte)
        self._signals[signum] = callback
        signal.signal(signum, lambda _signum, _frame: None)

    def run(self) -> None:
        """Serve events until `stop`."""
        self._running = True
        while self._goes_on():
            self._run_timers()
            if not self._goes_on():
                break
            ready = self._epoll.poll(self._timeout_s())
            self._added.clear()
            for fd, events in ready:
                callback = self._callbacks.get(fd)
                # An earlier callback of this round may have removed `fd` and closed it. The number may even belong
                # to a new descriptor: then these events are not its own. epoll reports it again in the next round.
                if callback is not None and fd not in self._added:
                    self._report(fd, callback, events)
                if not self._goes_on():
                    break

    def _report(self, fd: int, callback: "Callable[[int], None]", events: int) -> None:
        """Call the callback of a descriptor.  If it fails, ignore the descriptor for REST_S."""
        if not self._call(callback, lambda: callback(events)) and self._callbacks.get(fd) is callback:
            self._epoll.unregister(fd)
            self._resting.add(fd)
            self.call_later(REST_S, lambda: self._go_on_with(fd, callback))

    def _go_on_with(self, fd: int, callback: "Callable[[int], None]") -> None:
        if fd in self._resting and self._callbacks.get(fd) is callback:
            self._resting.discard(fd)
            self._epoll.register(fd, self._events[fd])

    def _call(self, named: object, call: "Callable[[], None]", source: "Source | None" = None) -> bool:
        """Call `call`, within the fence if there is one; return whether it returned without an exception.

        Log lines name the call after the function `named`.
        """
        if self.fence is not None:
            return self.fence.run(getattr(named, "__qualname__", "a call"), call, source)
        call()
        return True

    def stop(self) -> None:
        """Make `run` return after the current callback."""
        self._running = False

    def _goes_on(self) -> bool:
        return self._running

    def close(self) -> None:
        """Close the loop's own descriptors."""
        if self._signal_pipe is not None:
            signal.set_wakeup_fd(-1)
            for fd in self._signal_pipe:
                close(fd)
        close(self._wake_fd)
        self._epoll.close()

    def _timeout_s(self) -> float:
        while self._timers and self._timers[0].callback is None:
            heappop(self._timers)
        if not self._timers:
            return -1
        return max(0.0, self._timers[0].due_s - time.monotonic())

    def _run_timers(self) -> None:
        now_s = time.monotonic()
        while self._timers and self._timers[0].due_s <= now_s:
            timer = heappop(self._timers)
            callback, timer.callback = timer.callback, None
            if callback is not None:
                self._call(callback, callback, timer.source)

    def _on_wake(self, _events: int) -> None:
        os.eventfd_read(self._wake_fd)
        # Only the calls that are queued now: a call that queues another one must not keep the loop here.
        for _ in range(len(self._calls)):
            call = self._calls.pop(0)
            self._call(call, call)

    def _on_signal_byte(self, _events: int) -> None:
        assert self._signal_pipe is not None
        for signum in set(os.read(self._signal_pipe[0], 512)):
            callback = self._signals.get(signum)
            if callback is not None:
                self._call(callback, callback)
