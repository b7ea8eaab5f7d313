"""Counters that wake whoever polls them (eventfd(2)), as KVM and the two halves of a device signal each other."""

import os
import select


def eventfd() -> int:
    """Return a new one, which counts nothing yet and blocks nobody."""
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def readable(fd: int) -> bool:
    """Return whether an eventfd has something, without taking it."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def drain(fd: int) -> None:
    """Take what an eventfd has, if anything; another process or KVM may be quicker."""
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        return
