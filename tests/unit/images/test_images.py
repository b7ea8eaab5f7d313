"""Raw images, chains, and qcow2 on a failing host."""

import errno
import os
import posix
import random
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.descriptors import open_descriptors
from tests.support.images import (
    KIB,
    MIB,
    Scribbler,
    opened,
    opened_qcow2,
    pieces,
    problems,
    qemu,
    read,
    same,
    write,
)
from vmd.errors import HostError, ImageError, OperatorError
from vmd.images import hostfile, qcow2
from vmd.images.create import MAX_SIZE, convert, create
from vmd.images.files import OpenedChain
from vmd.images.header import OFFSET_MASK
from vmd.images.hostfile import total
from vmd.images.signatures import QCOW_MAGIC, SIGNATURES
from vmd.ipc.foreign import FOREIGN

CLUSTER = 64 * KIB


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """An empty qcow2 image."""
    path = tmp_path / "disk.qcow2"
    create(str(path), "qcow2", 16 * MIB)
    return path


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """An empty raw image."""
    path = tmp_path / "disk.raw"
    create(str(path), "raw", 4 * MIB)
    return path


# -- both formats


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_scribble(tmp_path: Path, image_format: str) -> None:
    """Random requests have the same result as on a flat disk, also after the image is opened again."""
    path = tmp_path / "disk"
    create(str(path), image_format, 4 * MIB + 512)
    flat = bytearray(4 * MIB + 512)
    image = opened(path, writable=True, formats=(image_format,))

    Scribbler(image, flat, seed=4).run(400)
    image.close()

    image = opened(path, formats=(image_format,))
    assert read(image, 0, len(flat)) == flat
    image.close()


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize(("offset", "length"), [(-512, 512), (4 * MIB, 1), (4 * MIB - 512, 1024), (1 << 62, 512)])
def test_request_outside_the_disk_is_refused(tmp_path: Path, image_format: str, offset: int, length: int) -> None:
    """Every method raises an error (hostile 29, 32)."""
    path = tmp_path / "disk"
    create(str(path), image_format, 4 * MIB)
    image = opened(path, writable=True, formats=(image_format,))

    requests: list[Callable[[], object]] = [
        lambda: read(image, offset, length),
        lambda: write(image, offset, bytes(length)),
        lambda: image.discard(offset, length),
        lambda: image.write_zeroes(offset, length, True),
    ]
    for request in requests:
        with pytest.raises(OSError, match="outside the disk"):
            request()
    image.close()


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_read_only_image_is_not_written(tmp_path: Path, image_format: str) -> None:
    """Requests that need not change anything are refused, too."""
    path = tmp_path / "disk"
    create(str(path), image_format, 4 * MIB)
    image = opened(path, formats=(image_format,))

    requests: list[Callable[[], None]] = [
        lambda: write(image, 0, bytes(512)),
        lambda: image.discard(0, 512),
        lambda: image.write_zeroes(0, 512, False),
        lambda: image.grow(8 * MIB),
    ]
    for request in requests:
        with pytest.raises(OSError, match="reading only") as refused:
            request()
        assert refused.value.errno == errno.EROFS
    image.flush()
    image.close()


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_more_views_than_the_kernel_takes(tmp_path: Path, image_format: str) -> None:
    """A request has 3000 sectors in as many pieces."""
    path = tmp_path / "disk"
    create(str(path), image_format, 4 * MIB)
    image = opened(path, writable=True, formats=(image_format,))
    data = random.Random(1).randbytes(3000 * 512)
    parts = [memoryview(data)[at : at + 512] for at in range(0, len(data), 512)]

    image.pwritev(512, parts)
    image.pwritev(512, parts)  # the second write is in place
    buffer = bytearray(len(data))
    image.preadv(512, [memoryview(buffer)[at : at + 512] for at in range(0, len(data), 512)])

    assert buffer == data
    image.close()


