"""For any content of a guest's disk, the search ends with a file or an error message."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from fuzz.seeds import seeds
from fuzz.targets import find_files, with_checksums
from tests.support.filesystems import MIB, Content, Link, Tree, ext_image, ffs_image, plant, small_disks
from vmd.diskfs.source import DiskFsError

ROUNDS = 100_000
ODD = (0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@pytest.mark.parametrize("number", range(len(seeds("disk"))))
def test_seed_is_read(number: int) -> None:
    """Its files are found, by name and by both links."""
    seed = seeds("disk")[number]

    assert [found[:6] for found in find_files(seed) if isinstance(found, bytes)] == [b"kernel"] * 3
    assert with_checksums(seed) == seed


def large_disks(folder: Path) -> list[bytes]:
    """Return disks with structures for which small ones are too small:

    extent trees, all levels of block maps, large blocks.
    """
    scattered = tuple((at * 9000, 4000) for at in range(60))
    tree: Tree = {
        "boot/kernel": Content(80 * MIB, (*scattered, (20 * MIB, 4000), (75 * MIB, 9000))),
        "kernel": Link("boot/kernel"),
        "l" * 100: Link("/boot/kernel"),
    }
    plant(folder / "sparse", tree)
    plant(folder / "dense", {**tree, "boot/kernel": Content(700_000, ((0, 700_000),))})
    made = [
        ext_image(folder / "image", folder / "sparse", *options, size=4 * MIB).read_bytes()
        for options in (("-t", "ext2", "-b", "1024"), ("-t", "ext4", "-b", "1024", "-O", "^has_journal"))
    ]
    for options in ("version=1,bsize=4096,fsize=512", "version=2,bsize=65536,fsize=8192"):
        made.append(ffs_image(folder / "image", folder / "dense", options).read_bytes())
    return made


class Mutator:
    """Changes a disk in a few places, most of which are in use."""

    def __init__(self, raw: bytes, chance: random.Random) -> None:
        self.raw = raw
        self.chance = chance
        # Of a run of equal bytes one piece is enough, because most runs are contents of files.
        self.used = [at for at in range(0, len(raw) - 8, 4) if raw[at : at + 4] != raw[at + 4 : at + 8]][:20_000]

    def place(self) -> int:
        """Return a position to change, a multiple of 2."""
        if self.chance.random() < 0.8:
            return self.chance.choice(self.used) + self.chance.choice((0, 0, 2))
        return self.chance.randrange(0, len(self.raw) - 8, 2)

    def mutated(self) -> bytes:
        """Return the disk with random changes."""
        chance, raw = self.chance, bytearray(self.raw)
        for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
            at = self.place()
            match chance.randrange(6):
                case 0:
                    raw[at + chance.randrange(4)] ^= 1 << chance.randrange(8)
                case 1:
                    raw[at + chance.randrange(4)] = chance.randrange(256)
                case 2:
                    width = chance.choice((2, 4, 8))
                    raw[at : at + width] = (chance.choice(ODD) & (1 << 8 * width) - 1).to_bytes(width, "little")
                case 3:
                    value = int.from_bytes(raw[at : at + 4], "little") + chance.choice((-64, -2, -1, 1, 2, 64))
                    raw[at : at + 4] = (value & 0xFFFFFFFF).to_bytes(4, "little")
                case 4:  # a block number is replaced by another one
                    source = self.place()
                    raw[at : at + 4] = raw[source : source + 4]
                case 5:
                    source, length = self.place() & ~511, chance.choice((512, 1024, 4096))
                    piece = raw[source : source + length]
                    target = at & ~511
                    raw[target : target + len(piece)] = piece
        return bytes(raw[: len(self.raw)])


def rounds(count: int, seed: int, more: Sequence[bytes] = ()) -> tuple[int, int]:
    """Search so many changed disks, a tenth of them from `more`.

    Return the numbers of files that were read and refused.
    """
    chance = random.Random(seed)
    small = [Mutator(raw, chance) for raw in small_disks().values()]
    large = [Mutator(raw, chance) for raw in more]
    read = refused = 0
    for _ in range(count):
        mutator = chance.choice(large if large and chance.random() < 0.1 else small)
        raw = mutator.mutated()
        for found in find_files(with_checksums(raw) if mutator in small else raw):
            if isinstance(found, DiskFsError):
                refused += 1
            else:
                read += 1
    return read, refused


def test_changed_disks_are_read_or_refused() -> None:
    """Only DiskFsError is raised, with a message of one line, and the limit of work holds."""
    read, refused = rounds(ROUNDS // 50, seed=15)

    assert read > 100
    assert refused > 100


@pytest.mark.deep
@pytest.mark.timeout(3600)
def test_many_changed_disks_are_read_or_refused(tmp_path: Path) -> None:
    """The same test, with more disks."""
    read, refused = rounds(ROUNDS, 16, large_disks(tmp_path))

    assert read > ROUNDS // 20
    assert refused > ROUNDS // 20
