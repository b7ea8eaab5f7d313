"""New image files: empty, on top of a base, or as copy of another (*cat. 3.6, 8.3*).

A file is created exclusively, readable by its owner only, and removed again if anything goes wrong.
"""

import contextlib
import os
import signal
import struct

from vmd.errors import HostError, ImageError
from vmd.images.header import (
    BACKING_FORMAT,
    EXTENSION,
    HEADER_V2,
    HEADER_V3,
    MAGIC,
    MAX_BACKING_NAME,
    MAX_TABLE_BYTES,
    V3_BYTES,
)
from vmd.images.hostfile import write_bytes
from vmd.images.qcow2 import Qcow2Image
from vmd.images.raw import RawImage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmd.images.image import Image

CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
REFCOUNT_ORDER = 4
COPY_BYTES = 1 << 20
ZERO_BYTES = 1 << 16  # what is left out of a copy if it is all zero
NOTHING = bytes(ZERO_BYTES)
ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
MAX_SIZE = MAX_TABLE_BYTES // 8 * CLUSTER * (CLUSTER // 8)


@contextlib.contextmanager
def new_file(path: str, creating: str = "could not create", writing: str = "could not write") -> "Iterator[int]":
    """Create a file and open it for reading and writing; it stays only if the block ends well.

    `creating` and `writing` are what errors begin with.  No signal comes between the file and its removal.

    Raises:
        HostError: it exists, or cannot be created or written.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise HostError(f"{creating} {path}", error) from None
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            yield fd
        except BaseException as error:
            signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
            remove(fd, path)
            if isinstance(error, OSError):
                raise HostError(f"{writing} {path}", error) from None
            raise
        finally:
            os.close(fd)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def remove(fd: int, path: str) -> None:
    """Remove a file that we have made, unless somebody else has put another in its place."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(fd), os.lstat(path)):
            os.unlink(path)


def write_empty(fd: int, path: str, image_format: str, size: int, backing: str = "", backing_format: str = "") -> None:
    """Make an open, empty file an empty image.  Raises OSError, ImageError."""
    if image_format == "raw":
        os.ftruncate(fd, size)
        return
    if size > MAX_SIZE:
        raise ImageError(path, f"{size} bytes are too large for a qcow2 image (limit is {MAX_SIZE})")
    l1_entries = max(1, -(-size // (CLUSTER * (CLUSTER // 8))))
    l1_clusters = -(-l1_entries * 8 // CLUSTER)
    clusters = 3 + l1_clusters  # header, refcount table, its one block, L1 table
    os.ftruncate(fd, clusters * CLUSTER)
    write_bytes(fd, struct.pack(f">{clusters}H", *[1] * clusters), 2 * CLUSTER)
    write_bytes(fd, struct.pack(">Q", 2 * CLUSTER), CLUSTER)
    write_bytes(fd, _header(path, size, l1_entries, backing, backing_format), 0)


def _header(path: str, size: int, l1_entries: int, backing: str, backing_format: str) -> bytes:
    """Return the first bytes of an image laid out as `write_empty` does.  Raises ImageError."""
    name = os.fsencode(backing)
    if len(name) > MAX_BACKING_NAME:
        raise ImageError(path, f"name of the backing file is {len(name)} bytes long, more than {MAX_BACKING_NAME}")
    extensions = b""
    if name:
        kind = backing_format.encode()
        extensions = EXTENSION.pack(BACKING_FORMAT, len(kind)) + kind + bytes(-len(kind) % 8)
    extensions += EXTENSION.pack(0, 0)
    name_offset = V3_BYTES + len(extensions) if name else 0
    head = HEADER_V2.pack(
        MAGIC, 3, name_offset, len(name), CLUSTER_BITS, size, 0, l1_entries, 3 * CLUSTER, CLUSTER, 1, 0, 0
    )
    return head + HEADER_V3.pack(0, 0, 0, REFCOUNT_ORDER, V3_BYTES) + extensions + name


def create(path: str, image_format: str, size: int, backing: str = "", backing_format: str = "") -> None:
    """Create an empty image; the path of its backing file is recorded as it is given.

    Raises:
        HostError: the file exists, or cannot be created or written.
        ImageError: it would be too large, or its backing file's name too long.
    """
    with new_file(path) as fd:
        write_empty(fd, path, image_format, size, backing, backing_format)


def convert(
    source: "Image", path: str, image_format: str, size: int, progress: "Callable[[int, int], None] | None" = None
) -> None:
    """Create an image of `size` bytes, not fewer than the source's, with the source's content.

    `progress` is called with the bytes done and the bytes there are.

    Raises:
        HostError: the file exists, or cannot be created, read or written.
        ImageError: it would be too large.
    """
    assert size >= source.size
    with new_file(path, "failed to create destination image file", "failed to write to destination") as fd:
        write_empty(fd, path, image_format, size)
        own = os.dup(fd)
        try:
            target = _open_target(own, path, image_format)
            _copy(source, target, progress)
            target.flush()
        except BaseException:
            os.close(own)  # what is half an image needs no good end
            raise
        target.close()


def _open_target(fd: int, path: str, image_format: str) -> "Image":
    """Open a new image for writing."""
    if image_format == "raw":
        return RawImage(fd, path, writable=True)
    return Qcow2Image(fd, path, writable=True)


def _copy(source: "Image", target: "Image", progress: "Callable[[int, int], None] | None") -> None:
    """Copy what is not zero.  Raises HostError for the source, OSError for the target."""
    buffer = memoryview(bytearray(COPY_BYTES))
    position = 0
    while position < source.size:
        try:
            has_data, length = source.span(position)
            if has_data:
                length = min(length, COPY_BYTES - position % COPY_BYTES)
                source.preadv(position, [buffer[:length]])
        except OSError as error:
            raise HostError("failed to read from source", error) from None
        if has_data:
            _write_data(target, position, buffer[:length])
        position += length
        if progress is not None:
            progress(position, source.size)


def _write_data(target: "Image", position: int, data: memoryview) -> None:
    """Write the blocks that are not zero, neighbours together.  Raises OSError."""
    start = end = 0
    while end < len(data):
        step = min(ZERO_BYTES - (position + end) % ZERO_BYTES, len(data) - end)
        if data[end : end + step] == NOTHING[:step]:
            if end > start:
                target.pwritev(position + start, [data[start:end]])
            start = end + step
        end += step
    if end > start:
        target.pwritev(position + start, [data[start:end]])
