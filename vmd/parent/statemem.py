"""A memory file that always holds something whole, whenever its writer is killed: two slots, written in turn.

    page 0   two headers of 64 bytes: magic, sequence number, offset and length of the content, digest of all this
    then     the contents, where there is room beside the one that counts; behind a content what has changed since

The content that counts is that of the valid header with the higher number.  The other slot is what is written next:
first its content, and then its header.  A write that is cut anywhere leaves a header that is not valid, or the old one.

A change has a header of its own, of 40 bytes: its length, and a digest of it, the sequence number of the content, and
how many changes come before it.  The first one that is not valid ends them.  Whoever knows of no changes must not take
a content without them: one that may have some has another magic.
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
MAGIC, FOLLOWED = b"vmdstate", b"vmdstat2"
CHANGE = struct.Struct("<Q32s")  # length, digest
SLOTS = 2
FIRST = mmap.PAGESIZE  # where contents begin
CONTENT_MAX = 1 << 28  # bytes; nothing that a daemon knows is longer


class Slot:
    """A content that was found valid."""

    def __init__(self, index: int, sequence: int, offset: int, end: int, *, followed: bool) -> None:
        self.index = index
        self.sequence = sequence
        self.offset = offset
        self.first = self.end = end  # where changes begin, and where the next one would
        self.followed = followed  # by changes, perhaps
        self.changes: list[bytes] = []  # as they were found
        self.count = 0  # of changes


class StateMemory:
    """The memory file.  `close` it when it is of no use any more."""

    def __init__(self, fd: int) -> None:
        """Take a memory file with what it holds; `fd` is ours from now on."""
        self.fd = fd
        self._written: Slot | None = None  # by us

    @classmethod
    def create(cls) -> "Self":
        """Make an empty one.  Raises OSError."""
        return cls(memory_file("vmd-state"))

    def read(self) -> list[bytes]:
        """Return the content that counts and its changes; nothing if there is none, or none whole.  Raises OSError."""
        slot = self._newest()
        if slot is None:
            return []
        return [os.pread(self.fd, slot.first - slot.offset, slot.offset), *slot.changes]

    def write(self, content: bytes, *, followed: bool = False) -> None:
        """Have a content count instead of the one before.  `followed`: changes may be added to it.

        Raises OSError; the one before counts then.
        """
        before = self._written or self._newest()
        index, sequence, offset = 0, 1, FIRST
        if before is not None:
            index, sequence = (before.index + 1) % SLOTS, before.sequence + 1
            if FIRST + len(content) > before.offset:
                offset = before.end
        self._written = None
        write_all(self.fd, content, offset)
        self._put(index, header(sequence, offset, content, FOLLOWED if followed else MAGIC))
        if followed:  # nor may they take what was written before it
            self._put((index + 1) % SLOTS, bytes(HEADER.size))
        end = offset + len(content)
        os.ftruncate(self.fd, max(end, before.end if before is not None else 0))
        self._written = Slot(index, sequence, offset, end, followed=followed)

    @property
    def takes_changes(self) -> bool:
        """Whether a change can be added: not before there is a content of ours, nor to many changes already."""
        slot = self._written
        return slot is not None and slot.followed and slot.end - slot.first <= slot.first - slot.offset

    def add(self, change: bytes) -> None:
        """Add a change to the content that counts.  Raises OSError; it does not count then."""
        slot = self._written
        assert slot is not None
        assert slot.followed
        packed = CHANGE.pack(len(change), digest_of(slot, change)) + change
        write_all(self.fd, packed, slot.end)
        slot.end += len(packed)
        slot.count += 1

    def _put(self, index: int, packed: bytes) -> None:
        write_all(self.fd, packed, index * HEADER.size)

    def _newest(self) -> Slot | None:
        slots = [slot for slot in map(self._slot, range(SLOTS)) if slot is not None]
        newest = max(slots, key=lambda slot: slot.sequence, default=None)
        while newest is not None and newest.followed and (change := self._change(newest)) is not None:
            newest.changes.append(change)
            newest.end += CHANGE.size + len(change)
            newest.count += 1
        return newest

    def _slot(self, index: int) -> Slot | None:
        raw = os.pread(self.fd, HEADER.size, index * HEADER.size)
        if len(raw) < HEADER.size:
            return None
        magic, sequence, offset, length, _ = HEADER.unpack(raw)
        if magic not in (MAGIC, FOLLOWED) or offset < FIRST or length > CONTENT_MAX:
            return None
        content = os.pread(self.fd, length, offset)
        if header(sequence, offset, content, magic) != raw:
            return None
        return Slot(index, sequence, offset, offset + length, followed=magic == FOLLOWED)

    def _change(self, slot: Slot) -> bytes | None:
        """Return the change that begins at the end of a slot; None if there is none."""
        raw = os.pread(self.fd, CHANGE.size, slot.end)
        if len(raw) < CHANGE.size:
            return None
        length, digest = CHANGE.unpack(raw)
        if length > CONTENT_MAX:
            return None
        change = os.pread(self.fd, length, slot.end + CHANGE.size)
        return change if len(change) == length and digest_of(slot, change) == digest else None

    def close(self) -> None:
        """Let it go."""
        close(self.fd)


def header(sequence: int, offset: int, content: bytes, magic: bytes) -> bytes:
    """Return the header of a content."""
    start = HEADER.pack(magic, sequence, offset, len(content), bytes(32))
    digest = hashlib.sha256(start)
    digest.update(content)
    return HEADER.pack(magic, sequence, offset, len(content), digest.digest())


def digest_of(slot: Slot, change: bytes) -> bytes:
    """Return the digest of the next change of a slot."""
    return hashlib.sha256(struct.pack("<QQQ", slot.sequence, slot.count, len(change)) + change).digest()


def write_all(fd: int, raw: bytes, offset: int) -> None:
    """Write all of it.  Raises OSError."""
    rest = memoryview(raw)
    while rest:
        written = os.pwrite(fd, rest, offset)
        rest, offset = rest[written:], offset + written
