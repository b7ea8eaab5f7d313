"""Files of FFS are read as makefs writes them, and as OpenBSD's layout demands where makefs has no such case."""

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.filesystems import (
    MIB,
    Content,
    Link,
    Tree,
    check_content,
    check_tree,
    ffs_image,
    links_of,
    opened,
    opened_file,
    plant,
    run,
    trees,
)  # fmt: skip
from vmd.diskfs import ffs, source, walk
from vmd.diskfs.ffs import LAYOUTS, Ffs
from vmd.diskfs.source import DiskFsError, NoSuchFile

# OpenBSD's installer makes FFS2 with blocks of 16 KiB, and of 32 or 64 KiB where a partition is large.
VARIANTS = [
    f"version={version},bsize={block},fsize={fragment}"
    for version in (1, 2)
    for block, fragment in ((4096, 512), (8192, 1024), (16384, 2048), (32768, 32768), (65536, 8192), (65536, 65536))
]


def checked(tmp_path: Path, tree: Tree, options: str) -> None:
    """Make a file system of a tree, read it, and compare."""
    folder = tmp_path / f"tree{len(list(tmp_path.iterdir()))}"
    plant(folder, tree)
    disk = opened_file(ffs_image(tmp_path / "image", folder, options))
    check_tree(disk, tree)
    for path, what in links_of(tree).items():
        check_content(disk, path, what)


@pytest.mark.parametrize("options", VARIANTS)
def test_files_are_read(tmp_path: Path, options: str) -> None:
    """Files of fragments, of blocks, of both, and with indirect blocks, found by name and by all kinds of links."""
    deep = "/".join(f"d{number}" for number in range(40))
    tree: Tree = {
        f"boot/0small{'x' * 200}": Content(50, ((0, 50),)),
        "l0": Link(f"boot/0small{'x' * 200}"),
        "1short": Content(5000, ((0, 5000),), 1),
        "l1": Link("/" * 58 + "1short"),
        f"{deep}/2large": Content(900_001, ((0, 900_001),), 2),
        f"{deep}/l2": Link("../" * 40 + deep + "/2large"),
        "3sparse": Content(6 * MIB + 5, ((0, 10), (300_000, 5000), (5 * MIB, 70_000)), 3),
        "boot/l3": Link("../" * 30 + "3sparse"),
        "4empty": Content(0),
        **{f"many/f{number}{'n' * 60}": Content(number, ((0, number),), number) for number in range(120)},
    }

    checked(tmp_path, tree, options)


@settings(max_examples=4, suppress_health_check=list(HealthCheck))
@given(tree=trees(sparse=False), options=st.sampled_from(VARIANTS))
def test_any_tree_is_read(tmp_path_factory: pytest.TempPathFactory, tree: Tree, options: str) -> None:
    """Trees and block sizes are random."""
    checked(tmp_path_factory.mktemp("any"), tree, options)


@pytest.mark.deep
@pytest.mark.timeout(1800)
@settings(max_examples=600, suppress_health_check=list(HealthCheck))
@given(tree=trees(sparse=False), options=st.sampled_from(VARIANTS))
def test_many_trees_are_read(tmp_path_factory: pytest.TempPathFactory, tree: Tree, options: str) -> None:
    """The same test, with more examples."""
    checked(tmp_path_factory.mktemp("any"), tree, options)


