"""imgprobe: reads what an image says about itself, for a parent that must not.

Runs as  an id of its own, in the cell, confined to its descriptors before it reads the first byte; for a moment
Peers    parent (starts it, reads one line of `ipc/probemsg.py`, kills it if that takes too long)
Holds    one image, for reading, and a pipe's writing end
"""

import os
import sys

from vmd.errors import ImageError
from vmd.images.identify import probe
from vmd.ipc.probemsg import FD_ANSWER, FD_IMAGE, pack_error, pack_image
from vmd.privsep.confine import IMGPROBE, confine


def answer(fd: int, format_hint: str) -> bytes:
    """Return the line about an open image."""
    try:
        return pack_image(probe(fd, "image", format_hint))
    except ImageError as error:
        return pack_error(error.what)


def main() -> int:
    """Answer and be gone; the one argument, if there is one, is the format that the image has to have."""
    format_hint = sys.argv[1] if len(sys.argv) > 1 else ""
    confine(IMGPROBE)  # what the kernel lacks, others have said
    line = memoryview(answer(FD_IMAGE, format_hint))
    while line:
        line = line[os.write(FD_ANSWER, line) :]
    return 0
