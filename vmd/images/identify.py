"""What an image file says it is: its format, size and backing file."""

import os
import stat

from vmd.errors import ImageError
from vmd.images.header import MAGIC, parse_header
from vmd.images.hostfile import read_bytes
from vmd.ipc.probemsg import FORMATS, Probe


def probe(fd: int, path: str, format_hint: str = "") -> Probe:
    """Tell format, size and backing file of an open image; without a hint, by its first bytes.

    What to do with a backing file that a guessed image names is the caller's business; not to open it.

    Raises:
        ImageError: it is damaged, or needs what we do not have.
    """
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise ImageError(path, "neither a regular file nor a block device")
        file_bytes = os.lseek(fd, 0, os.SEEK_END)
        found = format_hint or ("qcow2" if read_bytes(fd, len(MAGIC), 0) == MAGIC else "raw")
    except OSError as error:
        raise ImageError(path, f"cannot be read: {error.strerror}") from error
    if found not in FORMATS:
        raise ImageError(path, f"unknown image format {found}")
    if found == "raw":
        return Probe(format=found, size=file_bytes, guessed=not format_hint)
    header = parse_header(fd, path)
    return Probe(
        format=found,
        size=header.size,
        guessed=not format_hint,
        backing=header.backing,
        backing_format=header.backing_format,
    )
