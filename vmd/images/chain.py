"""Makes a disk from an image and its backing images.  Another process has opened the descriptors."""

import posix as os

from vmd.errors import ImageError
from vmd.images.qcow2 import UNPACK, Qcow2Image
from vmd.images.raw import RawImage
from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vmd.images.image import Image
    from vmd.images.qcow2 import Unpack

MAX_CHAIN = 4  # *cat. 8.2*
# A guest can write a header to its disk.  Such a header must not make us open another file.
GUESSED = "only its first bytes say that it is qcow2; say so yourself with `format qcow2`"


class Link(Record):
    """One image of a chain.  `guessed`: the format is known only from the first bytes of the image.

    `discard_granularity` is that of the block device in bytes; 0 if the kernel does not say.
    """

    fd: int
    path: str
    format: str
    guessed: bool = False
    discard_granularity: int = 0


def open_chain(
    links: "Sequence[Link]", *, writable: bool, unpack: "Mapping[str, Unpack]" = UNPACK
) -> "Image":
    """Return the disk that a chain makes.  Its first link is the top image; only that is ever written.

    Takes the descriptors: the image owns them, and a failure closes them.

    Raises:
        ImageError: one of the images cannot be used.
    """
    image: Image | None = None
    pending = list(links)
    try:
        if not 0 < len(links) <= MAX_CHAIN:
            raise ImageError(links[0].path if links else "disk", f"backing chain is longer than {MAX_CHAIN} images")
        while pending:
            link = pending[-1]
            image = _open(link, writable=writable and len(pending) == 1, backing=image, unpack=unpack)
            pending.pop()
        assert image is not None
        return image
    except BaseException:
        if image is not None:
            image.close()
        for link in pending:
            os.close(link.fd)
        raise


def _open(link: Link, *, writable: bool, backing: "Image | None", unpack: "Mapping[str, Unpack]") -> "Image":
    """Open one image on top of another.  Raises ImageError, which names the image, for every failure."""
    try:
        return _open_as(link, writable=writable, backing=backing, unpack=unpack)
    except OSError as error:
        raise ImageError(link.path, f"cannot be used: {error.strerror}") from error


def _open_as(link: Link, *, writable: bool, backing: "Image | None", unpack: "Mapping[str, Unpack]") -> "Image":
    """Open one image in the format of its link.  Raises ImageError, OSError."""
    granularity = link.discard_granularity
    if link.format == "raw":
        if backing is not None:
            raise ImageError(link.path, "a raw image has no backing file")
        return RawImage(
            link.fd, link.path, writable=writable, guessed=link.guessed, discard_granularity=granularity
        )
    if link.format != "qcow2":
        raise ImageError(link.path, f"unknown image format {link.format}")
    if link.guessed and backing is not None:
        raise ImageError(link.path, f"has a backing file, but {GUESSED}")
    return Qcow2Image(
        link.fd, link.path, writable=writable, backing=backing, discard_granularity=granularity, unpack=unpack
    )

