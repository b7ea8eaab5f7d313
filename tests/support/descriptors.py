"""The open descriptors of processes."""

import contextlib
import gc
import os


def open_descriptors() -> list[str]:
    """Return the sorted numbers of our descriptors, after garbage collection has closed leftovers of earlier tests."""
    gc.collect()
    listed = os.listdir("/proc/self/fd")  # includes the listing's own descriptor, which is closed again
    return sorted(number for number in listed if os.path.lexists(f"/proc/self/fd/{number}"))


class NewDescriptors:
    """The descriptors that are opened from now on by a process that a test plays.  No object may still own one of them.

    A process often leaves its descriptors to the kernel, which closes them when it ends.
    """

    def __init__(self) -> None:
        self._before = set(open_descriptors())

    def close(self) -> None:
        """Close them."""
        for fd in set(open_descriptors()) - self._before:
            os.close(int(fd))


def open_files(pid: int) -> dict[int, str]:
    """Return the open files of a process by number, without those that it closes meanwhile."""
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
            continue  # the descriptor of the listing
    return found
