"""qcow2 images: which requests take room, what is refused, and what is on the disk at each moment."""

import errno
import os
import posix
import random
from pathlib import Path

import pytest

from tests.support.images import KIB, MIB, opened, opened_qcow2, problems, qemu, read, write
from vmd.errors import ImageError
from vmd.images import qcow2, refcounts
from vmd.images.create import MAX_SIZE, create
from vmd.images.header import MAX_TABLE_BYTES, OFFSET_MASK
from vmd.images.qcow2 import COPIED, INFLATED_BYTES, Qcow2Image, inflate
from vmd.images.rewrite import Rewrite

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

CLUSTER = 64 * KIB
USUAL = "cluster_size=64k"
SMALL = "cluster_size=512,refcount_bits=64"  # an L2 table and a refcount block have 64 entries each


def made(folder: Path, options: str, size: int) -> Qcow2Image:
    """Have QEMU make an empty image; return it."""
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", options, folder / "image", size)
    return opened_qcow2(folder / "image")


def put(path: Path, offset: int, data: bytes) -> None:
    """Change bytes of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def packed(folder: Path, content: bytes, options: str) -> Path:
    """Have QEMU make an image with compressed clusters; return its path."""
    (folder / "plain").write_bytes(content)
    qemu("qemu-img", "convert", "-cf", "raw", "-O", "qcow2", "-o", options, folder / "plain", folder / "packed")
    return folder / "packed"


# -- what is there, and what takes room


@pytest.mark.parametrize("below", [0, 2 * CLUSTER])
def test_zeroes_take_no_room_where_the_disk_reads_as_zeroes(tmp_path: Path, below: int) -> None:
    """Without a backing file this is everywhere, else from its end on and where zeroes were written before."""
    (tmp_path / "base").write_bytes(b"b" * below)
    create(str(tmp_path / "top"), "qcow2", MIB, "base" if below else "", "raw" if below else "")
    paths = [tmp_path / "top", tmp_path / "base"][: 2 if below else 1]
    image = opened(*paths, writable=True, formats=("qcow2", "raw"))
    assert isinstance(image, Qcow2Image)
    write(image, MIB - CLUSTER, b"x" * CLUSTER)
    image.write_zeroes(0, CLUSTER, True)
    end = image.refcounts.end

    for unmap in (True, False):
        for offset in (0, below, below + 512, MIB - 2 * CLUSTER):
            image.write_zeroes(offset, 512, unmap)
    assert image.refcounts.end == end
    if below:
        image.write_zeroes(below - 512, 512, True)
        assert image.refcounts.end == end + 1
        assert read(image, CLUSTER, CLUSTER) == b"b" * (CLUSTER - 512) + bytes(512)
    image.close()


def test_spans_are_those_of_the_data(tmp_path: Path) -> None:
    """Compressed clusters are data, zeroes are not, and the backing file counts up to its end."""
    top, base = packed(tmp_path, b"p" * 2 * CLUSTER + bytes(10 * CLUSTER), USUAL), tmp_path / "base"
    base.write_bytes(bytes(2 * CLUSTER) + b"b" * CLUSTER)
    os.truncate(base, 6 * CLUSTER)
    put(base, 2 * CLUSTER, b"b" * CLUSTER)
    qemu("qemu-img", "rebase", "-uf", "qcow2", "-F", "raw", "-b", base, top)
    image = opened(top, base, writable=True, formats=("qcow2", "raw"))
    write(image, 4 * CLUSTER, b"d" * CLUSTER)
    image.write_zeroes(5 * CLUSTER, CLUSTER, True)

    spans = {at: image.span(at * CLUSTER) for at in range(7)}

    one = (True, CLUSTER)
    assert spans == {0: (True, 2 * CLUSTER), 1: one, 2: one, 3: (False, CLUSTER), 4: one, 5: (False, CLUSTER),
                     6: (False, 6 * CLUSTER)}  # fmt: skip
    image.close()


@pytest.mark.parametrize(("size", "decompressed"), [("64k", 2), ("2M", 4)])
def test_decompressed_clusters_are_kept_in_bounded_memory(tmp_path: Path, size: str, decompressed: int) -> None:
    """Small ones are not decompressed for each request; the largest one is larger than the bound."""
    bytes_of = {"64k": CLUSTER, "2M": 2 * MIB}[size]
    path = packed(tmp_path, b"a" * bytes_of + b"b" * bytes_of, f"cluster_size={size}")
    calls = []

    def unpack(raw: bytes, most: int) -> bytes:
        calls.append(most)
        return inflate(raw, most)

    image = Qcow2Image(os.open(path, os.O_RDONLY), str(path), writable=False, unpack={"zlib": unpack})
    for place, byte in ((0, b"a"), (1, b"b")) * 2:
        assert read(image, place * bytes_of + 512, 512) == byte * 512
        assert sum(map(len, image.inflated.values())) <= max(INFLATED_BYTES, bytes_of)
    assert len(calls) == decompressed
    image.close()


def test_write_over_old_and_new_clusters_leaves_the_old_ones_in_place(tmp_path: Path) -> None:
    """Another request may be writing to an old one at this moment: if it moved, that write would be lost."""
    image = made(tmp_path, USUAL, MIB)
    write(image, CLUSTER, b"a" * CLUSTER)
    image.flush()
    place = image.slices[0].table[1]

    write(image, CLUSTER - 512, b"b" * (CLUSTER + 1024))

    assert image.slices[0].table[1] == place
    assert read(image, 0, 3 * CLUSTER) == bytes(CLUSTER - 512) + b"b" * (CLUSTER + 1024) + bytes(CLUSTER - 512)
    image.close()
    assert problems(tmp_path / "image") == {}


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_file_has_no_gaps(tmp_path: Path, bits: int) -> None:
    """New clusters follow each other, for refcounts of each width; a freed one is used first."""
    image = made(tmp_path, f"cluster_size=512,refcount_bits={bits}", 2 * MIB)
    for number in range(200):
        write(image, number * 1536, b"x" * 512)
    image.discard(1536, 512)
    image.flush()
    end = image.refcounts.end
    write(image, 512, b"y" * 512)

    assert [cluster for cluster in range(end) if not image.refcounts.get(cluster)] == []
    assert image.refcounts.end == end == (tmp_path / "image").stat().st_size // 512
    image.close()
    assert problems(tmp_path / "image") == {}


def test_clusters_of_the_former_refcount_table_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They lie directly behind the header.  The table grows up to its maximum."""
    monkeypatch.setattr(refcounts, "MAX_TABLE_BYTES", 1024)
    image = made(tmp_path, SMALL, 4 * MIB)
    choice = random.Random(1)
    write(image, 0, choice.randbytes(2 * MIB))
    assert len(image.refcounts.table) == 128
    image.close()
    image = opened_qcow2(tmp_path / "image")
    write(image, 2 * MIB, b"n" * 512)
    assert image.refcounts.get(1) == 1
    image.close()

    content = choice.randbytes(2 * MIB + 512)
    image = opened_qcow2(tmp_path / "image")
    write(image, 0, content)
    image.close()
    image = opened_qcow2(tmp_path / "image", writable=False)
    assert read(image, 0, len(content)) == content
    image.close()
    assert problems(tmp_path / "image") == {}


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_disk_without_bytes_grows(tmp_path: Path, kind: str) -> None:
    """It has no L1 table before."""
    path = tmp_path / "disk"
    qemu("qemu-img", "create", "-qf", kind, path, 0)
    image = opened(path, writable=True, formats=(kind,))
    image.settle()
    image.grow(MIB)
    write(image, MIB - 512, b"x" * 512)
    image.close()
    image = opened(path, formats=(kind,))
    assert read(image, 0, MIB) == bytes(MIB - 512) + b"x" * 512
    image.close()
    assert kind == "raw" or problems(path) == {}


