"""imgresize: enlarges the disk of a stopped VM, for an opener, which must not parse images.

Runs as  an id of its own, in the cell, confined to its descriptors before it reads the first byte; for one disk
Peers    an opener, which asks it (`ipc/probing.py`); the parent starts it, and kills it with the opener
Holds    its socket, and the images of the disk, the first for writing
"""

from vmd.errors import ImageError
from vmd.images.chain import Link, open_chain
from vmd.ipc.probemsg import Probe, pack_error, pack_image
from vmd.ipc.probing import serve
from vmd.privsep.confine import IMGRESIZE, confine

OF_IMAGE = 3  # arguments for each image, after the size: path, format, and "1" if the format is guessed


def answer(arguments: list[str], files: list[int]) -> bytes:
    """Enlarge a disk, close its files, and return the line of the answer.  The new size is on stable storage."""
    fds = files[:]
    files.clear()
    size, rows = int(arguments[0]), arguments[1:]
    links = [
        Link(fd=fd, path=path, format=image_format, guessed=guessed == "1")
        for fd, path, image_format, guessed in zip(
            fds, rows[::OF_IMAGE], rows[1::OF_IMAGE], rows[2::OF_IMAGE], strict=True
        )
    ]
    top = f"{links[0].path}: "
    try:
        image = open_chain(links, writable=True)
        try:
            image.grow(size)
        finally:
            image.close()
    except ImageError as error:
        return pack_error(str(error).removeprefix(top))
    except OSError as error:
        return pack_error((error.strerror or str(error)).removeprefix(top))
    return pack_image(Probe(format=links[0].format, size=size))


def main() -> int:
    """Answer questions until the socket is closed."""
    confine(IMGRESIZE)  # other processes have logged what the kernel lacks
    return serve(answer)
