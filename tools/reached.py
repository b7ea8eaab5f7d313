"""The marks of the statements that `make coverage` counts, in a file that all processes map.

`tools/coverage.py` puts this module into a copy of the checkout, as `vmd/reached.py`, with FILE and SIZE set.  Each
statement of the copy stores a one.  Programs that users run do not contain this module.  A mark is in the file as soon
as the statement runs, so a killed process has left its marks, too.  A confined process needs no further rights, because
it has mapped the file before.
"""

import fcntl
import mmap
import posix as os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

FILE = ""
SIZE = 0
MAGIC = b"marks of vmd"  # the first bytes of the file
FD = 63  # of the file in a started process; `privsep/spawn.py` uses no higher number


def open_marks() -> int:
    """Return a descriptor of the file: the inherited one, else a new one by name, or -1."""
    try:
        if os.fstat(FD).st_size == SIZE and os.pread(FD, len(MAGIC), 0) == MAGIC:
            return FD
    except OSError:
        pass
    try:
        low = os.open(FILE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return -1
    high = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, FD)  # low numbers have a meaning, even if they are closed
    os.close(low)
    return high


def hand_on(spawn: "Callable[..., Any]") -> "Callable[..., Any]":
    """Return a `spawn` that also passes the file to each process that it starts."""

    def spawn_with_marks(*arguments: "Any", fds: "Mapping[int, int] | None" = None, **named: "Any") -> "Any":  # noqa: ANN401
        return spawn(*arguments, fds={**(fds or {}), FD: fd} if fd >= 0 else fds, **named)

    return spawn_with_marks


def map_marks() -> "mmap.mmap | bytearray":
    """Return the marks.  The mapping duplicates the descriptor, also to a high number."""
    if fd < 0:
        return bytearray(SIZE)
    low = [os.dup(fd)]
    while low[-1] < FD:
        low.append(os.dup(fd))
    mapped = mmap.mmap(fd, SIZE)
    for each in low:
        os.close(each)
    return mapped


fd = open_marks()
marks = map_marks()
