"""Files of ext2, ext3 and ext4 are read as mke2fs, e2fsck and the kernel have written them."""

import os
import struct
import subprocess
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
    ext_image,
    links_of,
    opened,
    opened_file,
    plant,
    run,
    trees,
)  # fmt: skip
from vmd.diskfs.ext import Ext
from vmd.diskfs.source import DiskFsError, NoSuchFile

VARIANTS = {
    "ext2 of 1 KiB blocks": ("-t", "ext2", "-b", "1024"),
    "ext2 of revision 0": ("-t", "ext2", "-r", "0", "-b", "1024"),
    "ext3": ("-t", "ext3", "-b", "2048"),
    "ext4": ("-t", "ext4"),
    "ext4 of 1 KiB blocks": ("-t", "ext4", "-b", "1024"),
    "ext4 of 64 KiB blocks": ("-t", "ext4", "-b", "65536", "-O", "^has_journal"),
    "inline data": ("-t", "ext4", "-O", "inline_data", "-I", "256"),
    "inline data in large inodes": ("-t", "ext4", "-O", "inline_data", "-I", "1024"),
    "meta_bg": ("-t", "ext4", "-b", "1024", "-g", "1024", "-O", "meta_bg,^resize_inode"),
    "meta_bg, old descriptors":
        ("-t", "ext4", "-b", "1024", "-g", "256", "-O", "meta_bg,^resize_inode,^64bit,^has_journal"),
    "no flex_bg, 32 bits": ("-t", "ext4", "-b", "1024", "-g", "2048", "-O", "^flex_bg,^64bit,^metadata_csum"),
    "bigalloc": ("-t", "ext4", "-O", "bigalloc", "-C", "16384"),
    "sparse_super2": ("-t", "ext4", "-b", "1024", "-g", "1024", "-O", "sparse_super2,meta_bg,^resize_inode"),
    "small inodes": ("-t", "ext4", "-I", "128"),
    "features that change nothing":
        ("-t", "ext4", "-O", "large_dir,encrypt,metadata_csum_seed,ea_inode,mmp,project,quota"),
    "casefold": ("-t", "ext4", "-O", "casefold"),
}  # fmt: skip


def checked(tmp_path: Path, tree: Tree, *options: str, size: int = 16 * MIB) -> None:
    """Make a file system of a tree, read it, and compare."""
    if any("inline_data" in option for option in options):  # with it mke2fs gives files that end in a hole a wrong size
        tree = {path: what for path, what in tree.items() if not isinstance(what, Content) or not ends_in_a_hole(what)}
    folder = tmp_path / f"tree{len(list(tmp_path.iterdir()))}"
    plant(folder, tree)
    disk = opened_file(ext_image(tmp_path / "image", folder, *options, size=size))
    check_tree(disk, tree)
    for path, what in links_of(tree).items():
        check_content(disk, path, what)


