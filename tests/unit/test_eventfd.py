"""Eventfds: a new one is zero, and neither reading nor resetting it ever waits."""

import os

from vmd.eventfd import drain, eventfd
from vmd.readable import readable


def test_an_eventfd() -> None:
    """It keeps its value until it is reset."""
    fd = eventfd()
    assert not os.get_inheritable(fd)
    assert not readable(fd)
    drain(fd)
    os.eventfd_write(fd, 3)
    assert readable(fd)
    assert readable(fd)
    drain(fd)
    assert not readable(fd)
    os.close(fd)
