"""The end of a thread that moves frames.  In the program it ends with its process, but tests have many of them."""

import os
from collections.abc import Callable
from queue import SimpleQueue

import pytest

from tests.support.fakedriver import DEADLINE_S
from vmd.devices.vionet.mover import Mover


class End:
    """Takes the place of what the stopped thread sleeps in, and of its process.  It ends the thread."""

    def __init__(self) -> None:
        self.jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()

    def poll(self) -> None:
        """End the thread."""
        raise SystemExit

    def post(self, job: Callable[[], None]) -> None:
        """Keep the job that raises why the thread has ended.  The thread uses no descriptor any more."""
        self.jobs.put(job)


def end_thread(mover: Mover) -> None:
    """End the thread, which was told to stop, and close its descriptors and the bells of its workers."""
    end = End()
    sleep, mover.services, mover.stop_epoll = mover.stop_epoll, end, end  # type: ignore[assignment]
    mover.look()
    job = end.jobs.get(timeout=DEADLINE_S)
    with pytest.raises(SystemExit):
        job()
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