def test_largest_image(tmp_path: Path) -> None:
    """Its L1 table has the maximum size.  No feature bit is set."""
    create(str(tmp_path / "disk"), "qcow2", MAX_SIZE)
    image = opened_qcow2(tmp_path / "disk")
    header = image.header
    assert (header.l1_entries * 8, header.incompatible, header.autoclear) == (MAX_TABLE_BYTES, 0, 0)
    write(image, MAX_SIZE - 512, b"x" * 512)
    assert read(image, MAX_SIZE - CLUSTER, CLUSTER) == bytes(CLUSTER - 512) + b"x" * 512
    image.close()


# -- growing


@pytest.mark.parametrize(("below", "grows"), [(MIB - 512, True), (MIB, True), (MIB + 512, False)])
def test_version_2_grows_unless_its_backing_file_is_larger(tmp_path: Path, below: int, grows: bool) -> None:
    """It has no clusters that hide the rest of that file.  Its present size is no error."""
    base, top = tmp_path / "base", tmp_path / "top"
    base.write_bytes(b"b" * below)
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", "compat=0.10", "-F", "raw", "-b", base, top, MIB)
    image = opened(top, base, writable=True, formats=("qcow2", "raw"))
    image.grow(MIB)
    if grows:
        image.grow(2 * MIB)
        assert read(image, 0, 2 * MIB) == b"b" * below + bytes(2 * MIB - below)
    else:
        with pytest.raises(OSError, match="its backing file is larger") as refused:
            image.grow(2 * MIB)
        assert refused.value.errno == errno.ENOTSUP
        assert image.size == MIB
    image.close()


