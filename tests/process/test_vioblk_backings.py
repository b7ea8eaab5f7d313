"""The disk process on files and devices that end, fill up, grow, shrink or have limits keeps all acknowledged data.

Each request succeeds or fails by itself.  A request without room makes no other request, flush or shutdown fail.
"""

import contextlib
import errno
import os
import random
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.blkdriver import IOERR, OK, BlockDriver
from tests.support.images import KIB, MIB, check_report, opened, problems, qemu, same, small_file_system
from tests.support.loopdevice import LoopDevice
from vmd.images.hostfile import fallocate
from vmd.units import SECTOR

pytestmark = pytest.mark.root

UNIT = 8 * KIB
PER_UNIT = UNIT // SECTOR


def make_image(path: Path, size: int, options: str = "cluster_size=64k") -> Path:
    """Have QEMU make an empty image."""
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", options, path, size)
    return path


class Writer:
    """Writes units of a disk in random order, and remembers the acknowledged content in `flat`."""

    def __init__(self, driver: BlockDriver, size: int, seed: int = 1) -> None:
        self.driver = driver
        self.flat = bytearray(size)
        self.choice = random.Random(seed)
        self.order = list(range(size // UNIT))
        self.choice.shuffle(self.order)
        self.done = self.refused = 0

    def write(self, count: int) -> None:
        """Write `count` units, one after the other.  After a refused write, read what is there now."""
        for _ in range(count):
            unit = self.order[(self.done + self.refused) % len(self.order)]
            data = self.choice.randbytes(UNIT)
            if self.driver.wait_for(self.driver.write(unit * PER_UNIT, data)).status == OK:
                self.done += 1
            else:
                self.refused += 1
                data = self.driver.read_now(unit * PER_UNIT, UNIT)
            self.flat[unit * UNIT : (unit + 1) * UNIT] = data

    def flush(self) -> int:
        """Flush; return the status."""
        return self.driver.wait_for(self.driver.flush()).status


@contextlib.contextmanager
def device_with(image: Path, size: int) -> Iterator[LoopDevice]:
    """Give a device of `size` bytes with an image on it."""
    with LoopDevice(image.with_suffix(".device"), size) as device:
        device.load(image)
        yield device


# --- devices of any size -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ("cluster_size=64k", 64 * MIB + 512),
        ("cluster_size=64k", 63 * MIB + 4 * KIB),
        ("cluster_size=2M", 64 * MIB - 512),
        ("cluster_size=512", 64 * MIB + 512),
        ("compat=0.10", 64 * MIB - 512),
    ],
)
def test_image_on_a_device_keeps_everything(tmp_path: Path, options: str, size: int) -> None:
    """On a device of any size all writes and flushes succeed, and all data is there after an orderly end."""
    with device_with(make_image(tmp_path / "image", 16 * MIB, options), size) as device:
        with BlockDriver([device.path]) as driver:
            writer = Writer(driver, 16 * MIB)
            writer.write(40)
            assert writer.flush() == OK
            writer.write(40)
            driver.shut_down()

        assert writer.refused == 0
        assert problems(device.path) == {}
        same(device.path, writer.flat, tmp_path)


def test_a_guest_that_writes_nothing_causes_no_log_line(tmp_path: Path) -> None:
    """The end of a disk process on a device causes no error."""
    with device_with(make_image(tmp_path / "image", 16 * MIB), 64 * MIB + 512) as device:
        with BlockDriver([device.path]) as driver:
            driver.shut_down()

        assert problems(device.path) == {}


