"""Partition tables are read as Linux and OpenBSD read them, and damage is reported."""

import json
import struct
import zlib
from pathlib import Path

import pytest

from tests.support.filesystems import (
    OPENBSD,
    SECTOR,
    Part,
    boot_record,
    disk_of,
    gpt_disk,
    label,
    mbr_disk,
    openbsd_disk,
    opened,
    opened_file,
    put,
    run,
)  # fmt: skip
from vmd.diskfs.partitions import Partition, Table
from vmd.diskfs.source import DiskFsError

FILLED = b"\x11" * 4 * SECTOR


def table(raw: bytes | bytearray) -> Table:
    """Return the partition table of a disk."""
    return opened(raw).table


def places(raw: bytes | bytearray) -> list[tuple[str, int, int]]:
    """Return name, first sector and number of sectors of each usable partition."""
    return [(p.name, p.start // SECTOR, p.size // SECTOR) for p in table(raw).partitions if not p.problem + p.holds]


def named(raw: bytes | bytearray, name: str) -> Partition:
    """Return one partition."""
    return next(partition for partition in table(raw).partitions if partition.name == name)


def test_primary_partitions() -> None:
    """There are up to four, and unused entries are skipped."""
    raw = mbr_disk(Part(8, FILLED), Part(16, FILLED, 0x82))
    assert places(raw) == [("p1", 8, 4), ("p2", 16, 4)]
    put(raw, 0, boot_record((0, 0, 0), (0x83, 8, 4)))
    assert places(raw) == [("p2", 8, 4)]
    assert table(raw).kind == "MBR"


def test_logical_partitions_are_counted_from_five() -> None:
    """Each boot record has the position of the next one."""
    parts = [Part(first, FILLED) for first in (8, 16, 24, 33, 41, 57)]
    raw = mbr_disk(*parts)

    assert places(raw) == [("p1", 8, 4), ("p2", 16, 4), ("p3", 24, 4), ("p5", 33, 4), ("p6", 41, 4), ("p7", 57, 4)]
    assert named(raw, "p4").holds == "logical partitions: p5, p6, p7"


@pytest.mark.parametrize("kind", [0x05, 0x0F, 0x85])
def test_every_kind_of_extended_partition(kind: int) -> None:
    """Those of DOS, of Windows and of Linux."""
    raw = mbr_disk(*[Part(first, FILLED) for first in (8, 16, 24, 33, 41)])
    at = 446 + 3 * 16 + 4
    assert raw[at] in (0x05, 0x0F, 0x85)
    raw[at] = kind

    assert places(raw) == [("p1", 8, 4), ("p2", 16, 4), ("p3", 24, 4), ("p5", 33, 4), ("p6", 41, 4)]


def test_a_chain_of_boot_records_without_an_end_ends() -> None:
    """A loop and a record outside of the disk are reported, and the partitions before them are kept."""
    raw = mbr_disk(*[Part(first, FILLED) for first in (8, 16, 24, 33, 41)])
    put(raw, 40, boot_record((0x83, 1, 4), (0x05, 0, 9)))
    assert named(raw, "p7").problem == "its boot record at sector 32 is in the chain twice"
    assert named(raw, "p6").problem == ""
    put(raw, 40, boot_record((0x83, 1, 4), (0x05, 1 << 30, 9)))
    assert named(raw, "p7").problem == "its boot record at sector 1073741856 is damaged"
    for at in (len(raw) // SECTOR, len(raw) // SECTOR + 1):
        put(raw, 40, boot_record((0x83, 1, 4), (0x05, at - 32, 9)))
        assert named(raw, "p7").problem == f"its boot record at sector {at} is damaged"
    # All boot records differ, so only the limit of their number ends the chain.
    endless = disk_of(size=4096 * SECTOR)
    put(endless, 0, boot_record((0x05, 64, 4000)))
    for number in range(4000):
        put(endless, 64 + number, boot_record((0x83, 1, 1), (0x05, number + 1, 1)))
    assert len(table(endless).partitions) == 129


def test_partitions_outside_of_the_disk_are_named() -> None:
    """The disk may have been truncated."""
    raw = mbr_disk(Part(8, FILLED), Part(16, FILLED))
    end = len(raw)
    put(raw, 0, boot_record((0x83, 8, 4), (0x83, 16, 1000), (0x83, 5000, 4)))

    assert named(raw, "p2").problem == f"ends at {1016 * SECTOR}, after the end of the disk at {end}"
    assert named(raw, "p3").problem == f"begins at {5000 * SECTOR}, after the end of the disk at {end}"
    assert places(raw) == [("p1", 8, 4)]


def test_a_boot_sector_is_no_table() -> None:
    """The boot sector of FAT has text in place of a partition table."""
    raw = mbr_disk(Part(8, FILLED))
    raw[446:510] = b"Remove disks or other media. Press any key to restart".ljust(64, b"\r")

    assert table(raw) == Table()


@pytest.mark.parametrize("entry_bytes", [128, 256])
def test_gpt(entry_bytes: int) -> None:
    """A partition has the number of its entry, for any size of entries."""
    raw = gpt_disk(Part(40, FILLED), Part(48, FILLED), entry_bytes=entry_bytes)
    assert places(raw) == [("p1", 40, 4), ("p2", 48, 4)]
    assert table(raw).kind == "GPT"


def test_the_backup_of_a_gpt_is_used() -> None:
    """The header or the entries of the first GPT are damaged."""
    for at, sector in ((40, 1), (32, 2)):
        raw = gpt_disk(Part(40, FILLED))
        raw[sector * SECTOR + at] ^= 1
        assert places(raw) == [("p1", 40, 4)]


def test_a_gpt_needs_no_backup() -> None:
    """The disk was enlarged, or cut."""
    raw = gpt_disk(Part(40, FILLED))
    put(raw, len(raw) // SECTOR - 1, bytes(SECTOR))
    assert places(raw) == [("p1", 40, 4)]


def test_a_gpt_without_a_valid_copy_is_reported() -> None:
    """The message has the damage of both copies."""
    raw = gpt_disk(Part(40, FILLED))
    last = len(raw) // SECTOR - 1
    raw[SECTOR + 60] ^= 1
    raw[last * SECTOR] ^= 1

    assert table(raw).problem == (
        f"its GPT has a header with a wrong checksum, and the backup has no header in sector {last}"
    )
    with pytest.raises(DiskFsError, match="its GPT has a header"):
        opened(raw).find("/a")


@pytest.mark.parametrize(
    ("count", "size", "header", "said"),
    [
        (1025, 128, 92, "has 1025 entries of 128 bytes"),
        (4, 129, 92, "has 4 entries of 129 bytes"),
        (1024, 4096, 92, "has 1024 entries of 4096 bytes"),
        (4, 128, 513, "has a header of 513 bytes"),
        (4, 128, 91, "has a header of 91 bytes"),
    ],
)
def test_a_gpt_has_bounds(count: int, size: int, header: int, said: str) -> None:
    """The limits hold although the checksums are right."""
    raw = gpt_disk(Part(40, FILLED))
    struct.pack_into("<I", raw, SECTOR + 12, header)
    struct.pack_into("<II", raw, SECTOR + 80, count, size)
    crc = zlib.crc32(raw[SECTOR : SECTOR + 16] + bytes(4) + raw[SECTOR + 20 : SECTOR + header])
    struct.pack_into("<I", raw, SECTOR + 16, crc)
    put(raw, len(raw) // SECTOR - 1, bytes(SECTOR))

    assert said in table(raw).problem


@pytest.mark.parametrize("mbr", [True, False])
def test_disklabel(mbr: bool) -> None:
    """It is in a partition of OpenBSD or alone on the disk.  Its partition `c`, the whole disk, is skipped."""
    raw = openbsd_disk(FILLED, mbr=mbr)

    assert places(raw) == [("a", 64, 4), ("b", 68, len(raw) // SECTOR - 68)]
    assert table(raw).kind == ("MBR and " if mbr else "") + "OpenBSD disklabel"
    if mbr:
        assert named(raw, "p4").holds == "the partitions of a disklabel: a, b"


def test_disklabel_in_a_gpt() -> None:
    """OpenBSD's installer makes this for UEFI."""
    labelled = bytes(SECTOR) + label(("a", 7, 48, 4), ("d", 7, 52, 1 << 33))
    raw = gpt_disk(Part(40, labelled), Part(48, FILLED * 2), guid=OPENBSD)

    assert places(raw) == [("p2", 48, 8), ("a", 48, 4)]
    assert named(raw, "d").problem.startswith(f"ends at {(52 + (1 << 33)) * SECTOR}, after")


def test_disklabel_of_more_than_sixteen_partitions() -> None:
    """Their letters continue after `p`."""
    raw = disk_of(Part(64, FILLED))
    put(raw, 1, label(("a", 7, 64, 4), ("z", 7, 65, 2)))

    assert places(raw) == [("a", 64, 4), ("z", 65, 2)]


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (138, 53, "its disklabel has 53 partitions"),
        (138, 0x102, "its disklabel has 258 partitions"),
        (136, 1, "its disklabel has a wrong checksum"),
    ],
)
def test_damaged_disklabels_are_reported(at: int, value: int, said: str) -> None:
    """The disk is not treated as one without a disklabel."""
    raw = openbsd_disk(FILLED, mbr=False)
    struct.pack_into("<H", raw, SECTOR + at, value)

    assert table(raw).problem == said


def test_a_disklabel_for_other_sectors_is_named() -> None:
    """Its sector numbers would have another meaning."""
    raw = disk_of(Part(64, FILLED))
    put(raw, 1, label(("a", 7, 8, 4), sector_bytes=4096))

    assert table(raw).problem == "its disklabel is for sectors of 4096 bytes"


@pytest.mark.parametrize("size", [0, 1, 511, 512, 1023, 1024, 2048])
def test_a_disk_may_be_of_any_size(size: int) -> None:
    """A disk without room for a table has none."""
    found = table(boot_record((0x83, 1, 1))[:size].ljust(size, b"\0"))
    assert (found.kind, found.problem) == ("MBR" if size >= 1024 else "", "")


@pytest.mark.parametrize(
    "script",
    [
        "label: dos\nsize=2MiB\nsize=1MiB, type=82\nsize=3MiB, bootable\n",
        "label: dos\nsize=1MiB\ntype=5\nsize=1MiB\nsize=2MiB\nsize=1MiB\n",
        "label: dos\n3: size=1MiB\n1: size=4MiB, type=f\n5: size=512KiB\n6: size=512KiB\n",
        "label: gpt\nsize=2MiB\n4: size=1MiB, type=U\n128: size=1MiB\n",
        "label: gpt\ntable-length: 56\nsize=2MiB\nsize=1MiB\n",
    ],
)
def test_sfdisk_agrees(tmp_path: Path, script: str) -> None:
    """We read the partitions that sfdisk has written and reads."""
    image = tmp_path / "image"
    image.write_bytes(bytes(16 << 20))
    run("sfdisk", "-q", image, stdin=script)
    told = json.loads(run("sfdisk", "-J", image))["partitiontable"]["partitions"]

    found = [(p.name, p.start // SECTOR, p.size // SECTOR) for p in opened_file(image).table.partitions]

    expected = [(f"p{each['node'].removeprefix(str(image))}", each["start"], each["size"]) for each in told]
    assert found == expected
    assert len(found) >= 2
