"""The protocol of imgboot: a question is a packet of words, as in `ipc/probing.py`; the answer is one line.

    question              disk number, partition, path; then for each image of the disk: path, format, and "1" if the
                          format was only guessed from its first bytes
    files                 the images, for reading, and a memory file to copy the boot file to; without a memory file
                          imgboot describes what is on the disk
    answer                `file` NUL size NUL name NUL options LF
                          `error` NUL sentence LF

The sentence does not name the disk; the process that reads it adds the name.  Standard library only.
"""

from vmd.config.model import DiskFile
from vmd.ipc.probemsg import END, SIZE_DIGITS, as_field, fields_of, pack_error
from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["OPTIONS", "BootFile", "BootLink", "asked", "pack_error", "pack_file", "question", "unpack_file"]

FILE = b"file"
OF_FILE, OF_IMAGE = 3, 3  # words
OPTIONS = frozenset("acds")
NAME_MAX = 1200  # bytes; a partition, and the longest path


class BootFile(Record):
    """A file that was copied: its size in bytes, and its place as a DiskFile in words."""

    size: int
    name: str
    options: str = ""  # of boot(8), from /etc/boot.conf, without the hyphen: letters of OPTIONS


class BootLink(Record):
    """One image of the disk."""

    path: str
    format: str
    guessed: bool


def question(file: DiskFile, links: "Sequence[BootLink]") -> list[str]:
    """Return the words of a question."""
    words = [str(file.disk), file.partition, file.path]
    for link in links:
        words += [link.path, link.format, "1" if link.guessed else "0"]
    return words


def asked(words: "Sequence[str]") -> tuple[DiskFile, list[BootLink]]:
    """Return the file and the images of a question.  Raises ValueError."""
    number, partition, path = words[:OF_FILE]
    rows = words[OF_FILE:]
    links = [
        BootLink(path=name, format=image_format, guessed=guessed == "1")
        for name, image_format, guessed in zip(rows[::OF_IMAGE], rows[1::OF_IMAGE], rows[2::OF_IMAGE], strict=True)
    ]
    return DiskFile(disk=int(number), partition=partition, path=path), links


def pack_file(found: BootFile) -> bytes:
    """Return the line for a file that was copied."""
    words = (FILE, b"%d" % found.size, as_field(found.name)[:NAME_MAX], found.options.encode())
    return b"\0".join(words) + END


def unpack_file(line: bytes) -> BootFile | str:
    """Return the contents of an answer: a file, or the sentence of an error.

    Raises ValueError for a malformed line.
    """
    answer = fields_of(line)
    if isinstance(answer, str):
        return answer
    kind, *fields = answer
    if kind != FILE or len(fields) != 3:
        raise ValueError(f"{len(fields)} fields of kind {kind[:16]!r}")
    size, name, options = fields
    if not size.isdigit() or len(size) > SIZE_DIGITS:
        raise ValueError(f"size {size[:32]!r}")
    if len(name) > NAME_MAX:
        raise ValueError(f"name of {len(name)} bytes")
    if len(options) > len(OPTIONS) or not OPTIONS.issuperset(options.decode("ascii", "replace")):
        raise ValueError(f"options {options[:16]!r}")
    return BootFile(size=int(size), name=name.decode("utf-8", "backslashreplace"), options=options.decode())
