"""From a path to a file, in any file system: what all readers have in common.

Links are followed inside the file system only.  `..` goes back the way that was come, so no loop of directories can
be walked forever.
"""

from vmd.diskfs.source import DiskFsError, NoSuchFile, Source, shown
from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Protocol

    class FileSystem(Protocol):
        """A file system that was recognised; every method raises DiskFsError, and nothing else."""

        name: str  # "ext4", "FFS2"

        def node(self, number: int) -> "Node":
            """Return what an inode says."""

        def entry(self, directory: "Node", name: bytes) -> int:
            """Return the inode that a name stands for; 0: there is no such name."""

        def target(self, link: "Node") -> bytes:
            """Return where a link leads; `link.size` is at most PATH_MAX."""

        def pieces(self, file: "Node") -> "Iterator[tuple[int, bytes]]":
            """Yield what is not a hole: offset in the file and bytes, ascending, at most PIECE_BYTES each."""


PIECE_BYTES = 1 << 20
PATH_MAX = 4096
NAME_MAX = 255
DEPTH_MAX = 256  # directories inside one another
LINKS_MAX = 40
ROOT = 2  # the inode of the root directory, of ext and of FFS alike
FILE_MAX = 1 << 30

FILE, DIRECTORY, LINK, OTHER = "a file", "a directory", "a symbolic link", "neither a file nor a directory"
KINDS = {0x8: FILE, 0x4: DIRECTORY, 0xA: LINK}  # by the upper four bits of a mode


class Node(Record):
    """An inode: `size` in bytes, `raw` as it is on the disk."""

    number: int
    kind: str
    size: int
    raw: bytes


def kind_of(mode: int) -> str:
    """Return what a mode says an inode is."""
    return KINDS.get(mode >> 12, OTHER)


class File:
    """A file that was found; `size` in bytes, as its inode says, which is at most FILE_MAX."""

    def __init__(self, filesystem: "FileSystem", node: Node, path: str) -> None:
        self.filesystem = filesystem
        self.node = node
        self.path = path
        self.partition = ""
        self.size = node.size

    def pieces(self) -> "Iterator[tuple[int, bytes]]":
        """Yield offset in the file and bytes, ascending, at most PIECE_BYTES each; what is left out is zeroes.

        Raises DiskFsError.
        """
        try:
            yield from self.filesystem.pieces(self.node)
        except DiskFsError as error:
            raise error.at(partition=self.partition, filesystem=self.filesystem.name, path=self.path) from error

    def content(self, most: int) -> bytes:
        """Return the bytes of a small file.  Raises DiskFsError, also if it is larger than `most`."""
        if self.size > most:
            raise DiskFsError(
                f"has {self.size} bytes, where {most} are the most",
                partition=self.partition,
                filesystem=self.filesystem.name,
                path=self.path,
            )
        content = bytearray(self.size)
        for offset, piece in self.pieces():
            content[offset : offset + len(piece)] = piece
        return bytes(content)


def find(filesystem: "FileSystem", path: str) -> File:
    """Return the file of a path, which begins with `/` or is taken as if it did.

    Raises:
        NoSuchFile: a name of it is not there.
        DiskFsError: it is no file, or something on the way to it cannot be read.
    """
    try:
        try:
            node = _walk(filesystem, path.encode(errors="surrogateescape"))
        except UnicodeEncodeError:
            raise NoSuchFile("no name of a file is like that") from None
        if node.kind != FILE:
            raise DiskFsError(f"is {node.kind}")
        if node.size > FILE_MAX:
            raise DiskFsError(f"has {node.size} bytes, where {FILE_MAX} are the most")
    except DiskFsError as error:
        raise error.at(filesystem=filesystem.name, path=path) from error
    return File(filesystem, node, path)


def root_of(filesystem: "FileSystem") -> Node:
    """Return the root directory.  Raises DiskFsError."""
    node = filesystem.node(ROOT)
    if node.kind != DIRECTORY:
        raise DiskFsError(f"its root is {node.kind}")
    return node


def _walk(filesystem: "FileSystem", path: bytes) -> Node:
    """Return the inode of a path, links followed.  Raises DiskFsError."""
    if len(path) > PATH_MAX:
        raise DiskFsError(f"a path of {len(path)} bytes, where {PATH_MAX} are the most")
    names = path.split(b"/")[::-1]  # those still to go, the next one last
    way = [root_of(filesystem)]  # directories from the root down to where we are
    done: list[bytes] = []  # their names, without the root's
    links = 0
    while names:
        name = names.pop()
        if name in (b"", b"."):
            continue
        if name == b"..":
            if done:
                way.pop()
                done.pop()
            continue
        if way[-1].kind != DIRECTORY:
            raise DiskFsError(f"{_at(done)} is {way[-1].kind}, where a directory is needed")
        if len(way) > DEPTH_MAX:
            raise DiskFsError(f"more than {DEPTH_MAX} directories inside one another")
        number = filesystem.entry(way[-1], name) if len(name) <= NAME_MAX else 0
        if not number:
            raise NoSuchFile(f"there is no {_at([*done, name])}" + (", where a link leads" if links else ""))
        node = filesystem.node(number)
        if node.kind != LINK:
            way.append(node)
            done.append(name)
            continue
        links += 1
        if links > LINKS_MAX:
            raise DiskFsError(f"more than {LINKS_MAX} symbolic links on the way, the last at {_at([*done, name])}")
        if node.size > PATH_MAX:
            raise DiskFsError(f"the symbolic link {_at([*done, name])} has {node.size} bytes")
        target = filesystem.target(node)
        if not target or b"\0" in target:
            raise DiskFsError(f"the symbolic link {_at([*done, name])} leads nowhere")
        if target.startswith(b"/"):
            del way[1:], done[:]
        names += target.split(b"/")[::-1]
        if sum(map(len, names)) > PATH_MAX:
            raise DiskFsError(f"symbolic links make the path longer than {PATH_MAX} bytes")
    return way[-1]


def _at(names: list[bytes]) -> str:
    return shown(b"/" + b"/".join(names))


def pieces_of(
    source: Source, runs: "Iterator[tuple[int, int, int]]", size: int
) -> "Iterator[tuple[int, bytes]]":
    """Yield a file's bytes from its runs: (offset in the file, offset on the source, length), in bytes, ascending.

    Runs that are side by side are read together.  Raises DiskFsError.
    """
    at = start = length = 0
    for offset, begin, more in runs:
        if offset == at + length and begin == start + length:
            length += more
        else:
            yield from _read(source, at, start, min(length, size - at))
            at, start, length = offset, begin, more
        if offset + more >= size:
            break
    yield from _read(source, at, start, min(length, size - at))


def _read(source: Source, at: int, start: int, length: int) -> "Iterator[tuple[int, bytes]]":
    source.inside(start, max(length, 0))
    for done in range(0, length, PIECE_BYTES):
        yield at + done, source.content(start + done, min(PIECE_BYTES, length - done))
