"""The discard limits are true: a guest that discards pieces of the announced alignment frees the host's blocks.

The real disk process serves the requests.  The host's block counts show the result.
"""

import os
import struct
from pathlib import Path

import pytest

from tests.support.blkdriver import DISCARD, OK, WRITE_ZEROES, BlockDriver
from tests.support.diskstorage import run
from tests.support.images import KIB, MIB, problems, qemu
from vmd.files.images import discard_granularity
from vmd.units import SECTOR

LIMITS_AT = 36
SMALL, LARGE = 4 * MIB, 12 * MIB  # disks; the large one is for the largest clusters
PIECE = 256 * KIB
SLACK = MIB // 2  # tables of the image and of the file system


class Limits:
    """The fields of the configuration space about discard and write zeroes."""

    def __init__(self, config: bytes) -> None:
        (self.max_discard, self.discard_ranges, self.alignment, self.max_zeroes, self.zeroes_ranges) = (
            struct.unpack_from("<5I", config, LIMITS_AT)
        )


def held(path: Path) -> int:
    """Return the number of bytes that a file occupies in its file system."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_blocks * 512


def size_for(cluster: int) -> int:
    """Return the size of the test disk for this cluster size."""
    return LARGE if cluster > MIB else SMALL


def make(folder: Path, cluster: int, levels: int) -> tuple[list[Path], tuple[str, ...]]:
    """Make an image.  A `cluster` of 0 makes a raw one.  `levels` is the number of backing files, 0 or 1."""
    size = size_for(cluster)
    top, base = folder / "top", folder / "base"
    if not cluster:
        qemu("qemu-img", "create", "-qf", "raw", top, size)
        return [top], ("raw",)
    below: tuple[object, ...] = ()
    if levels:
        qemu("qemu-img", "create", "-qf", "raw", base, size)
        below = ("-F", "raw", "-b", base)
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", f"cluster_size={cluster}", *below, top, size)
    return [top, base][: 1 + levels], ("qcow2", "raw")[: 1 + levels]


def fill(driver: BlockDriver) -> None:
    """Write the whole disk."""
    for at in range(0, driver.sectors * SECTOR, PIECE):
        driver.write(at // SECTOR, b"x" * PIECE)
    driver.wait_all()
    assert driver.wait_for(driver.flush()).status == OK
    assert {request.status for request in driver.done} == {OK}


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES], ids=["discard", "unmap"])
@pytest.mark.parametrize(
    ("cluster", "levels"),
    [(0, 0), (512, 0), (4 * KIB, 0), (64 * KIB, 0), (2 * MIB, 0), (4 * KIB, 1), (64 * KIB, 1), (2 * MIB, 1)],
    ids=["raw", "512", "4k", "64k", "2m", "4k-overlay", "64k-overlay", "2m-overlay"],
)
def test_discarded_pieces_give_their_room_back(tmp_path: Path, cluster: int, levels: int, kind: int) -> None:
    """The pieces have the announced alignment as their size, and follow each other."""
    paths, formats = make(tmp_path, cluster, levels)
    size = size_for(cluster)
    with BlockDriver(paths, formats) as driver:
        limits = Limits(driver.device.config)
        fill(driver)
        full = held(paths[0])
        unmap = int(kind == WRITE_ZEROES)
        pieces = [(at, limits.alignment, unmap) for at in range(0, size // SECTOR, limits.alignment)]
        for at in range(0, len(pieces), limits.zeroes_ranges):
            driver.change_ranges(kind, pieces[at : at + limits.zeroes_ranges])
        driver.wait_all()
        assert driver.wait_for(driver.flush()).status == OK
        assert {request.status for request in driver.done} == {OK}
        driver.shut_down()

    assert full >= size
    # With 512-byte clusters, every 64th is a table.  It keeps one block of the file system (eight clusters) occupied.
    assert held(paths[0]) < SLACK + 5 * cluster + (size // 7 if cluster == 512 else 0)
    if cluster:
        assert problems(paths[0]) == {}


@pytest.mark.parametrize("cluster", [0, 512, 4 * KIB, 64 * KIB, 2 * MIB])
def test_limits_depend_on_the_image(tmp_path: Path, cluster: int) -> None:
    """The alignment is the cluster size, and at least the file system's block size.  Limits are multiples of it."""
    paths, formats = make(tmp_path, cluster, 0)
    with BlockDriver(paths, formats) as driver:
        limits = Limits(driver.device.config)

        assert limits.alignment * SECTOR == max(cluster, paths[0].stat().st_blksize)
        assert limits.max_discard % limits.alignment == limits.max_zeroes % limits.alignment == 0
        assert min(limits.max_discard, limits.max_zeroes) * SECTOR >= LARGE
        one = [(0, limits.max_discard, 0)]
        assert driver.wait_for(driver.change_ranges(DISCARD, one)).status != OK  # longer than the disk
        one = [(0, size_for(cluster) // SECTOR, 0)]
        assert driver.wait_for(driver.change_ranges(DISCARD, one)).status == OK


@pytest.mark.root
@pytest.mark.parametrize(
    ("told", "expected"), [(192 * KIB, 192 * KIB), (0, 4 * KIB), ((1 << 24) * SECTOR - SECTOR, 4 * KIB)]
)
def test_granularity_of_a_device_is_told_to_the_guest(tmp_path: Path, told: int, expected: int) -> None:
    """It may be any number of sectors.  An impossible value counts as unknown."""
    file = tmp_path / "device"
    with file.open("wb") as new:
        new.truncate(8 * MIB)
    device = Path(run("losetup", "-f", "--show", file))
    try:
        with BlockDriver([device], ("raw",), granularity=told) as driver:
            limits = Limits(driver.device.config)

            assert limits.alignment * SECTOR == expected
            assert limits.max_discard % limits.alignment == limits.max_zeroes % limits.alignment == 0
    finally:
        run("losetup", "-d", device)


@pytest.mark.root
def test_granularity_of_a_device_comes_from_the_kernel(tmp_path: Path) -> None:
    """A regular file has granularity 0."""
    file = tmp_path / "device"
    with file.open("wb") as new:
        new.truncate(8 * MIB)
        assert discard_granularity(new.fileno()) == 0
    device = Path(run("losetup", "-f", "--show", file))
    try:
        expected = int(Path(f"/sys/block/{device.name}/queue/discard_granularity").read_text())
        with device.open("rb") as opened:
            assert discard_granularity(opened.fileno()) == expected > 0
    finally:
        run("losetup", "-d", device)
