"""The disk of the guest `blk`: the host's pattern in it, and the check of what the guest leaves.

Regions and formula are those of `guests/blk/blk.h`.
"""

import struct
from pathlib import Path

SECTOR = 512
SECTORS = 16384
KEPT, KEPT_END = 2048, 4096  # sectors that the guest never writes
FINAL, FINAL_END = 0, 2048  # sectors that the guest's last check writes
HOST, GUEST = 0, 0xAB  # generations of the pattern

WORDS = SECTOR // 8
FACTOR = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


def pattern(first: int, end: int, generation: int) -> bytes:
    """Return the bytes of sectors `first` up to, but not including, `end`."""
    numbers = (sector << 16 | generation << 8 | index for sector in range(first, end) for index in range(WORDS))
    words = [number * FACTOR & MASK for number in numbers]
    return struct.pack(f"<{len(words)}Q", *words)


class Disk:
    """A raw disk full of the host's pattern."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(pattern(0, SECTORS, HOST))

    def check_tested(self) -> None:
        """Raise AssertionError unless the guest's last writes are there and the kept sectors are unchanged."""
        content = self.path.read_bytes()
        assert len(content) == SECTORS * SECTOR
        assert content[FINAL * SECTOR : FINAL_END * SECTOR] == pattern(FINAL, FINAL_END, GUEST)
        assert content[KEPT * SECTOR : KEPT_END * SECTOR] == pattern(KEPT, KEPT_END, HOST)

    def check_untouched(self) -> None:
        """Raise AssertionError unless the disk is unchanged."""
        assert self.path.read_bytes() == pattern(0, SECTORS, HOST)
