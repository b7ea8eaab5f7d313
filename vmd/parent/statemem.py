"""A memory file whose content is complete even if its writer is killed at any moment: two slots, written in turn.

    page 0   two headers of 64 bytes: magic, sequence number, offset and length of the content, digest of all this
    then     the contents, each where it does not overlap the current one; after a content the changes to it

The current content is that of the valid header with the higher sequence number.  The other slot is written next: first
its content, and then its header.  A write that is interrupted leaves an invalid header, or the old one.

A change has a header of 40 bytes: its length, and a digest.  The digest covers the change, the sequence number of the
content, and the number of changes before it.  The first invalid change ends the list.  A content that may have changes
has another magic, so that a version that does not know changes does not read it without them.
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
CONTENT_MAX = 1 << 28  # bytes; no state of a daemon is longer


class Slot:
    """A content that was found valid."""

    def __init__(self, index: int, sequence: int, offset: int, end: int, *, followed: bool) -> None:
        self.index = index
        self.sequence = sequence
        self.offset = offset
        self.first = self.end = end  # the offsets of the first change, and of the next one
        self.followed = followed  # changes may follow it
        self.changes: list[bytes] = []  # those that were found when it was read
        self.count = 0  # of changes


class StateMemory:
    """The memory file.  `close` ends its use."""

    def __init__(self, fd: int) -> None:
        """Use an existing memory file, and take over `fd`."""
        self.fd = fd
        self._written: Slot | None = None  # the slot that was written by this object last

    @classmethod
    def create(cls) -> "Self":
        """Make an empty memory file.  Raises OSError."""
        return cls(memory_file("vmd-state"))

    def read(self) -> list[bytes]:
        """Return the current content and its changes; an empty list if there is no valid one.  Raises OSError."""
        slot = self._newest()
        if slot is None:
            return []
        return [os.pread(self.fd, slot.first - slot.offset, slot.offset), *slot.changes]

    def write(self, content: bytes, *, followed: bool = False) -> None:
        """Write a content, which becomes the current one.  `followed`: changes may be added to it.

        Raises OSError; then the content before stays the current one.
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
        if followed:  # invalidate the old slot, so that a version that does not know changes cannot read it either
            self._put((index + 1) % SLOTS, bytes(HEADER.size))
        end = offset + len(content)
        os.ftruncate(self.fd, max(end, before.end if before is not None else 0))
        self._written = Slot(index, sequence, offset, end, followed=followed)

    @property
    def takes_changes(self) -> bool:
        """Whether a change can be added: to a content of this object, while changes are no longer than the content."""
        slot = self._written
        return slot is not None and slot.followed and slot.end - slot.first <= slot.first - slot.offset

    def add(self, change: bytes) -> None:
        """Add a change to the current content.  Raises OSError; then the change does not count."""
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
        """Close the memory file."""
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
    """Write all bytes at an offset.  Raises OSError."""
    rest = memoryview(raw)
    while rest:
        written = os.pwrite(fd, rest, offset)
        rest, offset = rest[written:], offset + written
