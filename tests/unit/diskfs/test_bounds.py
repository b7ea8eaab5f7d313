"""Structures that form loops or repeat themselves: the search for a file on such a disk ends."""

import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.filesystems import MIB, Content, ext_image, journal, opened, plant, run, small_disks
from vmd.diskfs import journal as journals
from vmd.diskfs import source
from vmd.diskfs.ext import Ext
from vmd.diskfs.source import DiskFsError

TOO_MUCH = "too much would have to be read to find it"
BLOCK_SIZES = (1024, 4096, 65536)


class Crafted:
    """An ext file system whose inodes and free blocks a test fills."""

    def __init__(self, tmp_path: Path, block_bytes: int, *options: str) -> None:
        plant(tmp_path / "tree", {"dir/file": Content(5), "file": Content(5)})
        self.image = ext_image(tmp_path / "image", tmp_path / "tree", "-b", str(block_bytes), *options, size=16 * MIB)
        self.raw = bytearray(self.image.read_bytes())
        self.size = block_bytes
        self.free = len(self.raw) // block_bytes - 1

    def block(self, data: bytes | bytearray) -> int:
        """Fill a free block, and return its number."""
        self.free -= 1
        self.raw[self.free * self.size : (self.free + 1) * self.size] = data.ljust(self.size, b"\0")
        return self.free

    def inode(self, path: str, size: int, block_map: bytes) -> None:
        """Set size and map of an inode."""
        found = run("debugfs", "-R", f"imap {path}", self.image)
        said = re.search(r"located at block (\d+), offset (0x[0-9a-f]+)", found)
        assert said
        at = int(said[1]) * self.size + int(said[2], 16)
        struct.pack_into("<I", self.raw, at + 4, size & 0xFFFFFFFF)
        struct.pack_into("<I", self.raw, at + 108, size >> 32)
        self.raw[at + 40 : at + 40 + len(block_map)] = block_map


