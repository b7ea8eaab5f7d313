"""The backlog: the last 64 KiB of a console's output, in shared memory that the VM process writes and the parent keeps.

So no output is lost when a VM process ends, even by a kill.  The parent passes on the output that no viewer has read
yet.  After a reset of the guest the next VM process continues the same backlog.

The file is sealed at its size.  It begins with a page of 64-bit counters of bytes, which never decrease.  Byte n of the
output is at n % BACKLOG_BYTES behind that page.  The reader trusts no value, because a VM process may write anything at
any time.
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
COUNTERS = struct.Struct("<QQQ")  # in the order of the numbers below, without LOGGED
SHOWN, PASSED, BEGUN, LOGGED = range(4)
# SHOWN   output that is complete in the file
# PASSED  output that has gone to the pty, or was dropped because no viewer read it in time
# BEGUN   SHOWN plus the output that is being written now
# LOGGED  output that is in the console log, or that is lost for it.  The process "consolelog" writes it, so that its
#         successor goes on there
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class BacklogWriter:
    """The VM process's side.  Only one thread may use it at a time."""

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
        """The number of bytes that the guest has printed since the output began."""
        return self._counters[SHOWN]

    @property
    def waiting(self) -> int:
        """The number of bytes that wait for the pty."""
        return self._counters[SHOWN] - self._counters[PASSED]

    def write(self, data: bytes) -> None:
        """Add output.  Waiting bytes that it overwrites are dropped."""
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
        """Return the first waiting bytes, at most `most`, and only those that are contiguous."""
        at = self._counters[PASSED] % BACKLOG_BYTES
        return self._bytes[at : min(at + min(most, self.waiting), BACKLOG_BYTES)]

    def pass_on(self, count: int) -> None:
        """Note that `count` waiting bytes have gone to the pty."""
        self._counters[PASSED] += count

    def pass_all(self) -> int:
        """Drop all waiting bytes, because they are shown in another way.  Return `shown`."""
        shown = self._counters[PASSED] = self._counters[SHOWN]
        return shown


class Output:
    """A part of a console's output.  `data` ends with byte `end`.  The first `passed` bytes of all went to the pty."""

    __slots__ = ("data", "end", "passed")

    def __init__(self, data: bytes, end: int, passed: int) -> None:
        self.data = data
        self.end = end
        self.passed = min(max(passed, end - len(data)), end)

    def since(self, position: int) -> bytes:
        """Return the bytes after `position` that are still there."""
        return self.data[max(0, position - (self.end - len(self.data))) :]


class Backlog:
    """The parent's side: it makes the file and reads it.  The output in it begins with byte number `start`."""

    def __init__(self, fd: int, start: int) -> None:
        self.fd = fd
        self.start = start

    @classmethod
    def create(cls, start: int = 0) -> "Self":
        """Make the file for a new VM.  Raises OSError."""
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
        """Return the number of bytes that the guest has printed."""
        return int(COUNTERS.unpack(os.pread(self.fd, COUNTERS.size, 0))[SHOWN])

    def read(self, upto: int | None = None) -> Output:
        """Return the latest output, up to byte `upto` or up to now."""
        shown, passed, _ = COUNTERS.unpack(os.pread(self.fd, COUNTERS.size, 0))
        end = shown if upto is None else min(shown, upto)
        ring = os.pread(self.fd, BACKLOG_BYTES, mmap.PAGESIZE)
        # The oldest bytes may have been overwritten during the read.
        begun = COUNTERS.unpack(os.pread(self.fd, COUNTERS.size, 0))[BEGUN]
        first = min(end, max(self.start, begun - BACKLOG_BYTES, end - BACKLOG_BYTES, 0))
        at = first % BACKLOG_BYTES
        return Output((ring[at:] + ring[:at])[: end - first], end, passed)

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)


class LoggedBacklog(Backlog):
    """The side of the process that writes the output to a file.  The first `logged` bytes are written.

    A VM process can change the stored LOGGED before this object is made.  Then only its own log lacks bytes, or has
    some twice.
    """

    def __init__(self, fd: int, start: int) -> None:
        """Take ownership of a file that a `Backlog` has made.  A failure closes `fd`.  Raises OSError, ValueError."""
        super().__init__(fd, start)
        try:
            self._mapping = mmap.mmap(fd, mmap.PAGESIZE)
        except BaseException:
            os.close(fd)
            raise
        self._counters = memoryview(self._mapping).cast("Q")
        self.logged = min(max(self._counters[LOGGED], start), self._counters[SHOWN])

    def shown(self) -> int:
        """Return the number of bytes that the guest has printed, without a system call."""
        return self._counters[SHOWN]

    def close(self) -> None:
        """Unmap and close the file."""
        self._counters.release()
        self._mapping.close()  # it has a descriptor of its own
        super().close()

    def fresh(self) -> tuple[int, bytes]:
        """Return how many bytes after `logged` are lost, and the next bytes that are contiguous."""
        shown = self._counters[SHOWN]
        first = max(self.logged, shown - BACKLOG_BYTES)
        if first >= shown:
            return 0, b""
        at = first % BACKLOG_BYTES
        data = os.pread(self.fd, min(shown - first, BACKLOG_BYTES - at), mmap.PAGESIZE + at)
        # The oldest bytes may have been overwritten during the read.
        valid = min(max(first, self._counters[BEGUN] - BACKLOG_BYTES), first + len(data))
        return valid - self.logged, data[valid - first :]

    def log(self, count: int) -> None:
        """Note that `count` more bytes are in the log."""
        self.logged += count
        self._counters[LOGGED] = self.logged % (1 << 64)