def ends_in_a_hole(what: Content) -> bool:
    """Return whether the end of a file was not written."""
    return what.size > max((offset + length for offset, length in what.stretches), default=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_files_are_read(tmp_path: Path, variant: str) -> None:
    """Small, large, empty and sparse files, up to triple indirect blocks, found by name and by all kinds of links."""
    deep = "/".join(f"d{number}" for number in range(40))
    tree: Tree = {
        f"boot/0small{'x' * 200}": Content(50, ((0, 50),)),
        "l0": Link(f"boot/0small{'x' * 200}"),
        "1inline": Content(150, ((0, 150),), 1),
        "l1": Link("/1inline"),
        f"{deep}/2large": Content(700_001, ((0, 700_001),), 2),
        f"{deep}/l2": Link("../" * 40 + deep + "/2large"),
        "3sparse": Content(80 * MIB + 5, ((0, 10), (300_000, 5000), (5 * MIB, 70_000), (75 * MIB, 9)), 3),
        "boot/l3": Link("../3sparse"),
        "4empty": Content(0),
        "5hole": Content(90_000),
    }

    checked(tmp_path, tree, *VARIANTS[variant])
    lines = run("dumpe2fs", "-h", tmp_path / "image").splitlines()
    told = dict(line.split(":", 1) for line in lines if ":" in line)
    found = opened_file(tmp_path / "image").find("/4empty").filesystem
    assert isinstance(found, Ext)
    assert [found.inodes, found.blocks, found.first_data_block, found.block_bytes, found.inodes_per_group] == [
        int(told[name]) for name in ("Inode count", "Block count", "First block", "Block size", "Inodes per group")
    ]


@settings(max_examples=6, suppress_health_check=list(HealthCheck))
@given(tree=trees(), variant=st.sampled_from(sorted(VARIANTS)))
def test_any_tree_is_read(tmp_path_factory: pytest.TempPathFactory, tree: Tree, variant: str) -> None:
    """Trees and features are random."""
    checked(tmp_path_factory.mktemp("any"), tree, *VARIANTS[variant])


@pytest.mark.deep
@pytest.mark.timeout(1800)
@settings(max_examples=600, suppress_health_check=list(HealthCheck))
@given(tree=trees(), variant=st.sampled_from(sorted(VARIANTS)))
def test_many_trees_are_read(tmp_path_factory: pytest.TempPathFactory, tree: Tree, variant: str) -> None:
    """The same test, with more examples."""
    checked(tmp_path_factory.mktemp("any"), tree, *VARIANTS[variant])


@pytest.mark.parametrize("variant", ["ext4 of 1 KiB blocks", "inline data"])
def test_hashed_directory_is_read(tmp_path: Path, variant: str) -> None:
    """Its index is in the same blocks as its names."""
    tree = {f"many/file{number:05}": Content(1, ((0, 1),), number) for number in range(800)}
    plant(tmp_path / "tree", tree)
    image = ext_image(tmp_path / "image", tmp_path / "tree", *VARIANTS[variant])
    subprocess.run(["/usr/sbin/e2fsck", "-fyD", image], capture_output=True, check=False)  # 1: it was changed
    assert "Hash Version: 1" in run("debugfs", "-R", "htree_dump /many", image)

    disk = opened_file(image)

    for number in range(0, 800, 37):
        check_content(disk, f"many/file{number:05}", tree[f"many/file{number:05}"])
    with pytest.raises(NoSuchFile, match=r"there is no /many/file99999$"):
        disk.find("/many/file99999")


FAR = {
    "meta_bg": ("-O", "meta_bg,^resize_inode,^has_journal"),
    "meta_bg from its second block on": ("-O", "^has_journal"),
    "meta_bg, old descriptors": ("-O", "meta_bg,^resize_inode,^has_journal,^64bit"),
    "meta_bg, superblocks everywhere": ("-O", "meta_bg,^resize_inode,^has_journal,^sparse_super"),
    "meta_bg, descriptors as large as blocks": ("-O", "meta_bg,^resize_inode,^has_journal", "-E", "desc_size=1024"),
    "meta_bg, two more superblocks": ("-O", "meta_bg,^resize_inode,^has_journal,sparse_super2"),
    "meta_bg, clusters": ("-O", "meta_bg,^resize_inode,^has_journal,bigalloc", "-C", "2048"),
    "descriptors side by side": ("-O", "^has_journal"),
}  # fmt: skip


@pytest.mark.parametrize("variant", FAR)
def test_inodes_of_all_groups_are_found(tmp_path: Path, variant: str) -> None:
    """The positions of descriptor blocks depend on which groups have a copy of the superblock."""
    folder = tmp_path / "tree"
    folder.mkdir()
    for number in range(900):
        (folder / f"{number}").write_bytes(b"%d" % number)
    options = ("-t", "ext4", "-b", "1024", "-g", "256", "-N", "1024", *FAR[variant])
    image = ext_image(tmp_path / "image", folder, *options, size=16 * MIB)
    if "second" in variant:
        run("debugfs", "-w", "-R", "feature meta_bg", image)
        run("debugfs", "-w", "-R", "set_super_value first_meta_bg 100", image)

    disk = opened_file(image)

    files = {number: disk.find(f"/{number}") for number in range(0, 900, 17)}
    assert len({file.node.number // 16 for file in files.values()}) > 40  # groups
    assert {number: file.content(9) for number, file in files.items()} == {number: b"%d" % number for number in files}


def test_removed_names_are_not_found(tmp_path: Path) -> None:
    """Their bytes are still in the directory."""
    plant(tmp_path / "tree", {"boot/old": Content(5, ((0, 5),)), "boot/kept": Content(5, ((0, 5),))})
    image = ext_image(tmp_path / "image", tmp_path / "tree")
    run("debugfs", "-w", "-R", "rm /boot/old", image)

    disk = opened_file(image)

    assert b"old" in image.read_bytes()
    check_content(disk, "boot/kept", Content(5, ((0, 5),)))
    with pytest.raises(NoSuchFile):
        disk.find("/boot/old")


@pytest.mark.root
@pytest.mark.parametrize(
    "options", [("-t", "ext4"), ("-t", "ext3", "-b", "1024"), ("-t", "ext4", "-O", "^metadata_csum")]
)
def test_files_that_are_only_in_the_journal_are_read(tmp_path: Path, options: tuple[str, ...]) -> None:
    """A killed guest has left a kernel whose blocks were not yet written to their places."""
    plant(tmp_path / "tree", {"vmlinuz": Content(3000, ((0, 3000),), 1), "gone": Content(5, ((0, 5),))})
    image = ext_image(tmp_path / "image", tmp_path / "tree", *options, size=32 * MIB)
    mount, killed = tmp_path / "mount", tmp_path / "killed"
    mount.mkdir()
    run("mount", "-o", "loop,data=journal", image, mount)
    try:
        new = Content(200_000, ((0, 200_000),), 2)
        plant(mount, {"boot/new": new, "link": Link("boot/new")})
        (mount / "gone").unlink()
        (mount / "vmlinuz").write_bytes(b"\xc0\x3b\x39\x98 is how blocks of a journal begin")
        for name in ("boot/new", "vmlinuz", "."):
            fd = os.open(mount / name, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
        killed.write_bytes(image.read_bytes())
    finally:
        run("umount", mount)
    assert "needs_recovery" in run("dumpe2fs", "-h", killed)

    disk = opened_file(killed)

    check_content(disk, "boot/new", new)
    check_content(disk, "link", new)
    assert disk.find("/vmlinuz").content(100) == b"\xc0\x3b\x39\x98 is how blocks of a journal begin"
    with pytest.raises(NoSuchFile):
        disk.find("/gone")


def journalled(image: Path, script: str, path: str = "/a") -> bytes:
    """Let debugfs write to a journal.  Return the content of a file of 10 bytes."""
    run("debugfs", "-w", "-f", "-", image, stdin=script)
    return opened_file(image).find(path).content(100)


@pytest.fixture
def with_journal(tmp_path: Path) -> tuple[Path, str]:
    """A file system with a file of 10 bytes, and the number of the file's block."""
    plant(tmp_path / "tree", {"a": Content(10, ((0, 10),)), "b": Content(9000, ((0, 9000),))})
    image = ext_image(tmp_path / "image", tmp_path / "tree", "-t", "ext4", "-b", "1024")
    (tmp_path / "one").write_bytes(b"first once".ljust(1024, b"1"))
    (tmp_path / "two").write_bytes(b"then again".ljust(1024, b"2"))
    return image, run("debugfs", "-R", "blocks /a", image).strip()


def test_the_last_of_several_transactions_counts(tmp_path: Path, with_journal: tuple[Path, str]) -> None:
    """A transaction that was revoked afterwards does not count."""
    image, block = with_journal
    before = opened_file(image).find("/a").content(100)
    one, two = f"jw -b {block} {tmp_path}/one\n", f"jw -b {block} {tmp_path}/two\n"

    assert journalled(image, f"jo\n{one}jc\n") == b"first once"
    assert journalled(image, f"jo\n{two}jc\n") == b"then again"
    assert journalled(image, f"jo\njw -r {block}\njc\n") == before
    assert journalled(image, f"jo\n{one}jc\n") == b"first once"


def test_files_with_some_blocks_in_the_journal(
    tmp_path: Path, with_journal: tuple[Path, str]
) -> None:
    """One journal block is in the middle of an extent, and an escaped one is at the end of the file."""
    image, _ = with_journal
    before = opened_file(image).find("/b").content(9000)
    blocks = run("debugfs", "-R", "blocks /b", image).split()
    (tmp_path / "escaped").write_bytes(b"\xc0\x3b\x39\x98 of a journal".ljust(1024, b"3"))
    script = f"jo\njw -b {blocks[4]} {tmp_path}/one\njw -b {blocks[8]} {tmp_path}/escaped\njc\n"
    run("debugfs", "-w", "-f", "-", image, stdin=script)

    after = opened_file(image).find("/b").content(9000)

    assert after[4096:5120] == b"first once".ljust(1024, b"1")
    assert after[8192:] == b"\xc0\x3b\x39\x98 of a journal".ljust(808, b"3")
    assert after[:4096] + after[5120:8192] == before[:4096] + before[5120:8192]


def test_a_transaction_without_its_end_does_not_count(tmp_path: Path, with_journal: tuple[Path, str]) -> None:
    """The guest was killed while it wrote the transaction."""
    image, block = with_journal
    before = opened_file(image).find("/a").content(100)

    assert journalled(image, f"jo\njw -b {block} -c {tmp_path}/one\njc\n") == before


def superblock(image: Path, at: int, value: bytes) -> bytes:
    """Return a file system with other bytes in its superblock."""
    raw = bytearray(image.read_bytes())
    raw[1024 + at : 1024 + at + len(value)] = value
    return bytes(raw)


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (96, b"\x42\x00\x00\x80", "has unknown features: 0x80000000"),
        (96, b"\x43\x00\x00\x00", "uses compression, which is not supported"),
        (24, b"\x07\x00\x00\x00", "its superblock has blocks of 2^17 bytes"),
        (88, b"\x7f\x00", "its superblock has inodes of 127 bytes"),
        (254, b"\x21\x00", "its superblock has group descriptors of 33 bytes"),
        (32, b"\x00\x00\x00\x00", "its superblock has groups of 0 blocks and 2048 inodes"),
        (20, b"\x02\x00\x00\x00", "its superblock has 8192 blocks, the first one 2"),
        (0, b"\x01\x00\x00\x00", "points to inode 2, of 1"),
    ],
)
def test_damaged_superblocks_are_refused(tmp_path: Path, at: int, value: bytes, said: str) -> None:
    """The error names the damage."""
    plant(tmp_path / "tree", {"a": Content(10)})
    image = ext_image(tmp_path / "image", tmp_path / "tree", "-t", "ext4", "-b", "1024")

    with pytest.raises(DiskFsError) as refused:
        opened(superblock(image, at, value)).find("/a")

    assert str(refused.value).endswith(said)
    assert str(refused.value).startswith("the whole disk (ext")


@pytest.mark.parametrize(
    ("at", "most", "said"),
    [
        (32, 1 << 29, "its superblock has groups of {} blocks and 2048 inodes"),
        (40, 1 << 24, "its superblock has groups of 8192 blocks and {} inodes"),
    ],
)
def test_limits_of_a_superblock(tmp_path: Path, at: int, most: int, said: str) -> None:
    """The largest group is accepted, and one more is refused.  Root's inode is in the first group."""
    plant(tmp_path / "tree", {"a": Content(10)})
    image = ext_image(tmp_path / "image", tmp_path / "tree", "-t", "ext4", "-b", "1024")

    assert opened(superblock(image, at, most.to_bytes(4, "little"))).find("/a").size == 10
    with pytest.raises(DiskFsError) as refused:
        opened(superblock(image, at, (most + 1).to_bytes(4, "little"))).find("/a")

    assert str(refused.value).endswith(said.format(most + 1))


def test_encrypted_files_are_reported(tmp_path: Path) -> None:
    """Encrypted directories are reported, too."""
    plant(tmp_path / "tree", {"secret/a": Content(10), "b": Content(10)})
    image = ext_image(tmp_path / "image", tmp_path / "tree", "-t", "ext4", "-O", "encrypt")
    for name in ("secret", "b"):
        run("debugfs", "-w", "-R", f"set_inode_field /{name} flags 0x80800", image)
    disk = opened_file(image)

    with pytest.raises(DiskFsError, match=r"^the whole disk \(ext4\): /secret/a: a directory on the way to it is encr"):
        disk.find("/secret/a")
    with pytest.raises(DiskFsError, match=r"^the whole disk \(ext4\): /b: is encrypted"):
        disk.find("/b")


def test_a_missing_journal_is_reported(tmp_path: Path) -> None:
    """There is nothing to replay."""
    plant(tmp_path / "tree", {"a": Content(10)})
    image = ext_image(tmp_path / "image", tmp_path / "tree", "-t", "ext4", "-O", "^has_journal")
    run("debugfs", "-w", "-R", "feature needs_recovery", image)

    with pytest.raises(DiskFsError, match="was not unmounted, and its journal is missing: mount it once"):
        opened_file(image).find("/a")


def test_fast_commits_are_reported(tmp_path: Path) -> None:
    """They are not blocks that replace others."""
    plant(tmp_path / "tree", {"a": Content(10)})
    image = ext_image(tmp_path / "image", tmp_path / "tree", "-t", "ext4", "-O", "fast_commit", size=32 * MIB)
    run("debugfs", "-w", "-R", "feature needs_recovery", image)
    raw = bytearray(image.read_bytes())
    at = raw.index(b"\xc0\x3b\x39\x98\0\0\0\4")
    raw[at + 43] |= 0x20

    with pytest.raises(DiskFsError, match="its journal was not replayed, and has fast commits: mount it once"):
        opened(raw).find("/a")


def test_an_unwritten_extent_reads_as_zeros(tmp_path: Path) -> None:
    """The data on the disk does not matter."""
    plant(tmp_path / "tree", {"a": Content(9000, ((0, 9000),))})
    image = ext_image(tmp_path / "image", tmp_path / "tree", "-t", "ext4", "-b", "1024")
    raw = bytearray(image.read_bytes())
    nine = raw.index(b"\x0a\xf3\1\0\4\0\0\0\0\0\0\0" b"\0\0\0\0\x09\0") + 16  # an extent of nine blocks
    raw[nine : nine + 2] = b"\x09\x80"

    assert opened(raw).find("/a").content(9000) == bytes(9000)


def inode_of(path: str, raw: bytes | bytearray) -> int:
    """Return the position of an inode."""
    node = opened(raw).find(path).node
    assert raw.count(node.raw) == 1
    return raw.index(node.raw)


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (4, b"\xff\xff", "has 65535 bytes, but its inode has only 150 of them"),
        (128 + 32, bytes(4), "has 150 bytes, but its inode has only 60 of them"),
        (128 + 32 + 4 + 1, b"\x06", "has 150 bytes, but its inode has only 60 of them"),
        (128 + 32 + 4, b"\xff\x01", "has 150 bytes, but its inode has only 60 of them"),  # up to the end
        (128 + 32 + 4 + 2, b"\xf0\xff", "its inode is damaged: system.data is not inside it"),
        (128 + 32 + 4 + 4, b"\x01", "its inode is damaged: system.data is not inside it"),
    ],
)
def test_missing_inline_data_is_reported(tmp_path: Path, at: int, value: bytes, said: str) -> None:
    """It is shorter than the file, or its attribute is missing or points outside of the inode."""
    plant(tmp_path / "tree", {"a": Content(150, ((0, 150),))})
    image = ext_image(tmp_path / "image", tmp_path / "tree", "-t", "ext4", "-O", "inline_data", "-I", "512")
    raw = bytearray(image.read_bytes())
    begin = inode_of("/a", raw)
    assert opened(raw).find("/a").content(150) == Content(150, ((0, 150),)).pieces()[0][1]
    raw[begin + 436 : begin + 512] = b"\1" * 76
    raw[begin + at : begin + at + len(value)] = value

    with pytest.raises(DiskFsError) as refused:
        opened(raw).find("/a").content(1 << 20)

    assert refused.value.what == said


