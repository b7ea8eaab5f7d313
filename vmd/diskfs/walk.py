"""Finds a file by its path in any file system: the code that all readers share.

Symbolic links are followed inside the file system only.  `..` goes back to the directory before in the path, without
reading the entry on disk, so a loop of directories cannot be walked for ever.
"""

from vmd.diskfs.source import DiskFsError, NoSuchFile, Source, shown
from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Protocol

    class FileSystem(Protocol):
        """A file system that was recognised.  Every method raises DiskFsError only."""

        name: str  # "ext4", "FFS2"

        def node(self, number: int) -> "Node":
            """Return an inode."""

        def entry(self, directory: "Node", name: bytes) -> int:
            """Return the number of the inode for a name; 0 if there is no such name."""

        def target(self, link: "Node") -> bytes:
            """Return the target of a symbolic link.  `link.size` is at most PATH_MAX."""

        def pieces(self, file: "Node") -> "Iterator[tuple[int, bytes]]":
            """Yield (offset in the file, bytes) in ascending order, without holes, at most PIECE_BYTES each."""


PIECE_BYTES = 1 << 20
PATH_MAX = 4096
NAME_MAX = 255
DEPTH_MAX = 256  # nested directories
LINKS_MAX = 40
ROOT = 2  # the inode of the root directory, in both ext and FFS
FILE_MAX = 1 << 30

FILE, DIRECTORY, LINK, OTHER = "a file", "a directory", "a symbolic link", "neither a file nor a directory"
KINDS = {0x8: FILE, 0x4: DIRECTORY, 0xA: LINK}  # by the upper four bits of a mode


class Node(Record):
    """An inode.  `size` is in bytes; `raw` are its bytes on the disk."""

    number: int
    kind: str
    size: int
    raw: bytes


def kind_of(mode: int) -> str:
    """Return the kind of inode for a mode."""
    return KINDS.get(mode >> 12, OTHER)


class File:
    """A file that was found.  `size` is the size in its inode in bytes, at most FILE_MAX."""

    def __init__(self, filesystem: "FileSystem", node: Node, path: str) -> None:
        self.filesystem = filesystem
        self.node = node
        self.path = path
        self.partition = ""
        self.size = node.size

    def pieces(self) -> "Iterator[tuple[int, bytes]]":
        """Yield (offset in the file, bytes) in ascending order, at most PIECE_BYTES each.  The rest is zeroes.

        Raises DiskFsError.
        """
        try:
            yield from self.filesystem.pieces(self.node)
        except DiskFsError as error:
            raise error.at(partition=self.partition, filesystem=self.filesystem.name, path=self.path) from error

    def content(self, most: int) -> bytes:
        """Return the bytes of a small file.  Raises DiskFsError, also if it has more than `most` bytes."""
        if self.size > most:
            raise DiskFsError(
                f"has {self.size} bytes (limit is {most})",
                partition=self.partition,
                filesystem=self.filesystem.name,
                path=self.path,
            )
        content = bytearray(self.size)
        for offset, piece in self.pieces():
            content[offset : offset + len(piece)] = piece
        return bytes(content)


def find(filesystem: "FileSystem", path: str) -> File:
    """Return the file of a path.  The path is relative to the root directory, even without a `/` at its beginning.

    Raises:
        NoSuchFile: the file or a directory in the path does not exist.
        DiskFsError: it is not a regular file, or something in the path cannot be read.
    """
    try:
        try:
            node = _walk(filesystem, path.encode(errors="surrogateescape"))
        except UnicodeEncodeError:
            raise NoSuchFile("cannot be the name of a file") from None
        if node.kind != FILE:
            raise DiskFsError(f"is {node.kind}")
        if node.size > FILE_MAX:
            raise DiskFsError(f"has {node.size} bytes (limit is {FILE_MAX})")
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
    """Return the inode of a path, and follow symbolic links.  Raises DiskFsError."""
    if len(path) > PATH_MAX:
        raise DiskFsError(f"a path of {len(path)} bytes (limit is {PATH_MAX})")
    names = path.split(b"/")[::-1]  # remaining names, the next one last
    way = [root_of(filesystem)]  # inodes from the root to the current one
    done: list[bytes] = []  # names of `way`, without the root
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
            raise DiskFsError(f"{_at(done)} is {way[-1].kind}, not a directory")
        if len(way) > DEPTH_MAX:
            raise DiskFsError(f"more than {DEPTH_MAX} nested directories")
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
    """Yield the bytes of a file from its runs: (offset in the file, offset in the source, length), ascending, in bytes.

    Adjacent runs are read together.  Raises DiskFsError.
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
