"""Finds the size of a disk from its partition table (GPT; UEFI 2.10, 5.3).

The table is at the beginning of the disk, and a copy of it at the end.
"""

import struct
import zlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.images.image import Image

HEADER = struct.Struct("<8sIIIIQQ")  # signature, revision, length, CRC-32, zeroes, its own sector, the copy's sector
SIGNATURE = b"EFI PART"
SECTORS = (512, 4096)
AT_CRC = 16
END_MAX = (1 << 63) - 1  # bytes; no disk is larger


def gpt_end(image: "Image") -> int:
    """Return the size in bytes of the disk that the GPT was made for; 0 if there is no GPT.  Raises OSError."""
    for sector in SECTORS:
        if image.size < 2 * sector:
            break
        raw = bytearray(sector)
        image.preadv(sector, [memoryview(raw)])
        signature, _, length, crc, _, own, copy = HEADER.unpack_from(raw)
        if signature != SIGNATURE or own != 1 or not HEADER.size <= length <= sector:
            continue
        raw[AT_CRC : AT_CRC + 4] = bytes(4)
        if zlib.crc32(raw[:length]) == crc and (end := int((copy + 1) * sector)) <= END_MAX:
            return end
    return 0
