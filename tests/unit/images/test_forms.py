"""qcow2 images of each form: clusters, refcounts and versions of all widths, backing files, compressed clusters.

QEMU must find neither damage nor leaks in them, whatever was done before.
"""

import os
import posix
import random
from pathlib import Path

import pytest

from tests.support.images import KIB, MIB, Scribbler, opened, opened_qcow2, problems, qemu, read, write
from vmd.errors import ImageError
from vmd.images import qcow2, refcounts, rewrite
from vmd.images.header import AT_SIZE, MAX_TABLE_BYTES, OFFSET_MASK, parse_header
from vmd.images.qcow2 import COPIED, Qcow2Image
from vmd.images.rewrite import Rewrite
from vmd.images.snapshots import find, read_snapshots, state_offset

SIZE = 2 * MIB  # with clusters of 512 bytes the L1 table fills a cluster
STATE = bytes(range(256)) * 13


def made(folder: Path, options: str, below: str = "") -> tuple[Qcow2Image, bytearray]:
    """Make an image, and return it with its content.  `below`: "raw", with a backing file that is longer; "packed"."""
    path, other = folder / "image", folder / "other"
    content = (b"below" * 103 + b"\n") * (2 * SIZE // 516)
    if below == "raw":
        other.write_bytes(content)
        qemu("qemu-img", "create", "-qf", "qcow2", "-o", options, "-F", "raw", "-b", other, path, SIZE)
        image = opened(path, other, writable=True, formats=("qcow2", "raw"))
    elif below == "packed":
        other.write_bytes(content[:SIZE])
        qemu("qemu-img", "convert", "-cf", "raw", "-O", "qcow2", "-o", options, other, path)
        image = opened(path, writable=True)
    else:
        content = bytes(SIZE)
        qemu("qemu-img", "create", "-qf", "qcow2", "-o", options, path, SIZE)
        image = opened(path, writable=True)
    assert isinstance(image, Qcow2Image)
    return image, bytearray(content[:SIZE])


def create(image: Qcow2Image, name: str, state: bytes = b"") -> None:
    """Make a snapshot."""
    change = Rewrite(image)
    if state:
        change.add_state([memoryview(state)], len(state))
    change.create(name, 3_000_000_007, 11)
    change.commit()


def go_back(image: Qcow2Image, name: str) -> None:
    """Set the disk back to a snapshot."""
    change = Rewrite(image)
    change.go_back(name)
    change.commit()


def delete(image: Qcow2Image, name: str) -> None:
    """Delete a snapshot."""
    change = Rewrite(image)
    change.delete(name)
    change.commit()


def content_of(path: Path, name: str) -> tuple[bytes, bytes]:
    """Return disk and state of a snapshot that `create` has made in an image without a backing file."""
    fd = os.open(path, os.O_RDONLY)
    header = parse_header(fd, str(path))
    one = find(read_snapshots(fd, header, str(path)), name)
    assert one is not None
    assert (one.date_s, one.date_ns, one.clock_ns) == (3, 7, 11)
    image = Qcow2Image(fd, str(path), writable=False, snapshot=one)
    found = read(image, 0, one.size), read(image, state_offset(one, header), one.state_bytes)
    image.close()
    return found


FORMS = {
    "512-64": ("cluster_size=512,refcount_bits=64", ""),
    "1k-4": ("cluster_size=1k,refcount_bits=4", ""),
    "4k-32-packed": ("cluster_size=4k,refcount_bits=32", "packed"),
    "4k-version-2": ("cluster_size=4k,compat=0.10", ""),
    "64k-16-based": ("cluster_size=64k", "raw"),
}
each_form = pytest.mark.parametrize(("options", "below"), FORMS.values(), ids=FORMS)


@each_form
def test_disk_and_snapshots_keep_their_content(tmp_path: Path, options: str, below: str) -> None:
    """The disk is written, grows, and goes back; each snapshot stays as it was until it is deleted."""
    image, disk = made(tmp_path, options, below)
    scribbler = Scribbler(image, disk, seed=len(options))
    scribbler.longest = 40 * KIB
    saved = {}
    for name in ("one", "two"):
        scribbler.run(25)
        create(image, name, STATE)
        saved[name] = bytes(disk)
        scribbler.run(25)
        image.grow(len(disk) + MIB + 512)
        disk.extend(bytes(MIB + 512))
    scribbler.run(25)
    image.settle()
    assert problems(tmp_path / "image") == {}
    for name, content in saved.items():
        assert below == "raw" or content_of(tmp_path / "image", name) == (content, STATE)
        go_back(image, name)
        assert image.size == len(content)
        assert read(image, 0, image.size) == content
        delete(image, name)
        assert read(image, 0, image.size) == content
        disk[:] = content
        scribbler.run(25)
    image.close()

    assert problems(tmp_path / "image") == {}


@each_form
def test_abandoned_snapshot_takes_nothing(tmp_path: Path, options: str, below: str) -> None:
    """Its clusters lie between those of the disk, which stay as they are; the storage is given back."""
    path = tmp_path / "image"
    image, disk = made(tmp_path, options, below)
    choice = random.Random(options)
    disk[:MIB] = choice.randbytes(MIB)
    write(image, 0, bytes(disk[:MIB]))
    for offset in range(0, MIB, 192 * KIB):
        image.discard(offset, 64 * KIB)
        disk[offset : offset + 64 * KIB] = read(image, offset, 64 * KIB)
    image.settle()
    before = path.stat().st_blocks

    change = Rewrite(image)
    for part in (choice.randbytes(64 * KIB), choice.randbytes(4 * KIB), b"s"):
        change.add_state([memoryview(part)], len(part))
    change.create("gone")
    change.abandon()

    # A block of the file system stays if a smaller cluster in it is in use.
    assert path.stat().st_blocks <= before + (0 if image.cluster_size >= 4 * KIB else 64)
    image.close()
    assert problems(path) == {}
    found = opened(path, *[tmp_path / "other"] * (below == "raw"), formats=("qcow2", "raw"))
    assert read(found, 0, SIZE) == disk
    found.close()


# -- growing


@pytest.mark.parametrize("compat", ["1.1", "0.10"])
def test_tables_behind_the_end_of_the_disk_show_nothing(tmp_path: Path, compat: str) -> None:
    """Another program may have made the disk smaller, and not its tables."""
    image, _ = made(tmp_path, f"compat={compat}")
    write(image, 0, b"x" * SIZE)
    image.close()
    with (tmp_path / "image").open("rb+") as file:
        file.seek(AT_SIZE)
        file.write((MIB + 512).to_bytes(8, "big"))
    image = opened_qcow2(tmp_path / "image")

    image.grow(SIZE)

    assert read(image, 0, SIZE) == b"x" * (MIB + 512) + bytes(MIB - 512)
    image.close()
    assert problems(tmp_path / "image") == {}


def test_size_is_stored_last_and_is_stable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut the disk has either size: all that the larger one needs is on the disk before it."""
    image, _ = made(tmp_path, "cluster_size=512")
    done: list[int] = []
    write_real, sync_real = posix.pwritev, posix.fdatasync

    def pwritev(fd: int, views: list[memoryview], offset: int) -> int:
        done.append(offset)
        return write_real(fd, views, offset)

    def fdatasync(fd: int) -> None:
        sync_real(fd)
        done.append(-1)

    monkeypatch.setattr(posix, "pwritev", pwritev)
    monkeypatch.setattr(posix, "fdatasync", fdatasync)
    image.grow(64 * MIB)

    assert done[done.index(AT_SIZE) - 1 :] == [-1, AT_SIZE, -1]
    image.close()


def test_table_of_many_clusters_is_in_one_piece(tmp_path: Path) -> None:
    """It has more clusters than a refcount block counts, so new blocks lie in front of it."""
    image, disk = made(tmp_path, "cluster_size=512,refcount_bits=64")
    disk[:MIB] = random.Random(1).randbytes(MIB)
    write(image, 0, bytes(disk[:MIB]))
    image.grow(256 * MIB)
    write(image, 256 * MIB - 4 * KIB, b"e" * 4 * KIB)
    image.close()

    assert problems(tmp_path / "image") == {}
    image = opened_qcow2(tmp_path / "image")
    assert read(image, 0, SIZE) == disk
    assert read(image, 256 * MIB - 8 * KIB, 8 * KIB) == bytes(4 * KIB) + b"e" * 4 * KIB

    largest = MAX_TABLE_BYTES // 8 << image.table_shift
    with pytest.raises(OSError, match=f"{largest + 512} bytes are too many for its clusters of 512$"):
        image.grow(largest + 512)
    assert image.size == 256 * MIB
    image.close()


# -- refcounts


@pytest.mark.parametrize(("count", "blocks"), [(64, 2), (126, 2), (127, 3)])
def test_many_clusters_in_one_piece_have_as_few_refcount_blocks_as_they_need(
    tmp_path: Path, count: int, blocks: int
) -> None:
    """A block counts 64 clusters, and itself."""
    image, _ = made(tmp_path, "cluster_size=512,refcount_bits=64")
    first = image.refcounts.allocate_together(count)

    assert first % 64 == blocks
    assert image.refcounts.end == first + count
    assert {image.refcounts.get(cluster) for cluster in range(first - blocks, first + count)} == {1}
    assert image.refcounts.get(first + count) == 0
    image.close()


def test_file_has_no_gaps(tmp_path: Path) -> None:
    """New clusters follow each other, also where a new refcount block begins; freed ones are used first."""
    image, _ = made(tmp_path, "cluster_size=512,refcount_bits=64")
    write(image, 0, random.Random(1).randbytes(MIB))
    for number in range(4):  # clusters that different blocks count
        image.discard(number * 32 * KIB, 512)
        image.flush()
        write(image, MIB + number * KIB, b"x" * KIB)
    image.flush()

    assert [cluster for cluster in range(image.refcounts.end) if not image.refcounts.get(cluster)] == []
    assert (tmp_path / "image").stat().st_size == image.refcounts.end * 512
    image.close()


def write_until_refused(image: Qcow2Image, data: bytes) -> tuple[int, str]:
    """Write data piece by piece until it is refused; return how much was written, and the error."""
    for offset in range(0, len(data), 16 * KIB):
        try:
            write(image, offset, data[offset : offset + 16 * KIB])
        except OSError as error:
            return offset, str(error)
    raise AssertionError("nothing was refused")


def test_refcount_table_of_the_largest_size_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes that need a larger one are refused, and all else is kept."""
    monkeypatch.setattr(refcounts, "MAX_TABLE_BYTES", 512)
    image, disk = made(tmp_path, "cluster_size=512,refcount_bits=64")
    data = random.Random(1).randbytes(SIZE)
    offset, said = write_until_refused(image, data)
    assert said.endswith("the refcount table of the image has its maximum size")
    write(image, 0, data[8 * KIB : 16 * KIB])
    image.close()

    disk[:offset] = data[8 * KIB : 16 * KIB] + data[8 * KIB : offset]
    assert problems(tmp_path / "image") == {}
    image = opened_qcow2(tmp_path / "image", writable=False)
    assert read(image, 0, offset) == disk[:offset]
    image.close()


@pytest.mark.parametrize("cluster", [1000, 1 << 40])
def test_cluster_that_was_never_allocated_is_not_written(tmp_path: Path, cluster: int) -> None:
    """An L2 entry leads behind the end of the file: the image is corrupt, and is marked so."""
    image, _ = made(tmp_path, "cluster_size=512,refcount_bits=64")
    write(image, 0, b"x" * 512)
    image.close()
    with (tmp_path / "image").open("rb+") as file:
        file.seek(image.l1[0] & OFFSET_MASK)
        file.write((cluster * 512 | COPIED).to_bytes(8, "big"))
    image = opened_qcow2(tmp_path / "image")

    with pytest.raises(OSError, match=f"leads to {cluster * 512}, which has refcount 0"):
        write(image, 0, b"y" * 512)
    image.close()
    with pytest.raises(ImageError, match="is marked as corrupt"):
        opened_qcow2(tmp_path / "image")


def test_refcounts_that_cannot_be_written_do_not_fill_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other blocks leave the cache instead; only if none can be written, clusters cannot be allocated."""
    image, _ = made(tmp_path, "cluster_size=512,refcount_bits=64")
    image.refcounts.max_blocks = 4
    write(image, 0, b"x" * 192 * KIB)
    assert len(image.refcounts.blocks) == 4
    bad = {image.refcounts.table[number] for number in list(image.refcounts.blocks)[:1]}
    real = posix.pwritev

    def refuse(fd: int, views: list[memoryview], offset: int) -> int:
        if offset in bad:
            raise OSError(5, "no")
        return real(fd, views, offset)

    with monkeypatch.context() as broken:
        broken.setattr(posix, "pwritev", refuse)
        write(image, 192 * KIB, b"y" * 128 * KIB)
        assert len(image.refcounts.blocks) == 4
        bad |= set(image.refcounts.table)
        with pytest.raises(OSError, match="no"):
            write(image, 320 * KIB, b"z" * 256 * KIB)
        assert len(image.refcounts.blocks) == 4
    image.close()

    assert problems(tmp_path / "image") == {}


@pytest.mark.parametrize("which", [0, -1])
def test_refcounts_that_cannot_be_written_fail_a_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    """The guest is not told that its data is safe.  The next flush writes what is missing."""
    image, disk = made(tmp_path, "cluster_size=512,refcount_bits=64")
    disk[: 128 * KIB] = random.Random(1).randbytes(128 * KIB)
    write(image, 0, bytes(disk[: 128 * KIB]))
    bad = image.refcounts.table[list(image.refcounts.blocks)[which]]
    real = posix.pwritev

    def refuse(fd: int, views: list[memoryview], offset: int) -> int:
        if bad <= offset < bad + 512:
            raise OSError(5, "no")
        return real(fd, views, offset)

    with monkeypatch.context() as broken:
        broken.setattr(posix, "pwritev", refuse)
        with pytest.raises(OSError, match="no"):
            image.flush()
    image.flush()
    image.close()

    assert problems(tmp_path / "image") == {}
    image = opened_qcow2(tmp_path / "image", writable=False)
    assert read(image, 0, 128 * KIB) == disk[: 128 * KIB]
    image.close()


@pytest.mark.parametrize("what", ["header", "L1", "refcount table", "refcount block", "L2", "snapshots"])
def test_metadata_without_a_refcount_is_not_overwritten(tmp_path: Path, what: str) -> None:
    """The image is corrupt, which a write that needs a cluster finds."""
    image, _ = made(tmp_path, "cluster_size=4k,refcount_bits=16")
    write(image, 0, b"x" * 4 * KIB)
    create(image, "one")
    image.close()
    image = opened_qcow2(tmp_path / "image")
    places = {
        "header": 0,
        "L1": image.header.l1_offset,
        "refcount table": image.header.refcount_offset,
        "refcount block": image.refcounts.table[0],
        "L2": image.l1[0] & OFFSET_MASK,
        "snapshots": image.header.snapshots_offset,
    }
    cluster = places[what] // (4 * KIB)
    os.pwrite(image.fd, bytes(2), image.refcounts.table[0] + 2 * cluster)
    before = os.pread(image.fd, 4 * KIB, places[what])

    with pytest.raises(OSError, match=f"image is corrupt: cluster {cluster} is in use and has refcount 0; repair"):
        write(image, MIB, b"y" * 64 * KIB)
    image.close()
    after = (tmp_path / "image").read_bytes()[places[what] :][: 4 * KIB]
    assert after == (before if what != "header" else before[:79] + b"\2" + before[80:])  # marked as corrupt


@pytest.mark.parametrize("what", ["create", "delete"])
def test_snapshot_of_a_cluster_without_a_refcount_is_refused(tmp_path: Path, what: str) -> None:
    """The image is corrupt, which a sentence says."""
    image, _ = made(tmp_path, "cluster_size=4k,refcount_bits=16")
    write(image, 0, b"x" * 4 * KIB)
    if what == "delete":
        create(image, "one")
        write(image, 0, b"y" * 4 * KIB)
    image.flush()
    image.close()
    image = opened_qcow2(tmp_path / "image")
    entry = image.l1[0] if what == "create" else read_snapshots(image.fd, image.header, "")[0].l1_offset
    at = entry & OFFSET_MASK
    if what == "delete":
        at = int.from_bytes(os.pread(image.fd, 8, at), "big") & OFFSET_MASK
    cluster = (int.from_bytes(os.pread(image.fd, 8, at), "big") & OFFSET_MASK) // (4 * KIB)
    os.pwrite(image.fd, bytes(2), image.refcounts.table[0] + 2 * cluster)

    with pytest.raises(ImageError, match=f"image is corrupt: cluster {cluster} is in use and has refcount 0; repair"):
        (create if what == "create" else delete)(image, "one")
    image.close()


@pytest.mark.parametrize(("bits", "size"), [(1, 8 * 4096), (4, 2 * 4096), (8, 4096), (64, 4096)])
def test_refcounts_that_need_too_much_memory_are_refused(
    tmp_path: Path, bits: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each narrow refcount takes a byte."""
    image, _ = made(tmp_path, f"cluster_size=4k,refcount_bits={bits}")
    monkeypatch.setattr(rewrite, "MAX_COUNTS_BYTES", size)
    Rewrite(image).abandon()
    monkeypatch.setattr(rewrite, "MAX_COUNTS_BYTES", size - 1)

    with pytest.raises(ImageError, match=f"its {size} bytes of refcounts are more than {size - 1}"):
        Rewrite(image)
    image.close()


def test_version_2_keeps_the_bytes_behind_its_header(tmp_path: Path) -> None:
    """It has no feature bits there; the name of the backing file may be."""
    name = b"a-base-with-quite-a-long-name"
    image, _ = made(tmp_path, "compat=0.10")
    image.close()
    (tmp_path / name.decode()).write_bytes(b"b" * SIZE)
    with (tmp_path / "image").open("rb+") as file:
        file.seek(8)
        file.write((72).to_bytes(8, "big") + len(name).to_bytes(4, "big"))
        file.seek(72)
        file.write(name)
    paths = tmp_path / "image", tmp_path / name.decode()
    based = opened(*paths, writable=True, formats=("qcow2", "raw"))
    assert isinstance(based, Qcow2Image)

    create(based, "one")
    go_back(based, "one")

    assert based.header.backing == name.decode()
    assert read(based, 0, 512) == b"b" * 512
    based.close()


@pytest.mark.parametrize("leads_to", ["middle of a cluster", "middle of the header"])
def test_snapshot_of_an_image_whose_table_is_not_a_cluster(tmp_path: Path, leads_to: str) -> None:
    """The image is corrupt, and its clusters are not counted by what is there."""
    image, _ = made(tmp_path, "cluster_size=4k")
    write(image, 0, b"x" * 512)
    image.flush()
    table = image.l1[0] & OFFSET_MASK
    image.l1[0] = (table + 512 if leads_to == "middle of a cluster" else 512) | COPIED

    with pytest.raises(ImageError, match=f"an L1 entry leads to {image.l1[0] & OFFSET_MASK}, which is not a cluster"):
        Rewrite(image).create("one")
    image.l1[0] = table | COPIED
    image.close()


# -- devices


def test_image_on_a_device_does_not_grow_beyond_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot without room says where the device ends, and changes nothing."""
    monkeypatch.setattr(qcow2, "is_device", lambda _fd: True)
    image, disk = made(tmp_path, "cluster_size=4k,preallocation=metadata")
    image.settle()
    end = (tmp_path / "image").stat().st_size
    change = Rewrite(image)

    with pytest.raises(OSError, match=f"it ends after {end} bytes"):
        change.create("one")
    change.abandon()

    assert (tmp_path / "image").stat().st_size == end
    assert read(image, 0, SIZE) == disk
    image.close()
    assert problems(tmp_path / "image") == {}


def test_dirty_image_with_snapshots_on_a_device_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its refcounts are unreliable, so that free clusters could only be behind its end; there are none on a device."""
    image, _ = made(tmp_path, "cluster_size=4k")
    create(image, "one")
    image.close()
    with (tmp_path / "image").open("rb+") as file:
        file.seek(72)
        file.write((1).to_bytes(8, "big"))
    opened_qcow2(tmp_path / "image").close()
    monkeypatch.setattr(qcow2, "is_device", lambda _fd: True)

    with pytest.raises(ImageError, match="is dirty, and the end of its use is not known"):
        opened_qcow2(tmp_path / "image")
