"""Disks grow: their content stays, the new part is zeroes, and QEMU finds no error."""

import json
import os
import random
from pathlib import Path

import pytest

from tests.support.images import (
    KIB,
    MIB,
    Scribbler,
    chain_formats,
    make_chain,
    opened,
    opened_qcow2,
    problems,
    qemu,
    read,
    same,
    write,
)
from tests.support.loopdevice import LoopDevice
from vmd.images.header import MAX_TABLE_BYTES

GROWN = [
    pytest.param(
        f"cluster_size={size},{more}",
        levels,
        id=f"{size}-{more}-{levels}",
        marks=() if levels == 3 else pytest.mark.deep,
    )
    for size, more, levels in [
        ("512", "refcount_bits=16", 0),
        ("512", "refcount_bits=64", 3),
        ("1k", "refcount_bits=1", 0),
        ("4k", "compat=0.10", 1),
        ("64k", "refcount_bits=16", 0),
        ("64k", "refcount_bits=16", 3),
        ("64k", "preallocation=metadata", 0),
        ("2M", "refcount_bits=16", 1),
    ]
]


def virtual_size(path: Path) -> int:
    """Return the size of the disk in an image, from QEMU."""
    size: int = json.loads(qemu("qemu-img", "info", "--output=json", path))["virtual-size"]
    return size


@pytest.mark.parametrize(("options", "levels"), GROWN)
def test_a_disk_grows_again_and_again(tmp_path: Path, options: str, levels: int) -> None:
    """It grows between requests of all kinds.  The tables of small clusters move several times."""
    size = 2 * MIB + 3 * 512
    paths, flat = make_chain(tmp_path, options, size, levels)
    image = opened(*paths, writable=True, formats=chain_formats(paths))
    scribbler = Scribbler(image, flat, seed=1)

    for larger in (size + 512, 4 * MIB + 512, 4 * MIB + 512, 12 * MIB):
        scribbler.run(60)
        image.grow(larger)
        flat.extend(bytes(larger - len(flat)))
        assert image.size == larger
    scribbler.run(60)
    image.close()

    assert problems(paths[0]) == {}
    assert virtual_size(paths[0]) == 12 * MIB
    same(paths[0], flat, tmp_path)


