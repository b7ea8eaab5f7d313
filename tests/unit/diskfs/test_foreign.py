"""Contents that we do not read are named by the signature at its place."""

import struct

import pytest

from vmd.diskfs.foreign import SIGNATURES, recognise
from vmd.diskfs.source import Source, Store

KIB = 1024
FFS_MAGIC = 1376 - 4  # fs_magic is at the end of the superblock
# As the headers of each format say; a FAT's signature is that of its boot sector.
PLACES = [
    ("LUKS", 0, b"LUKS\xba\xbe"), ("XFS", 0, b"XFSB"), ("SquashFS", 0, struct.pack("<I", 0x73717368)),
    ("NTFS", 3, b"NTFS    "), ("exFAT", 3, b"EXFAT   "), ("FAT", 0x36, b"FAT12   "), ("FAT", 0x36, b"FAT16   "),
    ("FAT", 0x52, b"FAT32   "), ("LVM", 512, b"LABELONE"), ("F2FS", KIB, struct.pack("<I", 0xF2F52010)),
    ("swap", 4 * KIB - 10, b"SWAPSPACE2"), ("Linux RAID", 4 * KIB, struct.pack("<I", 0xA92B4EFC)),
    ("OpenBSD softraid", 16 * 512, struct.pack("<Q", 0x4D4152436372616D)), ("ISO 9660", 16 * 2048 + 1, b"CD001"),
    ("big-endian FFS1", 8 * KIB + FFS_MAGIC, struct.pack(">I", 0x00011954)),
    ("big-endian FFS2", 8 * KIB + FFS_MAGIC, struct.pack(">I", 0x19540119)),
    ("big-endian FFS2", 64 * KIB + FFS_MAGIC, struct.pack(">I", 0x19540119)),
    ("Btrfs", 64 * KIB + 0x40, b"_BHRfS_M"),
]  # fmt: skip


def looks_like(data: bytes) -> str:
    """Return the name of the content of a partition of these bytes."""
    return recognise(Source(Store(lambda offset, length: data[offset : offset + length], len(data)), 0, len(data)))


@pytest.mark.parametrize(("name", "at", "signature"), PLACES)
def test_a_signature_counts_at_its_place(name: str, at: int, signature: bytes) -> None:
    """It may be the last bytes of the partition.  Beside its place, or cut off, it is none."""
    assert looks_like(bytes(at) + signature) == name
    assert looks_like((bytes(at) + signature).ljust(at + 128 * KIB, b"\0")) == name
    assert looks_like(bytes(at + 1) + signature + bytes(1)) == ""
    assert looks_like((bytes(at) + signature)[:-1]) == ""
    assert looks_like((bytes(at) + signature)[1:] + bytes(2)) == ""


def test_each_signature_has_its_test() -> None:
    """An empty partition has none."""
    assert {name for name, *_ in SIGNATURES} == {name for name, *_ in PLACES}
    assert len(SIGNATURES) == len(PLACES)
    assert looks_like(b"") == looks_like(bytes(128 * KIB)) == ""
