"""qcow2 headers with wrong values (hostile 52): imgprobe and the opener refuse each with a message."""

import os
import random
import re
import struct
from pathlib import Path

import pytest

from tests.support.images import MIB, opened, read, write
from vmd.errors import ImageError
from vmd.images.create import create
from vmd.images.files import OpenedChain
from vmd.images.header import parse_header
from vmd.images.identify import probe
from vmd.images.probe import answer
from vmd.ipc.probemsg import Probe, unpack

CLUSTER = 1 << 16
SIZE = 8 * MIB


def header_of(path: Path, changes: dict[int, tuple[str, int | bytes]]) -> None:
    """Overwrite fields of a header: offset -> (struct format, value)."""
    with path.open("r+b") as file:
        for offset, (kind, value) in changes.items():
            file.seek(offset)
            file.write(struct.pack(">" + kind, value))


def refusal(path: Path) -> str:
    """Return the message with which an image is refused."""
    with pytest.raises(ImageError) as refused:
        opened(path, writable=True).close()
    return str(refused.value)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An empty image of ours."""
    path = tmp_path / "disk.qcow2"
    create(str(path), "qcow2", SIZE)
    return path


# The groups of QEMU's iotest 080, followed by those that hostile input 52 adds.
LIES: dict[str, list[tuple[dict[int, tuple[str, int | bytes]], str]]] = {
    "header-length": [
        ({100: ("I", 96)}, "header claims to be 96 bytes long"),
        ({100: ("I", 105)}, "header claims to be 105 bytes long"),
        ({100: ("I", CLUSTER + 8)}, "header claims to be 65544 bytes long"),
        ({100: ("I", 0x7FFFFFF8)}, "header claims to be 2147483640 bytes long"),
        ({100: ("I", 0xFFFFFFF8)}, "header claims to be 4294967288 bytes long"),
        ({100: ("I", 0xFFFFFFFF)}, "header claims to be 4294967295 bytes long"),
    ],
    "header-extension": [
        ({104: ("Q", 0x12345678FFFFFFFF)}, "extension 0x12345678 of 4294967295 bytes exceeds"),
        ({104: ("Q", 0x123456787FFFFFFF)}, "extension 0x12345678 of 2147483647 bytes exceeds"),
        ({104: ("Q", 0x1234567800010000)}, "extension 0x12345678 of 65536 bytes exceeds"),
        ({104: ("Q", 0x123456780000FFF0), CLUSTER - 8: ("Q", 0x1234567800000001)}, "extension 0x12345678 of "),
        ({104: ("Q", 0xE2792ACAFFFFFFFF)}, "extension 0xe2792aca of 4294967295 bytes exceeds"),
    ],
    "refcount-table-size": [
        ({56: ("I", 0)}, "has no refcount table"),
        ({56: ("I", 0xFFFFFFFF)}, "refcount table of 281474976645120 bytes is larger than"),
        ({56: ("I", 1 << 31)}, "refcount table of 140737488355328 bytes is larger than"),
        ({56: ("I", 0x00020001)}, "refcount table of 8590000128 bytes is larger than"),
        ({56: ("I", 64)}, "refcount table at 65536 is not inside the file"),
        ({56: ("I", 65)}, "refcount table of 4259840 bytes is larger than 4194304"),
    ],
    "refcount-table-offset": [
        ({48: ("Q", 0)}, "refcount table at 0 is not at the start"),
        ({48: ("Q", CLUSTER + 8)}, "is not at the start of a cluster"),
        ({48: ("Q", 0x12345678ABCDEF)}, "is not at the start of a cluster"),
        ({48: ("Q", 1 << 40)}, "is not inside the file"),
        ({48: ("Q", 0xFFFFFFFFFFFF0000)}, "is not inside the file"),
    ],
    "snapshot-table": [
        ({60: ("I", 70000)}, "70000 internal snapshots are more than 65536"),
        ({60: ("I", 0xFFFFFFFF)}, "4294967295 internal snapshots are more than 65536"),
        ({60: ("I", 0x7FFFFFFF)}, "2147483647 internal snapshots are more than 65536"),
        ({60: ("I", 1), 64: ("Q", 8)}, "snapshot table at 8 is not at the start"),
        ({60: ("I", 1), 64: ("Q", 0x12345678ABCDEF)}, "is not at the start of a cluster"),
        ({60: ("I", 1), 64: ("Q", 1 << 50)}, "snapshot table at 1125899906842624 is not inside"),
        ({60: ("I", 1), 64: ("Q", 0xFFFFFFFFFFFF0000)}, "is not inside the file"),
        ({60: ("I", 65536), 64: ("Q", 3 * CLUSTER)}, "snapshot table at 196608 is not inside"),
    ],
    "l1-table-size": [
        ({36: ("I", 0)}, "L1 table of 0 entries is too small"),
        ({36: ("I", 0xFFFFFFFF)}, "L1 table of 34359738360 bytes is larger than"),
        ({36: ("I", 0x7FFFFFFF)}, "L1 table of 17179869176 bytes is larger than"),
        ({36: ("I", 100000)}, "L1 table at 196608 is not inside the file"),
        ({36: ("I", 524288)}, "L1 table at 196608 is not inside the file"),
        ({36: ("I", 524289)}, "L1 table of 4194312 bytes is larger than 4194304"),
        ({24: ("Q", 1 << 40)}, "L1 table of 1 entries is too small for 1099511627776 bytes"),
    ],
    "l1-table-offset": [
        ({40: ("Q", 0)}, "L1 table at 0 is not at the start"),
        ({40: ("Q", CLUSTER * 3 + 512)}, "is not at the start of a cluster"),
        ({40: ("Q", 0x12345678ABCDEF)}, "is not at the start of a cluster"),
        ({40: ("Q", 1 << 63)}, "is not inside the file"),
        ({40: ("Q", 0x7FFFFFFFFFFF0000)}, "is not inside the file"),
        ({40: ("Q", 0xFFFFFFFFFFFF0000)}, "is not inside the file"),
        ({40: ("Q", CLUSTER)}, "L1 table and refcount table overlap"),
    ],
    "backing-name": [
        ({8: ("Q", 90), 16: ("I", 4)}, "outside the header"),
        ({8: ("Q", CLUSTER - 2), 16: ("I", 4)}, "outside the header"),
        ({8: ("Q", 1 << 63), 16: ("I", 4)}, "outside the header"),
        ({8: ("Q", 0xFFFFFFFFFFFFFFFF), 16: ("I", 4)}, "outside the header"),
        ({8: ("Q", 112), 16: ("I", 1024)}, "1024 bytes long, more than 1023"),
        ({8: ("Q", CLUSTER - 3), 16: ("I", 4)}, "outside the header"),
        ({8: ("Q", CLUSTER - 4), 16: ("I", 4), CLUSTER - 4: ("4s", b"name")}, "needs its backing file name"),
        ({8: ("Q", 103), 16: ("I", 4)}, "outside the header"),
        ({104: ("Q", 0x1234567800000009), 8: ("Q", 120), 16: ("I", 1)}, "extension 0x12345678 of 9 bytes exceeds"),
        (
            {104: ("Q", 0x1234567800000008), 8: ("Q", 120), 16: ("I", 1), 120: ("s", b"b")},
            "needs its backing file b",
        ),
        ({8: ("Q", 112), 16: ("I", 0xFFFFFFFF)}, "4294967295 bytes long, more than 1023"),
        ({8: ("Q", 112), 16: ("I", 5), 112: ("5s", b"nbd:x")}, "nbd:x is not a plain path"),
        ({8: ("Q", 112), 16: ("I", 8), 112: ("8s", b'json:{"/')}, "is not a plain path"),
        ({8: ("Q", 112), 16: ("I", 3), 112: ("3s", b"a\0b")}, "contains a NUL byte"),
        ({8: ("Q", 112), 16: ("I", 3), 112: ("3s", b"abc")}, "needs its backing file abc"),
        (
            {104: ("Q", 0xE2792ACA00000004), 112: ("4s", b"vmdk"), 8: ("Q", 120), 16: ("I", 1), 120: ("s", b"b")},
            "format vmdk",
        ),
    ],
    "magic-and-version": [
        ({0: ("I", 0x514649FA)}, "not a qcow2 image"),
        ({4: ("I", 0)}, "unsupported qcow2 version 0"),
        ({4: ("I", 1)}, "unsupported qcow2 version 1"),
        ({4: ("I", 4)}, "unsupported qcow2 version 4"),
        ({4: ("I", 0xFFFFFFFF)}, "unsupported qcow2 version 4294967295"),
    ],
    "cluster-size": [
        ({20: ("I", 0)}, r"cluster size of 2\^0 bytes"),
        ({20: ("I", 8)}, r"cluster size of 2\^8 bytes"),
        ({20: ("I", 22)}, r"cluster size of 2\^22 bytes"),
        ({20: ("I", 64)}, r"cluster size of 2\^64 bytes"),
        ({20: ("I", 0xFFFFFFFF)}, r"cluster size of 2\^4294967295 bytes"),
    ],
    "size": [
        ({24: ("Q", 1 << 63)}, "virtual size of 9223372036854775808 bytes is too large"),
        ({24: ("Q", 0xFFFFFFFFFFFFFFFF)}, "virtual size of 18446744073709551615 bytes is too large"),
        ({24: ("Q", 1 << 62)}, "is too small for 4611686018427387904 bytes"),
    ],
    "encryption": [
        ({32: ("I", 1)}, r"is encrypted \(AES\)"),
        ({32: ("I", 2)}, r"is encrypted \(LUKS\)"),
        ({32: ("I", 77)}, r"is encrypted \(77\)"),
    ],
    "features": [
        ({72: ("Q", 2)}, "is marked as corrupt"),
        ({72: ("Q", 3)}, "is marked as corrupt"),
        ({72: ("Q", 4)}, "needs an external data file"),
        ({72: ("Q", 8)}, "for a compression type, but names none"),
        ({72: ("Q", 8), 100: ("I", 112), 104: ("B", 1)}, "uses zstd compression, which a VM cannot read"),
        ({72: ("Q", 0), 100: ("I", 112), 104: ("B", 1)}, "has compression type 1 without its incompatible feature bit"),
        ({72: ("Q", 8), 100: ("I", 112), 104: ("B", 9)}, "uses type 9 compression"),
        ({72: ("Q", 16)}, "needs extended L2 entries"),
        ({72: ("Q", 1 << 40)}, "needs incompatible qcow2 feature 40"),
        ({72: ("Q", 0xFFFFFFFFFFFFFFFF)}, "for a compression type, but names none"),
        (
            {72: ("Q", 1 << 9), 104: ("Q", 0x6803F85700000030), 112: ("48s", b"\0\x09wings" + bytes(41))},
            'needs "wings", which is not supported',
        ),
    ],
    "refcount-width": [
        ({96: ("I", 7)}, r"refcounts of 2\^7 bits"),
        ({96: ("I", 0xFFFFFFFF)}, r"refcounts of 2\^4294967295 bits"),
    ],
}
EVERY_LIE = [
    pytest.param(changes, words, id=f"{group}-{number}")
    for group, lies in LIES.items()
    for number, (changes, words) in enumerate(lies)
]


@pytest.mark.parametrize(("changes", "words"), EVERY_LIE)
def test_lie_is_refused_52(image: Path, changes: dict[int, tuple[str, int | bytes]], words: str) -> None:
    """Hostile input 52: one wrong value at a time.  The message names the file and the value."""
    header_of(image, changes)

    text = refusal(image)

    assert text.startswith(f"{image}: ")
    assert re.search(words, text)


@pytest.mark.parametrize(("changes", "words"), EVERY_LIE)
def test_imgprobe_says_the_same_52(image: Path, changes: dict[int, tuple[str, int | bytes]], words: str) -> None:
    """Hostile input 52: imgprobe is asked first.  Checks that need more than the header are left to the opener."""
    header_of(image, changes)

    with image.open("rb") as file:
        told = unpack(answer(file.fileno(), "qcow2"))

    if isinstance(told, str):
        assert re.search(words, told)
    else:
        assert words == "is marked as corrupt" or words.startswith("needs its backing file")


@pytest.mark.parametrize(
    ("changes", "end"),
    [
        ({}, 3 * CLUSTER + 8),  # L1 table
        ({40: ("Q", CLUSTER), 48: ("Q", 3 * CLUSTER)}, 4 * CLUSTER),  # refcount table
        ({60: ("I", 2), 64: ("Q", 4 * CLUSTER)}, 4 * CLUSTER + 80),  # snapshot table
    ],
)
def test_table_may_end_with_the_file_52(image: Path, changes: dict[int, tuple[str, int | bytes]], end: int) -> None:
    """With a byte less the image is refused."""
    header_of(image, changes)
    os.truncate(image, end)
    with image.open("rb") as file:
        assert parse_header(file.fileno(), "disk").size == SIZE
        os.truncate(image, end - 1)
        with pytest.raises(ImageError, match=f"is not inside the file of {end - 1} bytes"):
            parse_header(file.fileno(), "disk")


@pytest.mark.parametrize(
    ("l1", "entries", "refcounts", "overlap"),
    [(3, 1, 2, False), (2, 1, 3, False), (1, 8192, 2, False), (1, 8193, 2, True), (2, 1, 2, True)],
)
def test_tables_may_be_adjacent_52(image: Path, l1: int, entries: int, refcounts: int, overlap: bool) -> None:
    """Neither may have a byte of the other."""
    header_of(image, {36: ("I", entries), 40: ("Q", l1 * CLUSTER), 48: ("Q", refcounts * CLUSTER)})
    if overlap:
        assert "L1 table and refcount table overlap" in refusal(image)
        return
    with image.open("rb") as file:
        assert parse_header(file.fileno(), "disk").l1_entries == entries


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (3 * CLUSTER, 0x8000000000000000 | CLUSTER * 4 + 512, "L2 table at 262656 is not a cluster of the file"),
        (3 * CLUSTER, 0x8000000000000000 | CLUSTER, "L2 table at 65536 overlaps"),
        (3 * CLUSTER, 0x8000000000000000 | 3 * CLUSTER, "L2 table at 196608 overlaps"),
        (3 * CLUSTER, 0x80FFFFFFFFFF0000, "is not a cluster of the file"),
        (CLUSTER, 512, "refcount block at 512 is not a cluster of the file"),
        (CLUSTER, CLUSTER, "refcount block at 65536 overlaps"),
        (CLUSTER, 3 * CLUSTER, "refcount block at 196608 overlaps"),
        (CLUSTER + 8, 2 * CLUSTER, "refcount block at 131072 overlaps"),
    ],
)
def test_pointer_into_metadata_is_refused_52(image: Path, place: int, value: int, words: str) -> None:
    """An image whose tables point to the header, to tables or to themselves must not be written."""
    header_of(image, {place: ("Q", value)})

    assert words in refusal(image)


def test_missing_refcount_block_frees_no_metadata_52(image: Path) -> None:
    """Without a refcount, the header looks free, but it is not allocated."""
    header_of(image, {CLUSTER: ("Q", 0)})
    before = image.read_bytes()[: 4 * CLUSTER]
    disk = opened(image, writable=True)

    with pytest.raises(OSError, match="cluster 0 is in use and has no refcount"):
        write(disk, 0, b"x" * 512)
    with pytest.raises(OSError, match="image is corrupt"):
        write(disk, 0, b"x" * 512)
    assert read(disk, 0, 512) == bytes(512)
    disk.close()

    after = image.read_bytes()[: 4 * CLUSTER]
    assert after[72:80] == bytes(7) + b"\2"  # marked as corrupt, so that it is not written before it is repaired
    assert after[:72] + after[80:] == before[:72] + before[80:]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (0x8000000000000000 | 3 * CLUSTER, "is metadata"),
        (0x8000000000000000 | 4 * CLUSTER, "is metadata"),
        (0x80FFFFFFFFFF0000, "has refcount 0"),
    ],
)
def test_entry_into_metadata_is_not_written_to_52(image: Path, entry: int, words: str) -> None:
    """An entry far behind the end of the file is not written either: the file would become huge."""
    disk = opened(image, writable=True)
    write(disk, 0, b"x" * CLUSTER)
    disk.close()
    header_of(image, {4 * CLUSTER: ("Q", entry)})
    assert os.path.getsize(image) == 6 * CLUSTER
    disk = opened(image, writable=True)

    with pytest.raises(OSError, match=words):
        write(disk, 512, b"y" * 512)
    disk.close()

    assert os.path.getsize(image) == 6 * CLUSTER


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (0x8000000000050200, "not the start of a cluster"),
        (0x80FFFFFFFFFF0000, "before a cluster that is in use"),
        (0x4000000000000000, "compressed cluster at 0"),
        (0x7FFFFFFFFFFFFFFF, "compressed cluster at"),
        (0x40FFFFFFFFFFFFFF, "compressed cluster at"),
    ],
)
def test_entry_that_leads_nowhere_is_an_error_52(image: Path, entry: int, words: str) -> None:
    """Reading its cluster fails, and other clusters can be read."""
    disk = opened(image, writable=True)
    write(disk, 0, b"x" * CLUSTER + b"z" * 512)
    disk.close()
    header_of(image, {4 * CLUSTER: ("Q", entry)})
    disk = opened(image)

    with pytest.raises(OSError, match=words):
        read(disk, 0, 512)
    assert read(disk, CLUSTER, 512) == b"z" * 512
    disk.close()


def test_cluster_in_use_with_refcount_0_is_not_allocated_52(image: Path) -> None:
    """Hostile input 52, overlap on allocation: the image's tables are known, even with wrong refcounts."""
    disk = opened(image, writable=True)
    write(disk, 0, b"x" * CLUSTER)  # cluster 4 is its L2 table, 5 the data
    disk.close()
    for cluster in range(5):
        header_of(image, {2 * CLUSTER + 2 * cluster: ("H", 0)})
        before = image.read_bytes()
        disk = opened(image, writable=True)

        with pytest.raises(OSError, match=f"cluster {cluster} is in use and has refcount 0"):
            write(disk, CLUSTER, b"y" * CLUSTER)
        disk.close()

        after = image.read_bytes()
        assert [at for at in range(len(before)) if before[at] != after[at]] == [79]  # the corrupt bit only
        header_of(image, {72: ("Q", 0), 2 * CLUSTER + 2 * cluster: ("H", 1)})


