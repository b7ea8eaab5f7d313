"""Units of metadata: which are known to be writable, and which a flush writes."""

import errno
import itertools
import os
import posix
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.images import KIB, MIB, opened_qcow2, problems, qemu, read, write
from vmd.images.units import Prepared, runs


@given(st.sets(st.integers(0, 600)))
def test_runs_are_those_of_the_set(units: set[int]) -> None:
    """They cover the set in order, and no two are adjacent."""
    found = list(runs(sum(1 << unit for unit in units)))

    assert [unit for first, end in found for unit in range(first, end)] == sorted(units)
    assert all(end < first for (_, end), (first, _) in itertools.pairwise(found))


def test_prepare_writes_a_unit_once_without_changing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's content and length stay the same, and a hole gets storage."""
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(MIB)
        file.seek(8 * KIB)
        file.write(b"x" * 100)
        file.truncate(12 * KIB + 7)
    before = path.read_bytes()
    fd = os.open(path, os.O_RDWR)
    prepared = Prepared(fd, 64 * KIB)

    prepared.prepare(8 * KIB + 10, 5 * KIB)
    os.fsync(fd)
    assert path.stat().st_blocks * 512 == 8 * KIB
    monkeypatch.setattr(posix, "pwritev", None)
    prepared.prepare(9 * KIB, 2 * KIB)
    os.close(fd)

    assert prepared.known == {2, 3}
    monkeypatch.undo()
    for offset, length, units in ((0, 4 * KIB, {0}), (4 * KIB - 1, 1, {0}), (4 * KIB - 1, 2, {0, 1})):
        fd = os.open(path, os.O_RDWR)
        prepared = Prepared(fd, 64 * KIB)
        prepared.prepare(offset, length)
        os.close(fd)
        assert prepared.known == units
    fd = os.open(path, os.O_RDWR)
    prepared = Prepared(fd, 64 * KIB)
    prepared.write(before[: 8 * KIB], 0)
    os.close(fd)
    prepared.prepare(0, 8 * KIB)  # the descriptor is closed, so nothing is written
    assert path.read_bytes() == before


def test_clusters_are_freed_though_the_rest_of_their_refcounts_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refcount block of 2 MiB is mostly a hole without room.  The unit with the used entries can be written."""
    path, cluster = tmp_path / "image", 2 * MIB
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", "cluster_size=2M", path, 16 * MIB)
    image = opened_qcow2(path)
    write(image, 0, b"a" * cluster)
    write(image, 2 * cluster, b"b" * cluster)
    image.close()
    table = int.from_bytes(path.read_bytes()[48:56], "big")
    block = int.from_bytes(path.read_bytes()[table : table + 8], "big")
    image, real = opened_qcow2(path), os.pwritev

    def no_room(fd: int, views: list[memoryview], offset: int) -> int:
        if offset < block + cluster and offset + sum(map(len, views)) > block + 4 * KIB and offset >= block:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, views, offset)

    monkeypatch.setattr(posix, "pwritev", no_room)
    image.discard(0, cluster)
    image.flush()
    write(image, 4 * cluster, b"c" * 512)
    image.close()
    monkeypatch.undo()

    assert problems(path) == {}
    image = opened_qcow2(path, writable=False)
    assert read(image, 0, 512) == bytes(512)
    assert read(image, 4 * cluster, 1024) == b"c" * 512 + bytes(512)
    image.close()


def test_flush_writes_no_unit_that_has_not_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first and the last unit of an L2 table changed.  Between them may be a hole without room."""
    path = tmp_path / "image"
    qemu("qemu-img", "create", "-qf", "qcow2", path, 512 * MIB)
    image = opened_qcow2(path)
    write(image, 0, b"a" * 512)
    image.close()
    image = opened_qcow2(path)
    table = image.l1[0] & (1 << 63) - 1
    write(image, 64 * KIB, b"b" * 512)
    write(image, 512 * MIB - 512, b"c" * 512)
    image.refcounts.write_blocks()
    written, real = [], os.pwritev

    def note(fd: int, views: list[memoryview], offset: int) -> int:
        written.append((offset - table, sum(map(len, views))))
        return real(fd, views, offset)

    monkeypatch.setattr(posix, "pwritev", note)
    image.flush()
    image.close()

    assert written == [(0, 4 * KIB), (60 * KIB, 4 * KIB)]