@pytest.mark.parametrize(
    ("depth", "entry"), [(0, struct.pack("<IHHI", 0, 1, 1, 5)), (1, struct.pack("<IIHH", 0, 5, 1, 0))]
)
def test_extents_behind_the_first_4294967296_blocks(tmp_path: Path, depth: int, entry: bytes) -> None:
    """Block numbers have 48 bits, in leaves and in the nodes above them."""
    plant(tmp_path / "tree", {"a": Content(3000, ((0, 3000),))})
    raw = bytearray(ext_image(tmp_path / "image", tmp_path / "tree", "-t", "ext4", "-b", "1024").read_bytes())
    begin = inode_of("/a", raw) + 40
    raw[begin + 6] = depth
    raw[begin + 12 : begin + 24] = entry

    with pytest.raises(DiskFsError, match=f"points to block {(1 << 32) + 5}, of 8192"):
        list(opened(raw).find("/a").pieces())


def test_inodes_behind_the_first_4294967296_blocks(tmp_path: Path) -> None:
    """The place of their table has 64 bits."""
    plant(tmp_path / "tree", {"a": Content(5)})
    options = "-t", "ext4", "-b", "1024", "-O", "64bit"
    raw = bytearray(ext_image(tmp_path / "image", tmp_path / "tree", *options).read_bytes())
    descriptor = 2048
    low = int.from_bytes(raw[descriptor + 8 : descriptor + 12], "little")
    raw[descriptor + 40] = 1

    with pytest.raises(DiskFsError, match=f"points to block {(1 << 32) + low}, of 8192"):
        opened(raw).find("/a")


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (0, b"\0", "its tree of extents is damaged"),
        (2, b"\5", "its tree of extents is damaged: 5 entries in 60 bytes"),
        (6, b"\6", "its tree of extents is damaged"),
        (6, b"\1", "points to block "),
        (24, b"\0", "its extents are not in order at block 0"),
        (28, b"\xff\x7f", "points to block "),
        (18, b"\1", "points to block "),
        (20, b"\xff\xff\xff\xff", "points to block "),
    ],
)
def test_a_damaged_tree_of_extents_is_reported(tmp_path: Path, at: int, value: bytes, said: str) -> None:
    """Its header, its order or its block numbers are wrong."""
    plant(tmp_path / "tree", {"a": Content(40 * MIB, ((0, 3000), (30 * MIB, 3000)))})
    image = ext_image(tmp_path / "image", tmp_path / "tree", "-t", "ext4", "-b", "1024")
    raw = bytearray(image.read_bytes())
    begin = inode_of("/a", raw) + 40
    raw[begin + at : begin + at + len(value)] = value
    if at == 24:
        raw[begin + 24 : begin + 28] = bytes(4)

    with pytest.raises(DiskFsError) as refused:
        list(opened(raw).find("/a").pieces())

    assert refused.value.what.startswith(said)


