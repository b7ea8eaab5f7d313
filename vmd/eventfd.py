"""Eventfds (eventfd(2)), by which KVM and the two halves of a device signal each other."""

import posix as os


def eventfd() -> int:
    """Return a new eventfd.  It is zero and does not block."""
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def drain(fd: int) -> None:
    """Reset an eventfd to zero.  It may be zero already, because another process or KVM has read it."""
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        return
