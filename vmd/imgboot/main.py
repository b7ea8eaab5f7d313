"""imgboot: reads a kernel or initrd from the file systems of a disk, for an opener, which must not parse them.

Runs as  an id of its own, in the cell, confined to its descriptors before it reads the first byte; for one start
Peers    an opener, which asks it (`ipc/bootmsg.py`); the parent starts it, and kills it with the opener
Holds    its socket; the images of one disk at a time, for reading; the memory file that it fills, which cannot grow

A guest may have written every byte of the disk, or another user.  The bounds for that are in `vmd/diskfs`.
"""

import posix as os

from vmd.diskfs.disk import Disk
from vmd.diskfs.source import DiskFsError
from vmd.errors import ImageError
from vmd.images.chain import Link, open_chain
from vmd.imgboot.search import Found, describe, search
from vmd.ipc.bootmsg import BootFile, asked, pack_error, pack_file
from vmd.ipc.probing import serve
from vmd.privsep.confine import IMGBOOT, confine, limit_memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.diskfs.source import Read
    from vmd.images.image import Image

MEMORY_BYTES = 1 << 30  # a kernel is copied in pieces; most of it is for cached tables of qcow2


def answer(words: list[str], files: list[int]) -> bytes:
    """Copy the wanted file to the memory file, close the images, and return the line that describes the file."""
    wanted, links = asked(words)
    images, memory = files[: len(links)], files[len(links) :]
    del files[: len(links)]
    top = f"{links[0].path}: "
    try:
        chain = [
            Link(fd=fd, path=link.path, format=link.format, guessed=link.guessed)
            for fd, link in zip(images, links, strict=True)
        ]
        image = open_chain(chain, writable=False)
        try:
            disk = Disk(reader(image), image.size)
            if not memory:
                return pack_error(describe(disk, wanted.disk))
            return pack_file(copy(search(disk, wanted), memory[0]))
        finally:
            image.close()
    except (DiskFsError, ImageError) as error:
        return pack_error(str(error).removeprefix(top))
    except OSError as error:
        return pack_error(os.strerror(error.errno) if error.errno else str(error))


def reader(image: "Image") -> "Read":
    """Return a function that reads exactly so many bytes of an image.  It raises OSError."""

    def read(offset: int, length: int) -> bytes:
        data = bytearray(length)
        image.preadv(offset, [memoryview(data)])
        return bytes(data)

    return read


def copy(found: Found, memory: int) -> BootFile:
    """Copy a file.  Holes stay zero.  Raises DiskFsError, OSError."""
    most = os.fstat(memory).st_size
    if found.file.size > most:
        what = f"has {found.file.size} bytes, and {most} are the most for this vm"
        raise DiskFsError(what, partition=found.file.partition, path=found.file.path)
    for offset, piece in found.file.pieces():
        rest = memoryview(piece)
        while rest:
            done = os.pwrite(memory, rest, offset)
            offset, rest = offset + done, rest[done:]
    os.ftruncate(memory, found.file.size)
    return BootFile(size=found.file.size, name=found.name, options=found.options)


def main() -> int:
    """Answer requests until the opener closes the socket."""
    confine(IMGBOOT)  # the parent has logged what this kernel lacks
    limit_memory(MEMORY_BYTES)
    return serve(answer)