@pytest.mark.parametrize(
    "snapshot",
    [
        struct.pack(">QIHHIIQII", 0x12345678ABCDEF00, 0x10000000, 1, 1, 0, 0, 0, 0, 0),
        struct.pack(">QIHHIIQII", 3 * CLUSTER, 0xFFFFFFFF, 0xFFFF, 0xFFFF, 0, 0, 0, 0, 0xFFFFFFFF),
        b"\xff" * 40,
    ],
)
def test_invalid_snapshot_is_never_read_52(image: Path, snapshot: bytes) -> None:
    """Hostile input 52, iotest 080's invalid L1 table of a snapshot: we never revert to a snapshot."""
    place = image.stat().st_size
    with image.open("r+b") as file:
        file.seek(place)
        file.write(snapshot.ljust(CLUSTER, b"\0"))
    header_of(image, {60: ("I", 1), 64: ("Q", place), 2 * CLUSTER + place // CLUSTER * 2: ("H", 1)})
    disk = opened(image, writable=True)

    write(disk, MIB, b"x" * 512)
    disk.close()

    disk = opened(image)
    assert read(disk, MIB, 1024) == b"x" * 512 + bytes(512)
    disk.close()
    assert image.read_bytes()[place : place + 40] == snapshot


def test_every_prefix_is_refused_or_opened_52(image: Path) -> None:
    """A truncated file raises ImageError, or is an image once all of its metadata is there."""
    whole = image.read_bytes()
    for length in [*range(300), *range(CLUSTER - 1, len(whole), 9973)]:
        image.write_bytes(whole[:length])
        refusal(image) if length < len(whole) - CLUSTER else opened(image).close()


def test_random_bytes_raise_documented_exceptions_only_52(tmp_path: Path) -> None:
    """Images with flipped bits and random fields are opened, read and written.

    Only ImageError or OSError is raised.
    """
    path = tmp_path / "disk"
    create(str(path), "qcow2", SIZE)
    disk = opened(path, writable=True)
    write(disk, 0, b"x" * CLUSTER)
    disk.close()
    whole = path.read_bytes()
    choice = random.Random(1)
    places = [*range(112), *range(CLUSTER, CLUSTER + 16), *range(2 * CLUSTER, 2 * CLUSTER + 16),
              *range(3 * CLUSTER, 3 * CLUSTER + 8), *range(4 * CLUSTER, 4 * CLUSTER + 16)]  # fmt: skip
    outcomes = set()
    for _ in range(1500):
        damaged = bytearray(whole)
        for _ in range(choice.randrange(1, 4)):
            damaged[choice.choice(places)] = choice.choice((0, 1, 0x80, 0xFF, choice.randrange(256)))
        path.write_bytes(damaged)
        try:
            disk = opened(path, writable=True)
        except ImageError:
            outcomes.add("refused")
            continue
        try:
            read(disk, 0, min(disk.size, CLUSTER))
            write(disk, 0, bytes(min(disk.size, 2 * CLUSTER)))
            disk.discard(0, min(disk.size, CLUSTER))
            disk.flush()
            outcomes.add("used")
        except OSError:
            outcomes.add("failed")
        try:
            disk.close()
        except OSError:
            outcomes.add("failed")
    assert outcomes == {"refused", "used", "failed"}


def test_probe_tells_formats(image: Path, tmp_path: Path) -> None:
    """A given format is used.  Otherwise the first bytes decide."""
    with image.open("rb") as file:
        assert (probe(file.fileno(), "x").format, probe(file.fileno(), "x").size) == ("qcow2", SIZE)
        assert probe(file.fileno(), "x").guessed
        raw = probe(file.fileno(), "x", "raw")
        assert (raw.format, raw.size, raw.guessed) == ("raw", image.stat().st_size, False)
    (tmp_path / "raw").write_bytes(bytes(100))
    with (tmp_path / "raw").open("rb") as file:
        assert (probe(file.fileno(), "x").format, probe(file.fileno(), "x").size) == ("raw", 100)
        with pytest.raises(ImageError, match="not a qcow2 image"):
            probe(file.fileno(), "x", "qcow2")


def test_imgprobe_answers_with_one_line(image: Path) -> None:
    """A refusal has no file name, because imgprobe does not know it."""
    with image.open("rb") as file:
        assert unpack(answer(file.fileno(), "qcow2")) == Probe(format="qcow2", size=SIZE)
        assert unpack(answer(file.fileno(), "raw")) == Probe(format="raw", size=4 * CLUSTER)
        assert unpack(answer(file.fileno(), "")) == Probe(format="qcow2", size=SIZE, guessed=True)
        header_of(image, {4: ("I", 9)})
        assert unpack(answer(file.fileno(), "")) == "unsupported qcow2 version 9"


def test_guessed_image_has_no_backing_file(tmp_path: Path) -> None:
    """A guest may have written that header (hostile 52), so its backing file is not opened by path."""
    create(str(tmp_path / "top"), "qcow2", SIZE, "/etc/shadow", "raw")

    with (tmp_path / "top").open("rb") as file:
        told = probe(file.fileno(), "top", "qcow2")
        guessed = probe(file.fileno(), "top")
    with pytest.raises(ImageError, match=r"top: has backing file /etc/shadow, but .* give it as qcow2:/"):
        OpenedChain(str(tmp_path / "top"))

    assert (told.backing, told.backing_format, told.guessed) == ("/etc/shadow", "raw", False)
    assert (guessed.backing, guessed.guessed) == ("/etc/shadow", True)


def test_extensions_end_with_type_0_52(tmp_path: Path) -> None:
    """Bytes after it are no extension, whatever they are."""
    path = tmp_path / "disk"
    create(str(path), "qcow2", SIZE)
    header_of(path, {104: ("Q", 0), 112: ("Q", 0xE2792ACA00000003), 120: ("8s", b"raw"), 128: ("Q", 0x12345678FFFFFFF)})

    with path.open("rb") as file:
        assert parse_header(file.fileno(), "disk").backing_format == ""


def test_version_2_header_has_extensions_too_52(tmp_path: Path) -> None:
    """They begin at byte 72."""
    path = tmp_path / "disk"
    create(str(path), "qcow2", SIZE)
    header_of(path, {4: ("I", 2), 72: ("Q", 0xE2792ACA00000003), 80: ("8s", b"raw"), 88: ("Q", 0)})
    header_of(path, {8: ("Q", 96), 16: ("I", 4), 96: ("4s", b"base")})

    with path.open("rb") as file:
        header = parse_header(file.fileno(), "disk")

    assert (header.version, header.backing, header.backing_format) == (2, "base", "raw")
