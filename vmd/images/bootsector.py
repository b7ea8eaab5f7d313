"""Tells whether a BIOS finds boot code in the first sector of a disk.  Looks at the top image only.

Standard library only.
"""

import struct

from vmd.images.header import ALL_ZERO, COMPRESSED, OFFSET_MASK
from vmd.images.hostfile import read_bytes
from vmd.ipc.probemsg import BELOW, NO_CODE
from vmd.units import SECTOR

SIGNATURE_AT, SIGNATURE, CODE_BYTES = 510, b"\x55\xaa", 440
VERSION_AT, L1_OFFSET_AT = 4, 40  # in the header of a qcow2 image, which has been checked before
VERSION, ENTRY = struct.Struct(">I"), struct.Struct(">Q")


def first_sector(fd: int, image_format: str) -> tuple[str, ...]:
    """Return notes about the first sector: NO_CODE, or BELOW if it is in the backing file.

    () means that a BIOS may find boot code there, or that this is not known.
    """
    try:
        at = 0
        if image_format == "qcow2":
            (version,) = VERSION.unpack(read_bytes(fd, VERSION.size, VERSION_AT))
            table = _entry(fd, _entry(fd, L1_OFFSET_AT))
            entry = _entry(fd, table & OFFSET_MASK) if table & OFFSET_MASK else 0
            if entry & COMPRESSED:
                return ()
            if entry & ALL_ZERO and version > 2:
                return (NO_CODE,)
            at = entry & OFFSET_MASK
            if not at:
                return (BELOW,)
        sector = read_bytes(fd, SECTOR, at)
    except (OSError, OverflowError, struct.error):
        return ()
    starts = sector[SIGNATURE_AT:] == SIGNATURE and any(sector[:CODE_BYTES])
    return () if starts else (NO_CODE,)


def _entry(fd: int, at: int) -> int:
    """Return the 64-bit number at an offset of an image.  Raises OSError, OverflowError, struct.error."""
    (number,) = ENTRY.unpack(read_bytes(fd, ENTRY.size, at))
    return int(number)
