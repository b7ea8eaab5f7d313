"""A memory file that always holds something whole, whenever its writer is killed: two slots, written in turn.

    page 0   two headers of 64 bytes: magic, sequence number, offset and length of the content, digest of all this
    then     the contents, where there is room beside the one that counts

The content that counts is that of the valid header with the higher number.  The other slot is what is written next:
first its content, and then its header.  A write that is cut anywhere leaves a header that is not valid, or the old one.
"""

import hashlib
import mmap
import os
import struct

from vmd.closing import close
from vmd.memfile import memory_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

HEADER = struct.Struct("<8sQQQ32s")  # magic, sequence number, offset, length, digest
MAGIC = b"vmdstate"
SLOTS = 2
FIRST = mmap.PAGESIZE  # where contents begin
CONTENT_MAX = 1 << 28  # bytes; nothing that a daemon knows is longer


class Slot:
    """A content that was found valid."""

    def __init__(self, index: int, sequence: int, offset: int, content: bytes) -> None:
        self.index = index
        self.sequence = sequence
        self.offset = offset
        self.content = content

    @property
    def end(self) -> int:
        """Return where the next byte after it is."""
        return self.offset + len(self.content)


class StateMemory:
    """The memory file.  `close` it when it is of no use any more."""

    def __init__(self, fd: int) -> None:
        """Take a memory file with what it holds; `fd` is ours from now on."""
        self.fd = fd

    @classmethod
    def create(cls) -> "Self":
        """Make an empty one.  Raises OSError."""
        return cls(memory_file("vmd-state"))

    def read(self) -> bytes | None:
        """Return what was written last; None if there is nothing, or nothing whole.  Raises OSError."""
        slot = self._newest()
        return slot.content if slot is not None else None

    def write(self, content: bytes) -> None:
        """Have a content count instead of the one before.  Raises OSError; the one before counts then."""
        before = self._newest()
        index, sequence, offset = 0, 1, FIRST
        if before is not None:
            index, sequence = (before.index + 1) % SLOTS, before.sequence + 1
            if FIRST + len(content) > before.offset:
                offset = before.end
        write_all(self.fd, content, offset)
        self._put(index, header(sequence, offset, content))
        os.ftruncate(self.fd, max(offset + len(content), before.end if before is not None else 0))

    def _put(self, index: int, packed: bytes) -> None:
        write_all(self.fd, packed, index * HEADER.size)

    def _newest(self) -> Slot | None:
        slots = [slot for slot in map(self._slot, range(SLOTS)) if slot is not None]
        return max(slots, key=lambda slot: slot.sequence, default=None)

    def _slot(self, index: int) -> Slot | None:
        raw = os.pread(self.fd, HEADER.size, index * HEADER.size)
        if len(raw) < HEADER.size:
            return None
        magic, sequence, offset, length, _ = HEADER.unpack(raw)
        if magic != MAGIC or offset < FIRST or length > CONTENT_MAX:
            return None
        content = os.pread(self.fd, length, offset)
        return Slot(index, sequence, offset, content) if header(sequence, offset, content) == raw else None

    def close(self) -> None:
        """Let it go."""
        close(self.fd)


def header(sequence: int, offset: int, content: bytes) -> bytes:
    """Return the header of a content."""
    start = HEADER.pack(MAGIC, sequence, offset, len(content), bytes(32))
    digest = hashlib.sha256(start)
    digest.update(content)
    return HEADER.pack(MAGIC, sequence, offset, len(content), digest.digest())


def write_all(fd: int, raw: bytes, offset: int) -> None:
    """Write all of it.  Raises OSError."""
    rest = memoryview(raw)
    while rest:
        written = os.pwrite(fd, rest, offset)
        rest, offset = rest[written:], offset + written
