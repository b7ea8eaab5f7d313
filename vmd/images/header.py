"""The header of a qcow2 image: untrusted bytes, checked and turned into a frozen record.

QEMU's docs/interop/qcow2.txt is the specification.  Every offset in the record is aligned and inside the file, and
every size is bounded.  So code that uses them allocates little memory and never divides by zero.
"""

import posix as os
import struct
import sys
from io import SEEK_END

from vmd.errors import ImageError
from vmd.images.hostfile import read_bytes
from vmd.images.signatures import QCOW_MAGIC
from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

HEADER_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
HEADER_V3 = struct.Struct(">QQQII")  # directly after HEADER_V2
V2_BYTES, V3_BYTES = HEADER_V2.size, HEADER_V2.size + HEADER_V3.size
EXTENSION = struct.Struct(">II")
FEATURE = struct.Struct(">BB46s")
CONTENT = struct.Struct(">QIIQQIIQ")

# Offsets of the fields that are written on their own.
AT_SIZE = 24
AT_L1 = 36  # entries and offset
AT_REFCOUNT_TABLE = 48
AT_CONTENT = 24  # size of the disk to snapshot table; in one sector, with the fields of version 3 after them
AT_INCOMPATIBLE = 72
AT_AUTOCLEAR = 88

END, BACKING_FORMAT, FEATURE_NAMES = 0, 0xE2792ACA, 0x6803F857

DIRTY, CORRUPT, EXTERNAL_DATA, COMPRESSION_TYPE, EXTENDED_L2 = (1 << bit for bit in range(5))
FEATURES = {2: "an external data file", 4: "extended L2 entries"}  # incompatible features that are not supported
COMPRESSIONS = {0: "zlib", 1: "zstd"}
COMMON = ("zlib",)  # supported by every reader
# The error for an image that a VM cannot use.  It does not name the image, because imgprobe does not know the name.
ZSTD_UNREAD = "uses zstd compression, which a VM cannot read; vmctl create -i converts it"
ENCRYPTIONS = {1: "AES", 2: "LUKS"}

# An autoclear feature bit of ours: the disks of a VM are going back to a snapshot, and some may have done so already.
# QEMU clears it when it writes to the image.
GOING_BACK = 1 << 58

OFFSET_MASK = 0x00FFFFFFFFFFFE00  # of an entry of an L1 or L2 table: offset in the file
COMPRESSED = 1 << 62  # of an entry of an L2 table
ALL_ZERO = 1  # of an entry of an L2 table in version 3: the cluster reads as zeroes
MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21
MAX_REFCOUNT_ORDER = 6
MAX_SIZE = (1 << 63) - 1
MAX_TABLE_BYTES = 4 << 20  # L1 table and refcount table: 16 GiB of 512-byte clusters, 256 TiB of 64 KiB ones
MAX_SNAPSHOTS = 65536  # QEMU's limit
SNAPSHOT_BYTES = 40  # minimum size of an entry of the snapshot table
MAX_BACKING_NAME = 1023
MAX_FORMAT_NAME = 15


class Header(Record):
    """A checked qcow2 header."""

    version: int
    cluster_bits: int
    size: int
    l1_entries: int
    l1_offset: int
    refcount_offset: int
    refcount_clusters: int
    refcount_order: int
    snapshots: int
    snapshots_offset: int
    incompatible: int
    autoclear: int
    compression: str  # of compressed clusters: a name of COMPRESSIONS
    backing: str
    backing_format: str

    @property
    def cluster_size(self) -> int:
        """The size of a cluster in bytes."""
        return 1 << self.cluster_bits

    @property
    def dirty(self) -> bool:
        """Whether the last writer kept refcounts in memory (lazy refcounts) and ended without writing them."""
        return bool(self.incompatible & DIRTY)


def parse_header(fd: int, path: str, compressions: "Collection[str]" = COMMON) -> Header:
    """Read and check the header of the open image `fd`; `path` is for errors only.

    `compressions` are those that the caller can decompress.

    Raises:
        ImageError: it is not a qcow2 image, is damaged, or needs a feature that we do not have.
    """
    try:
        file_bytes = os.lseek(fd, 0, SEEK_END)
        raw = read_bytes(fd, 1 << MAX_CLUSTER_BITS if file_bytes > 1 << MAX_CLUSTER_BITS else file_bytes, 0)
    except OSError as error:
        raise ImageError(path, f"cannot be read: {error.strerror}") from error
    return _Parser(path, raw, file_bytes, compressions).parse()


