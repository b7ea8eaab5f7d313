"""Tables of numbers: big-endian in a qcow2 file, native in memory; of 64 bits unless a width is given.

`array` has all of this, but imports `collections`: a millisecond and 400 KiB in each disk process.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

# Of memoryview, by the bytes of a number.
FORMATS: "dict[int, Literal['B', 'H', 'I', 'Q']]" = {1: "B", 2: "H", 4: "I", 8: "Q"}


def swapped(raw: "bytes | bytearray | memoryview", width: int = 8) -> bytearray:
    """Return numbers of `width` bytes with the bytes of each in the opposite order."""
    turned = bytearray(len(raw))
    for place in range(width):
        turned[place::width] = raw[width - 1 - place :: width]
    return turned


def native(raw: "bytes | bytearray", width: int = 8) -> memoryview:
    """Return the numbers of a table as it stands in a file; they can be changed."""
    return memoryview(swapped(raw, width)).cast(FORMATS[width])


def big_endian(words: memoryview) -> bytearray:
    """Return numbers as they stand in a file: a copy."""
    return swapped(words.cast("B"), words.itemsize)


def zeroes(count: int) -> memoryview:
    """Return a table of so many zeroes."""
    return memoryview(bytearray(8 * count)).cast("Q")
