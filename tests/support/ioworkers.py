"""The end of the threads that carry out a disk's requests.  In the program they end with their process."""

import os
import threading

from vmd.devices.vioblk.device import Workers

DEADLINE_S = 60


def end_workers(workers: Workers, most: int) -> None:
    """End all threads, which have no jobs, and close their eventfd.  `most` is as in the constructor."""
    started = most - workers.missing
    together = threading.Barrier(started + 1)

    def leave() -> None:
        together.wait(DEADLINE_S)
        raise SystemExit  # before the thread writes to the eventfd

    for _ in range(started):
        workers.jobs.put(leave)
    together.wait(DEADLINE_S)
    os.close(workers.done)
