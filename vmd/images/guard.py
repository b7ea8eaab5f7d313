"""Keeps a guest from writing a format's signature to a raw disk whose format was guessed.

The format of such a disk is guessed from its bytes again when it is opened next.  With a signature in them the disk
would be refused, or read in another format.  `refused` in `vmd.ipc.foreign` has the reasons, `signatures.py` the bytes.
"""

import _thread
import errno
import posix as os
from io import SEEK_END

from vmd.images.hostfile import Cursor, read_bytes, write_views
from vmd.images.signatures import HEAD_BYTES, QCOW_MAGIC, TAIL_BYTES, recognise
from vmd.ipc.foreign import FOREIGN, refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class Guard:
    """Checks and does the writes to the first and the last bytes of a raw image.

    `write_zeroes` and `discard` need no check, because whole sectors of zeroes do not complete a signature.
    """

    def __init__(self, fd: int, path: str) -> None:
        """`fd` stays the image's.  `path` matters by its suffix, and is for errors.  Raises OSError."""
        self.fd = fd
        self.path = path
        self.file_bytes = os.lseek(fd, 0, SEEK_END)
        self.tail_at = max(0, self.file_bytes - TAIL_BYTES)
        self.lock = _thread.allocate_lock()

    def concerns(self, offset: int, length: int) -> bool:
        """Return whether a write must be done by `write`."""
        return length > 0 and (offset < HEAD_BYTES or offset + length > self.tail_at)

    def write(self, offset: int, views: "Sequence[memoryview]", length: int) -> None:
        """Write, unless the image would look like another format.  Raises OSError; EPERM in that case."""
        in_head = min(max(HEAD_BYTES - offset, 0), length)
        in_tail = min(max(offset + length - max(self.tail_at, offset + in_head), 0), length - in_head)
        cursor = Cursor(views)
        # Copies are checked and written, because the guest can change its memory in between.
        first = b"".join(cursor.take(in_head))
        middle = cursor.take(length - in_head - in_tail)
        last = b"".join(cursor.take(in_tail))
        with self.lock:
            parts = ((offset, first), (offset + length - in_tail, last))
            # A file may end inside its last sector.  A write to that sector makes it longer.
            tail_at = max(0, max(self.file_bytes, offset + length) - TAIL_BYTES)
            found = self.read_as(self._after(0, HEAD_BYTES, parts), self._after(tail_at, TAIL_BYTES, parts))
            if found:
                raise OSError(
                    errno.EPERM,
                    f"{self.path}: the guest may not write the signature of {found} to a disk whose format was guessed;"
                    " configure it with `format raw`",
                )
            pieces = [memoryview(first), *middle, memoryview(last)]
            write_views(self.fd, [piece for piece in pieces if piece], offset, length)

    def read_as(self, head: bytes, tail: bytes) -> str:
        """Return the format that an image with these bytes would be taken for; "" if it would still be used as raw."""
        if head.startswith(QCOW_MAGIC):
            return "a qcow2 image"
        found = recognise(head, tail)
        return FOREIGN[found].what if refused(found, self.file_bytes, self.path) else ""

    def _after(self, start: int, length: int, parts: "Sequence[tuple[int, bytes]]") -> bytes:
        """Return a range of the file as it will be after `parts`, (offset, bytes), are written.  Raises OSError."""
        found = bytearray(read_bytes(self.fd, length, start))
        for offset, part in parts:
            begin, end = max(offset, start), min(offset + len(part), start + length)
            if begin < end:
                found.extend(bytes(max(0, end - start - len(found))))
                found[begin - start : end - start] = part[begin - offset : end - offset]
        return bytes(found)
