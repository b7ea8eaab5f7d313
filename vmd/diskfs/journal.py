"""The journal of ext3 and ext4, replayed in memory: Linux, Documentation/filesystems/ext4/journal.rst.

After a guest was killed, committed changes may be in the journal but not at their places in the file system.  This
module finds out which block of the journal has the newest content of which block of the file system.  Nothing is
written.
"""

import struct

from vmd.diskfs.source import DiskFsError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MAGIC = 0xC03B3998
HEADER = struct.Struct(">III")  # magic, kind, transaction
DESCRIPTOR, COMMIT, SUPERBLOCK_V1, SUPERBLOCK_V2, REVOKE = 1, 2, 3, 4, 5
SUPERBLOCK = struct.Struct(">IIIII")  # from 12: block size, blocks, first, transaction, start
FEATURES_AT, FEATURES = 36, struct.Struct(">III")
HAS_REVOKE, HAS_64BIT, ASYNC_COMMIT, CSUM_V2, CSUM_V3, FAST_COMMIT = (1 << bit for bit in range(6))
REVOKE_HEADER_BYTES = 16
TAIL_BYTES = 4  # a checksum
UUID_BYTES = 16
ESCAPED, SAME_UUID, LAST = 1, 2, 8
ENTRIES_MAX = 1 << 17  # blocks that a journal changes or revokes; half of the blocks of the longest one of mke2fs
RUNS_MAX = 1 << 14


