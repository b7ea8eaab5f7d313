"""What processes have open."""

import contextlib
import gc
import os


def open_descriptors() -> list[str]:
    """Return the numbers, in order, after whatever earlier tests have left to the garbage collector is gone."""
    gc.collect()
    listed = os.listdir("/proc/self/fd")  # also the one that it is listed with, which is closed by now
    return sorted(number for number in listed if os.path.lexists(f"/proc/self/fd/{number}"))


def open_files(pid: int) -> dict[int, str]:
    """Return what a process has open, by number; what it closes meanwhile is left out."""
    found = {}
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found[int(number)] = os.readlink(f"/proc/{pid}/fd/{number}")
    return found


def inheritable() -> list[int]:
    """Return the descriptors of this process that survive an exec."""
    found = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            if int(entry) > 2 and os.get_inheritable(int(entry)):
                found.append(int(entry))
        except OSError:
            continue  # the listing's own
    return found
