"""The interface that raw and qcow2 images share; for type checkers only.

Any thread may call any method at any time but `close`, which comes after the last other call has returned.
Requests that overlap and are in flight together have no order, as on any disk.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol

    class Image(Protocol):
        """A disk of `size` bytes.  Every method raises OSError with errno and sentence; nothing else comes out.

        What a write, discard or write_zeroes has done survives the end of this process and of the host only
        after the next `flush` has returned; until then either may be lost, never the image's consistency.
        """

        fd: int  # of the image itself
        path: str  # for sentences only; nothing here opens a path
        size: int  # whole sectors
        writable: bool
        discard_granularity: int  # bytes; a discard gives back the room of whole, aligned pieces of this size
        remark: str  # what its user should know about it, or ""

        def preadv(self, offset: int, views: "Sequence[memoryview]") -> None:
            """Fill all views, which are of bytes, with what is at `offset`."""

        def pwritev(self, offset: int, views: "Sequence[memoryview]") -> None:
            """Write all views to `offset`; others may change their bytes meanwhile."""

        def flush(self) -> None:
            """Return when everything written before is on stable storage.

            Raises:
                FlushFailed: it is not yet; DataLost: it will never be.
            """

        def discard(self, offset: int, length: int) -> None:
            """Give storage back where that is possible; what can be read there afterwards is undefined."""

        def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
            """Make a range read as zeroes; with `unmap` its storage may be given back."""

        def span(self, offset: int) -> tuple[bool, int]:
            """Return whether there is data at `offset`, and for how many bytes that holds; False: zeroes."""

        def finish(self) -> None:
            """After a `flush`, and with no request under way: store what `close` would, and make it last.

            Unless something is written to it afterwards, `close` does not change the image then.
            """

        def settle(self) -> None:
            """Have the file say everything that is in memory; no request is under way."""

        def reload(self) -> None:
            """Forget what was read: somebody else has written to the file.  Raises ImageError, too.

            After a failure nothing can be written any more.
            """

        def grow(self, size: int) -> None:
            """Become larger: `size` bytes, whole sectors, and zeroes in what is new.  It is so on stable storage, then.

            A size that it has already is no error, and one that is smaller is.  If it fails the disk is as it was.
            """

        def close(self) -> None:
            """Finish what is to be finished and let the descriptors go.

            Raises:
                FlushFailed: something that was acknowledged is not on stable storage, and this was not said before.
            """