class Patched:
    """A file system in memory.  A test may use the blocks of its large file `space` for other purposes."""

    def __init__(self, folder: Path, options: str) -> None:
        plant(folder, {"space": Content(2 * MIB, ((0, 2 * MIB),)), "a": Content(10, ((0, 10),))})
        self.raw = bytearray(ffs_image(folder.with_name("image"), folder, options).read_bytes())
        self.fs: Ffs = opened(self.raw)._filesystem(opened(self.raw)._candidates()[0])  # type: ignore[assignment]
        self.layout = LAYOUTS[self.fs.name]
        space = self.fs.node(self.fs.entry(walk.root_of(self.fs), b"space"))
        self.free = [at for _, at, length in self.fs._runs(space) if length == self.fs.block_bytes]
        self.inode_at = self.raw.index(self.fs.node(self.fs.entry(walk.root_of(self.fs), b"a")).raw)
        self.pointers = self.fs.block_bytes // self.layout.number_bytes

    def set_size(self, size: int) -> None:
        """Set the size of the file `a`."""
        struct.pack_into("<Q", self.raw, self.inode_at + self.layout.size_at, size)

    def set_block(self, number: int, at: int) -> None:
        """Set a block number in the inode of `a` to that of byte `at`.  0 is a hole."""
        place = self.inode_at + self.layout.map_at + number * self.layout.number_bytes
        struct.pack_into(f"<{self.layout.number}", self.raw, place, at // self.fs.fragment_bytes)

    def block(self, data: bytes = b"") -> int:
        """Fill a free block, and return its position."""
        at = self.free.pop()
        self.raw[at : at + self.fs.block_bytes] = data.ljust(self.fs.block_bytes, b"\0")
        return at

    def indirect(self, **entries: int) -> int:
        """Make an indirect block of the entries `_NUMBER=at`, and return its position."""
        at = self.block()
        for number, place in entries.items():
            where = at + int(number[1:]) * self.layout.number_bytes
            struct.pack_into(f"<{self.layout.number}", self.raw, where, place // self.fs.fragment_bytes)
        return at


@pytest.mark.parametrize("version", [1, 2])
def test_holes_and_all_levels_of_indirect_blocks_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    """The file is larger than a gigabyte, and has five blocks."""
    monkeypatch.setattr(walk, "FILE_MAX", 1 << 40)
    disk = Patched(tmp_path / "tree", f"version={version},bsize=4096,fsize=512")
    each = disk.pointers
    once, twice = 12 + each, 12 + each + each * each
    last = (twice + each * each + 3 * each + 1) * 4096
    disk.set_size(last + 100)
    disk.set_block(0, 0)
    disk.set_block(3, disk.block(b"direct"))
    disk.set_block(12, disk.indirect(_7=disk.block(b"single")))
    disk.set_block(13, disk.indirect(_2=disk.indirect(_9=disk.block(b"double"))))
    triple = disk.indirect(_3=disk.indirect(_1=disk.block(b"triple")))
    disk.set_block(14, disk.indirect(_0=disk.indirect(_5=disk.indirect(_6=disk.block(b"sixth"))), _1=triple))

    file = opened(disk.raw).find("/a")

    found = [(at // 4096, piece.rstrip(b"\0"), len(piece)) for at, piece in file.pieces()]
    assert file.size == last + 100
    assert found == [
        (3, b"direct", 4096),
        (12 + 7, b"single", 4096),
        (once + 2 * each + 9, b"double", 4096),
        (twice + 5 * each + 6, b"sixth", 4096),
        (last // 4096, b"triple", 100),
    ]


def test_a_directory_with_a_hole(tmp_path: Path) -> None:
    """Names behind the hole are found."""
    disk = Patched(tmp_path / "tree", "version=2")
    names = disk.fs._runs(walk.root_of(disk.fs))
    at = next(at for _, at, _ in names)
    root = disk.raw.index(walk.root_of(disk.fs).raw)
    content = bytes(disk.raw[at : at + 512])
    moved = disk.block(content)
    struct.pack_into("<Q", disk.raw, root + disk.layout.size_at, disk.fs.block_bytes + 512)
    struct.pack_into("<QQ", disk.raw, root + disk.layout.map_at, 0, moved // disk.fs.fragment_bytes)

    assert opened(disk.raw).find("/a").size == 10


def test_groups_of_ffs1_may_have_an_offset(tmp_path: Path) -> None:
    """On old disks with equal cylinders, the metadata of each group begins further inside the group than before.

    After some groups the offset is 0 again.
    """
    disk = Patched(tmp_path / "tree", "version=1,bsize=4096,fsize=512")
    per_group = 40
    struct.pack_into("<II", disk.raw, 8192 + 24, 16, 0xFFFFFFFC)
    struct.pack_into("<I", disk.raw, 8192 + 44, 100)
    struct.pack_into("<II", disk.raw, 8192 + 184, disk.fs.inodes_per_group, per_group)
    found = walk.root_of(disk.fs).raw
    for group in (3, 5):
        begin = (group * per_group + 16 * (group % 4) + disk.fs.inode_block) * 512
        disk.raw[begin + 2 * 128 : begin + 3 * 128] = found

        fs = Ffs(opened(disk.raw).source, "FFS1")
        assert fs.node(group * disk.fs.inodes_per_group + 2).raw == found


def test_the_superblock_is_at_a_place_of_openbsd(tmp_path: Path) -> None:
    """It contains its own position, so an old copy elsewhere is not used.  makefs writes it at 8 KiB."""
    disk = Patched(tmp_path / "tree", "version=2")
    superblock = disk.raw[8192 : 8192 + 1376]
    disk.raw[8192 : 8192 + 1376] = bytes(1376)
    for at in (65536, 0, 262144):
        moved = disk.raw[:]
        moved[at : at + 1376] = superblock
        assert not ffs.recognise(opened(moved).source)
        struct.pack_into("<Q", moved, at + 1000, at)
        assert opened(moved).find("/a").size == 10


def test_ffs1_with_a_copy_of_its_superblock_at_64_kib(tmp_path: Path) -> None:
    """With blocks of 64 KiB the first copy is at the place of FFS2's superblock, and may be old."""
    disk = Patched(tmp_path / "tree", "version=1,bsize=65536,fsize=8192")
    assert disk.raw[65536 + 1372 : 65536 + 1376] == (0x011954).to_bytes(4, "little")
    struct.pack_into("<I", disk.raw, 65536 + 8, 9999)

    assert opened(disk.raw).find("/a").size == 10


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (48, 3000, "its superblock has blocks of 3000 bytes"),
        (48, 1 << 20, "its superblock has blocks of 1048576 bytes"),
        (52, 256, "its superblock has fragments of 256 bytes"),
        (44, 0, "its superblock has 0 groups"),
        (184, 0, "groups of 0 inodes"),
        (188, 0, "inodes and 0 fragments"),
        (52, 1024, "its superblock has fragments of 1024 bytes"),
        (52, 32768, "its superblock has fragments of 32768 bytes"),
        (48, 2048, "its superblock has blocks of 2048 bytes"),
        (1324, 0xFFFFFFFF, "has the inode format of before 4.4BSD, which is not supported"),
        (36, 20, "/a: points to fragment"),
    ],
)
def test_damaged_superblocks_are_refused(tmp_path: Path, at: int, value: int, said: str) -> None:
    """The error names the damage."""
    plant(tmp_path / "tree", {"a": Content(10)})
    raw = bytearray(ffs_image(tmp_path / "image", tmp_path / "tree", "version=1,bsize=16384,fsize=2048").read_bytes())
    struct.pack_into("<I", raw, 8192 + at, value)

    with pytest.raises(DiskFsError) as refused:
        opened(raw).find("/a")

    assert said in str(refused.value)
    assert str(refused.value).startswith("the whole disk (FFS1): ")


def test_big_endian_file_systems_are_reported(tmp_path: Path) -> None:
    """They come from machines of another architecture."""
    plant(tmp_path / "tree", {"a": Content(10)})
    for version in (1, 2):
        image = tmp_path / f"image{version}"
        run("makefs", "-t", "ffs", "-B", "be", "-o", f"version={version}", "-M", "2m", image, tmp_path / "tree")
        with pytest.raises(DiskFsError, match=rf"^the whole disk \(big-endian FFS{version}\): is not supported$"):
            opened_file(image).find("/a")


@pytest.mark.parametrize("version", [1, 2])
def test_a_search_in_an_endless_directory_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    """Its blocks have the bytes of the wanted name everywhere, but only in unused entries."""
    monkeypatch.setattr(source, "WORK_MAX", 1 << 15)
    disk = Patched(tmp_path / "tree", f"version={version},bsize=8192,fsize=1024")
    names = disk.block(struct.pack("<IHBB4s", 0, 12, 0, 1, b"none") * 42 + struct.pack("<IHBB", 0, 8, 0, 0))
    block = bytes(disk.raw[names : names + 512]) * 16
    disk.raw[names : names + 8192] = block
    numbers = disk.indirect(**{f"_{number}": names for number in range(disk.pointers)})
    twice = disk.indirect(**{f"_{number}": numbers for number in range(disk.pointers)})
    root = disk.raw.index(walk.root_of(disk.fs).raw)
    struct.pack_into("<Q", disk.raw, root + disk.layout.size_at, 1 << 40)
    fragments = [at // 1024 for at in (*[names] * 12, numbers, twice, 0)]
    struct.pack_into(f"<15{disk.layout.number}", disk.raw, root + disk.layout.map_at, *fragments)
    looked_at = 0
    entry_in = Ffs._entry_in

    def counted(self: Ffs, block: bytes, name: bytes) -> int:
        nonlocal looked_at
        looked_at += block.count(b"none")
        return entry_in(self, block, name)

    monkeypatch.setattr(Ffs, "_entry_in", counted)

    with pytest.raises(DiskFsError, match="too much would have to be read to find it"):
        opened(disk.raw).find("/none")
    assert 1000 < looked_at < 1 << 16


@pytest.mark.parametrize("inside", [True, False])
def test_an_inode_or_a_block_at_the_end_of_the_file_system(tmp_path: Path, inside: bool) -> None:
    """The last bytes still belong to it.  What is behind them does not, although the disk is larger."""
    disk = Patched(tmp_path / "tree", "version=2,bsize=4096,fsize=512")
    last = disk.block(b"last")
    disk.set_size(4096)
    disk.set_block(0, last)
    struct.pack_into("<Q", disk.raw, 8192 + 1080, last // 512 + (8 if inside else 7))
    if inside:
        assert opened(disk.raw).find("/a").content(4096) == b"last".ljust(4096, b"\0")
    else:
        with pytest.raises(DiskFsError, match=f"points to fragment {last // 512}, of {last // 512 + 7}"):
            opened(disk.raw).find("/a").content(4096)

    end = disk.inode_at // 512 + 1  # the fragment of the inode is the last one
    for fragments, fits in ((end, True), (end - 1, False)):
        struct.pack_into("<Q", disk.raw, 8192 + 1080, fragments)
        fs = Ffs(opened(disk.raw).source, "FFS2")
        number = disk.fs.entry(walk.root_of(disk.fs), b"a") | 1  # the second inode of a fragment ends with it
        if fits:
            assert fs.node(number).number == number
        else:
            with pytest.raises(DiskFsError, match=f"points to fragment {end - 1}, of {end - 1}"):
                fs.node(number)


def test_a_damaged_directory_is_reported(tmp_path: Path) -> None:
    """An entry with an invalid length ends the search with an error."""
    disk = Patched(tmp_path / "tree", "version=2")
    at = disk.raw.index(b"\1a\0\0") - 7
    disk.raw[at + 4 : at + 6] = b"\0\0"

    with pytest.raises(DiskFsError, match=r"\(FFS2\): /a: a directory on the way to it is damaged$"):
        opened(disk.raw).find("/a")


def test_damage_elsewhere_in_a_directory_hides_no_file(tmp_path: Path) -> None:
    """Only the blocks that have the bytes of the name are looked through."""
    fs = Patched(tmp_path / "tree", "version=2").fs
    damaged = bytes(512)
    block = damaged + struct.pack("<IHBB4s", 7, 512, 8, 4, b"name").ljust(512, b"\0") + damaged

    assert fs._entry_in(block, b"name") == 7
    assert fs._entry_in(block, b"none") == 0


@pytest.mark.parametrize("length", [0, 7, 8, 9])
def test_the_last_entry_of_a_directory_block(tmp_path: Path, length: int) -> None:
    """It ends with the block, and may have no name."""
    disk = Patched(tmp_path / "tree", "version=2")
    block = struct.pack("<IHBB4s", 0, 12, 0, 4, b"none") * 42 + struct.pack("<IHBB", 0, length, 0, 0)
    assert len(block) == 512

    if length == 8:
        assert disk.fs._entry_in(block, b"none") == 0
    else:
        with pytest.raises(DiskFsError, match="is damaged"):
            disk.fs._entry_in(block, b"none")


def test_an_invalid_inode_number_is_reported(tmp_path: Path) -> None:
    """A name may have any inode number."""
    disk = Patched(tmp_path / "tree", "version=2")
    at = disk.raw.index(b"\1a\0\0") - 7
    disk.raw[at : at + 4] = b"\xff\xff\xff\xff"

    with pytest.raises(DiskFsError, match=r"points to inode 4294967295, of \d+$"):
        opened(disk.raw).find("/a")
    with pytest.raises(NoSuchFile):
        opened(disk.raw).find("/b")
