"""A path is followed through a file system in memory: links, `..`, and the limits of everything that a guest wrote."""

from collections.abc import Iterator

import pytest

from vmd.diskfs.source import DiskFsError, NoSuchFile, Source, Store
from vmd.diskfs.walk import (
    DEPTH_MAX,
    DIRECTORY,
    FILE,
    FILE_MAX,
    LINK,
    LINKS_MAX,
    NAME_MAX,
    OTHER,
    PATH_MAX,
    PIECE_BYTES,
    ROOT,
    File,
    Node,
    find,
    kind_of,
    pieces_of,
)

Tree = dict[bytes, "Tree | bytes | int"]  # a directory, the target of a link, the size of a file
SOCKET = -1


class Memory:
    """A file system of a tree.  All its files have the same content: `pieces`, or damage if there are none."""

    name = "ext4"

    def __init__(self, tree: "Tree | bytes | int", pieces: tuple[tuple[int, bytes], ...] = ()) -> None:
        self.things = {ROOT: tree}
        self.said = pieces
        self.looked: list[bytes] = []

    def node(self, number: int) -> Node:
        """Return an inode."""
        thing = self.things[number]
        if isinstance(thing, int):
            kind, size = (OTHER, 0) if thing == SOCKET else (FILE, thing)
        else:
            kind, size = (DIRECTORY if isinstance(thing, dict) else LINK), len(thing)
        return Node(number=number, kind=kind, size=size, raw=b"")

    def entry(self, directory: Node, name: bytes) -> int:
        """Return the number of a name."""
        self.looked.append(name)
        tree = self.things[directory.number]
        assert isinstance(tree, dict)
        if name not in tree:
            return 0
        number = ROOT + len(self.things)
        self.things[number] = tree[name]
        return number

    def target(self, link: Node) -> bytes:
        """Return the target of a link."""
        found = self.things[link.number]
        assert isinstance(found, bytes)
        return found

    def pieces(self, _file: Node) -> Iterator[tuple[int, bytes]]:
        """Yield the content."""
        yield from self.said
        if not self.said:
            raise DiskFsError("is damaged")


def refusal(filesystem: Memory, path: str) -> tuple[bool, str]:
    """Return whether a file is missing, and why it is not found."""
    with pytest.raises(DiskFsError) as refused:
        find(filesystem, path)
    assert (refused.value.filesystem, refused.value.path) == ("ext4", path)
    return isinstance(refused.value, NoSuchFile), refused.value.what


def deep(depth: int) -> Tree:
    """Return a file below so many directories, of which the root is the first."""
    tree: Tree = {b"f": 1}
    for _ in range(depth - 1):
        tree = {b"d": tree}
    return tree


def linked(count: int) -> Tree:
    """Return a file `f0`, and a link `f1` to it, `f2` to that and so on."""
    return {b"f0": 7, **{b"f%d" % number: b"f%d" % (number - 1) for number in range(1, count + 1)}}


# --- what a path leads to -----------------------------------------------------------------------------------------

TREE: Tree = {
    b"k": 5,
    b"a": {b"b": {b"f": 3}, b"up": b"../k", b"out": b"../../../../k", b"whole": b"/k", b"k": 9, b"here": b"b"},
    b"dir": b"a/b",
    b"root": b"/",
    b"self": b".",
    b"late": b"dir/../k",
}


