"""What a console showed last: 64 KiB of shared memory, which the VM process writes and the parent keeps.

So nothing of it is lost with a VM process, however that ends: what no viewer has read yet, the parent hands on, and
the next VM process (the guest has reset itself) goes on where the last one stopped.

The file is sealed at its size.  It begins with a page of 64-bit counters of bytes, which only ever grow; byte n
of the output stands at n % BACKLOG_BYTES behind that page.  Its reader believes nothing: a VM process may write
anything at any time.
"""

import fcntl
import mmap
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

BACKLOG_BYTES = 64 * 1024
FILE_BYTES = mmap.PAGESIZE + BACKLOG_BYTES
COUNTERS = struct.Struct("<QQQ")  # in the order of the numbers below, but for the last
SHOWN, PASSED, BEGUN, LOGGED = range(4)
# SHOWN   what is complete
# PASSED  what has gone to the pty, or was given up: a viewer did not read it in time
# BEGUN   SHOWN, and what is being written
# LOGGED  what is in the console log, or can never be; written by the process "consolelog", so that the next one of
#         these goes on there
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class BacklogWriter:
    """The VM process's side.  Callers take turns."""

    def __init__(self, fd: int) -> None:
        """Take a file that a `Backlog` has made; closes `fd`.  Raises OSError, ValueError."""
        try:
            memory = memoryview(mmap.mmap(fd, FILE_BYTES))
        finally:
            os.close(fd)
        self._counters = memory[: mmap.PAGESIZE].cast("Q")
        self._bytes = memory[mmap.PAGESIZE :]

    @property
    def shown(self) -> int:
        """How much the guest has printed ever."""
        return self._counters[SHOWN]

    @property
    def waiting(self) -> int:
        """How much of it waits for the pty."""
        return self._counters[SHOWN] - self._counters[PASSED]

    def write(self, data: bytes) -> None:
        """Keep output; what it takes the place of does not wait any more."""
        counters = self._counters
        first = counters[SHOWN]
        shown = counters[BEGUN] = first + len(data)
        if len(data) > BACKLOG_BYTES:
            first, data = shown - BACKLOG_BYTES, data[-BACKLOG_BYTES:]
        if counters[PASSED] < shown - BACKLOG_BYTES:
            counters[PASSED] = shown - BACKLOG_BYTES
        at = first % BACKLOG_BYTES
        fits = min(len(data), BACKLOG_BYTES - at)
        self._bytes[at : at + fits] = data[:fits]
        self._bytes[: len(data) - fits] = data[fits:]
        counters[SHOWN] = shown

    def next_piece(self, most: int) -> memoryview:
        """Return the first of what waits, as far as it lies in one piece."""
        at = self._counters[PASSED] % BACKLOG_BYTES
        return self._bytes[at : min(at + min(most, self.waiting), BACKLOG_BYTES)]

    def pass_on(self, count: int) -> None:
        """So much of what waits has gone to the pty."""
        self._counters[PASSED] += count

    def pass_all(self) -> int:
        """Nothing waits any more: it is shown in another way.  Return `shown`."""
        shown = self._counters[PASSED] = self._counters[SHOWN]
        return shown


class Output:
    """A part of what a console has shown: `data` ends with byte `end`, and `passed` of all bytes went to the pty."""

    __slots__ = ("data", "end", "passed")

    def __init__(self, data: bytes, end: int, passed: int) -> None:
        self.data = data
        self.end = end
        self.passed = min(max(passed, end - len(data)), end)

    def since(self, position: int) -> bytes:
        """Return what comes after a position, as far as it is there."""
        return self.data[max(0, position - (self.end - len(self.data))) :]


class Backlog:
    """The parent's side: makes the file and reads it; `start` is the number of its first byte."""

    def __init__(self, fd: int, start: int) -> None:
        self.fd = fd
        self.start = start

    @classmethod
    def create(cls, start: int = 0) -> "Self":
        """Make the file for a VM that begins.  Raises OSError."""
        fd = os.memfd_create("console", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, FILE_BYTES)
            os.pwrite(fd, COUNTERS.pack(start, start, start), 0)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, start)

    def shown(self) -> int:
        """Return how much the guest has printed."""
        return int(COUNTERS.unpack(os.pread(self.fd, COUNTERS.size, 0))[SHOWN])

    def read(self, upto: int | None = None) -> Output:
        """Return what was shown last, up to byte `upto` or now."""
        shown, passed, _ = COUNTERS.unpack(os.pread(self.fd, COUNTERS.size, 0))
        end = shown if upto is None else min(shown, upto)
        ring = os.pread(self.fd, BACKLOG_BYTES, mmap.PAGESIZE)
        # While we were reading, the oldest bytes may have been written over.
        begun = COUNTERS.unpack(os.pread(self.fd, COUNTERS.size, 0))[BEGUN]
        first = min(end, max(self.start, begun - BACKLOG_BYTES, end - BACKLOG_BYTES, 0))
        at = first % BACKLOG_BYTES
        return Output((ring[at:] + ring[:at])[: end - first], end, passed)

    def close(self) -> None:
        """Let it go."""
        os.close(self.fd)


class LoggedBacklog(Backlog):
    """The side of who writes the output to a file.  `logged` is how far that has come.

    A VM process can change `logged` when this object is made: then its own log lacks something, or has it twice.
    """

    def __init__(self, fd: int, start: int) -> None:
        """Own a file that a `Backlog` has made; `fd` is closed where this fails.  Raises OSError, ValueError."""
        super().__init__(fd, start)
        try:
            self._counters = memoryview(mmap.mmap(fd, mmap.PAGESIZE)).cast("Q")
        except BaseException:
            os.close(fd)
            raise
        self.logged = min(max(self._counters[LOGGED], start), self._counters[SHOWN])

    def shown(self) -> int:
        """Return how much the guest has printed, without a system call."""
        return self._counters[SHOWN]

    def fresh(self) -> tuple[int, bytes]:
        """Return how many bytes behind `logged` are gone, and what comes next, as far as it lies in one piece."""
        shown = self._counters[SHOWN]
        first = max(self.logged, shown - BACKLOG_BYTES)
        if first >= shown:
            return 0, b""
        at = first % BACKLOG_BYTES
        data = os.pread(self.fd, min(shown - first, BACKLOG_BYTES - at), mmap.PAGESIZE + at)
        # While we were reading, the oldest bytes may have been written over.
        valid = min(max(first, self._counters[BEGUN] - BACKLOG_BYTES), first + len(data))
        return valid - self.logged, data[valid - first :]

    def log(self, count: int) -> None:
        """So much more is in the log."""
        self.logged += count
        self._counters[LOGGED] = self.logged % (1 << 64)
