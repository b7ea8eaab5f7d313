"""The form of a sent VM: sections, each with its length in front and its digest behind (docs/formats.md 4).

    preamble    magic, format version, length of the header (u32); the header; their SHA-256
    section*    kind, zero (u32), length (u64), body; their SHA-256
    END         a section whose body is the number of those before it (u64)

All numbers are little-endian.  The body of MEMORY is a guest-physical address (u64) and the bytes from there on; that
of RUNS is how many runs of memory it has (u64), address and length of each (u64), and then their bytes.  Of STATE and
the header the records are `vm/state.py`'s, with their fields by name.  (Version 2 had them in order:
`vm/stream_v2.py`.)  A new field has a default, which says what was so before.  Where a guest cannot go on without
what is new, or the form changes, VERSION is raised, so that older readers refuse the stream.

Up to version 3, memory comes in ascending order, and none of it twice.  From version 4 on, in which a machine is sent
that runs meanwhile, it comes in any order, in RUNS, too, and what comes later counts.  A machine that stands still is
written as version 3: more readers know it.

Memory is hashed while it is written, or the next pieces are read: on its way out where it lies, or of a machine that
runs in a copy, which does not change; on its way in, in buffers, for a page that is written with its file costs half
of one that comes into being by being touched.  To hash it takes longer than to read it and to write it, so there are
two threads for that on its way in.

Everything here blocks, and runs on a thread of its own, but only in `Pipe.wait`: so that whoever wants it to end is
heard, and a peer that does nothing for IDLE_TIMEOUT_S is given up.  A StreamError completes "the stream ...".
"""

import errno
import hashlib
import os
import select
import stat
from _queue import SimpleQueue
from struct import Struct

from vmd import threads
from vmd.errors import VmdError, sentence
from vmd.ipc.streams import MAGIC
from vmd.privsep.title import name_thread
from vmd.tasks import start_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable, Iterator, Sequence
else:
    from _collections import deque

VERSION = 4
STILL = 3  # the version of a machine that stands still
OLDEST = 2  # that is read
PREAMBLE = Struct("<8sII")
SECTION = Struct("<IIQ")
GPA = Struct("<Q")
COUNT = Struct("<Q")
RUN = Struct("<QQ")  # address, length
MEMORY, STATE, END, RUNS = 1, 2, 3, 4
DIGEST_BYTES = 32

HEADER_MAX = 64 << 10  # a configuration fits one message of 16 KiB, and a CPUID table that KVM takes another
PIECE_BYTES = 8 << 20  # of memory in one section: what one thread hashes while the other one moves the next
RUNS_MAX = 2048  # in one section: as many pages as it has
RUNS_BYTES_MAX = COUNT.size + RUNS_MAX * RUN.size + PIECE_BYTES
HASHERS = 2  # of a reader
IDLE_TIMEOUT_S = 300.0
LOOK_S = 0.2  # for a wish that this end
ATOMIC_BYTES = select.PIPE_BUF  # what a pipe that poll(2) calls writable takes without waiting


class StreamError(VmdError):
    """A stream ends too early, or is not what it should be."""


class Cancelled(VmdError):
    """Somebody wanted this end."""


class Hasher:
    """One thread that computes digests while its owner waits for I/O."""

    def __init__(self) -> None:
        """Raises HostError."""
        self._work: Callable[[], None] | None = None
        self._digest = b""
        self._go: SimpleQueue[None] = SimpleQueue()
        self._done: SimpleQueue[None] = SimpleQueue()
        self._thread = threads.Thread(target=self._run, name="hasher", daemon=True)
        start_thread("hasher", self._thread.start)

    def begin(self, parts: "Sequence[bytes | memoryview]") -> None:
        """Hash these, one after the other; `result` waits."""

        def work() -> None:
            digest = hashlib.sha256()
            for part in parts:
                digest.update(part)
            self._digest = digest.digest()

        self._work = work
        self._go.put(None)

    def result(self) -> bytes:
        """Return the digest of what was begun last."""
        self._done.get()
        return self._digest

    def close(self) -> None:
        """End the thread."""
        self._work = None
        self._go.put(None)
        self._thread.join()

    def _run(self) -> None:
        name_thread("hasher")
        while True:
            self._go.get()
            work = self._work
            if work is None:
                return
            work()
            self._done.put(None)