@pytest.mark.parametrize(
    ("path", "size"),
    [
        ("/k", 5), ("k", 5), ("//k", 5), ("./k", 5), ("k/", 5), ("k/.", 5), ("/a/b/f", 3),
        ("../k", 5), ("/../../a/k", 9), ("a/../k", 5), ("a/b/../k", 9), ("a/b/../../k", 5), ("a/b/../../../../k", 5),
        ("a/up", 5), ("a/out", 5), ("a/whole", 5), ("a/here/f", 3), ("a/here/../k", 9), ("dir/f", 3),
        ("dir/../k", 9), ("dir/../../k", 5), ("a/b/../whole", 5), ("root/k", 5), ("root/../k", 5), ("self/self/k", 5),
        ("late", 9), ("a/b/f/../f", 3),
    ],
)  # fmt: skip
def test_what_a_path_leads_to(path: str, size: int) -> None:
    """`..` goes back on the way that was taken, over links too, and never beyond the root."""
    found = find(Memory(TREE), path)

    assert (found.size, found.path, found.partition) == (size, path, "")


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "path", "missing", "words"),
    [
        ({}, "/x", True, "there is no /x"),
        ({b"a": {}}, "/a/x/y", True, "there is no /a/x"),
        ({b"l": b"x/y"}, "/l", True, "there is no /x, where a link leads"),
        ({}, "/\ud800", True, "cannot be the name of a file"),
        ({}, "/", False, "is a directory"),
        ({b"s": SOCKET}, "/s", False, "is neither a file nor a directory"),
        ({b"f": 3}, "/f/x", False, "/f is a file, not a directory"),
        ({b"f": 3, b"l": b"f/x"}, "/l", False, "/f is a file, not a directory"),
        ({b"l": b""}, "/l", False, "the symbolic link /l leads nowhere"),
        ({b"d": {b"l": b"k\0"}, b"k": 1}, "/d/l", False, "the symbolic link /d/l leads nowhere"),
        (b"k", "/k", False, "its root is a symbolic link"),
        (3, "/k", False, "its root is a file"),
    ],
)
def test_paths_that_lead_to_no_file(tree: "Tree | bytes | int", path: str, missing: bool, words: str) -> None:
    """Only a file that is missing may be in another partition.  The name that is wrong is said with its directory."""
    assert refusal(Memory(tree), path) == (missing, words)


def test_limits_of_a_path() -> None:
    """The longest path, the longest name, the deepest directory, the last link and the largest file are found."""
    assert (PATH_MAX, NAME_MAX, DEPTH_MAX, LINKS_MAX, FILE_MAX) == (4096, 255, 256, 40, 1024**3)
    path = "/" * (PATH_MAX - 1) + "k"
    assert find(Memory({b"k": 4}), path).size == 4
    assert refusal(Memory({b"k": 4}), "/" + path) == (False, f"a path of {PATH_MAX + 1} bytes (limit is {PATH_MAX})")

    assert find(Memory(deep(DEPTH_MAX)), "d/" * (DEPTH_MAX - 1) + "f").size == 1
    said = refusal(Memory(deep(DEPTH_MAX + 1)), "d/" * DEPTH_MAX + "f")
    assert said == (False, f"more than {DEPTH_MAX} nested directories")

    assert find(Memory(linked(LINKS_MAX)), f"f{LINKS_MAX}").size == 7
    said = refusal(Memory(linked(LINKS_MAX + 1)), f"f{LINKS_MAX + 1}")
    assert said == (False, f"more than {LINKS_MAX} symbolic links on the way, the last at /f1")

    assert find(Memory({b"k": FILE_MAX}), "k").size == FILE_MAX
    assert refusal(Memory({b"k": FILE_MAX + 1}), "k") == (False, f"has {FILE_MAX + 1} bytes (limit is {FILE_MAX})")


@pytest.mark.parametrize("length", [NAME_MAX, NAME_MAX + 1])
def test_a_name_has_a_limit(length: int) -> None:
    """A longer name is not searched for, because no directory can have it."""
    filesystem = Memory({b"n" * length: 6})

    if length == NAME_MAX:
        assert find(filesystem, "n" * length).size == 6
    else:
        assert refusal(filesystem, "n" * length) == (True, "there is no /" + "n" * 99 + "...")
        assert filesystem.looked == []


def test_a_link_has_a_limit() -> None:
    """A target of PATH_MAX bytes is read, and the size of a longer one is not asked for."""
    target = b"/" * (PATH_MAX - 1) + b"k"
    assert find(Memory({b"l": target, b"k": 4}), "l").size == 4

    filesystem = Memory({b"l": b"/" + target, b"k": 4})
    assert refusal(filesystem, "l") == (False, f"the symbolic link /l has {PATH_MAX + 1} bytes")


