"""qcow2 images after a power cut: any part of the unflushed writes may be on the disk, in any order.

This is harder than a kill, after which all writes remain.  The tests record everything that an image writes to its
file.  They then make files that a disk could hold after a power cut: all writes before the last fdatasync, and any
sectors of the later ones.  QEMU must find no corruption in them, and the content must be one that is allowed.
"""

import os
import posix
import random
import subprocess
from pathlib import Path

import pytest

from tests.support.images import KIB, MIB, opened, problems, qemu, write
from vmd.images import hostfile, qcow2
from vmd.images.header import AT_REFCOUNT_TABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SECTOR = 512
UNIT = 8 * KIB  # a unit holds one number, repeated in each of its sectors
UNITS = 256
ANY = -1  # the content after a discard is undefined
BARRIER = (-1, b"")
CUTS = 50


class Recorder:
    """The recorded operations on a file: (offset, bytes) of each write, and a BARRIER for each fdatasync."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.before = path.read_bytes()
        self.done: list[tuple[int, bytes]] = []
        self.real = os.pwritev, os.fdatasync, os.ftruncate
        monkeypatch.setattr(posix, "pwritev", self.pwritev)
        monkeypatch.setattr(posix, "fdatasync", self.fdatasync)
        monkeypatch.setattr(posix, "ftruncate", self.ftruncate)
        monkeypatch.setattr(qcow2, "fallocate", self.fallocate)

    def pwritev(self, fd: int, views: list[memoryview], offset: int) -> int:
        """Record a write."""
        length = self.real[0](fd, views, offset)
        self.done.append((offset, b"".join(views)[:length]))
        return length

    def fdatasync(self, fd: int) -> None:
        """Record that all earlier operations are safe."""
        self.real[1](fd)
        self.done.append(BARRIER)

    def ftruncate(self, fd: int, size: int) -> None:
        """Record growth."""
        self.real[2](fd, size)
        self.done.append((size, b""))

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """Record a hole as zeroes."""
        assert mode == hostfile.FALLOC_FL_PUNCH_HOLE | hostfile.FALLOC_FL_KEEP_SIZE
        end = min(offset + length, os.fstat(fd).st_size)
        hostfile.fallocate(fd, mode, offset, length)
        if end > offset:
            self.done.append((offset, bytes(end - offset)))

    def barriers(self, after: int = 0) -> list[int]:
        """Return the numbers of the barriers from operation `after` on."""
        return [number for number in range(after, len(self.done)) if self.done[number] is BARRIER]

    def safe(self, at: int) -> int:
        """Return how many of the first `at` operations have reached the disk for certain."""
        return max((number for number in range(at) if self.done[number] is BARRIER), default=0)

    def any_sectors(self, at: int, choice: random.Random) -> "Callable[[int], bool]":
        """Return a function that tells whether a sector written before operation `at` reaches the disk."""
        one = choice.randrange(self.safe(at), at)
        return choice.choice((
            lambda _number: False,
            lambda _number: choice.random() < 0.5,
            lambda number: number != one,
            lambda number: number == one,
        ))  # fmt: skip

    def after_cut(self, at: int, reaches: "Callable[[int], bool]") -> bytes:
        """Return the file after a power cut before operation `at`, where sectors that were not safe may be lost."""
        safe = self.safe(at)
        file = bytearray(self.before)
        for number, (offset, data) in enumerate(self.done[:at]):
            if self.done[number] is BARRIER:
                continue
            if len(file) < offset + len(data):
                file.extend(bytes(offset + len(data) - len(file)))
            if number < safe:
                file[offset : offset + len(data)] = data
                continue
            position = 0
            while position < len(data):
                step = min(SECTOR - (offset + position) % SECTOR, len(data) - position)
                if reaches(number):
                    file[offset + position : offset + position + step] = data[position : position + step]
                position += step
        return bytes(file)


def bounds(moments: list[tuple[int, list[set[int]]]], index: int) -> tuple[int, int]:
    """Return the operations that belong to a request."""
    return moments[index - 1][0], moments[index][0]


@pytest.mark.parametrize(
    ("options", "based"),
    [
        ("cluster_size=64k", False),
        ("cluster_size=64k", True),
        ("cluster_size=4k,compat=0.10", True),
        ("cluster_size=512,refcount_bits=64", False),
        ("cluster_size=4k,refcount_bits=1", False),
    ],
)
def test_power_cut_leaves_a_consistent_image(
    tmp_path: Path, options: str, based: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image is never corrupt.  Every unit has its number from the last flush, or a later one."""
    path, base, cut = tmp_path / "image", tmp_path / "base", tmp_path / "cut"
    base.write_bytes(bytes(UNITS * UNIT))
    below = ("-F", "raw", "-b", base) if based else ()
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", options, *below, path, UNITS * UNIT)
    choice = random.Random(len(options) + based)
    paths = (path, base) if based else (path,)
    image = opened(*paths, writable=True, formats=("qcow2", "raw")[: len(paths)])
    recorder = Recorder(path, monkeypatch)
    latest = [0] * UNITS
    moments: list[tuple[int, list[set[int]]]] = []  # (number of operations, possible numbers of each unit at that time)
    possible = [{0} for _ in range(UNITS)]

    for number in range(1, 400):
        unit, what = choice.randrange(UNITS), choice.random()
        if what < 0.1:
            image.flush()
            possible = [{one} for one in latest]
        else:
            latest[unit] = number if what < 0.75 else 0 if what < 0.9 else ANY
            possible[unit] = possible[unit] | {latest[unit]}
            if latest[unit] == ANY:
                image.discard(unit * UNIT, UNIT)
            elif latest[unit] == 0:
                image.write_zeroes(unit * UNIT, UNIT, choice.random() < 0.5)
            else:
                write(image, unit * UNIT, number.to_bytes(4, "little") * (UNIT // 4))
        moments.append((len(recorder.done), list(possible)))
    image.close()
    monkeypatch.undo()

    flushes = [index for index in range(1, len(moments)) if BARRIER in recorder.done[slice(*bounds(moments, index))]]
    for _ in range(CUTS):
        index = choice.choice(flushes) if choice.random() < 0.8 else choice.randrange(1, len(moments))
        # A cut in the middle of a request may leave the content before or after it.
        (start, earlier), (end, later) = moments[index - 1], moments[index]
        at = choice.randint(max(1, start), max(1, end))
        cut.write_bytes(recorder.after_cut(at, recorder.any_sectors(at, choice)))
        assert set(problems(cut)) <= {"leaks"}
        qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", cut, tmp_path / "content")
        content = (tmp_path / "content").read_bytes()
        for unit in range(UNITS):
            allowed = earlier[unit] | later[unit]
            for at in range(unit * UNIT, (unit + 1) * UNIT, SECTOR):
                found = int.from_bytes(content[at : at + 4], "little")
                assert found in allowed or ANY in allowed, f"unit {unit} holds {found}, not one of {allowed}"
                assert content[at : at + SECTOR] == content[at : at + 4] * (SECTOR // 4)


def consistent(path: Path) -> bool:
    """Return whether QEMU finds nothing worse than leaks."""
    try:
        return set(problems(path)) <= {"leaks"}
    except (subprocess.CalledProcessError, AssertionError):
        return False


def test_power_cut_while_the_refcount_table_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header points to the new table only after the table is on the disk."""
    path, cut = tmp_path / "image", tmp_path / "cut"
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", "cluster_size=512,refcount_bits=64", path, "4M")
    image = opened(path, writable=True)
    recorder = Recorder(path, monkeypatch)
    for offset in range(0, 3 * MIB, MIB):
        write(image, offset, b"x" * MIB)
        image.flush()
    image.close()
    monkeypatch.undo()

    moved = [number for number, (offset, _) in enumerate(recorder.done) if offset == AT_REFCOUNT_TABLE]
    assert moved
    for number in moved:
        for reaches in (True, False):  # of all unsafe writes only this one, or all except this one
            cut.write_bytes(recorder.after_cut(number + 1, lambda one: (one == number) is reaches))  # noqa: B023
            assert consistent(cut)


def test_power_cut_while_refcount_blocks_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No used table refers to a cluster before its refcount block is on the disk and in the refcount table."""
    path, cut = tmp_path / "image", tmp_path / "cut"
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", "cluster_size=512,refcount_bits=64", path, "1M")
    image = opened(path, writable=True)
    for offset in range(0, MIB, 32 * KIB):
        write(image, offset, b"a" * SECTOR)  # all L2 tables exist from now on
    image.flush()
    recorder = Recorder(path, monkeypatch)
    for offset in range(SECTOR, MIB, 16 * KIB):
        write(image, offset, b"b" * 15 * KIB)
        image.flush()
    image.close()
    monkeypatch.undo()

    table = int.from_bytes(recorder.before[48:56], "big")
    added = [number for number, (offset, _) in enumerate(recorder.done) if table <= offset < table + SECTOR]
    assert added
    for number in added:
        for end in recorder.barriers(number)[:2]:
            cut.write_bytes(recorder.after_cut(end, lambda one: one != number))  # noqa: B023
            assert consistent(cut), "clusters are used before the table entry of their refcounts"
        cut.write_bytes(recorder.after_cut(number + 1, lambda one: one == number))  # noqa: B023
        assert consistent(cut), "the table entry precedes its refcount block"


@pytest.mark.parametrize("based", [False, True])
def test_power_cut_while_a_disk_grows(tmp_path: Path, based: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the old or the new size, its content, and zeroes in the new part, never data of a backing file."""
    path, base, cut = tmp_path / "image", tmp_path / "base", tmp_path / "cut"
    before, after = 1 * MIB, 4 * MIB
    content = random.Random(1).randbytes(before)
    base.write_bytes(content + b"b" * before)
    below = ("-F", "raw", "-b", base) if based else ()
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", "cluster_size=512", *below, path, before)
    paths = (path, base) if based else (path,)
    image = opened(*paths, writable=True, formats=("qcow2", "raw")[: len(paths)])
    write(image, 0, content)
    image.flush()
    recorder = Recorder(path, monkeypatch)
    image.grow(after)
    image.close()
    monkeypatch.undo()

    moments = {moment for barrier in recorder.barriers() for moment in (barrier, barrier + 1)} | {len(recorder.done)}
    choice = random.Random(2)
    sizes = set()
    for at in sorted(moments):
        for reaches in (lambda _number: True, recorder.any_sectors(max(1, at), choice)):
            cut.write_bytes(recorder.after_cut(at, reaches))
            assert consistent(cut)
            qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", cut, tmp_path / "content")
            found = (tmp_path / "content").read_bytes()
            assert found in (content, content + bytes(after - before))
            sizes.add(len(found))
    assert sizes == {before, after}
