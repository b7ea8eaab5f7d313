"""The format of a stream, which is how a VM is sent (docs/formats.md 4).

    preamble    magic, format version, length of the header (u32); the header; their SHA-256
    section*    kind, zero (u32), length (u64), body; their SHA-256
    END         a section whose body is the number of sections before it (u64)

All numbers are little-endian.

    MEMORY  a guest-physical address (u64), then the bytes from that address on
    RUNS    the number of runs of memory (u64), the address and the length of each run (u64 each), then their bytes
    STATE   a `MachineState` of `vm/state.py`

The records in STATE and in the header carry their fields by name.  (Version 2 had them in order: `vm/stream_v2.py`.)
A new field has a default, which stands for the behaviour before that field.  VERSION is raised if the format changes,
or if a guest cannot go on where the new field is unknown.  So older readers refuse a stream of that version.

Up to version 3 memory comes in ascending order, and no address comes twice.  Version 4 is for a machine that runs while
it is sent: memory comes in any order, also in RUNS, and the last bytes for an address count.  A paused machine is
written as version 3, because more readers know that version.

Memory is hashed while other bytes are written or read.  A writer hashes the memory of a paused machine in place, and
the memory of a running machine in a copy, which does not change.  A reader hashes buffers, and writes them to the
memory's file: that takes half the time of touching new pages.  Hashing takes longer than reading and writing, so a
reader has two threads for it.

Everything here runs on a thread of its own.  The only place that blocks is `Pipe.wait`, which polls for cancellation
and gives up on a peer that moves nothing for IDLE_TIMEOUT_S.  A StreamError completes "the stream ...".
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
STILL = 3  # the version in which a paused machine is written
OLDEST = 2  # the oldest version that is read
PREAMBLE = Struct("<8sII")
SECTION = Struct("<IIQ")
GPA = Struct("<Q")
COUNT = Struct("<Q")
RUN = Struct("<QQ")  # address, length
MEMORY, STATE, END, RUNS = 1, 2, 3, 4
DIGEST_BYTES = 32

HEADER_MAX = 64 << 10  # several times a configuration (16 KiB, one message) and the largest CPUID table of KVM
PIECE_BYTES = 8 << 20  # largest piece of memory in one section: one thread hashes it while another moves the next
RUNS_MAX = 2048  # runs in one section: one for each page of a piece
RUNS_BYTES_MAX = COUNT.size + RUNS_MAX * RUN.size + PIECE_BYTES
HASHERS = 2  # hashing threads of a reader
IDLE_TIMEOUT_S = 300.0
LOOK_S = 0.2  # between two looks whether the transfer was cancelled
ATOMIC_BYTES = select.PIPE_BUF  # a pipe that poll(2) reports writable takes this many without blocking


class StreamError(VmdError):
    """A stream ends too early, is damaged, or cannot be read or written."""


class Cancelled(VmdError):
    """The transfer was cancelled."""


class Hasher:
    """One thread that computes digests while its owner waits for I/O."""

    def __init__(self) -> None:
        """Start the thread.  Raises HostError."""
        self._work: Callable[[], None] | None = None
        self._digest = b""
        self._go: SimpleQueue[None] = SimpleQueue()
        self._done: SimpleQueue[None] = SimpleQueue()
        self._thread = threads.Thread(target=self._run, name="hasher", daemon=True)
        start_thread("hasher", self._thread.start)

    def begin(self, parts: "Sequence[bytes | memoryview]") -> None:
        """Start to hash these parts, one after the other.  `result` waits for the digest."""

        def work() -> None:
            digest = hashlib.sha256()
            for part in parts:
                digest.update(part)
            self._digest = digest.digest()

        self._work = work
        self._go.put(None)

    def result(self) -> bytes:
        """Wait for the digest that was begun last, and return it."""
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
    """A descriptor that came from a client: a pipe, socket, file or device.

    The client may share its open file description, so its flags are not changed.
    """

    def __init__(self, fd: int, direction: int, moved_bytes: int = 0) -> None:
        """`direction` is select.POLLIN or POLLOUT.  `moved_bytes` were moved by another process before."""
        self.fd = fd
        self.moved_bytes = moved_bytes
        self.cancelled = False
        self._poll = select.poll()
        self._poll.register(fd, direction)
        self._flags = 0 if stat.S_ISREG(os.fstat(fd).st_mode) else os.RWF_NOWAIT  # a regular file has no slow reader
        self._at_once = PIECE_BYTES

    def wait(self) -> None:
        """Wait until bytes can be moved.  Raises Cancelled, or StreamError after IDLE_TIMEOUT_S."""
        for _ in range(int(IDLE_TIMEOUT_S / LOOK_S)):
            if self.cancelled:
                raise Cancelled("cancelled")
            if self._poll.poll(LOOK_S * 1000):
                return
        raise StreamError(f"has not moved for {IDLE_TIMEOUT_S:.0f} s")

    def write(self, *parts: "bytes | memoryview") -> None:
        """Write all parts.  Raises StreamError or Cancelled."""
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
        """Write as many bytes as the descriptor takes without blocking.  Return their number."""
        if self._at_once == ATOMIC_BYTES:
            return os.writev(self.fd, [pending[0][:ATOMIC_BYTES]])
        first = pending[0][: self._at_once]
        rest = pending[1:] if len(first) == len(pending[0]) else ()
        if not self._flags:
            return os.writev(self.fd, [first, *rest])
        try:
            return os.pwritev(self.fd, [first, *rest], -1, self._flags)
        except OSError as error:
            # Pipes do not have RWF_NOWAIT before Linux 6.5, and devices still do not.
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
        """Read and return `size` bytes.  Raises StreamError or Cancelled."""
        buffer = bytearray(size)
        self.read_into(memoryview(buffer))
        return bytes(buffer)

    def close(self) -> None:
        """Close the descriptor.  For a file, only close(2) may tell that bytes could not be written.

        A second call does nothing.  Raises StreamError.
        """
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
        """Write a run of memory that begins at guest-physical address `gpa`."""
        for start in range(0, len(view), PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            self._section(MEMORY, GPA.pack(gpa + start), piece)

    def runs(self, runs: "Sequence[tuple[int, int]]", data: memoryview) -> None:
        """Write runs of memory, each an (address, length); `data` has their bytes.

        There are at most RUNS_MAX runs, and PIECE_BYTES of data.
        """
        table = b"".join(RUN.pack(gpa, length) for gpa, length in runs)
        self._section(RUNS, COUNT.pack(len(runs)) + table, data)

    def state(self, body: bytes) -> None:
        """Write the machine's state."""
        self._section(STATE, body)

    def end(self) -> None:
        """Write the last section."""
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
    """Checks the digests of sections while the next ones are read, at most HASHERS at a time."""

    def __init__(self) -> None:
        self._idle: list[Hasher] = []
        self._busy: deque[tuple[Hasher, bytes]] = deque()  # (hasher, expected digest), in the order of the sections

    def begin(self, parts: "Sequence[bytes | memoryview]", expected: bytes) -> None:
        """Begin to check one more section.  If all hashers are busy, wait for the oldest one first.

        Raises StreamError if its digest is wrong, or HostError if no thread can be started.
        """
        if len(self._busy) == HASHERS:
            self._wait()
        hasher = self._idle.pop() if self._idle else Hasher()
        hasher.begin(parts)
        self._busy.append((hasher, expected))

    def finish(self) -> None:
        """Wait for all digests.  Raises StreamError if one is wrong."""
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
    """Reads a stream, and checks every value in it."""

    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe
        self.sections = 0
        self.version = VERSION  # the stream's version, once the header was read
        # Buffers for memory: one is read into while the others are hashed.
        self._buffers = deque(bytearray() for _ in range(HASHERS + 1))

    def header(self) -> bytes:
        """Read the preamble and the header, and return the header.  Raises StreamError."""
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
        """Read all sections.

        `memory(gpa, data)` takes a run of memory, and raises ValueError if the guest has no memory there.  `state`
        takes the body of STATE, which has at most `state_max` bytes.  Nothing that they were given may be used unless
        this method returns: `memory` is called before the digest is checked.

        Raises StreamError, or HostError if no thread can be started.
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
        """Return a buffer that no thread is hashing."""
        self._buffers.rotate()
        buffer = self._buffers[0]
        if len(buffer) < length:
            buffer = self._buffers[0] = bytearray(length)
        return memoryview(buffer)[:length]


def runs_of(body: memoryview) -> "Iterator[tuple[int, memoryview]]":
    """Yield the address and the bytes of each run in the body of a RUNS section.  Raises ValueError."""
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