@pytest.mark.parametrize("more", [0, 1])
def test_the_rest_of_a_path_has_a_limit(more: int) -> None:
    """The bytes of all names that a link leaves to walk are counted, without their slashes."""
    rest = "/".join(["x" * 200] * 20)
    target = b"d/" + b"y" * (PATH_MAX - 4000 - len("d") + more)

    missing, words = refusal(Memory({b"l": target, b"d": {}}), f"l/{rest}")

    assert missing is not bool(more)
    assert (words == f"symbolic links make the path longer than {PATH_MAX} bytes") is bool(more)


# --- kinds, content -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        (0o100644, FILE), (0o107777, FILE), (0o040755, DIRECTORY), (0o120777, LINK), (0o140755, OTHER),
        (0o060644, OTHER), (0o020644, OTHER), (0o010644, OTHER), (0, OTHER), (0o170000, OTHER),
    ],
)  # fmt: skip
def test_the_kind_of_an_inode(mode: int, kind: str) -> None:
    """The upper four bits count; permissions do not."""
    assert kind_of(mode) == kind


def test_the_content_of_a_file() -> None:
    """Bytes between the pieces are zeroes.  A file may have as many bytes as its reader takes."""
    filesystem = Memory({b"k": 8}, ((1, b"ab"), (6, b"cd")))
    found = find(filesystem, "k")

    assert found.content(8) == b"\0ab\0\0\0cd"
    with pytest.raises(DiskFsError, match=r"^p1 \(ext4\): k: has 8 bytes \(limit is 7\)$"):
        in_partition(found).content(7)


def test_damage_names_the_file() -> None:
    """It may be found long after the file was opened."""
    found = in_partition(find(Memory({b"k": 8}), "k"))

    with pytest.raises(DiskFsError, match=r"^p1 \(ext4\): k: is damaged$"):
        list(found.pieces())


def in_partition(file: File) -> File:
    """Return a file, after its partition was noted."""
    file.partition = "p1"
    return file


# --- runs ---------------------------------------------------------------------------------------------------------


def test_runs_are_read_together() -> None:
    """Adjacent runs are one read.  The last one is cut at the size of the file, and no run after it is asked for."""
    disk = bytes(range(100))
    asked: list[tuple[int, int]] = []

    def read(offset: int, length: int) -> bytes:
        asked.append((offset, length))
        return disk[offset : offset + length]

    def runs(*many: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
        yield from many
        raise AssertionError("asks for more")

    source = Source(Store(read, 100), 0, 100)

    # Two that follow each other; one elsewhere on the disk; one after a hole in the file; the rest is beyond the end.
    found = list(pieces_of(source, runs((0, 10, 4), (4, 14, 4), (8, 40, 4), (16, 44, 4), (20, 48, 8)), 26))

    assert asked == [(10, 8), (40, 4), (44, 10)]
    assert found == [(0, disk[10:18]), (8, disk[40:44]), (16, disk[44:54])]


@pytest.mark.parametrize(("runs", "found"), [([], []), ([(0, 0, 4)], [(0, b"abcd")]), ([(2, 0, 2)], [(2, b"ab")])])
def test_files_of_few_runs(runs: list[tuple[int, int, int]], found: list[tuple[int, bytes]]) -> None:
    """A file may have none, and its first one may be at the beginning of the disk."""
    data = b"abcdefgh"
    source = Source(Store(lambda offset, length: data[offset : offset + length], 8), 0, 8)

    assert list(pieces_of(source, iter(runs), 8)) == found


def test_pieces_have_a_limit() -> None:
    """So a reader needs no more memory than that.  A run that ends outside of the disk is refused before it is read."""
    size = 2 * PIECE_BYTES + 5
    source = Source(Store(lambda _offset, length: bytes(length), size), 0, size)

    found = [(at, len(data)) for at, data in pieces_of(source, iter([(0, 0, size)]), size)]
    assert found == [(0, PIECE_BYTES), (PIECE_BYTES, PIECE_BYTES), (2 * PIECE_BYTES, 5)]

    with pytest.raises(DiskFsError, match="are after its end"):
        next(pieces_of(source, iter([(0, 1, size)]), size))
