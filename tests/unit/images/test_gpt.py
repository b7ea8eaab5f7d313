"""The size of the disk that a partition table was made for."""

import zlib
from pathlib import Path

import pytest

from tests.support.images import opened
from vmd.images.gpt import END_MAX, HEADER, SIGNATURE, gpt_end

COPY = 99  # sector of the copy


def end_of(path: Path, sector: int, **changes: int) -> int:
    """Return what is found on a disk with a table; `changes` are wrong values of its fields."""
    given = {"length": 92, "own": 1, "copy": COPY, "crc": 0} | changes
    size = max(HEADER.size, min(given["length"], sector))
    signature = SIGNATURE if "signature" not in changes else b"EFI PARX"
    fields = [signature, 0x10000, given["length"], 0, 0, given["own"], given["copy"]]
    crc = zlib.crc32(HEADER.pack(*fields).ljust(size, b"\0")[:size]) + given["crc"]
    fields[3] = crc
    path.write_bytes(bytes(sector) + HEADER.pack(*fields).ljust(sector, b"\0"))
    image = opened(path, formats=("raw",))
    try:
        return gpt_end(image)
    finally:
        image.close()


@pytest.mark.parametrize("sector", [512, 4096])
def test_size_is_found(tmp_path: Path, sector: int) -> None:
    """It ends with the copy of the table.  A header may fill its sector; the largest disk ends before 2^63 bytes."""
    assert END_MAX == 9223372036854775807
    last = END_MAX // sector - 1
    cases: list[tuple[dict[str, int], int]] = [
        ({}, (COPY + 1) * sector),
        ({"length": sector}, (COPY + 1) * sector),
        ({"length": HEADER.size}, (COPY + 1) * sector),
        ({"copy": last}, (last + 1) * sector),
    ]
    for changes, end in cases:
        assert end_of(tmp_path / "disk", sector, **changes) == end


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize(
    "changes",
    [{"signature": 0}, {"own": 2}, {"own": 0}, {"crc": 1}, {"length": 39}, {"copy": (1 << 64) - 1}, {"copy": 1 << 54}],
)
def test_table_with_wrong_values_is_none(tmp_path: Path, sector: int, changes: dict[str, int]) -> None:
    """Nothing is said about the size then."""
    assert HEADER.size == 40
    assert end_of(tmp_path / "disk", sector, **changes) == 0


@pytest.mark.parametrize("size", [0, 512, 1024, 8192])
def test_disk_without_a_table(tmp_path: Path, size: int) -> None:
    """It may be shorter than a table."""
    (tmp_path / "disk").write_bytes(bytes(size))
    image = opened(tmp_path / "disk", formats=("raw",))
    assert gpt_end(image) == 0
    image.close()
