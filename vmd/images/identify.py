"""Finds format, size and backing file of an image, and recognises formats that we do not read."""

import os
import stat

from vmd.errors import ImageError
from vmd.images.header import COMMON, parse_header
from vmd.images.header import CORRUPT as CORRUPT_BIT
from vmd.images.header import DIRTY as DIRTY_BIT
from vmd.images.header import GOING_BACK as GOING_BACK_BIT
from vmd.images.hostfile import read_bytes
from vmd.images.signatures import (
    DISC_AT,
    DISC_DESCRIPTOR,
    HEAD_BYTES,
    QCOW_MAGIC,
    TAIL_BYTES,
    recognise,
    recognise_disc,
)
from vmd.ipc.foreign import FOREIGN
from vmd.ipc.probemsg import CORRUPT, DIRTY, DISC, FORMATS, GOING_BACK, NOT_QCOW2, Probe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection


def probe(fd: int, path: str, format_hint: str = "", compressions: "Collection[str]" = COMMON) -> Probe:
    """Return format, size and backing file of an open image.  Without a hint, the format is guessed from its bytes.

    The caller must not open the backing file if the format of the image was guessed.  The caller also decides whether a
    raw image that looks like another format is used; `foreign.refused` has the rule.

    `compressions` of qcow2 are those that the caller can decompress.

    Raises:
        ImageError: the image is damaged, or needs a feature that we do not have.
    """
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise ImageError(path, "neither a regular file nor a block device")
        size = os.lseek(fd, 0, os.SEEK_END)
        if format_hint == "raw":
            return Probe(format="raw", size=size)
        head, tail = read_bytes(fd, HEAD_BYTES, 0), read_bytes(fd, TAIL_BYTES, max(0, size - TAIL_BYTES))
        descriptor = read_bytes(fd, DISC_DESCRIPTOR, DISC_AT) if format_hint == DISC else b""
    except OSError as error:
        raise ImageError(path, f"cannot be read: {error.strerror}") from error
    if format_hint == DISC:
        looks = recognise_disc(head, tail, descriptor)
        return Probe(format="raw", size=size, looks=looks)
    if format_hint not in ("", *FORMATS):
        raise ImageError(path, f"unknown image format {format_hint}")
    looks = recognise(head, tail)
    if format_hint == "" and looks:
        return Probe(format="raw" if FOREIGN[looks].content else "", size=size, looks=looks, guessed=True)
    if not head.startswith(QCOW_MAGIC):
        if looks:
            return Probe(format="", size=size, looks=looks)
        if format_hint:
            raise ImageError(path, NOT_QCOW2)
        return Probe(format="raw", size=size, guessed=True)
    header = parse_header(fd, path, compressions)
    marks = ((DIRTY_BIT, DIRTY), (CORRUPT_BIT, CORRUPT))
    return Probe(
        format="qcow2",
        size=header.size,
        guessed=not format_hint,
        backing=header.backing,
        backing_format=header.backing_format,
        notes=(
            *(word for bit, word in marks if header.incompatible & bit),
            *((GOING_BACK,) if header.autoclear & GOING_BACK_BIT else ()),
        ),
    )
