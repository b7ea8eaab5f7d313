"""imgprobe: reads what images say about themselves, for an opener that must not.

Runs as  an id of its own, in the cell, confined to its descriptors before it reads the first byte; for one start
Peers    an opener, which asks it (`ipc/probing.py`); the parent starts it, and kills it with the opener
Holds    its socket, and one image at a time, for reading
"""

from vmd.errors import ImageError
from vmd.images.bootsector import first_sector
from vmd.images.identify import probe
from vmd.ipc.probemsg import BOOTS, pack_error, pack_image
from vmd.ipc.probing import serve
from vmd.privsep.confine import IMGPROBE, confine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def answer(fd: int, format_hint: str, more: "Sequence[str]" = ()) -> bytes:
    """Return the line about an open image."""
    try:
        found = probe(fd, "image", format_hint)
        if BOOTS in more:
            found = found.replace(notes=(*found.notes, *first_sector(fd, found.format)))
        return pack_image(found)
    except ImageError as error:
        return pack_error(error.what)


def main() -> int:
    """Answer until nobody asks; the first argument is the format that the image has to have, or nothing."""
    confine(IMGPROBE)  # what the kernel lacks, others have said
    return serve(lambda arguments, files: answer(files[0], arguments[0], arguments[1:]))
