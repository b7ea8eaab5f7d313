"""The interface of raw and qcow2 images; for type checkers only.

Any thread may call any method at any time, except `close`: all other calls must have returned before it.
Overlapping requests that are in flight together have no order, as on any disk.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol

    class Image(Protocol):
        """A disk of `size` bytes.  Methods raise only OSError, with an errno and a sentence.

        The effect of a write, discard or write_zeroes survives a crash of this process or of the host only after the
        next `flush` has returned.  A crash before that can lose it, but the image stays consistent.
        """

        fd: int  # of the image itself
        path: str  # for errors only; it is never opened
        size: int  # whole sectors
        writable: bool
        discard_granularity: int  # bytes; a discard gives back storage in whole, aligned pieces of this size
        remark: str  # a sentence about the image for the user, or ""

        def preadv(self, offset: int, views: "Sequence[memoryview]") -> None:
            """Fill all views, which have format "B", with the bytes at `offset`."""

        def pwritev(self, offset: int, views: "Sequence[memoryview]") -> None:
            """Write all views to `offset`.  The guest may change their bytes meanwhile."""

        def flush(self) -> None:
            """Wait until everything written before is on stable storage.

            Raises:
                FlushFailed: it is not, but a later flush may succeed.
                DataLost: it never will be.
            """

        def discard(self, offset: int, length: int) -> None:
            """Give storage back to the host if possible.  Afterwards the range reads as undefined bytes."""

        def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
            """Make a range read as zeroes.  With `unmap` its storage may be given back to the host."""

        def span(self, offset: int) -> tuple[bool, int]:
            """Return whether there is data at `offset`, and for how many bytes this is true.  False: zeroes."""

        def finish(self) -> None:
            """Write what `close` would write, and sync it.  Called after a `flush`, with no request in flight.

            If nothing is written afterwards, `close` does not change the image any more.
            """

        def settle(self) -> None:
            """Write all changes in memory to the file.  No request may be in flight."""

        def reload(self) -> None:
            """Read everything again, because another process has written to the file.  Raises ImageError, too.

            After a failure the image cannot be written any more.
            """

        def grow(self, size: int) -> None:
            """Grow the disk to `size` bytes, a multiple of a sector.  The new part reads as zeroes.

            The new size is on stable storage on return.  The current size is not an error, a smaller one is.  After a
            failure the disk is unchanged.
            """

        def close(self) -> None:
            """Flush, and close the descriptors.

            Raises:
                FlushFailed: an acknowledged write is not on stable storage, and no earlier call has reported this.
            """
