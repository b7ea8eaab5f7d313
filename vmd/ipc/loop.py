"""The event loop of every process but the device leaves: descriptors, timers, signals, calls from threads."""

import os
import select
import time
from _heapq import heappop, heappush

from vmd import signals as signal
from vmd.closing import close

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.ipc.fence import Fence, Source

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
HANG_UP = select.EPOLLHUP | select.EPOLLERR  # always waited for
REST_S = 0.1  # for a descriptor whose callback has failed: what made it fail may still be there


class Timer:
    """A call due at a moment of the monotonic clock; `source` is for whom it is (`Fence`)."""

    __slots__ = ("callback", "due_s", "source")

    def __init__(self, due_s: float, callback: "Callable[[], None]", source: "Source | None" = None) -> None:
        self.due_s = due_s
        self.callback: Callable[[], None] | None = callback
        self.source = source

    def cancel(self) -> None:
        """Never make the call; harmless after it was made."""
        self.callback = None

    def __lt__(self, other: "Timer") -> bool:
        return self.due_s < other.due_s


class Loop:
    """One epoll set with its timers.

    All methods but `call_from_thread` and `schedule` belong to the loop's own thread.
    An exception of a callback comes out of `run`, unless there is a `fence`.
    """

    def __init__(self) -> None:
        self.fence: Fence | None = None
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._events: dict[int, int] = {}  # what is waited for
        self._resting: set[int] = set()  # descriptors whose callback has just failed
        self._added: set[int] = set()  # since this round's events were found
        self._timers: list[Timer] = []
        self._calls: list[Callable[[], None]] = []
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
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
        """Change what is waited for; 0 leaves hang-up and error only."""
        self._events[fd] = events
        if fd not in self._resting:
            self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Forget `fd`; call before closing it, harmless if it was never added."""
        if self._callbacks.pop(fd, None) is not None:
            del self._events[fd]
            if fd in self._resting:
                self._resting.discard(fd)
            else:
                self._epoll.unregister(fd)

    def call_later(self, delay_s: float, callback: "Callable[[], None]", source: "Source | None" = None) -> Timer:
        """Call once, `delay_s` seconds from now."""
        timer = Timer(time.monotonic() + delay_s, callback, source)
        heappush(self._timers, timer)
        return timer

    def schedule(self, delay_s: float, callback: "Callable[[], None]") -> Timer:
        """Do as `call_later`, from any thread."""
        timer = Timer(time.monotonic() + delay_s, callback)
        self.call_from_thread(lambda: heappush(self._timers, timer))
        return timer

    def call_from_thread(self, callback: "Callable[[], None]") -> None:
        """Call once in the loop's thread, soon; any thread may ask."""
        self._calls.append(callback)  # list.append and pop(0) are atomic under the interpreter's lock
        os.eventfd_write(self._wake_fd, 1)

    def on_signal(self, signum: int, callback: "Callable[[], None]") -> None:
        """Call from the loop, not from the signal handler; for the main thread only."""
        if self._signal_pipe is None:
            self._signal_pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            signal.set_wakeup_fd(self._signal_pipe[1], warn_on_full_buffer=False)
            self.add(self._signal_pipe[0], self._on_signal_byte)
        self._signals[signum] = callback
        signal.signal(signum, lambda _signum, _frame: None)

    def run(self) -> None:
        """Serve until `stop`."""
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
        """Tell a callback what its descriptor is ready for; after a failure the descriptor rests."""
        if not self._call(callback, lambda: callback(events)) and self._callbacks.get(fd) is callback:
            self._epoll.unregister(fd)
            self._resting.add(fd)
            self.call_later(REST_S, lambda: self._go_on_with(fd, callback))

    def _go_on_with(self, fd: int, callback: "Callable[[int], None]") -> None:
        if fd in self._resting and self._callbacks.get(fd) is callback:
            self._resting.discard(fd)
            self._epoll.register(fd, self._events[fd])

    def _call(self, named: object, call: "Callable[[], None]", source: "Source | None" = None) -> bool:
        """Make a call, called as `named` is; return whether it came back."""
        if self.fence is not None:
            return self.fence.run(getattr(named, "__qualname__", "a call"), call, source)
        call()
        return True

    def stop(self) -> None:
        """Make `run` return after the callback at hand."""
        self._running = False

    def _goes_on(self) -> bool:
        return self._running

    def close(self) -> None:
        """Release the loop's own descriptors."""
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
        # Only what was asked before this moment: a call that asks for another must not keep us here.
        for _ in range(len(self._calls)):
            call = self._calls.pop(0)
            self._call(call, call)

    def _on_signal_byte(self, _events: int) -> None:
        assert self._signal_pipe is not None
        for signum in set(os.read(self._signal_pipe[0], 512)):
            callback = self._signals.get(signum)
            if callback is not None:
                self._call(callback, callback)
