"""What an image file says it is: its format, size and backing file."""

import os
import stat

from vmd.errors import ImageError
from vmd.images.chain import FORMATS, GUESSED
from vmd.images.header import MAGIC, parse_header
from vmd.images.hostfile import read_bytes
from vmd.record import Record


class Probe(Record):
    """What an image is; `backing` is the path as recorded, relative to the image's directory."""

    format: str
    size: int
    guessed: bool = False
    backing: str = ""
    backing_format: str = ""


def probe(fd: int, path: str, format_hint: str = "") -> Probe:
    """Tell format, size and backing file of an open image; without a hint, by its first bytes.

    Raises:
        ImageError: it is damaged, needs what we do not have, or asks for a backing file though its
            format was only guessed.
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
    if header.backing and not format_hint:
        raise ImageError(path, f"has backing file {header.backing}, but {GUESSED}")
    return Probe(
        format=found,
        size=header.size,
        guessed=not format_hint,
        backing=header.backing,
        backing_format=header.backing_format,
    )
