"""imgprobe: reads what images say about themselves, for an opener that must not.

Runs as  an id of its own, in the cell, confined to its descriptors before it reads the first byte; for one start
Peers    an opener, which asks it (`ipc/probing.py`); the parent starts it, and kills it with the opener
Holds    its socket, and one image at a time, for reading
"""

from vmd.errors import ImageError
from vmd.images.identify import probe
from vmd.ipc.probemsg import pack_error, pack_image
from vmd.ipc.probing import serve
from vmd.privsep.confine import IMGPROBE, confine


def answer(fd: int, format_hint: str) -> bytes:
    """Return the line about an open image."""
    try:
        return pack_image(probe(fd, "image", format_hint))
    except ImageError as error:
        return pack_error(error.what)


def main() -> int:
    """Answer until nobody asks; the one argument is the format that the image has to have, or nothing."""
    confine(IMGPROBE)  # what the kernel lacks, others have said
    return serve(lambda arguments, files: answer(files[0], arguments[0]))