def endless_directory(tmp_path: Path, block_bytes: int) -> bytearray:
    """Return a directory in which every block is the same one, which is also each of its indirect blocks."""
    crafted = Crafted(tmp_path, block_bytes, "-t", "ext2")
    own = struct.pack("<I", crafted.free - 1)
    number = crafted.block(own * (block_bytes // 4))
    crafted.inode("/dir", 0xFFFFFFFF, struct.pack("<I", number) * 15)
    return crafted.raw


def many_names(tmp_path: Path, block_bytes: int) -> bytearray:
    """Return a directory whose blocks have the bytes of the wanted name everywhere, but only in unused entries."""
    crafted = Crafted(tmp_path, block_bytes, "-t", "ext2")
    entry = struct.pack("<IHBB4s", 0, 12, 4, 1, b"none")
    count = block_bytes // len(entry)
    names = bytearray(entry * count)
    struct.pack_into("<H", names, len(names) - 12 + 4, 12 + block_bytes - len(names))
    number = crafted.block(names)
    numbers = struct.pack("<I", number) * (block_bytes // 4)
    once = crafted.block(numbers)
    twice = crafted.block(struct.pack("<I", once) * (block_bytes // 4))
    thrice = crafted.block(struct.pack("<I", twice) * (block_bytes // 4))
    crafted.inode("/dir", 0xFFFFFFFF, struct.pack("<15I", *[number] * 12, once, twice, thrice))
    return crafted.raw


def empty_tree(tmp_path: Path, block_bytes: int) -> bytearray:
    """Return a tree of extents: each node points to one child as often as it has room, and all leaves are empty."""
    crafted = Crafted(tmp_path, block_bytes, "-t", "ext4", "-O", "^has_journal,^metadata_csum")
    room = (block_bytes - 12) // 12
    below = crafted.block(struct.pack("<HHHHI", 0xF30A, room, room, 0, 0) + struct.pack("<IHHI", 0, 0, 0, 5) * room)
    for depth in range(1, 5):
        head = struct.pack("<HHHHI", 0xF30A, room, room, depth, 0)
        below = crafted.block(head + struct.pack("<IIHH", 0, below, 0, 0) * room)
    crafted.inode("/dir", 0xFFFFFFFF, struct.pack("<HHHHIIIHH", 0xF30A, 1, 4, 5, 0, 0, below, 0, 0))
    return crafted.raw


def holes(tmp_path: Path, block_bytes: int) -> bytearray:
    """Return a directory with indirect blocks that are shared and lead to holes only."""
    crafted = Crafted(tmp_path, block_bytes, "-t", "ext2", "-O", "large_dir")
    once = crafted.block(b"")
    twice = crafted.block(struct.pack("<I", once) * (block_bytes // 4))
    thrice = crafted.block(struct.pack("<I", twice) * (block_bytes // 4))
    crafted.inode("/dir", 1 << 48, struct.pack("<15I", *[0] * 12, once, twice, thrice))
    return crafted.raw


MADE: tuple[Callable[[Path, int], bytearray], ...] = (endless_directory, many_names, empty_tree, holes)


def refusal(raw: bytes | bytearray) -> str:
    """Return why a file is not found, and check the size of the cache."""
    disk = opened(raw)
    with pytest.raises(DiskFsError) as refused:
        disk.find("/dir/none")
    assert len(disk.source.store.cache) <= source.CACHED
    return refused.value.what


@pytest.mark.parametrize("block_bytes", BLOCK_SIZES)
@pytest.mark.parametrize("made", MADE, ids=lambda made: made.__name__)
def test_a_search_comes_to_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Callable[[Path, int], bytearray], block_bytes: int
) -> None:
    """It ends at the limit of work, however small the part of the disk is that it reads."""
    monkeypatch.setattr(source, "WORK_MAX", 1 << 15)

    assert refusal(made(tmp_path, block_bytes)) == TOO_MUCH


def test_examined_names_count_as_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block has many names and is read in one step."""
    monkeypatch.setattr(source, "WORK_MAX", 1 << 15)
    looked_at = 0
    entry_in = Ext._entry_in

    def counted(self: Ext, block: bytes, name: bytes) -> int:
        nonlocal looked_at
        looked_at += block.count(b"none")
        return entry_in(self, block, name)

    monkeypatch.setattr(Ext, "_entry_in", counted)

    assert refusal(many_names(tmp_path, 65536)) == TOO_MUCH
    assert 1000 < looked_at < 1 << 16


@pytest.mark.deep
@pytest.mark.parametrize("block_bytes", BLOCK_SIZES)
@pytest.mark.parametrize("made", MADE, ids=lambda made: made.__name__)
def test_a_search_comes_to_its_real_end(
    tmp_path: Path, made: Callable[[Path, int], bytearray], block_bytes: int
) -> None:
    """It ends with the limit that applies outside of tests, too."""
    assert refusal(made(tmp_path, block_bytes)) == TOO_MUCH


def with_journal(content: bytes) -> bytearray:
    """Return a small disk whose journal begins with other content."""
    raw = bytearray(small_disks()["ext3"])
    at = raw.index(b"\xc0\x3b\x39\x98\0\0\0\4")
    raw[at : at + len(content)] = content
    return raw


def transactions(*bodies: tuple[int, bytes]) -> bytes:
    """Return a journal of transactions with one block each, given by kind and data."""
    blocks = [journal("0", b"")[:1024]]
    for number, (kind, body) in enumerate(bodies):
        for each, what in ((kind, body), (2, b"")):
            blocks.append((struct.pack(">III", 0xC03B3998, each, 7 + number) + what).ljust(1024, b"\xff"))
    return b"".join(blocks)


def test_a_journal_that_changes_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of changed and of revoked blocks are limited."""
    tags = struct.pack(">IHH16x", 0, 0, 0) + b"".join(struct.pack(">IHH", number, 0, 2) for number in range(1, 9))
    revoked = struct.pack(">I", 16 + 9 * 4) + struct.pack(">9I", *range(9))
    for kind, body in ((1, tags), (5, revoked)):
        monkeypatch.setattr(journals, "ENTRIES_MAX", 8)
        with pytest.raises(DiskFsError, match="its journal was not replayed, and changes more than 8 blocks"):
            opened(with_journal(transactions((kind, body)))).find("/kernel")


@pytest.mark.parametrize(
    ("kind", "body", "work"),
    [
        (1, struct.pack(">IHH16x", 1, 0, 0) + struct.pack(">IHH", 2, 0, 2) * 7 + struct.pack(">IHH", 3, 0, 10), 9),
        (5, struct.pack(">I", 16 + 9 * 4) + struct.pack(">9I", *range(9)), (16 + 9 * 4) // 4),
    ],
    ids=["changed", "revoked"],
)
def test_the_entries_of_a_journal_count_as_work(kind: int, body: bytes, work: int) -> None:
    """A block of the journal has many, and is read in one step."""
    raw = transactions((kind, body))
    spent: list[int] = []
    blocks = struct.unpack_from(">I", raw, 16)[0]

    def read(number: int) -> bytes:
        return raw[number * 1024 : (number + 1) * 1024].ljust(1024, b"\0")

    journals.Journal(read, spent.append, [(0, 0, blocks)], 1024).changed()
    assert sum(spent) == work


def test_a_journal_is_read_once() -> None:
    """A full journal without an end wraps around, and has no complete transaction."""
    revoking = struct.pack(">IIII", 0xC03B3998, 5, 7, 16).ljust(1024, b"\0")
    raw = with_journal(journal("0", b"")[:1024] + revoking * 11)

    assert opened(raw).find("/kernel").content(10_000).startswith(b"kernelkkk")


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (0, b"\0", "its journal is damaged, and was not replayed"),
        (12, struct.pack(">I", 4096), "the superblock of its journal is damaged"),
        (16, struct.pack(">I", 4096), "the superblock of its journal is damaged"),
        (20, struct.pack(">I", 0), "the superblock of its journal is damaged"),
        (28, struct.pack(">I", 12), "the superblock of its journal is damaged"),
        (40, struct.pack(">I", 0x40), "has unknown features: 0x40"),
        (40, struct.pack(">I", 0x4), "has asynchronous commits"),
    ],
)
def test_damaged_journals_are_refused(at: int, value: bytes, said: str) -> None:
    """The error names the damage.  Without the journal, an old kernel could be found."""
    superblock = bytearray(journal("0", b"")[:1024])
    superblock[at : at + len(value)] = value

    with pytest.raises(DiskFsError, match=said):
        opened(with_journal(bytes(superblock) if at else b"\0" * 12)).find("/kernel")


def test_a_journal_of_the_first_version_is_replayed() -> None:
    """It has no features: other bytes are in place of them."""
    superblock = bytearray(journal("0", b"")[:1024])
    superblock[4:8] = struct.pack(">I", 3)
    superblock[36:48] = b"\xff" * 12

    assert opened(with_journal(bytes(superblock))).find("/kernel").content(10_000).startswith(b"kernel of the journal")
