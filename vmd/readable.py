"""Waiting for one descriptor.  `select` would fail for numbers from 1024 on, which the parent of many VMs has."""

import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike


def readable(file: "FileDescriptorLike", timeout_s: float = 0) -> bool:
    """Wait until a read would not block; return False if it still would after `timeout_s`."""
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))