@pytest.mark.deep
@pytest.mark.parametrize("cluster", ["512", "2k", "64k"])
def test_a_large_table_finds_room_in_a_file_full_of_holes(tmp_path: Path, cluster: str) -> None:
    """The table is one contiguous piece: in a gap, behind the end, or behind new refcount blocks of its own."""
    path = tmp_path / "image"
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", f"cluster_size={cluster}", path, "1M")
    image = opened_qcow2(path)
    flat = bytearray(random.Random(1).randbytes(MIB))
    write(image, 0, bytes(flat))
    for offset in range(0, MIB, 8 * KIB):
        image.discard(offset, 4 * KIB)
        flat[offset : offset + 4 * KIB] = read(image, offset, 4 * KIB)
    image.flush()

    largest = MAX_TABLE_BYTES // 8 << image.table_shift
    for larger in (largest // 64, largest):
        image.grow(larger)
        write(image, larger - 4096, b"e" * 4096)
        assert read(image, larger - 8192, 8192) == bytes(4096) + b"e" * 4096
        assert read(image, 0, MIB) == flat
    with pytest.raises(OSError, match=f"{largest + 512} bytes are too many for its clusters of {image.cluster_size}$"):
        image.grow(largest + 512)
    image.close()

    assert problems(path) == {}
    assert virtual_size(path) == largest


@pytest.mark.parametrize("compat", ["1.1", "0.10"])
def test_the_rest_of_a_larger_backing_file_stays_hidden(tmp_path: Path, compat: str) -> None:
    """Data behind the end of the overlay is not part of its disk.  Version 2 cannot record that, and is refused."""
    base, path = tmp_path / "base", tmp_path / "top"
    base.write_bytes(random.Random(1).randbytes(5 * MIB))
    size = MIB + 3 * 512
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", f"compat={compat}", "-F", "raw", "-b", base, path, size)
    image = opened(path, base, writable=True, formats=("qcow2", "raw"))

    if compat == "0.10":
        with pytest.raises(OSError, match=r"its backing file is larger, and qcow2 version 2 cannot hide its rest$"):
            image.grow(8 * MIB)
        assert image.size == size
    else:
        image.grow(2 * MIB)
        image.grow(8 * MIB)
    image.close()

    flat = base.read_bytes()[:size]
    same(path, flat if compat == "0.10" else flat + bytes(8 * MIB - size), tmp_path)
    assert problems(path) == {}


def test_table_entries_behind_the_end_of_the_disk_stay_hidden(tmp_path: Path) -> None:
    """Another program may have made the disk smaller, and not its tables."""
    path = tmp_path / "image"
    qemu("qemu-img", "create", "-qf", "qcow2", path, "4M")
    image = opened_qcow2(path)
    write(image, 0, b"x" * 4 * MIB)
    image.close()
    with path.open("rb+") as file:
        file.seek(24)
        file.write((MIB + 512).to_bytes(8, "big"))

    image = opened_qcow2(path)
    image.grow(3 * MIB)
    image.close()

    same(path, b"x" * (MIB + 512) + bytes(2 * MIB - 512), tmp_path)
    assert problems(path) == {}


def test_snapshots_in_the_image_keep_their_own_size(tmp_path: Path) -> None:
    """QEMU goes back to one.  The disk then has its former size and content."""
    path = tmp_path / "image"
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", "cluster_size=512", path, "1M")
    image = opened_qcow2(path)
    before = random.Random(1).randbytes(MIB)
    write(image, 0, before)
    image.close()
    qemu("qemu-img", "snapshot", "-c", "first", path)
    image = opened_qcow2(path)

    image.grow(4 * MIB)
    write(image, 512 * KIB, b"y" * MIB)
    image.close()

    assert problems(path) == {}
    same(path, before[: 512 * KIB] + b"y" * MIB + bytes(4 * MIB - MIB - 512 * KIB), tmp_path)
    qemu("qemu-img", "snapshot", "-a", "first", path)
    same(path, before, tmp_path)
    assert problems(path) == {}


def test_snapshots_without_the_size_of_the_disk(tmp_path: Path) -> None:
    """Snapshots of version 2 prevent growth: after going back to one, the disk would have the wrong size."""
    path = tmp_path / "image"
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", "compat=0.10", path, "1M")
    qemu("qemu-img", "snapshot", "-c", "first", path)
    raw = bytearray(path.read_bytes())
    table = int.from_bytes(raw[64:72], "big")
    raw[table + 36 : table + 48] = bytes(4) + b"1first\0\0"  # without the extra data, as in old images
    path.write_bytes(raw)
    image = opened_qcow2(path)

    with pytest.raises(OSError, match=r"snapshot first in it does not record the size of the disk; delete it first$"):
        image.grow(4 * MIB)

    image.grow(MIB)  # the present size
    image.close()
    assert path.read_bytes() == raw


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_a_disk_is_never_made_smaller(tmp_path: Path, image_format: str) -> None:
    """A request for a smaller size changes nothing."""
    path = tmp_path / "image"
    qemu("qemu-img", "create", "-qf", image_format, path, "4M")
    image = opened(path, writable=True, formats=(image_format,))

    with pytest.raises(OSError, match=f"{path}: has {4 * MIB} bytes, and a disk is never made smaller$"):
        image.grow(4 * MIB - 512)

    assert image.size == 4 * MIB
    image.close()
    assert virtual_size(path) == 4 * MIB


def test_raw_files(tmp_path: Path) -> None:
    """A file may end inside a sector, and may have been made longer or shorter meanwhile."""
    path = tmp_path / "image"
    path.write_bytes(b"x" * 1000)
    image = opened(path, writable=True, formats=("raw",))
    assert image.remark

    image.grow(MIB)
    assert (image.size, image.remark) == (MIB, "")
    assert path.read_bytes() == b"x" * 1000 + bytes(MIB - 1000)
    os.truncate(path, 3 * MIB)
    with pytest.raises(OSError, match="a disk is never made smaller"):
        image.grow(2 * MIB)
    image.grow(3 * MIB)
    write(image, 3 * MIB - 512, b"e" * 512)
    os.truncate(path, MIB)
    with pytest.raises(OSError, match=f"the file has become shorter than {3 * MIB} bytes"):
        image.grow(4 * MIB)
    assert path.stat().st_size == MIB
    image.close()


def test_a_disk_on_a_device_grows_with_the_device(tmp_path: Path) -> None:
    """Its own tools make a logical volume larger.  Only then does the disk grow."""
    with LoopDevice(tmp_path / "backing", 4 * MIB) as device:
        image = opened(device.path, writable=True, formats=("raw",))
        with pytest.raises(OSError, match=f"is a device of {4 * MIB} bytes, and the disk has the size of its device$"):
            image.grow(8 * MIB)
        device.resize(8 * MIB)
        image.grow(8 * MIB)
        write(image, 8 * MIB - 512, b"e" * 512)
        image.close()

    assert (tmp_path / "backing").read_bytes()[-512:] == b"e" * 512


def test_a_read_only_disk_does_not_grow(tmp_path: Path) -> None:
    """Our own code refuses, before the kernel would."""
    for image_format in ("raw", "qcow2"):
        path = tmp_path / image_format
        qemu("qemu-img", "create", "-qf", image_format, path, "1M")
        image = opened(path, formats=(image_format,))
        with pytest.raises(OSError, match="opened for reading only"):
            image.grow(4 * MIB)
        image.close()
