"""A `select` for any number of descriptors, because the process that runs thousands of tests has more than 1024."""

import select
from collections.abc import Iterable
from typing import Any

READABLE = select.POLLIN | select.POLLHUP | select.POLLERR | select.POLLNVAL
WRITABLE = select.POLLOUT | select.POLLHUP | select.POLLERR | select.POLLNVAL


def any_select(
    reading: Iterable[Any], writing: Iterable[Any], other: Iterable[Any], timeout: float | None = None
) -> tuple[list[Any], list[Any], list[Any]]:
    """Wait as `select.select` does; `other` must be empty."""
    readers, writers = list(reading), list(writing)
    assert not list(other)
    poll = select.poll()
    events: dict[int, int] = {}
    for files, event in ((readers, select.POLLIN), (writers, select.POLLOUT)):
        for file in files:
            fd = number(file)
            events[fd] = events.get(fd, 0) | event
    for fd, event in events.items():
        poll.register(fd, event)
    found = dict(poll.poll(None if timeout is None else timeout * 1000))
    return (
        [file for file in readers if found.get(number(file), 0) & READABLE],
        [file for file in writers if found.get(number(file), 0) & WRITABLE],
        [],
    )


def number(file: Any) -> int:  # noqa: ANN401 - a descriptor, or anything with one
    """Return the descriptor of a file."""
    return file if isinstance(file, int) else int(file.fileno())


def install() -> None:
    """Put it in the place of `select.select`."""
    vars(select)["select"] = any_select