def test_bytes_behind_the_l1_table_are_no_entries(tmp_path: Path) -> None:
    """The rest of its last cluster may have any bytes before the table grows."""
    image = made(tmp_path, SMALL, MIB)
    write(image, 0, b"a" * 512)
    image.close()
    assert image.header.l1_entries == 32
    put(tmp_path / "image", image.header.l1_offset + 256, b"\xff" * 256)
    image = opened_qcow2(tmp_path / "image")
    image.grow(2 * MIB)
    image.close()

    image = opened_qcow2(tmp_path / "image")
    assert read(image, 0, 2 * MIB) == b"a" * 512 + bytes(2 * MIB - 512)
    image.close()
    assert problems(tmp_path / "image") == {}


# -- crashes


class Disk:
    """Keeps what is on stable storage.  No sector that is written alone, without others, makes the image corrupt."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.stable = path.read_bytes()
        self.checked = 0
        self.write, self.sync = posix.pwritev, posix.fdatasync
        monkeypatch.setattr(posix, "pwritev", self.pwritev)
        monkeypatch.setattr(posix, "fdatasync", self.fdatasync)

    def pwritev(self, fd: int, views: list[memoryview], offset: int) -> int:
        """Write, and check the image as if only these sectors were stored before the power fails."""
        done = self.write(fd, views, offset)
        start, now = offset & -512, self.path.read_bytes()
        cut = self.path.with_name("cut")
        cut.write_bytes(self.stable)
        put(cut, start, now[start : -(-(offset + done) // 512) * 512])
        assert "corruptions" not in problems(cut), f"{done} bytes at {offset}"
        self.checked += 1
        return done

    def fdatasync(self, fd: int) -> None:
        """Wait for the disk."""
        self.sync(fd)
        self.stable = self.path.read_bytes()


def allocate(image: Qcow2Image) -> None:
    """Write to new clusters, in new tables, and to a cluster that is free since the flush."""
    write(image, 100 * 512, b"n" * 40 * 512)
    image.discard(0, 512)
    image.flush()
    write(image, 200 * 512, b"m" * 512)
    image.flush()


def change_snapshots(image: Qcow2Image) -> None:
    """Make a snapshot, and delete it."""
    change = Rewrite(image)
    change.create("one")
    change.commit()
    write(image, 0, b"after")
    change = Rewrite(image)
    change.delete("one")
    change.commit()


@pytest.mark.parametrize(
    "change",
    [allocate, change_snapshots, lambda image: image.grow(4 * MIB), lambda image: image.grow(256 * MIB)],
    ids=["allocate", "snapshots", "grow", "grow-far"],
)
def test_image_is_consistent_after_each_write(
    tmp_path: Path, change: "Callable[[Qcow2Image], None]", monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk may do writes in any order between two flushes.  The last refcount block is nearly full before."""
    image = made(tmp_path, SMALL, 2 * MIB)
    write(image, 0, b"x" * (62 - image.refcounts.end) * 512)
    image.flush()
    with monkeypatch.context() as watched:
        disk = Disk(tmp_path / "image", watched)
        change(image)
    assert disk.checked > 3
    image.close()
    assert problems(tmp_path / "image") == {}


