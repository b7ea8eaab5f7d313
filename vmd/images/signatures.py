"""Recognises formats that we do not read, from the first and last bytes of an image.

The bytes are untrusted: names of other files in them are not opened.  The names of formats are those of
`vmd.ipc.foreign`.  For a disk only the first HEAD_BYTES and the last TAIL_BYTES count, so that `guard.py` can keep a
guest from writing a signature.
"""

import struct

HEAD_BYTES = 1024
TAIL_BYTES = 512

DISC_AT = 0x8000  # the first volume descriptor of a disc
DISC_DESCRIPTOR = 2048
DISC_NAMES = (b"CD001", b"BEA01", b"NSR02", b"NSR03", b"CDROM")  # ISO 9660, UDF, High Sierra
CD_SYNC = b"\0" + b"\xff" * 10 + b"\0"

QCOW_MAGIC = b"QFI\xfb"

# (name, offset, bytes); the first match counts.
SIGNATURES = (
    ("QED", 0, b"QED\0"),
    ("VMDK", 0, b"KDMV"),
    ("VMDK", 0, b"COWD"),
    ("VMDK", 0, b"\xbe\xba\xfe\xca\0\0\0\0"),  # SEsparse
    ("VMDK", 0, b"# Disk Descript"),
    ("VHD", 0, b"conectix"),
    ("VHD", 0, b"cxsparse"),
    ("VHDX", 0, b"vhdxfile"),
    ("Parallels", 0, b"WithoutFreeSpac"),
    ("Parallels", 0, b"WithouFreSpacEx"),
    ("VDI", 0x40, b"\x7f\x10\xda\xbe"),
    ("VDI", 0, b"<<< "),
    ("Bochs", 0, b"Bochs Virtual HD Image"),
    ("cloop", 0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop"),
    ("LUKS", 0, b"LUKS\xba\xbe"),
    ("LUKS", 0, b"SKUL\xba\xbe"),
    ("VMA", 0, b"VMA\0"),
    ("Android sparse", 0, b"\x3a\xff\x26\xed"),
    ("gzip", 0, b"\x1f\x8b\x08"),
    ("xz", 0, b"\xfd7zXZ\0"),
    ("zstd", 0, b"\x28\xb5\x2f\xfd"),
    *(("bzip2", 0, b"BZh%d1AY&SY" % level) for level in range(1, 10)),
    *(("bzip2", 0, b"BZh%d\x17rE8P\x90" % level) for level in range(1, 10)),  # an empty file
    ("lz4", 0, b"\x04\x22\x4d\x18"),
    ("lz4", 0, b"\x02\x21\x4c\x18"),
    ("lzip", 0, b"LZIP"),
    ("lzop", 0, b"\x89LZO\0\r\n\x1a\n"),
    ("zip", 0, b"PK\x03\x04"),
    ("zip", 0, b"PK\x05\x06"),
    ("7-Zip", 0, b"7z\xbc\xaf\x27\x1c"),
    ("tar", 257, b"ustar"),
    ("kernel", 0, b"\x7fELF"),
    ("kernel", 0x202, b"HdrS"),  # Linux
)
DISC_SIGNATURES = (
    ("qcow2", 0, QCOW_MAGIC),
    ("CD sectors", 0, CD_SYNC),
    ("CHD", 0, b"MComprHD"),
    ("CISO", 0, b"CISO"),
)

TAR_NAME_BYTES = 100
VERSIONS = (b"version=1", b"version=2", b"version=3")  # of a VMDK descriptor
FOOTER = struct.Struct(">8sII8x4x4x4x4xQQ4xI")  # a VHD's: cookie, features, version; sizes; type
VHD_FIXED = 2
KOLY = struct.Struct(">4sII")  # a DMG's last sector: magic, version, length


def recognise(head: bytes, tail: bytes) -> str:
    """Return the name of the format that the first and last bytes of a disk have, or ""."""
    if head[:4] == QCOW_MAGIC:
        return "QCOW" if head[4:8] == b"\0\0\0\1" else ""
    for name, at, signature in SIGNATURES:
        if head[at : at + len(signature)] == signature:
            return "OVA" if name == "tar" and holds_ovf(head) else name
    return described(head) or trailing(tail)


def recognise_disc(head: bytes, tail: bytes, descriptor: bytes) -> str:
    """Return the name of the format of an image that should be a disc, or "" if it is one.

    `descriptor` is the DISC_DESCRIPTOR bytes at DISC_AT.  It decides first, because the first 32 KiB of a disc may have
    any bytes: they are for boot code.
    """
    if descriptor[1:6] in DISC_NAMES or descriptor[9:14] in DISC_NAMES:
        return ""
    found = recognise(head, tail)
    if found:
        return found
    for name, at, signature in DISC_SIGNATURES:
        if head[at : at + len(signature)] == signature:
            return name
    return ""


def holds_ovf(head: bytes) -> bool:
    """Return whether the first file of a tar archive is an OVF description, as in an OVA."""
    return head[:TAR_NAME_BYTES].partition(b"\0")[0].lower().endswith(b".ovf")


def described(head: bytes) -> str:
    """Return the name of a format whose header is text: OVF or a VMDK descriptor; else ""."""
    text = head.removeprefix(b"\xef\xbb\xbf")
    if text.lstrip()[:1] == b"<":
        return "OVF" if b"/ovf/envelope" in text else ""
    if text[:1] not in (b"#", b"v", b" ", b"\n", b"\r"):
        return ""
    # QEMU takes a text for a VMDK if its first line that is not empty and not a comment is a version.
    for line in text.split(b"\n")[:-1]:
        line = line.strip(b" \r")
        if line and not line.startswith(b"#"):
            return "VMDK" if line in VERSIONS else ""
    return ""


def trailing(tail: bytes) -> str:
    """Return the name of the format that the last TAIL_BYTES of an image have, or ""."""
    if len(tail) < TAIL_BYTES:
        return ""
    cookie, _, _, _, _, kind = FOOTER.unpack_from(tail)
    if cookie == b"conectix" and kind == VHD_FIXED:
        return "VHD"
    return "DMG" if KOLY.unpack_from(tail) == (b"koly", 4, TAIL_BYTES) else ""