def test_cut_views_are_counted() -> None:
    """Their lengths are added up, however many there are."""
    assert total(pieces(bytes(1000), random.Random(3))) == 1000


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_lost_data_is_reported_ever_after(tmp_path: Path, image_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reports a failed write-back only once.  A later successful flush would be wrong (hostile 33)."""
    path = tmp_path / "disk"
    create(str(path), image_format, 4 * MIB)
    image = opened(path, writable=True, formats=(image_format,))
    write(image, 0, b"x" * 512)

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "failed")

    with monkeypatch.context() as broken:
        broken.setattr(posix, "fdatasync", fail)
        with pytest.raises(OSError, match="failed"):
            image.flush()
    with pytest.raises(OSError, match="data was lost"):
        image.flush()
    image.close()


def test_no_flush_succeeds_beside_one_that_fails(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reports the failure to one of two callers, but the data of both may be lost (hostile 33)."""
    image = opened(raw, writable=True, formats=("raw",))
    started, go_on, told = threading.Event(), threading.Event(), []

    def fail_once(fd: int) -> None:
        if not started.is_set():
            started.set()
            assert go_on.wait(60)
            raise OSError(errno.EIO, "failed")

    def flush() -> None:
        try:
            image.flush()
        except OSError as error:
            told.append(type(error))

    monkeypatch.setattr(posix, "fdatasync", fail_once)
    first, second = threading.Thread(target=flush), threading.Thread(target=flush)
    first.start()
    assert started.wait(60)
    second.start()
    go_on.set()
    first.join()
    second.join()

    assert told == [hostfile.DataLost] * 2
    image.close()


# -- raw


def test_raw_file_that_ends_inside_a_sector(raw: Path) -> None:
    """Reads find zeros after the last byte, up to the end of the sector."""
    raw.write_bytes(b"a" * 1000)
    image = opened(raw, writable=True, formats=("raw",))

    assert image.size == 1024
    assert "its 1000 bytes are no multiple of 512" in image.remark
    assert read(image, 512, 512) == b"a" * 488 + bytes(24)
    assert image.span(0) == (True, 1000)
    assert image.span(1000) == (True, 24)
    image.write_zeroes(512, 512, True)
    assert read(image, 512, 512) == bytes(512)
    os.truncate(raw, 999)
    with pytest.raises(OSError, match="has become shorter than 1000 bytes"):
        read(image, 512, 512)
    image.close()


def test_signature_in_a_shorter_guessed_raw_file_is_refused_31(raw: Path) -> None:
    """Missing bytes count as zeros (hostile 31)."""
    raw.write_bytes(b"QF")
    image = opened(raw, writable=True, formats=("raw",), guessed=True)

    with pytest.raises(OSError, match="may not write the signature"):
        write(image, 2, b"I\xfb")
    write(image, 8, b"I\xfb")
    assert read(image, 0, 512) == (b"QF" + bytes(6) + b"I\xfb").ljust(512, b"\0")
    image.close()


def test_shrunk_file_has_no_holes_behind_its_end_33(raw: Path, disk: Path) -> None:
    """A copy reads there and fails.  Zeros would be invented data (hostile 33)."""
    image = opened(raw, formats=("raw",))
    os.truncate(raw, MIB)
    assert image.span(MIB) == (True, 3 * MIB)
    assert image.span(0) == (False, MIB)
    image.close()

    packed = opened_qcow2(disk)
    write(packed, 0, b"a" * 4 * CLUSTER)
    packed.flush()
    os.truncate(disk, 6 * CLUSTER)
    assert packed.span(2 * CLUSTER) == (True, 2 * CLUSTER)
    with pytest.raises(OSError, match="file ends at 393216, before a cluster that is in use"):
        read(packed, 2 * CLUSTER, CLUSTER)
    packed.close()


def test_shrunk_file_is_an_error_33(raw: Path) -> None:
    """Zeros would be taken for the disk's content (hostile 33)."""
    image = opened(raw, writable=True, formats=("raw",))
    os.truncate(raw, MIB)

    with pytest.raises(OSError, match="has become shorter than 4194304 bytes"):
        read(image, MIB - 512, 1024)
    image.close()


@pytest.mark.parametrize(
    "signature",
    [QCOW_MAGIC, *(bytes(at) + found for name, at, found in SIGNATURES if not FOREIGN[name].content)],
)
def test_guessed_raw_disk_takes_no_signature_31(raw: Path, signature: bytes) -> None:
    """It is refused as a whole, in pieces and byte by byte (hostile 31)."""
    image = opened(raw, writable=True, formats=("raw",), guessed=True)
    sector = signature + bytes(512 - len(signature))

    with pytest.raises(OSError, match="may not write the signature") as refused:
        write(image, 0, sector)
    assert refused.value.errno == errno.EPERM
    with pytest.raises(OSError, match="may not write the signature"):
        image.pwritev(0, [memoryview(sector)[:1], memoryview(sector)[1:2], memoryview(sector)[2:]])
    write(image, 0, b"\x33")
    write(image, len(signature) - 2, signature[-2:])
    with pytest.raises(OSError, match="may not write the signature"):
        write(image, 0, signature[:-2])
    write(image, 0, b"\x33\xc0" + bytes(510))
    write(image, 1024, sector)
    image.close()


def test_memory_that_changes_under_the_check_gains_nothing_31(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The written bytes are those that were checked (hostile 20)."""
    image = opened(raw, writable=True, formats=("raw",), guessed=True)
    memory = bytearray(4096)
    real = os.pwritev

    def change_first(fd: int, views: list[memoryview], offset: int) -> int:
        memory[:4] = b"QFI\xfb"
        return real(fd, views, offset)

    monkeypatch.setattr(posix, "pwritev", change_first)
    image.pwritev(0, [memoryview(memory)])

    assert raw.read_bytes()[:4] == bytes(4)
    image.close()


def test_disk_configured_as_raw_takes_any_bytes(raw: Path) -> None:
    """Its first bytes are never used to guess a format."""
    image = opened(raw, writable=True, formats=("raw",))

    write(image, 0, b"QFI\xfb" + bytes(508))

    image.close()


def test_raw_discard_gives_storage_back(raw: Path) -> None:
    """Writing zeros that may be unmapped does so, too."""
    image = opened(raw, writable=True, formats=("raw",))
    write(image, 0, b"x" * 2 * MIB)
    image.flush()
    before = raw.stat().st_blocks

    image.discard(0, MIB)
    image.write_zeroes(MIB, MIB, True)

    assert raw.stat().st_blocks < before
    assert read(image, 0, 2 * MIB) == bytes(2 * MIB)
    image.close()


def test_qcow2_discard_gives_storage_back(disk: Path) -> None:
    """Writing zeros that may be unmapped does so, too, once nothing on the disk refers to the old clusters."""
    image = opened_qcow2(disk, writable=True)
    write(image, 0, b"x" * 3 * MIB)
    image.flush()
    before = disk.stat().st_blocks

    image.discard(0, MIB)
    image.write_zeroes(MIB, MIB, True)
    image.flush()

    assert (before - disk.stat().st_blocks) * 512 >= 2 * MIB
    assert read(image, 0, 3 * MIB) == bytes(2 * MIB) + b"x" * MIB
    image.close()
    assert problems(disk) == {}


def test_old_clusters_of_a_dirty_image_are_not_freed(disk: Path) -> None:
    """Its refcounts are unreliable.  Clusters allocated since then, behind the old ones, are freed as usual."""
    image = opened_qcow2(disk, writable=True)
    write(image, 0, b"x" * MIB)
    image.close()
    with disk.open("r+b") as file:
        file.seek(72)
        file.write((1).to_bytes(8, "big"))  # incompatible features: dirty
    image = opened_qcow2(disk, writable=True)
    assert image.refcounts.floor == disk.stat().st_size // CLUSTER
    write(image, 8 * MIB, b"y" * CLUSTER)  # in the existing slice of L2
    image.flush()
    before, end = disk.stat().st_blocks, disk.stat().st_size

    image.discard(0, MIB)
    image.flush()
    assert disk.stat().st_blocks == before

    image.discard(8 * MIB, CLUSTER)
    image.flush()
    assert (before - disk.stat().st_blocks) * 512 == CLUSTER
    write(image, 9 * MIB, b"z" * CLUSTER)  # at the freed place
    image.flush()
    assert (disk.stat().st_blocks, disk.stat().st_size) == (before, end)
    image.close()


@pytest.mark.parametrize("unmap", [True, False])
def test_zeroes_are_written_where_the_file_system_cannot_make_holes(
    raw: Path, monkeypatch: pytest.MonkeyPatch, unmap: bool
) -> None:
    """This is slow but correct.  A discard then does nothing."""
    image = opened(raw, writable=True, formats=("raw",))
    write(image, 0, b"x" * 3 * MIB)

    def refuse(fd: int, mode: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr("vmd.images.raw.fallocate", refuse)
    image.discard(0, MIB)
    image.write_zeroes(512, 2 * MIB, unmap)

    assert read(image, 0, 3 * MIB) == b"x" * 512 + bytes(2 * MIB) + b"x" * (MIB - 512)
    image.close()


# -- chains


def test_backing_image_that_is_shorter_reads_as_zeroes_52(tmp_path: Path) -> None:
    """This holds behind its end, which need not be at a sector (hostile 52)."""
    (tmp_path / "base").write_bytes(b"b" * 70001)
    create(str(tmp_path / "top"), "qcow2", MIB, "base", "raw")
    image = opened(tmp_path / "top", tmp_path / "base", writable=True, formats=("qcow2", "raw"))

    assert read(image, 0, MIB) == b"b" * 70001 + bytes(MIB - 70001)
    write(image, 70144, b"t" * 512)
    assert read(image, 0, MIB) == b"b" * 70001 + bytes(143) + b"t" * 512 + bytes(MIB - 70656)
    image.close()


def test_discard_uncovers_no_backing_file(tmp_path: Path) -> None:
    """A discard also hides the data of the backing file."""
    (tmp_path / "base").write_bytes(b"b" * MIB)
    create(str(tmp_path / "top"), "qcow2", MIB, "base", "raw")
    image = opened(tmp_path / "top", tmp_path / "base", writable=True, formats=("qcow2", "raw"))
    write(image, 0, b"t" * MIB)

    image.discard(0, CLUSTER)

    assert read(image, 0, CLUSTER) == bytes(CLUSTER)
    image.close()


def test_chain_that_does_not_fit_is_refused_52(tmp_path: Path, disk: Path) -> None:
    """It is too long or too short, below a raw image, or of a guessed image.  All files are closed."""
    create(str(tmp_path / "top"), "qcow2", MIB, "base", "qcow2")
    before = len(open_descriptors())

    for paths, formats, words in (
        ((tmp_path / "top", disk, disk, disk, disk), ("qcow2",) * 5, "top: backing chain is longer than 4 images"),
        ((tmp_path / "top",), ("qcow2",), "needs its backing file base"),
        ((disk, disk), ("qcow2",) * 2, "names no backing file"),
        ((disk, disk), ("raw", "qcow2"), "a raw image has no backing file"),
        ((disk,), ("vmdk",), "unknown image format vmdk"),
    ):
        with pytest.raises(ImageError, match=words):
            opened(*paths, formats=formats)
    with pytest.raises(ImageError, match="say so yourself with `format qcow2`"):
        opened(tmp_path / "top", disk, guessed=True)
    with pytest.raises(ImageError, match=r"^disk: "):
        opened()

    assert len(open_descriptors()) == before


def test_chain_by_path_is_followed_with_care_52(tmp_path: Path) -> None:
    """Missing files, loops and chains that are too long have a message each."""
    create(str(tmp_path / "self"), "qcow2", MIB, "self", "qcow2")
    create(str(tmp_path / "lost"), "qcow2", MIB, "gone", "qcow2")
    create(str(tmp_path / "0"), "qcow2", MIB)
    for level in range(1, 5):
        create(str(tmp_path / f"{level}"), "qcow2", MIB, f"{level - 1}", "qcow2")
    os.mkfifo(tmp_path / "fifo")

    for name, words in (
        ("self", "self: backing chain comes back to .*/self"),
        ("lost", "backing file .*/gone: cannot be opened: No such file or directory"),
        ("4", "4: backing chain is longer than 4 images"),
        ("fifo", "fifo: neither a regular file nor a block device"),
        ("missing", "missing: cannot be opened: No such file or directory"),
    ):
        with pytest.raises((ImageError, OperatorError), match=words):
            OpenedChain(str(tmp_path / name), "qcow2")
    chain = OpenedChain(str(tmp_path / "3"), "qcow2")
    assert [Path(link.path).name for link in chain.links] == ["3", "2", "1", "0"]
    chain.close()


# -- qcow2 on a failing host


def packed_image(path: Path, packed: bytes) -> None:
    """Make the first cluster of an image a compressed one with these bytes."""
    image = opened_qcow2(path)
    write(image, 0, b"x" * CLUSTER)
    image.close()
    sectors = -(-len(packed) // 512) - 1
    with path.open("r+b") as file:
        file.seek(4 * CLUSTER)
        file.write((1 << 62 | sectors << 54 | 5 * CLUSTER).to_bytes(8, "big"))
        file.seek(5 * CLUSTER)
        file.write(packed[:CLUSTER])


def deflated(data: bytes) -> bytes:
    """Compress as qcow2 does."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -12)
    return compressor.compress(data) + compressor.flush()


def test_bomb_yields_no_more_than_a_cluster_52(disk: Path) -> None:
    """The limit holds for any compressed data (hostile 52)."""
    packed_image(disk, deflated(bytes(50 * MIB))[:CLUSTER])
    image = opened_qcow2(disk)

    assert read(image, 0, CLUSTER) == bytes(CLUSTER)
    assert sum(map(len, image.inflated.values())) == CLUSTER
    image.close()


@pytest.mark.parametrize(
    ("packed", "words"),
    [
        (b"\xff" * 600, "cannot be read"),
        (deflated(b"short"), "has only 5 bytes"),
    ],
)
def test_bad_compressed_cluster_is_an_error_52(disk: Path, packed: bytes, words: str) -> None:
    """It cannot be decompressed, or has too little data."""
    packed_image(disk, packed)
    image = opened_qcow2(disk)

    with pytest.raises(OSError, match=words):
        read(image, 0, 512)
    image.close()


class FailingWrites:
    """pwritev(2) that fails once after a part of the data."""

    def __init__(self, failing: int, error: int) -> None:
        self.real = os.pwritev
        self.left = failing
        self.error = error

    def __call__(self, fd: int, views: list[memoryview], offset: int) -> int:
        """Write, or fail."""
        self.left -= 1
        if self.left == 0:
            self.real(fd, [views[0][:100]], offset)
            raise OSError(self.error, os.strerror(self.error))
        return self.real(fd, views, offset)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("failing", range(1, 12))
def test_failing_write_leaves_a_consistent_image_33(
    disk: Path, failing: int, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every write that may fail, the guest gets an error and all other data is kept (hostile 33)."""
    image = opened_qcow2(disk)
    write(image, 0, b"a" * CLUSTER)
    image.flush()
    requests: list[Callable[[], None]] = [
        lambda: write(image, 8 * MIB, b"b" * 512),
        lambda: write(image, CLUSTER - 512, b"c" * 1024),
        lambda: image.discard(0, CLUSTER),
        image.flush,
    ]
    failures = []

    writes = FailingWrites(failing, error)
    with monkeypatch.context() as broken:
        broken.setattr(posix, "pwritev", writes)
        for request in requests:
            try:
                request()
            except OSError as failure:
                failures.append(failure.errno)
    assert failures == [error] * (writes.left <= 0)
    write(image, 8 * MIB, b"d" * 512)
    write(image, CLUSTER, b"e" * 512)
    image.close()

    image = opened_qcow2(disk)
    assert read(image, 8 * MIB, 1024) == b"d" * 512 + bytes(512)
    assert read(image, CLUSTER, 1024) == b"e" * 512 + bytes(512)
    assert {image.refcounts.get(cluster) for cluster in range(8)} <= {0, 1}
    image.close()


@pytest.mark.parametrize("failing", range(1, 40, 3))
def test_failing_write_while_the_refcount_table_grows_33(
    tmp_path: Path, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A half-written table is made again, and no data is lost (hostile 33)."""
    disk = tmp_path / "disk"
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", "cluster_size=512,refcount_bits=64", disk, "4M")
    image = opened_qcow2(disk)
    flat = bytearray(random.Random(failing).randbytes(4 * MIB))
    table, step = image.refcounts.table_offset, 16 * KIB
    offset = 0
    while image.refcounts.end < len(image.refcounts.table) * image.refcounts.per_block - 100:
        write(image, offset, bytes(flat[offset : offset + step]))
        offset += step
    with monkeypatch.context() as broken:
        broken.setattr(posix, "pwritev", FailingWrites(failing, errno.ENOSPC))
        failed = []
        while image.refcounts.table_offset == table:
            try:
                write(image, offset, bytes(flat[offset : offset + step]))
                offset += step
            except OSError as error:
                failed.append(error.errno)
    assert failed == [errno.ENOSPC]
    while offset < 3 * MIB:
        write(image, offset, bytes(flat[offset : offset + step // 2 + 100]))
        flat[offset + step // 2 + 100 : offset + step] = bytes(step // 2 - 100)
        offset += step
    flat[offset:] = bytes(len(flat) - offset)
    image.close()

    assert set(problems(disk)) <= {"leaks"}
    same(disk, flat, tmp_path)


def test_flush_continues_after_an_unwritable_table_33(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that cannot be written does not stop the others, and is tried again (hostile 33)."""
    disk, second = tmp_path / "disk.qcow2", 512 * MIB
    create(str(disk), "qcow2", 2 * second)
    image = opened_qcow2(disk)
    write(image, 0, b"a" * 512)
    write(image, second, b"b" * 512)
    image.flush()
    write(image, CLUSTER, b"c" * 512)
    write(image, second + CLUSTER, b"d" * 512)
    first_table, real = image.l1[0] & OFFSET_MASK, os.pwritev

    def refuse(fd: int, views: list[memoryview], offset: int) -> int:
        if first_table <= offset < first_table + CLUSTER:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, views, offset)

    with monkeypatch.context() as broken:
        broken.setattr(posix, "pwritev", refuse)
        with pytest.raises(hostfile.FlushFailed, match="No space left"):
            image.flush()
        found = opened_qcow2(disk, writable=False)
        assert read(found, second + CLUSTER, 512) == b"d" * 512
        found.close()
    image.flush()

    found = opened_qcow2(disk, writable=False)
    assert read(found, CLUSTER, 512) == b"c" * 512
    found.close()
    image.close()
    assert problems(disk) == {}


@pytest.mark.parametrize("where", ["in", "beside"])
def test_unwritable_refcounts_do_not_fail_writes_in_place_33(
    disk: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file-size limit forbids writes to a refcount block.

    Writes in place work, and those that allocate are refused.
    """
    image = opened_qcow2(disk)
    write(image, 0, b"a" * CLUSTER)
    image.close()
    image = opened_qcow2(disk)
    real = os.pwritev

    def refuse(fd: int, views: list[memoryview], offset: int) -> int:
        if 2 * CLUSTER <= offset < 3 * CLUSTER:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        return real(fd, views, offset)

    with monkeypatch.context() as broken:
        broken.setattr(posix, "pwritev", refuse)
        if where == "in":
            write(image, 512, b"b" * 512)
        else:
            with pytest.raises(OSError, match="File too large"):
                write(image, CLUSTER, b"b" * 512)
            image.discard(0, CLUSTER)
        for _ in range(2):  # the second one would write the refcounts of what the first one has freed
            image.flush()
    image.close()

    assert set(problems(disk)) <= {"leaks"}


def test_table_that_was_half_written_is_not_seen_by_the_guest_33(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data takes its place at the end of the file next, so that place must be zeroed (hostile 33)."""
    disk, second = tmp_path / "disk.qcow2", 512 * MIB
    create(str(disk), "qcow2", 2 * second)
    image = opened_qcow2(disk)
    write(image, 0, b"a" * 512)
    write(image, second, b"b" * 512)
    image.close()
    with disk.open("rb+") as file:
        file.seek(image.header.l1_offset)
        file.write(bytes(1))  # the first table may not be written in place, as with a snapshot
    image = opened_qcow2(disk)
    with monkeypatch.context() as broken:
        broken.setattr(posix, "pwritev", FailingWrites(1, errno.ENOSPC))
        with pytest.raises(OSError, match="No space left"):
            write(image, CLUSTER, b"c" * 512)
    write(image, second + CLUSTER + 4 * KIB, b"d" * 512)

    assert read(image, second + CLUSTER, CLUSTER) == bytes(4 * KIB) + b"d" * 512 + bytes(CLUSTER - 4 * KIB - 512)
    image.close()


@pytest.mark.parametrize("flushed", [True, False])
def test_cluster_is_not_reused_while_a_write_to_it_is_under_way(
    disk: Path, monkeypatch: pytest.MonkeyPatch, flushed: bool
) -> None:
    """A guest discards a cluster during its write.  The late write must not reach the cluster's next user.

    After it, the next flush or the next write that needs a cluster frees the cluster.
    """
    image = opened_qcow2(disk)
    write(image, 0, b"a" * CLUSTER)
    image.flush()
    place = image.l1[0], image.slices[0].table[0]
    started, go_on = threading.Event(), threading.Event()
    real = hostfile.write_views

    def slow(fd: int, views: list[memoryview], offset: int, length: int) -> None:
        if threading.current_thread().name == "slow":
            started.set()
            assert go_on.wait(60)
        real(fd, views, offset, length)

    monkeypatch.setattr(qcow2, "write_views", slow)
    late = threading.Thread(target=write, args=(image, 0, b"L" * CLUSTER), name="slow")
    late.start()
    assert started.wait(60)
    image.discard(0, CLUSTER)
    image.flush()
    for number in range(1, 9):
        write(image, number * CLUSTER, b"n" * CLUSTER)
    go_on.set()
    late.join()

    assert read(image, CLUSTER, 8 * CLUSTER) == b"n" * 8 * CLUSTER
    if flushed:
        image.flush()
    write(image, 9 * CLUSTER, b"m" * CLUSTER)  # now the cluster may be reused
    assert (image.l1[0], image.slices[0].table[9]) == place
    image.close()


def test_read_goes_on_while_a_write_that_allocates_is_slow(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow request does not delay those that allocate nothing."""
    image = opened_qcow2(disk)
    write(image, 0, b"a" * CLUSTER)
    started, go_on = threading.Event(), threading.Event()
    real = hostfile.write_views

    def slow(fd: int, views: list[memoryview], offset: int, length: int) -> None:
        if threading.current_thread().name == "slow":
            started.set()
            assert go_on.wait(60)
        real(fd, views, offset, length)

    monkeypatch.setattr(qcow2, "write_views", slow)
    late = threading.Thread(target=write, args=(image, MIB, b"L" * CLUSTER), name="slow")
    late.start()
    assert started.wait(60)

    assert read(image, 0, CLUSTER) == b"a" * CLUSTER
    write(image, 0, b"b" * CLUSTER)
    assert read(image, MIB, 512) == bytes(512)

    go_on.set()
    late.join()
    image.close()


def test_cache_of_tables_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with more tables than fit is read and written correctly in bounded memory."""
    monkeypatch.setattr(qcow2, "CACHE_BYTES", 4 * qcow2.SLICE_BYTES)
    path = tmp_path / "disk"
    create(str(path), "qcow2", 64 << 29)
    image = opened_qcow2(path)

    for number in range(64):
        write(image, number << 29, bytes([number]) * 1024)
        assert len(image.slices) <= 8
    order = list(range(64))
    random.Random(1).shuffle(order)

    for number in order:
        assert read(image, number << 29, 1024) == bytes([number]) * 1024
        assert len(image.slices) <= 8
    image.close()


# -- creation


def test_existing_file_is_left_alone(raw: Path) -> None:
    """An existing file is never written."""
    raw.write_bytes(b"precious")

    with pytest.raises(HostError, match=f"could not create {raw}: File exists"):
        create(str(raw), "raw", MIB)

    assert raw.read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("size", "backing", "words"),
    [(MAX_SIZE + 1, "", "too large for a qcow2 image"), (MIB, "b" * 1024, "1024 bytes long, more than 1023")],
)
def test_invalid_image_leaves_no_file(tmp_path: Path, size: int, backing: str, words: str) -> None:
    """There is neither a file nor a part of one."""
    with pytest.raises(ImageError, match=words):
        create(str(tmp_path / "new"), "qcow2", size, backing, "qcow2")

    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_conversion_that_fails_leaves_no_file(
    tmp_path: Path, raw: Path, image_format: str, failure: BaseException
) -> None:
    """The disk is full, or the operator interrupts it."""
    raw.write_bytes(b"x" * MIB)
    source = OpenedChain(str(raw), "raw").image()

    def stop(done: int, whole: int) -> None:
        raise failure

    with pytest.raises((HostError, KeyboardInterrupt)):
        convert(source, str(tmp_path / "new"), image_format, MIB, stop)
    source.close()

    assert os.listdir(tmp_path) == [raw.name]
