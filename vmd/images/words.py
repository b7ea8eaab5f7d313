"""Tables of numbers: big-endian in a qcow2 file, native in memory.  Numbers have 64 bits unless a width is given.

The module `array` could do this, but imports `collections`, which costs a millisecond and 400 KiB in each vioblk.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

# Formats of memoryview by the bytes of a number.
FORMATS: "dict[int, Literal['B', 'H', 'I', 'Q']]" = {1: "B", 2: "H", 4: "I", 8: "Q"}


def swapped(raw: "bytes | bytearray | memoryview", width: int) -> bytearray:
    """Return numbers of `width` bytes, with the bytes of each in reverse order."""
    turned = bytearray(len(raw))
    for place in range(width):
        turned[place::width] = raw[width - 1 - place :: width]
    return turned


def native(raw: "bytes | bytearray", width: int = 8) -> memoryview:
    """Return a table of a file as native numbers: a copy, which can be changed."""
    return memoryview(swapped(raw, width)).cast(FORMATS[width])


def big_endian(words: memoryview) -> bytearray:
    """Return native numbers in the byte order of the file: a copy."""
    return swapped(words.cast("B"), words.itemsize)


def zeroes(count: int) -> memoryview:
    """Return a table of `count` zeroes."""
    return memoryview(bytearray(8 * count)).cast("Q")