def test_flushed_data_is_on_the_device_after_a_kill(tmp_path: Path) -> None:
    """The image has every flushed byte, and nothing worse than leaks."""
    with device_with(make_image(tmp_path / "image", 16 * MIB), 64 * MIB + 512) as device:
        with BlockDriver([device.path]) as driver:
            writer = Writer(driver, 16 * MIB)
            writer.write(100)
            assert writer.flush() == OK
            driver.device.child.kill(signal.SIGKILL)
            assert driver.device.status() == -signal.SIGKILL

        assert set(problems(device.path)) <= {"leaks"}
        same(device.path, writer.flat, tmp_path)


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_backing_file_may_be_a_device_of_any_size(tmp_path: Path, kind: str) -> None:
    """Clusters that an overlay does not have are read from the device, up to its end."""
    size = 3 * MIB + 512
    flat = bytearray(random.Random(5).randbytes(size))
    (tmp_path / "flat").write_bytes(flat)
    base, room = tmp_path / "flat", size
    if kind == "qcow2":
        base, room = tmp_path / "base", size + MIB
        qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", tmp_path / "flat", base)
    with device_with(base, room - room % SECTOR) as device:
        top = tmp_path / "top"
        qemu("qemu-img", "create", "-qf", "qcow2", "-F", kind, "-b", device.path, top, 4 * MIB)
        with BlockDriver([top, device.path], ("qcow2", kind)) as driver:
            flat += bytes(4 * MIB - size)
            assert driver.read_now(0, 4 * MIB) == flat
            assert driver.wait_for(driver.write((size - 1024) // SECTOR, b"t" * 4 * KIB)).status == OK
            flat[size - 1024 : size - 1024 + 4 * KIB] = b"t" * 4 * KIB
            assert driver.read_now(0, 4 * MIB) == flat
            driver.shut_down()

        assert problems(top) == {}
        same(top, flat, tmp_path)


def test_raw_device_is_a_disk_to_its_last_sector(tmp_path: Path) -> None:
    """The size of the device is not a multiple of the page size."""
    size = 2 * MIB + 3 * 512
    with LoopDevice(tmp_path / "device", size) as device:
        with BlockDriver([device.path], ("raw",)) as driver:
            assert driver.sectors * SECTOR == size
            assert driver.wait_for(driver.write(size // SECTOR - 8, b"e" * 4 * KIB)).status == OK
            assert driver.read_now(size // SECTOR - 8, 4 * KIB) == b"e" * 4 * KIB
            driver.shut_down()

        assert device.path.read_bytes()[-4 * KIB :] == b"e" * 4 * KIB


@pytest.mark.parametrize(
    ("start", "end", "whole"),
    [
        (0, 64 * KIB, (0, 64 * KIB)),
        (512, 64 * KIB - 512, (4 * KIB, 60 * KIB)),
        (5 * KIB, 7 * KIB, None),
        (7 * KIB, 9 * KIB, None),
        (63 * KIB, 64 * KIB + 512, (64 * KIB, 64 * KIB + 512)),
    ],
)
def test_only_whole_blocks_of_a_device_are_discarded_by_the_kernel(
    tmp_path: Path, start: int, end: int, whole: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a partial block the kernel would not lock out other writers, and could bring the old content back."""
    calls = []

    def note(fd: int, mode: int, offset: int, length: int) -> None:
        calls.append((offset, offset + length))
        fallocate(fd, mode, offset, length)

    monkeypatch.setattr("vmd.images.raw.fallocate", note)
    with LoopDevice(tmp_path / "device", 64 * KIB + 512) as device:
        before = device.path.read_bytes()
        for unmap in (False, True):
            image = opened(device.path, writable=True, formats=("raw",))
            image.pwritev(0, [memoryview(before)])
            image.write_zeroes(start, end - start, unmap)
            image.flush()
            image.close()
            assert device.path.read_bytes() == before[:start] + bytes(end - start) + before[end:]
        image = opened(device.path, writable=True, formats=("raw",))
        image.pwritev(0, [memoryview(before)])
        image.discard(start, end - start)
        image.close()
        after = device.path.read_bytes()

    assert (after[:start], after[end:]) == (before[:start], before[end:])
    assert calls == [whole] * 3 if whole else calls == []


# --- no room ---------------------------------------------------------------------------------------------------------


def fill_and_check(path: Path, tmp_path: Path, size: int, limit: Callable[[int], object] = str) -> None:
    """Write until there is no room, and go on.  Every flush succeeds, and all acknowledged data is kept."""
    with BlockDriver([path]) as driver:
        limit(driver.device.child.pid)
        writer = Writer(driver, size)
        for _ in range(8):
            writer.write(size // UNIT // 8)
            assert writer.flush() == OK
            assert driver.read_now(0, size) == writer.flat
        assert writer.done
        assert writer.refused
        writer.write(size // UNIT // 8)
        log = driver.shut_down(quiet=False)

    assert "flush" not in log
    assert "close" not in log
    assert set(problems(path)) <= {"leaks"}
    same(path, writer.flat, tmp_path)


@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=4k", "cluster_size=512,refcount_bits=64"])
def test_device_smaller_than_the_image(tmp_path: Path, options: str) -> None:
    """Data that fits is kept.  Each write without room is refused by itself."""
    with device_with(make_image(tmp_path / "image", 8 * MIB, options), 3 * MIB + 512) as device:
        fill_and_check(device.path, tmp_path, 8 * MIB)


@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=4k"])
def test_device_that_grows_is_used_further(tmp_path: Path, options: str) -> None:
    """The process asks for the size of the device again when it reaches the end."""
    with device_with(make_image(tmp_path / "image", 8 * MIB, options), 3 * MIB + 512) as device:
        with BlockDriver([device.path]) as driver:
            writer = Writer(driver, 8 * MIB)
            writer.write(900)
            assert writer.refused
            refused = writer.refused
            assert writer.flush() == OK
            device.resize(16 * MIB + 1024)
            writer.write(600)
            assert writer.refused == refused
            assert writer.flush() == OK
            assert driver.read_now(0, 8 * MIB) == writer.flat
            writer.write(100)
            driver.shut_down(quiet=False)

        assert set(problems(device.path)) <= {"leaks"}
        same(device.path, writer.flat, tmp_path)


def test_device_that_shrinks_loses_only_the_data_behind_its_end(tmp_path: Path) -> None:
    """Reads behind the end fail.  The image does not count as corrupt, and the rest of the device works."""
    with device_with(make_image(tmp_path / "image", 16 * MIB), 32 * MIB) as device:
        with BlockDriver([device.path]) as driver:
            for unit in range(16):
                assert driver.wait_for(driver.write(unit * MIB // SECTOR, bytes([unit + 1]) * MIB)).status == OK
                driver.wait_for(driver.flush())
            device.resize(8 * MIB + 512)
            assert driver.read_now(0, MIB) == b"\1" * MIB
            assert driver.wait_for(driver.read(15 * MIB // SECTOR, 4 * KIB)).status == IOERR
            assert driver.wait_for(driver.write(15 * MIB // SECTOR, b"x" * 4 * KIB)).status == IOERR
            assert driver.wait_for(driver.write(0, b"y" * 4 * KIB)).status == OK
            assert driver.wait_for(driver.flush()).status == OK
            assert "corrupt" not in driver.shut_down(quiet=False)
        device.resize(32 * MIB)

        assert "corruptions" not in problems(device.path) or check_report(device.path)["corruptions"] == 0


@pytest.mark.parametrize(("options", "limit"), [("cluster_size=64k", 3 * MIB + 700), ("cluster_size=4k", 3 * MIB)])
def test_file_that_may_not_become_longer(tmp_path: Path, options: str, limit: int) -> None:
    """EFBIG, as of a file size limit or FAT's largest file, and the signal that the limit causes."""
    path = make_image(tmp_path / "image", 8 * MIB, options)

    def set_limit(pid: int) -> None:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    fill_and_check(path, tmp_path, 8 * MIB, set_limit)


def test_full_file_system_with_an_image_full_of_holes(tmp_path: Path) -> None:
    """A table in a hole also needs room.  It gets the room before a write that depends on it is acknowledged."""
    size = 32 * MIB
    made = make_image(tmp_path / "made", size, "cluster_size=16k")
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 16k", made)  # now there is an L2 table, of four pages
    with small_file_system(tmp_path / "small") as small:
        path = small / "image"
        subprocess.run(["cp", "--sparse=always", made, path], check=True)
        with BlockDriver([path]) as driver:
            writer = Writer(driver, size)
            writer.flat[: 16 * KIB] = b"\7" * 16 * KIB
            while writer.refused < 20:
                writer.write(1)
            assert writer.flush() == OK
            assert "flush" not in driver.shut_down(quiet=False)

        assert set(problems(path)) <= {"leaks"}
        same(path, writer.flat, tmp_path)


def test_raw_file_without_room_fails_write_by_write(tmp_path: Path) -> None:
    """A sparse file on a full file system: flushes succeed, and all acknowledged data is there."""
    with small_file_system(tmp_path / "small") as small:
        path = small / "image"
        with path.open("wb") as file:
            file.truncate(8 * MIB)
        with BlockDriver([path], ("raw",)) as driver:
            writer = Writer(driver, 8 * MIB)
            writer.write(500)
            assert writer.refused
            assert writer.flush() == OK
            assert driver.read_now(0, 8 * MIB) == writer.flat
            assert "flush" not in driver.shut_down(quiet=False)

        assert path.read_bytes() == writer.flat


# --- dirty images ----------------------------------------------------------------------------------------------------


def make_dirty(path: Path, size: int) -> Path:
    """Have QEMU write 1 MiB with lazy refcounts, and kill it."""
    make_image(path, size, "lazy_refcounts=on,cluster_size=4k")
    with contextlib.suppress(subprocess.CalledProcessError):
        die = f"sigraise {signal.SIGKILL:d}"
        qemu("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", "-c", "flush", "-c", die, path)
    assert check_report(path)["corruptions"] > 0
    return path


def test_new_clusters_of_a_dirty_image_on_a_device_go_behind_those_in_use(tmp_path: Path) -> None:
    """The tables tell which clusters are in use; a device has no file size.  The VM hears that the image is dirty."""
    with device_with(make_dirty(tmp_path / "image", 8 * MIB), 16 * MIB + 512) as device:
        with BlockDriver([device.path]) as driver:
            (said,) = driver.device.troubles()
            assert said.startswith("was not closed by its last writer (dirty)")
            assert driver.wait_for(driver.write(4 * MIB // SECTOR, b"\5" * 256 * KIB)).status == OK
            assert driver.wait_for(driver.write(0, b"\6" * 512)).status == OK
            assert driver.wait_for(driver.flush()).status == OK
            driver.shut_down()
        qemu("qemu-img", "check", "-q", "-f", "qcow2", "-r", "all", device.path)

        expected = b"\6" * 512 + b"\7" * (MIB - 512) + bytes(3 * MIB) + b"\5" * 256 * KIB
        assert problems(device.path) == {}
        same(device.path, expected.ljust(8 * MIB, b"\0"), tmp_path)


def test_a_dirty_image_with_snapshots_is_refused_on_a_device(tmp_path: Path) -> None:
    """Snapshots have their own tables, which are not read.  On a file the file's length tells the end instead."""
    image = make_image(tmp_path / "image", 8 * MIB, "lazy_refcounts=on,cluster_size=4k")
    qemu("qemu-img", "snapshot", "-c", "old", image)
    with contextlib.suppress(subprocess.CalledProcessError):
        die = f"sigraise {signal.SIGKILL:d}"
        qemu("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", "-c", "flush", "-c", die, image)
    with device_with(image, 16 * MIB) as device, BlockDriver([device.path]).device as process:
        process.send_start(process.start_packet())

        sentence = process.error(process.sync)[1]

    assert sentence == (
        "disk 0: is dirty, and the end of its use is not known; repair it first with qemu-img check -r all"
    )
    with BlockDriver([image]) as driver:
        assert driver.wait_for(driver.write(4 * MIB // SECTOR, b"\5" * 64 * KIB)).status == OK
        assert "dirty" in driver.device.troubles()[0]
        driver.shut_down()


# --- odd lengths -----------------------------------------------------------------------------------------------------


def test_raw_file_that_ends_inside_a_sector(tmp_path: Path) -> None:
    """The last sector is padded with zeroes, and the VM is told.  A write to that sector makes the file longer."""
    path = tmp_path / "image"
    path.write_bytes(b"a" * MIB + b"tail!")

    with BlockDriver([path], ("raw",)) as driver:
        assert driver.device.troubles() == [
            f"its {MIB + 5} bytes are no multiple of 512; its last sector is padded with zeroes"
        ]
        assert driver.sectors == MIB // SECTOR + 1
        assert driver.read_now(MIB // SECTOR - 1, 1024) == b"a" * 512 + b"tail!" + bytes(507)
        assert path.stat().st_size == MIB + 5
        assert driver.wait_for(driver.write(MIB // SECTOR, b"new tail".ljust(512, b"\0"))).status == OK
        assert driver.read_now(MIB // SECTOR, 512) == b"new tail".ljust(512, b"\0")
        driver.shut_down()

    assert path.read_bytes() == b"a" * MIB + b"new tail".ljust(512, b"\0")


def test_raw_file_that_ends_inside_a_sector_and_may_not_become_longer(tmp_path: Path) -> None:
    """A write to the last sector is refused, any other succeeds."""
    path = tmp_path / "image"
    path.write_bytes(b"a" * MIB + b"tail!")

    with BlockDriver([path], ("raw",)) as driver:
        resource.prlimit(driver.device.child.pid, resource.RLIMIT_FSIZE, (MIB + 5, resource.RLIM_INFINITY))
        assert driver.wait_for(driver.write(MIB // SECTOR, b"new tail".ljust(512, b"\0"))).status == IOERR
        assert driver.wait_for(driver.write(MIB // SECTOR - 1, b"b" * 512)).status == OK
        assert driver.wait_for(driver.flush()).status == OK
        assert os.strerror(errno.EFBIG) in driver.shut_down(quiet=False)

    assert path.stat().st_size == MIB + 5


def test_raw_backing_file_that_ends_inside_a_sector(tmp_path: Path) -> None:
    """An overlay shows its last bytes, and keeps them when the rest of their cluster is written."""
    base, top = tmp_path / "base", tmp_path / "top"
    base.write_bytes(b"a" * MIB + b"tail!")
    qemu("qemu-img", "create", "-qf", "qcow2", "-F", "raw", "-b", base, top, 2 * MIB)
    flat = bytearray((b"a" * MIB + b"tail!").ljust(2 * MIB, b"\0"))

    with BlockDriver([top, base], ("qcow2", "raw")) as driver:
        assert driver.read_now(0, 2 * MIB) == flat
        assert driver.wait_for(driver.write(MIB // SECTOR + 3, b"n" * 512)).status == OK
        flat[MIB + 1536 : MIB + 2048] = b"n" * 512
        driver.shut_down()

    same(top, flat, tmp_path)
