"""The units in which metadata of a qcow2 image is written: 4 KiB, or a cluster if that is smaller.

A unit is inside one cluster, and a file system allocates storage for it as a whole.
"""

from vmd.images.hostfile import read_bytes, write_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

UNIT_MAX = 4096


def unit_bytes(cluster_size: int) -> int:
    """Return the size of a unit."""
    return min(cluster_size, UNIT_MAX)


def runs(units: int) -> "Iterator[tuple[int, int]]":
    """Yield the runs (first, end) of units in a bit set."""
    first = 0
    while units:
        skip = (units & -units).bit_length() - 1
        units >>= skip
        first += skip
        length = (~units & units + 1).bit_length() - 1
        yield first, first + length
        units >>= length
        first += length


class Prepared:
    """Makes sure that units of metadata can be written later without new space, and remembers them.

    A unit is written once with its unchanged bytes.  After that the file system has storage for it, and it is within
    every quota and size limit.
    """

    def __init__(self, fd: int, cluster_size: int) -> None:
        self.fd = fd
        self.unit_bytes = unit_bytes(cluster_size)
        self.known: set[int] = set()

    def prepare(self, offset: int, length: int) -> None:
        """Prepare the units of a piece of metadata.  Nobody else may write them meanwhile.  Raises OSError."""
        size = self.unit_bytes
        first, last = offset // size, (offset + length - 1) // size
        if first == last and first in self.known:  # the usual case
            return
        for unit in range(first, last + 1):
            if unit not in self.known:
                write_bytes(self.fd, read_bytes(self.fd, size, unit * size), unit * size)
                self.known.add(unit)

    def write(self, data: "bytes | bytearray", offset: int) -> None:
        """Write whole units, which are prepared by this.  Raises OSError."""
        write_bytes(self.fd, data, offset)
        self.known.update(range(offset // self.unit_bytes, (offset + len(data)) // self.unit_bytes))