class _Parser:
    """Parses the bytes of one header."""

    def __init__(self, path: str, raw: bytes, file_bytes: int, compressions: "Collection[str]") -> None:
        self.path = path
        self.compressions = compressions
        self.raw = raw
        self.file_bytes = file_bytes

    def refuse(self, what: str) -> ImageError:
        """Return the error that says why the image is refused."""
        return ImageError(self.path, what)

    def parse(self) -> Header:
        """Check everything, in the order of the specification."""
        raw = self.raw
        if raw[: len(QCOW_MAGIC)] != QCOW_MAGIC:
            raise self.refuse("not a qcow2 image")
        if len(raw) < V2_BYTES:
            raise self.refuse(f"qcow2 header cut short after {len(raw)} bytes")
        (
            _, version, backing_offset, backing_length, cluster_bits, size, encryption, l1_entries, l1_offset,
            refcount_offset, refcount_clusters, snapshots, snapshots_offset,
        ) = HEADER_V2.unpack_from(raw)  # fmt: skip
        if version not in (2, 3):
            raise self.refuse(f"unsupported qcow2 version {version}")
        if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
            raise self.refuse(f"qcow2 cluster size of 2^{cluster_bits} bytes is not one of 2^9 to 2^21")
        self.cluster_size = 1 << cluster_bits
        self.raw = raw = raw[: self.cluster_size]
        incompatible = autoclear = 0
        refcount_order, header_bytes = 4, V2_BYTES
        if version == 3:
            if len(raw) < V3_BYTES:
                raise self.refuse(f"qcow2 header cut short after {len(raw)} bytes")
            incompatible, _, autoclear, refcount_order, header_bytes = HEADER_V3.unpack_from(raw, V2_BYTES)
            if not V3_BYTES <= header_bytes <= len(raw) or header_bytes % 8:
                raise self.refuse(f"qcow2 header claims to be {header_bytes} bytes long")
            if refcount_order > MAX_REFCOUNT_ORDER:
                raise self.refuse(f"qcow2 refcounts of 2^{refcount_order} bits are wider than 64")
        if encryption:
            raise self.refuse(f"is encrypted ({ENCRYPTIONS.get(encryption, encryption)}), which is not supported")
        end = self._header_end(header_bytes, backing_offset, backing_length)
        extensions = self._extensions(header_bytes, end)
        compression = self._compression(incompatible, header_bytes)
        self._check_features(incompatible, extensions.get(FEATURE_NAMES, b""))
        self._check_tables(size, l1_entries, l1_offset, refcount_offset, refcount_clusters)
        self._check_snapshots(snapshots, snapshots_offset)
        return Header(
            version=version,
            cluster_bits=cluster_bits,
            size=size,
            l1_entries=l1_entries,
            l1_offset=l1_offset,
            refcount_offset=refcount_offset,
            refcount_clusters=refcount_clusters,
            refcount_order=refcount_order,
            snapshots=snapshots,
            snapshots_offset=snapshots_offset,
            incompatible=incompatible,
            autoclear=autoclear,
            compression=compression,
            backing=self._backing(backing_offset, backing_length),
            backing_format=self._backing_format(extensions) if backing_offset else "",
        )

    def _header_end(self, header_bytes: int, backing_offset: int, backing_length: int) -> int:
        """Return the end of the space for extensions: the name of the backing file, or the end of the first cluster."""
        if not backing_offset:
            return len(self.raw)
        if backing_length > MAX_BACKING_NAME:
            raise self.refuse(f"name of the backing file is {backing_length} bytes long, more than {MAX_BACKING_NAME}")
        if backing_offset < header_bytes or backing_offset + backing_length > len(self.raw):
            raise self.refuse(f"name of the backing file at {backing_offset} is outside the header")
        return backing_offset

    def _extensions(self, at: int, end: int) -> dict[int, bytes]:
        """Return the header extensions by type."""
        found: dict[int, bytes] = {}
        while at + EXTENSION.size <= end:
            kind, length = EXTENSION.unpack_from(self.raw, at)
            if kind == END:
                break
            at += EXTENSION.size
            if length > end - at:
                raise self.refuse(f"qcow2 header extension 0x{kind:08x} of {length} bytes exceeds the header")
            found.setdefault(kind, self.raw[at : at + length])
            at += (length + 7) & ~7
        return found

    def _compression(self, incompatible: int, header_bytes: int) -> str:
        """Return the name of the compression.  It must be one that the caller can decompress."""
        kind = self.raw[V3_BYTES] if header_bytes > V3_BYTES else 0
        if incompatible & COMPRESSION_TYPE and not kind:
            raise self.refuse("has the incompatible feature bit for a compression type, but names none")
        if kind and not incompatible & COMPRESSION_TYPE:
            raise self.refuse(f"has compression type {kind} without its incompatible feature bit")
        name = COMPRESSIONS.get(kind, f"type {kind}")
        if name in self.compressions:
            return name
        raise self.refuse(
            ZSTD_UNREAD if name == "zstd" else f"uses {name} compression, which is not supported (only zlib is)"
        )

    def _check_features(self, incompatible: int, names: bytes) -> None:
        """Refuse an unsupported incompatible feature, by our name for it or the one in the image."""
        unknown = incompatible & ~(DIRTY | CORRUPT | COMPRESSION_TYPE)
        if not unknown:
            return
        bit = (unknown & -unknown).bit_length() - 1
        name = FEATURES.get(bit, "")
        for at in range(0, len(names) - FEATURE.size + 1, FEATURE.size):
            kind, named_bit, text = FEATURE.unpack_from(names, at)
            if not name and kind == 0 and named_bit == bit:
                name = f'"{text.rstrip(bytes(1)).decode("ascii", "backslashreplace")}"'
        raise self.refuse(f"needs {name or f'incompatible qcow2 feature {bit}'}, which is not supported")

    def _check_tables(
        self, size: int, l1_entries: int, l1_offset: int, refcount_offset: int, refcount_clusters: int
    ) -> None:
        """Check offset and size of the L1 table and the refcount table."""
        if size > MAX_SIZE:
            raise self.refuse(f"virtual size of {size} bytes is too large")
        per_table = self.cluster_size * (self.cluster_size // 8)
        if l1_entries < -(-size // per_table):
            raise self.refuse(f"L1 table of {l1_entries} entries is too small for {size} bytes")
        self._check_table("L1 table", l1_offset, l1_entries * 8)
        if not refcount_clusters:
            raise self.refuse("has no refcount table")
        self._check_table("refcount table", refcount_offset, refcount_clusters * self.cluster_size)
        if l1_entries and (
            l1_offset < refcount_offset + refcount_clusters * self.cluster_size
            and refcount_offset < l1_offset + l1_entries * 8
        ):
            raise self.refuse("L1 table and refcount table overlap")

    def _check_table(self, name: str, offset: int, length: int) -> None:
        """Check that a table is not too large, begins at a cluster after the header, and is inside the file."""
        if length > MAX_TABLE_BYTES:
            raise self.refuse(f"{name} of {length} bytes is larger than {MAX_TABLE_BYTES}")
        if not length:
            return
        if offset % self.cluster_size or offset < self.cluster_size:
            raise self.refuse(f"{name} at {offset} is not at the start of a cluster after the header")
        if offset + length > self.file_bytes:
            raise self.refuse(f"{name} at {offset} is not inside the file of {self.file_bytes} bytes")

    def _check_snapshots(self, snapshots: int, offset: int) -> None:
        """Check the offset and size of the snapshot table.  Its entries are not read here."""
        if not snapshots:
            return
        if snapshots > MAX_SNAPSHOTS:
            raise self.refuse(f"{snapshots} internal snapshots are more than {MAX_SNAPSHOTS}")
        if offset % self.cluster_size or offset < self.cluster_size:
            raise self.refuse(f"snapshot table at {offset} is not at the start of a cluster after the header")
        if offset + snapshots * SNAPSHOT_BYTES > self.file_bytes:
            raise self.refuse(f"snapshot table at {offset} is not inside the file of {self.file_bytes} bytes")

    def _backing(self, offset: int, length: int) -> str:
        """Return the path of the backing file, or "" if there is none."""
        if not offset or not length:
            return ""
        raw = self.raw[offset : offset + length]
        name = raw.decode(sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())
        if b"\0" in raw:
            raise self.refuse("name of the backing file contains a NUL byte")
        # QEMU takes the part before such a colon for a protocol, such as a server or options in JSON.
        if ":" in name.partition("/")[0]:
            raise self.refuse(f"backing file {name} is not a plain path")
        return name

    def _backing_format(self, extensions: dict[int, bytes]) -> str:
        """Return the recorded format of the backing file; "" if none is recorded."""
        raw = extensions.get(BACKING_FORMAT, b"")
        name = raw[: MAX_FORMAT_NAME + 1].decode("ascii", "backslashreplace")
        if name not in ("", "raw", "qcow2"):
            raise self.refuse(f"backing file is recorded to have format {name}, which is not supported")
        return name
