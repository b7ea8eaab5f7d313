"""Recognises file systems and other contents that we do not read, so that an error can name them."""

from vmd.diskfs.source import Source

# (name, offset, bytes); the first match counts.
SIGNATURES = (
    ("LUKS", 0, b"LUKS\xba\xbe"),
    ("XFS", 0, b"XFSB"),
    ("SquashFS", 0, b"hsqs"),
    ("NTFS", 3, b"NTFS    "),
    ("exFAT", 3, b"EXFAT   "),
    ("FAT", 54, b"FAT12   "),
    ("FAT", 54, b"FAT16   "),
    ("FAT", 82, b"FAT32   "),
    ("LVM", 512, b"LABELONE"),
    ("F2FS", 1024, b"\x10\x20\xf5\xf2"),
    ("swap", 4086, b"SWAPSPACE2"),
    ("Linux RAID", 4096, b"\xfc\x4e\x2b\xa9"),
    ("OpenBSD softraid", 8192, b"marcCRAM"),
    ("ISO 9660", 0x8001, b"CD001"),
    ("big-endian FFS1", 8192 + 1372, (0x011954).to_bytes(4, "big")),
    ("big-endian FFS2", 8192 + 1372, (0x19540119).to_bytes(4, "big")),
    ("big-endian FFS2", 65536 + 1372, (0x19540119).to_bytes(4, "big")),
    ("Btrfs", 0x10040, b"_BHRfS_M"),
)


def recognise(source: Source) -> str:
    """Return the name of the content of a partition, or "".  Raises DiskFsError."""
    for name, at, signature in SIGNATURES:
        if at + len(signature) <= source.size and source.read(at, len(signature)) == signature:
            return name
    return ""
