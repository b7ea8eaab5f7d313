"""Tables of 64-bit numbers: big-endian in a qcow2 file, native in memory.

`array` has all of this, but imports `collections`: a millisecond and 400 KiB in each disk process.
"""


def swapped(raw: "bytes | memoryview") -> bytearray:
    """Return 64-bit numbers with the bytes of each in the opposite order."""
    turned = bytearray(len(raw))
    for place in range(8):
        turned[place::8] = raw[7 - place :: 8]
    return turned


def native(raw: bytes) -> memoryview:
    """Return the numbers of a table as it stands in a file; they can be changed."""
    return memoryview(swapped(raw)).cast("Q")


def big_endian(words: memoryview) -> bytearray:
    """Return numbers as they stand in a file: a copy."""
    return swapped(words.cast("B"))


def zeroes(count: int) -> memoryview:
    """Return a table of so many zeroes."""
    return memoryview(bytearray(8 * count)).cast("Q")