def test_removed_names_in_a_block_of_64_kib(tmp_path: Path) -> None:
    """The block's length does not fit into the field for it."""
    plant(tmp_path / "tree", {"a": Content(3)})
    image = ext_image(tmp_path / "image", tmp_path / "tree", "-t", "ext4", "-b", "65536", "-O", "^metadata_csum")
    raw = bytearray(image.read_bytes())
    at = raw.index(b"\x02\0\0\0\x0c\0\1\2.\0\0\0")
    for length in (65535, 0):
        raw[at : at + 12] = struct.pack("<IHBB4x", 0, length, 0, 0)
        with pytest.raises(NoSuchFile):
            opened(raw).find("/a")


@pytest.mark.root
def test_files_written_by_the_kernel_are_read(tmp_path: Path) -> None:
    """It makes its own hashed directories, extent trees, unwritten extents, holes, and links."""
    plant(tmp_path / "tree", {"first": Content(3)})
    options = ("-t", "ext4", "-b", "1024", "-O", "inline_data", "-I", "256")
    image = ext_image(tmp_path / "image", tmp_path / "tree", *options, size=32 * MIB)
    mount = tmp_path / "mount"
    mount.mkdir()
    run("mount", "-o", "loop", image, mount)
    try:
        tree: Tree = {
            "scattered": Content(4 * MIB, tuple((at * 4096, 1024) for at in range(1000)), 1),
            "long": Content(700_000, ((0, 700_000),), 2),
            **{f"links/l{length}": Link("/" * (length - 4) + "long") for length in (5, 59, 60, 61, 160, 1023)},
            **{f"many/{number}{'n' * 50}": Content(9, ((0, 9),), number) for number in range(1500)},
        }
        plant(mount, tree)
        (mount / "punched").write_bytes(b"x" * 100_000)
        run("fallocate", "-p", "-o", "20480", "-l", "40960", mount / "punched")
        run("fallocate", "-l", "500000", mount / "allocated")
        for number in range(0, 1500, 2):
            (mount / f"many/{number}{'n' * 50}").unlink()
        # A process with a copy of our mounts may keep it mounted.  Then the last changes are only in the journal.
        run("sync", "-f", mount)
    finally:
        run("umount", mount)

    disk = opened_file(image)

    gone = {f"many/{number}{'n' * 50}" for number in range(0, 1500, 2)}
    check_tree(disk, {path: what for path, what in tree.items() if path not in gone})
    for path in sorted(gone)[::50]:
        with pytest.raises(NoSuchFile):
            disk.find("/" + path)
    for path in tree:
        if path.startswith("links/"):
            check_content(disk, path, Content(700_000, ((0, 700_000),), 2))
    assert disk.find("/punched").content(100_000) == b"x" * 20480 + bytes(40960) + b"x" * (100_000 - 61440)
    assert disk.find("/allocated").content(500_000) == bytes(500_000)


def test_files_of_other_owners_are_read(tmp_path: Path) -> None:
    """Mode, owner and group are beside each other in an inode."""
    plant(tmp_path / "tree", {"theirs": Content(50, ((0, 50),))})
    image = ext_image(tmp_path / "image", tmp_path / "tree")
    for field, value in (("uid", 1001), ("gid", 2002)):
        run("debugfs", "-w", "-R", f"set_inode_field theirs {field} {value}", image)

    check_content(opened_file(image), "theirs", Content(50, ((0, 50),)))
