"""Threads and what they wait for each other by, without `threading`, which takes each VM 0.3 MiB that nothing needs.

For type checkers this is `threading`.  Of that, there is here what VMs use: threads are daemons, an event is not taken
back, and a condition has one thread that waits.
"""

import _thread

__all__ = ["Condition", "Event", "Lock", "RLock", "Thread"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from threading import Condition, Event, Lock, RLock, Thread
else:
    Lock, RLock = _thread.allocate_lock, _thread.RLock

    class Thread:
        """A thread that calls `target` once it is started."""

        def __init__(self, *, target, name, daemon) -> None:  # noqa: ANN001 - these are those of `threading`
            assert daemon
            self.name = name
            self._target = target
            self._running = Lock()  # taken from its start to its end

        def start(self) -> None:
            """Begin.  Raises RuntimeError if there can be no more threads."""
            self._running.acquire()
            try:
                _thread.start_new_thread(self._run, ())
            except BaseException:
                self._running.release()
                raise

        def _run(self) -> None:
            try:
                self._target()
            finally:
                self._running.release()

        def is_alive(self) -> bool:
            """Return whether it has begun and not ended."""
            return self._running.locked()

        def join(self, timeout=None) -> None:  # noqa: ANN001
            """Wait for its end, or so many seconds."""
            if acquire(self._running, timeout):
                self._running.release()

    class Event:
        """Something that happens once, and wakes all who wait for it."""

        def __init__(self) -> None:
            self._lock = Lock()
            self._set = False
            self._waiting = []  # a lock each, which is released to wake

        def is_set(self) -> bool:
            """Return whether it has happened."""
            return self._set

        def set(self) -> None:
            """Let it happen."""
            with self._lock:
                self._set = True
                waiting, self._waiting = self._waiting, []
            for each in waiting:
                each.release()

        def wait(self, timeout=None) -> bool:  # noqa: ANN001
            """Wait until it has happened, or for so many seconds; return whether it has."""
            with self._lock:
                if self._set:
                    return True
                mine = Lock()
                mine.acquire()
                self._waiting.append(mine)
            if not acquire(mine, timeout):
                with self._lock:
                    if mine in self._waiting:
                        self._waiting.remove(mine)
            return self._set

    class Condition:
        """A lock, which its holder can take again, and a change of what it guards, which that one can wait for.

        Whoever waits has taken it once.
        """

        def __init__(self) -> None:
            self._lock = RLock()
            self._waiting = None

        def __enter__(self) -> bool:
            return self._lock.acquire()

        def __exit__(self, *_) -> None:  # noqa: ANN002
            self._lock.release()

        def wait(self) -> None:
            """Let go of the lock until `notify` is called, and take it again."""
            mine = self._waiting = Lock()
            mine.acquire()
            self._lock.release()
            try:
                mine.acquire()
            finally:
                self._lock.acquire()

        def notify(self) -> None:
            """Wake the one that waits, if there is one; called by the holder of the lock."""
            mine, self._waiting = self._waiting, None
            if mine is not None:
                mine.release()

    def acquire(lock, timeout_s) -> bool:  # noqa: ANN001
        """Take a lock in so many seconds, or whenever it can be had."""
        return lock.acquire(True, -1 if timeout_s is None else max(0.0, timeout_s))