class Journal:
    """A journal in the blocks `runs` of the file system."""

    def __init__(
        self,
        read: "Callable[[int], bytes]",
        spend: "Callable[[int], None]",
        runs: "Sequence[tuple[int, int, int]]",
        block_bytes: int,
    ) -> None:
        """`read` returns a block of the file system, `spend` counts work.

        A run is (block of the journal, block of the file system, number of blocks).  Raises DiskFsError if the journal
        is damaged or not supported.
        """
        self.read = read
        self.spend = spend
        self.runs = runs
        self.run = runs[0] if runs else (0, 0, 0)
        raw = self.block(0)
        magic, kind, _ = HEADER.unpack_from(raw)
        if magic != MAGIC or kind not in (SUPERBLOCK_V1, SUPERBLOCK_V2):
            raise DiskFsError("its journal is damaged, and was not replayed: run e2fsck")
        size, self.blocks, self.first, self.transaction, self.start = SUPERBLOCK.unpack_from(raw, HEADER.size)
        features = FEATURES.unpack_from(raw, FEATURES_AT)[1] if kind == SUPERBLOCK_V2 else 0
        if features & (ASYNC_COMMIT | FAST_COMMIT):
            what = "fast commits" if features & FAST_COMMIT else "asynchronous commits"
            raise DiskFsError(f"its journal was not replayed, and has {what}: mount it once, or run e2fsck")
        if unknown := features & ~(HAS_REVOKE | HAS_64BIT | CSUM_V2 | CSUM_V3):
            raise DiskFsError(f"its journal was not replayed, and has unknown features: {unknown:#x}")
        most = sum(count for _, _, count in runs)
        if size != block_bytes or not 0 < self.first < self.blocks <= most or (
            self.start and not self.first <= self.start < self.blocks
        ):
            raise DiskFsError("the superblock of its journal is damaged, and it was not replayed: run e2fsck")
        self.number = struct.Struct(">Q" if features & HAS_64BIT else ">I")
        self.has_64bit, self.v3 = bool(features & HAS_64BIT), bool(features & CSUM_V3)
        self.tail = TAIL_BYTES if features & (CSUM_V2 | CSUM_V3) else 0
        self.tag_bytes = 16 if self.v3 else 8 + 2 * bool(features & CSUM_V2) + 4 * self.has_64bit

    def changed(self) -> "dict[int, tuple[int, bool]]":
        """Return for each block with content in the journal the block of that content, and whether it is escaped.

        Raises DiskFsError.
        """
        newest: dict[int, tuple[int, int, int]] = {}  # (transaction, block of the journal, flags)
        revoked: dict[int, int] = {}  # block -> the last transaction that revoked it
        pending: list[tuple[int, int, int]] = []
        revoking: list[int] = []
        at, transaction, left = self.start, self.transaction, self.blocks if self.start else 0
        while left > 0:
            raw = self.block(at)
            magic, kind, belongs = HEADER.unpack_from(raw)
            if magic != MAGIC or belongs != transaction:
                break
            steps = 1
            if kind == DESCRIPTOR:
                for block, flags in self._tags(raw):
                    pending.append((block, self._after(at, steps), flags))
                    steps += 1
            elif kind == REVOKE:
                revoking += self._revoked(raw)
            elif kind == COMMIT:
                newest.update((block, (transaction, place, flags)) for block, place, flags in pending)
                revoked.update((block, transaction) for block in revoking)
                pending, revoking = [], []
                transaction = (transaction + 1) & 0xFFFFFFFF
            else:
                break
            if max(len(newest), len(revoked), len(pending), len(revoking)) > ENTRIES_MAX:
                raise DiskFsError(f"its journal was not replayed, and changes more than {ENTRIES_MAX} blocks")
            at = self._after(at, steps)
            left -= steps
        return {
            block: (self._place(place), bool(flags & ESCAPED))
            for block, (when, place, flags) in newest.items()
            if not (block in revoked and _reached(revoked[block], when))
        }

    def block(self, number: int) -> bytes:
        """Return a block of the journal.  Raises DiskFsError."""
        return self.read(self._place(number))

    def _after(self, number: int, steps: int) -> int:
        number += steps
        return number if number < self.blocks else number - self.blocks + self.first

    def _place(self, number: int) -> int:
        """Return the block of the file system for a block of the journal.  Raises DiskFsError."""
        first, place, count = self.run
        if not first <= number < first + count:
            low, high = 0, len(self.runs)
            while low < high:
                middle = (low + high) // 2
                if self.runs[middle][0] <= number:
                    low = middle + 1
                else:
                    high = middle
            first, place, count = self.run = self.runs[low - 1] if low else (0, 0, 0)
            if not first <= number < first + count:
                raise DiskFsError("its journal has holes, and was not replayed: run e2fsck")
        return place + number - first

    def _tags(self, raw: bytes) -> "list[tuple[int, int]]":
        """Return the tags of a descriptor block: block of the file system and flags, for each block that follows it."""
        found = []
        at, end = HEADER.size, len(raw) - self.tail
        while at + self.tag_bytes <= end:
            block = int.from_bytes(raw[at : at + 4], "big")
            flags = int.from_bytes(raw[at + (4 if self.v3 else 6) : at + 8], "big")
            if self.has_64bit:
                block |= int.from_bytes(raw[at + 8 : at + 12], "big") << 32
            found.append((block, flags))
            at += self.tag_bytes + (0 if flags & SAME_UUID else UUID_BYTES)
            if flags & LAST:
                break
        self.spend(len(found))
        return found

    def _revoked(self, raw: bytes) -> list[int]:
        """Return the blocks that a revoke block names: their earlier content in the journal is void."""
        end = min(int.from_bytes(raw[12:16], "big"), len(raw) - self.tail)
        number = self.number
        self.spend(end // number.size)
        return [
            number.unpack_from(raw, at)[0] for at in range(REVOKE_HEADER_BYTES, end - number.size + 1, number.size)
        ]


def restored(raw: bytes) -> bytes:
    """Return the content of an escaped block.  It begins with MAGIC, which the journal has replaced by zeroes."""
    return MAGIC.to_bytes(4, "big")[: len(raw)] + raw[4:]


def _reached(revoked: int, when: int) -> bool:
    """Return whether transaction `when` is not later than `revoked`.  Transaction numbers wrap."""
    return (revoked - when) & 0xFFFFFFFF < 1 << 31