class Pipe:
    """A descriptor that somebody gave us, with whatever it is behind; its flags are not ours to change."""

    def __init__(self, fd: int, direction: int, moved_bytes: int = 0) -> None:
        """`direction` is select.POLLIN or POLLOUT; others may have moved the first bytes."""
        self.fd = fd
        self.moved_bytes = moved_bytes
        self.cancelled = False
        self._poll = select.poll()
        self._poll.register(fd, direction)
        self._flags = 0 if stat.S_ISREG(os.fstat(fd).st_mode) else os.RWF_NOWAIT  # a file never waits for a reader
        self._at_once = PIECE_BYTES

    def wait(self) -> None:
        """Wait until something can be moved.  Raises Cancelled or StreamError."""
        for _ in range(int(IDLE_TIMEOUT_S / LOOK_S)):
            if self.cancelled:
                raise Cancelled("cancelled")
            if self._poll.poll(LOOK_S * 1000):
                return
        raise StreamError(f"has stood still for {IDLE_TIMEOUT_S:.0f} s")

    def write(self, *parts: "bytes | memoryview") -> None:
        """Write all.  Raises StreamError or Cancelled."""
        pending = [memoryview(part).cast("B") for part in parts]
        while pending:
            self.wait()
            try:
                done = self._write_some(pending)
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise StreamError("was closed by its reader") from None
            except OSError as error:
                raise StreamError(f"cannot be written: {sentence(error)}") from error
            self.moved_bytes += done
            while pending and done >= len(pending[0]):
                done -= len(pending.pop(0))
            if done:
                pending[0] = pending[0][done:]

    def _write_some(self, pending: "list[memoryview]") -> int:
        """Write what is taken without waiting; returns how much that was."""
        if self._at_once == ATOMIC_BYTES:
            return os.writev(self.fd, [pending[0][:ATOMIC_BYTES]])
        first = pending[0][: self._at_once]
        rest = pending[1:] if len(first) == len(pending[0]) else ()
        if not self._flags:
            return os.writev(self.fd, [first, *rest])
        try:
            return os.pwritev(self.fd, [first, *rest], -1, self._flags)
        except OSError as error:
            # Kernels before 6.5 know of no pipe that does not wait, and devices still do not.
            if error.errno not in (errno.EOPNOTSUPP, errno.ESPIPE, errno.EINVAL):
                raise
            self._at_once = ATOMIC_BYTES
            return 0

    def read_into(self, view: memoryview) -> None:
        """Fill a view.  Raises StreamError or Cancelled."""
        at = 0
        while at < len(view):
            self.wait()
            try:
                done = os.readv(self.fd, [view[at:]])
            except BlockingIOError:
                continue
            except OSError as error:
                raise StreamError(f"cannot be read: {sentence(error)}") from error
            if not done:
                what = f"ends after {self.moved_bytes} bytes, before its end" if self.moved_bytes else "is empty"
                raise StreamError(what)
            self.moved_bytes += done
            at += done

    def read(self, size: int) -> bytes:
        """Return as many bytes.  Raises StreamError or Cancelled."""
        buffer = bytearray(size)
        self.read_into(memoryview(buffer))
        return bytes(buffer)

    def close(self) -> None:
        """Close; of a file only that tells whether all is there.  A second call does nothing.  Raises StreamError."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            try:
                os.close(fd)
            except OSError as error:
                raise StreamError(f"cannot be closed: {sentence(error)}") from error


class StreamWriter:
    """Writes a stream."""

    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe
        self.hasher = Hasher()
        self.sections = 0

    def header(self, body: bytes, version: int = VERSION) -> None:
        """Write the preamble."""
        raw = PREAMBLE.pack(MAGIC, version, len(body)) + body
        self.pipe.write(raw, hashlib.sha256(raw).digest())

    def memory(self, gpa: int, view: memoryview) -> None:
        """Write a run of memory."""
        for start in range(0, len(view), PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            self._section(MEMORY, GPA.pack(gpa + start), piece)

    def runs(self, runs: "Sequence[tuple[int, int]]", data: memoryview) -> None:
        """Write runs of memory, (address, length) each, RUNS_MAX and PIECE_BYTES at most, whose bytes are in `data`."""
        table = b"".join(RUN.pack(gpa, length) for gpa, length in runs)
        self._section(RUNS, COUNT.pack(len(runs)) + table, data)

    def state(self, body: bytes) -> None:
        """Write a record."""
        self._section(STATE, body)

    def end(self) -> None:
        """Write the end."""
        self._section(END, COUNT.pack(self.sections))

    def _section(self, kind: int, *body: "bytes | memoryview") -> None:
        head = SECTION.pack(kind, 0, sum(map(len, body)))
        self.hasher.begin((head, *body))
        try:
            self.pipe.write(head, *body)
        finally:
            digest = self.hasher.result()
        self.pipe.write(digest)
        self.sections += 1


class Checks:
    """Sections whose digests are computed while more is read, at most HASHERS at a time."""

    def __init__(self) -> None:
        self._idle: list[Hasher] = []
        self._busy: deque[tuple[Hasher, bytes]] = deque()  # in the order of their sections, each with what it must find

    def begin(self, parts: "Sequence[bytes | memoryview]", expected: bytes) -> None:
        """Check one more section; if there are too many, wait for the first.

        Raises StreamError if that is wrong, or HostError for a thread that cannot be had.
        """
        if len(self._busy) == HASHERS:
            self._wait()
        hasher = self._idle.pop() if self._idle else Hasher()
        hasher.begin(parts)
        self._busy.append((hasher, expected))

    def finish(self) -> None:
        """Wait for all.  Raises StreamError if one is wrong."""
        while self._busy:
            self._wait()

    def close(self) -> None:
        """End the threads."""
        for hasher in (*self._idle, *(hasher for hasher, _ in self._busy)):
            hasher.close()

    def _wait(self) -> None:
        hasher, expected = self._busy.popleft()
        self._idle.append(hasher)
        if hasher.result() != expected:
            raise StreamError("is damaged: the digest of a section is wrong")


class StreamReader:
    """Reads a stream, and believes nothing."""

    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe
        self.sections = 0
        self.version = VERSION  # of the format, once the header was read
        # Of memory: one is read into while the others are hashed.
        self._buffers = deque(bytearray() for _ in range(HASHERS + 1))

    def header(self) -> bytes:
        """Return the header.  Raises StreamError."""
        raw = self.pipe.read(PREAMBLE.size)
        magic, version, length = PREAMBLE.unpack(raw)
        if magic != MAGIC:
            raise StreamError("is not a virtual machine that was sent by vmctl send")
        if not OLDEST <= version <= VERSION:
            raise StreamError(f"has version {version} of the format, this vmd reads versions {OLDEST} to {VERSION}")
        self.version = version
        if length > HEADER_MAX:
            raise StreamError(f"announces a header of {length} bytes")
        body = self.pipe.read(length)
        if self.pipe.read(DIGEST_BYTES) != hashlib.sha256(raw + body).digest():
            raise StreamError("is damaged: the digest of its header is wrong")
        return body

    def sections_until_end(
        self,
        memory: "Callable[[int, memoryview], None]",
        state: "Callable[[bytes], None]",
        *,
        state_max: int,
    ) -> None:
        """Read up to the end.

        `memory(gpa, data)` takes a run of memory, and raises ValueError if it goes nowhere; `state` takes the body of
        a record, which has `state_max` bytes at most.  What was read is good only if this returns.

        Raises StreamError, or HostError for a thread that cannot be had.
        """
        checks = Checks()
        try:
            while self._section(checks, memory, state, state_max):
                self.sections += 1
        except ValueError as error:
            raise StreamError(f"is not usable: section {self.sections}: {error}") from error
        finally:
            checks.close()

    def _section(
        self,
        checks: Checks,
        memory: "Callable[[int, memoryview], None]",
        state: "Callable[[bytes], None]",
        state_max: int,
    ) -> bool:
        head = self.pipe.read(SECTION.size)
        kind, zero, length = SECTION.unpack(head)
        if zero:
            raise StreamError(f"has unknown flags {zero:#x} in section {self.sections}")
        body: bytes | memoryview
        if kind == MEMORY and GPA.size < length <= GPA.size + PIECE_BYTES:
            address = self.pipe.read(GPA.size)
            body = self._buffer(length - GPA.size)
            self.pipe.read_into(body)
            memory(GPA.unpack(address)[0], body)
        elif kind == RUNS and self.version > STILL and COUNT.size <= length <= RUNS_BYTES_MAX:
            address = b""
            body = self._buffer(length)
            self.pipe.read_into(body)
            for gpa, data in runs_of(body):
                memory(gpa, data)
        elif (kind == STATE and length <= state_max) or (kind == END and length == COUNT.size):
            address = b""
            body = self.pipe.read(length)
        else:
            raise StreamError(f"has a section {self.sections} of kind {kind} and length {length}")
        checks.begin((head, address, body), self.pipe.read(DIGEST_BYTES))
        if kind not in (MEMORY, RUNS):
            checks.finish()
        if kind == STATE:
            state(bytes(body))
        elif kind == END and COUNT.unpack(body)[0] != self.sections:
            raise StreamError(f"has {self.sections} sections where its end says {COUNT.unpack(body)[0]}")
        return bool(kind != END)

    def _buffer(self, length: int) -> memoryview:
        """Return room that is not being hashed."""
        self._buffers.rotate()
        buffer = self._buffers[0]
        if len(buffer) < length:
            buffer = self._buffers[0] = bytearray(length)
        return memoryview(buffer)[:length]


def runs_of(body: memoryview) -> "Iterator[tuple[int, memoryview]]":
    """Yield address and bytes of each run of memory in the body of RUNS.  Raises ValueError."""
    (count,) = COUNT.unpack_from(body)
    if not 0 < count <= RUNS_MAX or COUNT.size + count * RUN.size > len(body):
        raise ValueError(f"{count} runs of memory in {len(body)} bytes")
    at = COUNT.size + count * RUN.size
    for gpa, length in RUN.iter_unpack(body[COUNT.size : at]):
        if not 0 < length <= len(body) - at:
            raise ValueError(f"memory at {gpa:#x}: {length} bytes where {len(body) - at} are left")
        yield gpa, body[at : at + length]
        at += length
    if at != len(body):
        raise ValueError(f"{len(body) - at} bytes behind the last run of memory")