def test_blocks_of_a_far_table_are_named_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of the new refcount blocks counts the others.  Their entries are in two sectors of the table."""
    image = made(tmp_path, SMALL, 2 * MIB)
    image.grow(256 * MIB)
    image.close()
    os.truncate(tmp_path / "image", 190 * 64 * 512 + 512)
    image = opened_qcow2(tmp_path / "image")
    for _ in range(2):
        image.refcounts._grow()
    with monkeypatch.context() as watched:
        disk = Disk(tmp_path / "image", watched)
        image.grow(512 * MIB)
    assert disk.checked > 3
    assert 0 not in image.refcounts.table[191:193].tolist()
    image.close()
    assert problems(tmp_path / "image") == {}


@pytest.mark.parametrize("options", [SMALL, "cluster_size=4k,refcount_bits=1", USUAL])
def test_flush_needs_no_new_room(tmp_path: Path, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a flush writes has room since the requests before it, which are refused if there is none."""
    image = made(tmp_path, options, 64 * MIB)
    unit = min(image.cluster_size, 4 * KIB)
    write(image, 0, b"o" * 4 * image.cluster_size)
    image.close()
    image = opened_qcow2(tmp_path / "image")
    written: set[int] = set()
    flushing = False
    real = posix.pwritev

    def note(fd: int, views: list[memoryview], offset: int) -> int:
        units = set(range(offset // unit, (offset + sum(map(len, views)) - 1) // unit + 1))
        assert not flushing or units <= written
        written.update(units)
        return real(fd, views, offset)

    monkeypatch.setattr(posix, "pwritev", note)
    for number in range(100):
        write(image, number * 641 * KIB & -512, b"n" * 1024)
    image.discard(0, image.cluster_size)
    image.write_zeroes(2 * image.cluster_size, image.cluster_size, True)
    flushing = True
    image.flush()
    flushing = False
    assert written
    image.close()
    assert problems(tmp_path / "image") == {}


# -- what is refused


@pytest.mark.parametrize("why", ["lost", "corrupt"])
def test_image_that_failed_is_not_written(tmp_path: Path, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that need no new cluster are refused, too.  It can be read."""
    path = tmp_path / "disk"
    create(str(path), "qcow2", MIB)
    image = opened_qcow2(path)
    write(image, 0, b"x" * 2 * CLUSTER)
    image.close()
    put(path, (image.l1[0] & OFFSET_MASK) + 8, (image.header.l1_offset | COPIED).to_bytes(8, "big"))
    image = opened_qcow2(path)

    def fail(_fd: int) -> None:
        raise OSError(errno.EIO, "failed")

    if why == "lost":
        with monkeypatch.context() as broken:
            broken.setattr(posix, "fdatasync", fail)
            with pytest.raises(OSError, match="data was lost"):
                image.flush()
    else:
        with pytest.raises(OSError, match="image is corrupt"):
            write(image, CLUSTER, b"y" * 512)
    before = path.read_bytes()

    requests: list[Callable[[], None]] = [
        lambda: write(image, 0, b"y" * 512),
        lambda: write(image, 4 * CLUSTER, b"y" * 512),
        lambda: image.discard(0, CLUSTER),
        lambda: image.write_zeroes(0, CLUSTER, False),
        lambda: image.grow(2 * MIB),
        image.settle,
        image.flush,
    ]
    for request in requests:
        with pytest.raises(OSError, match="data was lost" if why == "lost" else "image is corrupt"):
            request()
    assert read(image, 0, 512) == b"x" * 512
    image.close()
    assert path.read_bytes() == before


def test_cluster_behind_the_end_is_written_when_the_file_has_it_again(tmp_path: Path) -> None:
    """Somebody has cut the file, and mends it while it is open."""
    image = made(tmp_path, USUAL, MIB)
    write(image, 0, b"x" * 2 * CLUSTER)
    image.close()
    whole = (tmp_path / "image").read_bytes()
    os.truncate(tmp_path / "image", len(whole) - CLUSTER)
    image = opened_qcow2(tmp_path / "image")

    with pytest.raises(OSError, match=f"file ends at {len(whole) - CLUSTER}, before a cluster that is in use"):
        write(image, CLUSTER, b"y" * 512)
    put(tmp_path / "image", 0, whole)
    write(image, CLUSTER, b"y" * 512)

    assert read(image, 0, 2 * CLUSTER) == b"x" * CLUSTER + b"y" * 512 + b"x" * (CLUSTER - 512)
    image.close()
    assert problems(tmp_path / "image") == {}


@pytest.mark.parametrize("table", ["refcount block", "L2 table"])
def test_table_behind_the_end_of_a_file_that_was_cut(tmp_path: Path, table: str) -> None:
    """A write that needs it is refused."""
    image = made(tmp_path, SMALL, MIB)
    write(image, 0, b"x" * 256 * KIB)
    image.close()
    image = opened_qcow2(tmp_path / "image")
    last = max(image.refcounts.table if table == "refcount block" else [entry & OFFSET_MASK for entry in image.l1])
    os.truncate(tmp_path / "image", last + 256)

    with pytest.raises(OSError, match=f"now ends before the {table} at {last}|{table} at {last} is outside the file"):
        write(image, 256 * KIB if table == "refcount block" else 240 * KIB, b"y" * 512)
    image.fd, closed = os.open(os.devnull, os.O_RDWR), image.fd
    os.close(closed)
    os.close(image.fd)


def test_device_is_full_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a cluster at its end is not used.  When the device has become larger, the rest is used, too."""
    made(tmp_path, SMALL, MIB).close()
    path = tmp_path / "image"
    begin = -(-path.stat().st_size // 512)
    monkeypatch.setattr(qcow2, "is_device", lambda _fd: True)
    os.truncate(path, (begin + 5) * 512 + 256)  # an L2 table, and four clusters of data
    image = opened_qcow2(path)
    for more in (0, 3):
        os.truncate(path, (begin + 5 + more) * 512 + 256)
        size = path.stat().st_size
        for number in range(4 + more):
            write(image, number * 512, b"x" * 512)
        with pytest.raises(OSError, match=f"No space left on device: it ends after {size} bytes"):
            write(image, (4 + more) * 512, b"x" * 512)
        assert path.stat().st_size == size
    image.close()
    assert problems(path) == {}


# -- images that the last writer did not close


@pytest.mark.parametrize("what", ["plain", "packed", "zero"])
def test_free_clusters_of_a_dirty_image_follow_those_in_use(tmp_path: Path, what: str) -> None:
    """Whatever its tables lead to is in use, whatever its refcounts are."""
    content = random.Random(1).randbytes(4 * CLUSTER)
    if what == "packed":
        path = packed(tmp_path, content[: CLUSTER // 2] * 8 + bytes(MIB), USUAL)
    else:
        image = made(tmp_path, USUAL, 2 * MIB)
        write(image, 0, content)
        if what == "zero":
            image.write_zeroes(3 * CLUSTER, CLUSTER, False)
        image.close()
        path = tmp_path / "image"
    end = -(-path.stat().st_size // CLUSTER)
    put(path, 72, (1).to_bytes(8, "big"))

    image = opened_qcow2(path)
    before = read(image, 0, MIB)
    assert image.refcounts.floor == end
    write(image, MIB, b"n" * CLUSTER)
    assert image.slices[0].table[MIB // CLUSTER] == end * CLUSTER | COPIED
    assert read(image, 0, MIB) == before
    image.close()


def test_dirty_image_without_a_refcount_block(tmp_path: Path) -> None:
    """A block for the last clusters in use cannot be made, so the next one is."""
    image = made(tmp_path, SMALL, 2 * MIB)
    write(image, 0, b"x" * 40 * KIB)
    image.close()
    end = (tmp_path / "image").stat().st_size // 512
    assert 64 < end < 128
    put(tmp_path / "image", image.header.refcount_offset + 8, bytes(8))
    put(tmp_path / "image", 72, (1).to_bytes(8, "big"))

    image = opened_qcow2(tmp_path / "image")
    write(image, MIB, b"n" * 512)
    assert [image.refcounts.get(cluster) for cluster in (127, 128, 129, 130, 131)] == [0, 1, 1, 1, 0]
    assert read(image, 0, 40 * KIB) == b"x" * 40 * KIB
    image.close()


def test_dirty_image_whose_refcounts_end_before_its_clusters(tmp_path: Path) -> None:
    """Its refcount table is too small to count the clusters in use."""
    image = made(tmp_path, SMALL, 4 * MIB)
    write(image, 0, b"x" * 512)
    image.close()
    far = 64 * 64
    os.truncate(tmp_path / "image", (far + 1) * 512)
    put(tmp_path / "image", 72, (1).to_bytes(8, "big"))
    for cluster, refused in ((far, True), (far - 1, False)):
        put(tmp_path / "image", image.l1[0] & OFFSET_MASK, (cluster * 512 | COPIED).to_bytes(8, "big"))
        if refused:
            with pytest.raises(ImageError, match="is dirty, and clusters in use have no refcount"):
                opened_qcow2(tmp_path / "image")
        else:
            opened_qcow2(tmp_path / "image").close()


@pytest.mark.parametrize("kind", ["file", "device"])
def test_old_bytes_of_a_cluster_that_is_used_again_are_not_read(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage that cannot give room back still has them, and a write of a part has to fill the rest."""
    monkeypatch.setattr(qcow2, "fallocate", lambda *_arguments: (_ for _ in ()).throw(OSError(errno.EOPNOTSUPP, "no")))
    image = made(tmp_path, USUAL, 2 * MIB)
    image.device = kind == "device"
    write(image, 0, b"old" * (CLUSTER // 3) + b"o")
    place = image.slices[0].table[0] & OFFSET_MASK
    image.discard(0, CLUSTER)
    image.flush()
    write(image, MIB + 1024, b"new" * 100)

    assert image.slices[0].table[MIB // CLUSTER] & OFFSET_MASK == place
    assert read(image, MIB, CLUSTER) == (bytes(1024) + b"new" * 100).ljust(CLUSTER, b"\0")
    image.close()


@pytest.mark.parametrize(("size", "clusters"), [(4 << 40, 4), ((4 << 40) + 512, 5)])
def test_an_empty_image_has_no_more_clusters_than_it_needs(tmp_path: Path, size: int, clusters: int) -> None:
    """Header, refcount table, refcount block, and the L1 table, of which a cluster is enough for 4 TiB."""
    create(str(tmp_path / "image"), "qcow2", size)
    assert (tmp_path / "image").stat().st_size == clusters * CLUSTER
    assert problems(tmp_path / "image") == {}
