"""Eventfds (eventfd(2)), by which KVM and the two halves of a device signal each other."""

import posix as os
import select


def eventfd() -> int:
    """Return a new eventfd.  It is zero and does not block."""
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def readable(fd: int) -> bool:
    """Return whether an eventfd is not zero, without changing it."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def drain(fd: int) -> None:
    """Reset an eventfd to zero.  It may be zero already, because another process or KVM has read it."""
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        return
