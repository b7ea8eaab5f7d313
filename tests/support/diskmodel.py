"""A model of a disk: for each sector the values that a read may return now, or after the disk process was killed.

A value is a number.  START is the content when the model was made, ZERO is zeroes, ANY is unknown content.  A higher
number is the write of that number; the bytes of each write differ from those of all other writes.
"""

import bisect
import math
import struct
from collections.abc import Iterator, Sequence

SECTOR = 512
ANY, START, ZERO = -2, -1, 0

_words = struct.Struct("<QQ")


def written(number: int, sector: int, count: int = 1) -> bytes:
    """Return the bytes that write `number` puts into some sectors."""
    numbers = range(number << 40 | sector, (number << 40 | sector) + count)
    return b"".join([_words.pack(word, ~word & (1 << 64) - 1) * (SECTOR // _words.size) for word in numbers])


class Change:
    """One request that changes sectors to a value.  Until it has succeeded, the sectors may have either value."""

    __slots__ = ("certain_at", "durable", "value")

    def __init__(self, value: int) -> None:
        self.value = value
        self.certain_at = math.inf  # when the driver saw its completion
        self.durable = False  # whether its completion meant that it is on storage


class DiskModel:
    """The sectors of one disk, and the changes made to each of them in their order.

    Requests that overlap are never in flight together, so the order is known.  A discard never becomes certain: the
    sector has its old value or zeroes.  A read decides between several possible values: the sector keeps the one read.
    """

    def __init__(self, start: bytes) -> None:
        self.start = start
        self.sectors = len(start) // SECTOR
        # Sectors from cuts[n] up to cuts[n + 1] have had the same changes.
        self.cuts = [0, self.sectors]
        self.changes: list[list[Change]] = [[], []]
        self.now = 0
        self.flushed_at = -1  # when the last successful flush was submitted
        self.held = bytearray(self.sectors)  # 1: the sector held data of a write when the model was made

    def tick(self) -> int:
        """Return the next moment."""
        self.now += 1
        return self.now

    # -- parts of the disk

    def _cut(self, sector: int) -> int:
        """Split a part so that one begins at a sector; return the number of that part."""
        at = bisect.bisect_left(self.cuts, sector)
        if self.cuts[at] != sector:
            self.cuts.insert(at, sector)
            self.changes.insert(at, list(self.changes[at - 1]))
        return at

    def parts(self, first: int, count: int) -> Iterator[tuple[int, int, list[Change]]]:
        """Yield start, end and changes of all parts of a range."""
        at = bisect.bisect_right(self.cuts, first) - 1
        while first < self.sectors and count > 0:
            end = min(self.cuts[at + 1], first + count)
            yield first, end, self.changes[at]
            count -= end - first
            first = end
            at += 1

    # -- what happens

    def begin(self, value: int, ranges: Sequence[tuple[int, int]]) -> Change:
        """Record a submitted change of the ranges (first sector, number of sectors); return it."""
        change = Change(value)
        for first, count in ranges:
            if count:
                start = self._cut(first)
                for at in range(start, self._cut(first + count)):
                    self.changes[at].append(change)
        return change

    def succeed(self, change: Change, *, durable: bool = False) -> None:
        """Record that the driver has seen a change complete."""
        change.certain_at = self.tick()
        change.durable = durable

    def flush_succeeded(self, asked_at: int) -> None:
        """Record a successful flush.  It covers all changes that completed before it was submitted."""
        self.flushed_at = max(self.flushed_at, asked_at)

    # -- allowed contents

    def _values(self, changes: Sequence[Change], *, killed: bool = False) -> set[int]:
        """Return the values that sectors with these changes may have."""
        values = set()
        for change in reversed(changes):
            values.add(change.value)
            if change.durable or (change.certain_at < self.flushed_at if killed else change.certain_at < math.inf):
                return values
        values.add(START)
        return values

    def allowed(self, sector: int, *, killed: bool = False) -> set[int]:
        """Return the values that a sector may have, now or after a kill."""
        return next(self._values(changes, killed=killed) for _, _, changes in self.parts(sector, 1))

    def content(self, value: int, first: int, count: int = 1) -> bytes:
        """Return the bytes of sectors that have a value."""
        if value == START:
            return self.start[first * SECTOR : (first + count) * SECTOR]
        assert value != ANY
        return written(value, first, count) if value else bytes(count * SECTOR)

    def _is_one_of(self, values: set[int], sector: int, data: bytes) -> bool:
        """Return whether a sector's bytes match one of some values."""
        if ANY in values:
            return True
        candidates = [self.content(value, sector) for value in values]
        if data in candidates:
            return True
        # A write may have stopped in the middle, so each byte may come from any of the values.
        return len(candidates) > 1 and all(
            byte in bytes_there for byte, *bytes_there in zip(data, *candidates, strict=True)
        )

    def holds_data(self, ranges: Sequence[tuple[int, int]]) -> bool:
        """Return whether every sector certainly holds written data, so that its space on storage is allocated."""
        for first, count in ranges:
            for start, end, changes in self.parts(first, count):
                values = self._values(changes)
                value = values.pop()
                if values or value == ZERO or (value == START and 0 in self.held[start:end]):
                    return False
        return True

    # -- contents found

    def read(self, first: int, data: bytes) -> int | None:
        """Compare the data of a read; return the first wrong sector, or None."""
        seen: list[tuple[int, int]] = []
        for start, end, changes in self.parts(first, len(data) // SECTOR):
            values = self._values(changes)
            there = data[(start - first) * SECTOR : (end - first) * SECTOR]
            if len(values) == 1 and there == self.content(next(iter(values)), start, end - start):
                continue
            for sector in range(start, end):
                found = data[(sector - first) * SECTOR : (sector - first + 1) * SECTOR]
                if not self._is_one_of(values, sector, found):
                    return sector
                if ANY in values:
                    continue
                matching = [value for value in values if self.content(value, sector) == found]
                if len(matching) == 1:
                    seen.append((sector, matching[0]))
        for sector, value in seen:
            self.succeed(self.begin(value, [(sector, 1)]))
        return None

    def compare(self, data: bytes, *, killed: bool = False) -> Iterator[int]:
        """Compare the whole disk; yield the wrong sectors."""
        for start, end, changes in self.parts(0, self.sectors):
            values = self._values(changes, killed=killed)
            found = data[start * SECTOR : end * SECTOR]
            if ANY in values or found == self.content(max(values), start, end - start):
                continue
            for sector in range(start, end):
                if not self._is_one_of(values, sector, data[sector * SECTOR : (sector + 1) * SECTOR]):
                    yield sector

    def settled(self, data: bytes, *, killed: bool = False) -> "DiskModel":
        """Return a model for the next disk process, from the content that was found."""
        after = DiskModel(data)
        for start, end, changes in self.parts(0, min(self.sectors, after.sectors)):
            values = self._values(changes, killed=killed)
            if ANY in values:
                after.begin(ANY, [(start, end - start)])
            elif max(values) > 0 and len(values) == 1:
                after.held[start:end] = b"\1" * (end - start)
            elif values == {START}:
                after.held[start:end] = self.held[start:end]
        return after
