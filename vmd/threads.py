"""Threads, locks, events and conditions without the module `threading`, which costs each VM 0.3 MiB.

For type checkers this is `threading`.  Only the part that VMs use is here: all threads are daemons, an event cannot be
cleared, and only one thread may wait for a condition.
"""

import _thread

__all__ = ["Condition", "Event", "Lock", "RLock", "Thread"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from threading import Condition, Event, Lock, RLock, Thread
else:
    Lock, RLock = _thread.allocate_lock, _thread.RLock

    class Thread:
        """A thread that calls `target` after `start`."""

        def __init__(self, *, target, name, daemon) -> None:  # noqa: ANN001 - the types are those of `threading`
            assert daemon
            self.name = name
            self._target = target
            self._running = Lock()  # locked from the thread's start to its end

        def start(self) -> None:
            """Start the thread.  Raises RuntimeError if the host allows no more threads."""
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
            """Return whether the thread has started and not ended."""
            return self._running.locked()

        def join(self, timeout=None) -> None:  # noqa: ANN001
            """Wait until the thread ends, for at most `timeout` seconds."""
            if acquire(self._running, timeout):
                self._running.release()

    class Event:
        """An event that is set once, and wakes all threads that wait for it."""

        def __init__(self) -> None:
            self._lock = Lock()
            self._set = False
            self._waiting = []  # a lock for each waiting thread; releasing it wakes the thread

        def is_set(self) -> bool:
            """Return whether the event is set."""
            return self._set

        def set(self) -> None:
            """Set the event."""
            with self._lock:
                self._set = True
                waiting, self._waiting = self._waiting, []
            for each in waiting:
                each.release()

        def wait(self, timeout=None) -> bool:  # noqa: ANN001
            """Wait until the event is set, for at most `timeout` seconds; return whether it is set."""
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
        """A reentrant lock, and a condition that its holder can wait for.

        A thread that waits must have taken the lock exactly once.
        """

        def __init__(self) -> None:
            self._lock = RLock()
            self._waiting = None

        def __enter__(self) -> bool:
            return self._lock.acquire()

        def __exit__(self, *_) -> None:  # noqa: ANN002
            self._lock.release()

        def wait(self) -> None:
            """Release the lock until `notify` is called, then take it again."""
            mine = self._waiting = Lock()
            mine.acquire()
            self._lock.release()
            try:
                mine.acquire()
            finally:
                self._lock.acquire()

        def notify(self) -> None:
            """Wake the waiting thread, if there is one.  The caller holds the lock."""
            mine, self._waiting = self._waiting, None
            if mine is not None:
                mine.release()

    def acquire(lock, timeout_s) -> bool:  # noqa: ANN001
        """Take a lock; return False if that takes longer than `timeout_s`.  None: wait for ever."""
        return lock.acquire(True, -1 if timeout_s is None else max(0.0, timeout_s))
