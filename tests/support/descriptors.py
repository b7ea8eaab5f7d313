"""What this process has open."""

import gc
import os


def open_descriptors() -> list[str]:
    """Return the numbers, in order, after whatever earlier tests have left to the garbage collector is gone."""
    gc.collect()
    listed = os.listdir("/proc/self/fd")  # also the one that it is listed with, which is closed by now
    return sorted(number for number in listed if os.path.lexists(f"/proc/self/fd/{number}"))
