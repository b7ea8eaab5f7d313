"""imgprobe: reads headers of images for an opener, which must not parse them.

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
    """Return the answer for an open image: one line (`ipc/probemsg.py`)."""
    try:
        found = probe(fd, "image", format_hint)
        if BOOTS in more:
            found = found.replace(notes=(*found.notes, *first_sector(fd, found.format)))
        return pack_image(found)
    except ImageError as error:
        return pack_error(error.what)


def main() -> int:
    """Answer questions until the socket is closed.  Argument 0 of a question is the required format, or ""."""
    confine(IMGPROBE)  # other processes have logged what the kernel lacks
    return serve(lambda arguments, files: answer(files[0], arguments[0], arguments[1:]))
