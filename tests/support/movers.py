"""The end of a thread that moves frames.  In the program it ends with its process, but tests have many of them."""

import os
import threading
from collections.abc import Callable

from tests.support.fakedriver import DEADLINE_S
from vmd.devices.vionet.mover import Mover


class End:
    """Takes the place of what the stopped thread sleeps in, and of its process.  It ends the thread."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def poll(self) -> None:
        """End the thread."""
        raise SystemExit

    def post(self, _job: Callable[[], None]) -> None:
        """Note that the thread has ended.  It uses no descriptor any more."""
        self.over.set()


def end_thread(mover: Mover) -> None:
    """End the thread, which was told to stop, and close its descriptors and the bells of its workers."""
    end = End()
    sleep, mover.services, mover.stop_epoll = mover.stop_epoll, end, end  # type: ignore[assignment]
    mover.look()
    assert end.over.wait(DEADLINE_S), "the thread does not end"
    mover.stop_epoll = sleep
    close(mover)


def close(mover: Mover) -> None:
    """Close the descriptors of a thread that has ended or was not started, and the bells of its workers."""
    mover.epoll.close()
    mover.stop_epoll.close()
    os.close(mover.control)
    for worker in mover.workers:
        for bell in worker.bells:
            os.close(bell)
