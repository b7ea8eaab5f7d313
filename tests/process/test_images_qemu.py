"""Images tested with QEMU's programs: each side reads what the other has written."""

import contextlib
import json
import os
import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fakedriver import Device
from tests.support.images import (
    KIB,
    MIB,
    Scribbler,
    chain_formats,
    check_report,
    flat_file,
    make_chain,
    opened,
    opened_qcow2,
    problems,
    qemu,
    read,
    same,
    write,
)
from vmd.config.model import DiskConfig
from vmd.errors import ImageError, OperatorError
from vmd.files.images import OpenDisk, open_disk
from vmd.images.create import convert, create
from vmd.images.files import OpenedChain
from vmd.images.header import OFFSET_MASK
from vmd.images.identify import probe
from vmd.images.locks import lock
from vmd.ipc import devmsg
from vmd.ipc.probemsg import Probe

SCRIBBLES = [
    pytest.param(f"cluster_size={size},{more}", levels, id=f"{size}-{more}-{levels}")
    for size, more, levels in [
        ("512", "refcount_bits=16", 0),
        ("512", "refcount_bits=64", 3),
        ("1k", "refcount_bits=1", 0),
        ("4k", "refcount_bits=2", 1),
        ("4k", "compat=0.10", 0),
        ("4k", "compat=0.10", 3),
        ("16k", "refcount_bits=4", 3),
        ("64k", "refcount_bits=16", 0),
        ("64k", "refcount_bits=16", 1),
        ("64k", "refcount_bits=16", 3),
        ("64k", "refcount_bits=8", 0),
        ("64k", "preallocation=metadata", 0),
        ("256k", "refcount_bits=32", 1),
        ("2M", "refcount_bits=16", 1),
        ("2M", "compat=0.10", 0),
    ]
]


@pytest.mark.parametrize(("options", "levels"), SCRIBBLES)
def test_random_requests_leave_the_right_content(tmp_path: Path, options: str, levels: int) -> None:
    """After random requests of every kind, QEMU finds a clean image with the content of a flat disk."""
    size = 6 * MIB + 3 * 512
    paths, flat = make_chain(tmp_path, options, size, levels)
    image = opened(*paths, writable=True, formats=chain_formats(paths))

    Scribbler(image, flat, seed=1).run(300)
    image.close()

    assert problems(paths[0]) == {}
    same(paths[0], flat, tmp_path)


@pytest.mark.parametrize("levels", [0, 1])
def test_scribble_by_several_threads(tmp_path: Path, levels: int) -> None:
    """Each thread has its own sectors in shared clusters, and never reads another's data."""
    size, threads, sector = 4 * MIB, 4, 512
    paths, flat = make_chain(tmp_path, "cluster_size=8k", size, levels)
    image = opened(*paths, writable=True, formats=chain_formats(paths))
    failures: list[BaseException] = []

    def work(own: int) -> None:
        choice = random.Random(own)
        try:
            for _ in range(500):
                number = choice.randrange(size // sector // threads) * threads + own
                offset = number * sector
                if choice.random() < 0.5:
                    flat[offset : offset + sector] = choice.randbytes(sector)
                    write(image, offset, bytes(flat[offset : offset + sector]))
                else:
                    assert read(image, offset, sector) == flat[offset : offset + sector]
                if choice.random() < 0.02:
                    image.flush()
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(own,)) for own in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    image.close()

    assert failures == []
    assert problems(paths[0]) == {}
    same(paths[0], flat, tmp_path)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster_bits", range(9, 22))
def test_image_of_qemu_reads_back_identically(tmp_path: Path, compat: str, cluster_bits: int) -> None:
    """Images have every cluster size, both versions, plain and compressed clusters, and a backing file."""
    size = 5 * MIB + 1024
    flat = flat_file(tmp_path / "raw", size, seed=cluster_bits)
    options = f"compat={compat},cluster_size={1 << cluster_bits}"

    for name, more in (("plain", ()), ("packed", ("-c",))):
        path = tmp_path / name
        qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", options, *more, tmp_path / "raw", path)
        image = opened(path)
        assert read(image, 0, size) == flat
        image.close()


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster_bits", [9, 12, 16, 21])
def test_overlay_of_qemu_reads_back_identically(tmp_path: Path, compat: str, cluster_bits: int) -> None:
    """The base is shorter, and has another cluster size.  Behind its end there are zeroes."""
    size, below = 4 * MIB + 512, 3 * MIB - 1536
    flat = flat_file(tmp_path / "raw", below, seed=cluster_bits) + bytes(size - below)
    base, top = tmp_path / "base", tmp_path / "top"
    qemu("qemu-img", "convert", "-c", "-O", "qcow2", "-o", "cluster_size=32k", "-f", "raw", tmp_path / "raw", base)
    options = f"compat={compat},cluster_size={1 << cluster_bits}"
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", options, "-F", "qcow2", "-b", "base", top, size)
    commands = []
    choice = random.Random(cluster_bits)
    for number in range(1, 40):
        offset, length = choice.randrange(size // 512) * 512, choice.randrange(1, 200) * 512
        length = min(length, size - offset)
        zero = choice.random() < 0.2
        commands += ["-c", f"write {'-z' if zero else f'-P {number}'} {offset} {length}"]
        flat[offset : offset + length] = bytes([0 if zero else number]) * length
    qemu("qemu-io", "-f", "qcow2", *commands, top)

    chain = OpenedChain(str(top), "qcow2").image()
    content = read(chain, 0, size)
    chain.close()

    assert content == flat


@pytest.mark.parametrize("mode", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize("more", ["lazy_refcounts=on", "refcount_bits=1", "cluster_size=4k", "compat=0.10"])
def test_preallocated_image_reads_back_identically(tmp_path: Path, mode: str, more: str) -> None:
    """Clusters that QEMU has only reserved read as zeroes.  So do those that it has zeroed or discarded."""
    path, size = tmp_path / "image", 2 * MIB
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", f"preallocation={mode},{more}", path, size)
    commands = ["write -P 3 0 300k", "write -P 4 700k 1", "write -z 64k 130k", "discard 512k 256k", "write -z -u 1M 4k"]
    qemu("qemu-io", "-f", "qcow2", *(word for command in commands for word in ("-c", command)), path)
    qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, tmp_path / "raw")
    expected = (tmp_path / "raw").read_bytes()

    image = opened_qcow2(path)
    assert read(image, 0, size) == expected
    write(image, 1500 * KIB, b"x" * 100)
    image.close()

    assert problems(path) == {}
    same(path, expected[: 1500 * KIB] + b"x" * 100 + expected[1500 * KIB + 100 :], tmp_path)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_every_refcount_width_is_written(tmp_path: Path, bits: int) -> None:
    """Compressed clusters are replaced, and their places used again.  The image is clean afterwards."""
    size = 4 * MIB
    flat = flat_file(tmp_path / "raw", size, seed=bits, density=0.9)
    path = tmp_path / "image"
    width = bits
    packed = ("-c",) if bits >= 8 else ()  # compressed clusters share places, which narrow refcounts cannot count
    qemu("qemu-img", "convert", "-O", "qcow2", "-o", f"refcount_bits={width},cluster_size=4k", *packed,
         "-f", "raw", tmp_path / "raw", path)  # fmt: skip
    image = opened_qcow2(path)

    Scribbler(image, flat, seed=bits).run(200)
    image.close()

    assert problems(path) == {}
    same(path, flat, tmp_path)


def test_internal_snapshot_keeps_its_content(tmp_path: Path) -> None:
    """Clusters and tables of a snapshot are copied before a change."""
    path = tmp_path / "image"
    before = flat_file(tmp_path / "raw", 4 * MIB, seed=5)
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", tmp_path / "raw", path)
    qemu("qemu-img", "snapshot", "-c", "old", path)
    image = opened_qcow2(path)
    flat = bytearray(before)

    Scribbler(image, flat, seed=6).run(200)
    image.close()

    assert problems(path) == {}
    same(path, flat, tmp_path)
    qemu("qemu-img", "snapshot", "-a", "old", path)
    same(path, before, tmp_path)


def test_refcount_table_grows(tmp_path: Path) -> None:
    """An image with tiny clusters and wide refcounts needs a larger refcount table several times."""
    path = tmp_path / "image"
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", "cluster_size=512,refcount_bits=64", path, "24M")
    image = opened_qcow2(path)
    first = image.refcounts.table_offset
    flat = random.Random(1).randbytes(20 * MIB)

    for offset in range(0, len(flat), MIB):
        write(image, offset, flat[offset : offset + MIB])
    image.close()

    assert image.refcounts.table_offset != first
    assert problems(path) == {}
    same(path, flat + bytes(4 * MIB), tmp_path)


def test_freed_clusters_are_used_again(tmp_path: Path) -> None:
    """Data that is written, discarded and written elsewhere takes room only once."""
    path = tmp_path / "image"
    create(str(path), "qcow2", 64 * MIB)
    image = opened_qcow2(path)
    data = random.Random(2).randbytes(8 * MIB)

    for place in range(4):
        write(image, place * 8 * MIB, data)
        image.discard(place * 8 * MIB, 8 * MIB)
        image.flush()
    write(image, 0, data)
    image.close()

    assert path.stat().st_size < 9 * MIB
    assert problems(path) == {}
    same(path, data + bytes(56 * MIB), tmp_path)


def test_discarded_clusters_give_their_storage_back(tmp_path: Path) -> None:
    """After the flush that frees them, the host has the room again, so fstrim in a guest is useful."""
    path = tmp_path / "image"
    create(str(path), "qcow2", 64 * MIB)
    image = opened_qcow2(path)
    write(image, 0, random.Random(3).randbytes(8 * MIB))
    image.flush()
    os.fsync(image.fd)  # the file system allocates blocks when it writes data back
    before = path.stat().st_blocks

    image.discard(0, 7 * MIB)
    image.flush()

    assert (before - path.stat().st_blocks) * 512 > 6 * MIB
    assert len(set(read(image, 0, 7 * MIB))) == 1
    image.close()
    assert problems(path) == {}


def test_dirty_image_is_written_without_trusting_its_refcounts(tmp_path: Path) -> None:
    """With lazy refcounts of a killed writer, no cluster that it may have used is taken.  QEMU can repair it later."""
    path = tmp_path / "image"
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", "lazy_refcounts=on,cluster_size=4k", path, "8M")
    with contextlib.suppress(subprocess.CalledProcessError):
        die = f"sigraise {signal.SIGKILL:d}"
        qemu("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", "-c", "flush", "-c", die, path)
    assert check_report(path)["corruptions"] > 0
    image = opened_qcow2(path)

    write(image, 4 * MIB, b"\5" * MIB)
    write(image, 0, b"\6" * 512)
    image.close()
    qemu("qemu-img", "check", "-q", "-r", "all", path)

    assert problems(path) == {}
    same(path, b"\6" * 512 + b"\7" * (MIB - 512) + bytes(3 * MIB) + b"\5" * MIB + bytes(3 * MIB), tmp_path)


def test_dirty_image_uses_its_own_new_clusters_again(tmp_path: Path) -> None:
    """Clusters that we have added can be freed and used again, from the first one on."""
    path = tmp_path / "image"
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", "lazy_refcounts=on,cluster_size=4k", path, "8M")
    with contextlib.suppress(subprocess.CalledProcessError):
        die = f"sigraise {signal.SIGKILL:d}"
        qemu("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", "-c", "flush", "-c", die, path)
    image = opened_qcow2(path)
    write(image, 1536 * KIB, b"\5" * 4 * KIB)
    added = image.slices[0].table[384] & OFFSET_MASK
    assert added == image.refcounts.floor << 12

    image.discard(1536 * KIB, 4 * KIB)
    image.flush()
    write(image, 1792 * KIB, b"\5" * 4 * KIB)

    assert image.slices[0].table[448] & OFFSET_MASK == added
    image.close()


def test_bitmaps_of_qemu_are_disowned_before_the_first_write(tmp_path: Path) -> None:
    """An autoclear feature is kept by readers and cleared by a writer that does not know it."""
    path = tmp_path / "image"
    qemu("qemu-img", "create", "-qf", "qcow2", path, "8M")
    qemu("qemu-img", "bitmap", "--add", path, "changes")
    opened_qcow2(path, writable=False).close()
    assert path.read_bytes()[88:96] != bytes(8)
    image = opened_qcow2(path)

    write(image, 0, bytes(512))
    image.close()

    assert path.read_bytes()[88:96] == bytes(8)
    assert "corruptions" not in problems(path)


@pytest.mark.parametrize("feature", ["extended_l2=on", "compression_type=zstd", "data_file=data"])
def test_an_unsupported_feature_is_named(tmp_path: Path, feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal says what the image needs."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "image"
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", feature, path, "1M")
    words = {"ext": "extended L2", "com": "zstd", "dat": "external data file"}[feature[:3]]

    with pytest.raises(ImageError, match=words):
        opened_qcow2(path)


# -- made by us


@pytest.mark.parametrize("size", [0, 512, MIB, 5 * MIB + 512, 40 << 30, 9 << 40])
def test_created_image_is_clean(tmp_path: Path, size: int) -> None:
    """QEMU reports the format and size that we chose."""
    path = tmp_path / "image"

    create(str(path), "qcow2", size)

    info = json.loads(qemu("qemu-img", "info", "--output=json", path))
    assert (info["format"], info["virtual-size"], info["cluster-size"]) == ("qcow2", size, 64 * KIB)
    assert problems(path) == {}
    assert path.stat().st_mode & 0o777 == 0o600


def test_created_overlay_names_its_base(tmp_path: Path) -> None:
    """The overlay records the path as it was typed, and the format, which then need not be guessed."""
    create(str(tmp_path / "base"), "qcow2", MIB)

    create(str(tmp_path / "top"), "qcow2", MIB, "base", "qcow2")

    info = json.loads(qemu("qemu-img", "info", "--output=json", tmp_path / "top"))
    assert (info["backing-filename"], info["backing-filename-format"]) == ("base", "qcow2")
    assert problems(tmp_path / "top") == {}


@pytest.mark.parametrize("target", ["raw", "qcow2"])
@pytest.mark.parametrize("source", ["raw", "qcow2", "packed", "chain"])
def test_conversion_keeps_content_and_holes(tmp_path: Path, source: str, target: str) -> None:
    """Images of every kind become raw and qcow2 ones with the same bytes, which take no more room than needed."""
    size = 8 * MIB
    flat = flat_file(tmp_path / "source", size, seed=3, density=0.1)
    path = tmp_path / "source"
    if source in ("qcow2", "packed"):
        path = tmp_path / "image"
        more = ("-c",) if source == "packed" else ()
        qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *more, tmp_path / "source", path)
    elif source == "chain":
        paths, flat = make_chain(tmp_path, "cluster_size=4k", size, 3)
        path = paths[0]
    image = OpenedChain(str(path), "raw" if source == "raw" else "qcow2").image()
    seen: list[int] = []

    convert(image, str(tmp_path / "copy"), target, 9 * MIB, lambda done, whole: seen.append(done * 100 // whole))
    image.close()

    (tmp_path / "flat").write_bytes(flat + bytes(MIB))
    qemu("qemu-img", "compare", "-f", target, "-F", "raw", tmp_path / "copy", tmp_path / "flat")
    assert seen == sorted(seen)
    assert seen[-1] == 100
    assert (tmp_path / "copy").stat().st_blocks * 512 < size
    if target == "qcow2":
        assert problems(tmp_path / "copy") == {}


# -- locked


@contextlib.contextmanager
def held_by_qemu(path: Path, *, writable: bool, image_format: str = "raw") -> Iterator[None]:
    """Let a qemu-io keep an image and its backing files open."""
    mode = () if writable else ("-r",)
    holder = subprocess.Popen(
        ["stdbuf", "-oL", "qemu-io", "-f", image_format, *mode, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write("length\n")
        holder.stdin.flush()
        assert "MiB" in holder.stdout.readline()
        yield
    finally:
        holder.kill()
        holder.communicate()


def locked_by_us(path: Path, *, writable: bool) -> int:
    """Open and lock an image as we do for a VM."""
    fd = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
    try:
        lock(fd, str(path), writable=writable)
    except BaseException:
        os.close(fd)
        raise
    return fd


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True)])
def test_writer_excludes_others_53(tmp_path: Path, first: bool, second: bool) -> None:
    """Of two users, at least one of which writes, the second is refused, QEMU or our process (hostile 53)."""
    path = tmp_path / "image"
    create(str(path), "qcow2", MIB)  # QEMU lets raw files be read while another process writes
    open_it = ("qemu-io", "-c", "length", path) if second else ("qemu-img", "info", path)

    fd = locked_by_us(path, writable=first)
    with pytest.raises(OperatorError, match=f"{path}: is in use by another process"):
        locked_by_us(path, writable=second)
    with pytest.raises(subprocess.CalledProcessError) as refused:
        qemu(*map(str, open_it))
    os.close(fd)

    assert "lock" in refused.value.stderr
    os.close(locked_by_us(path, writable=second))


@pytest.mark.parametrize("writable", [True, False])
def test_image_that_qemu_writes_is_refused_53(tmp_path: Path, writable: bool) -> None:
    """It is refused as a disk and as a base."""
    path = tmp_path / "image"
    create(str(path), "raw", MIB)

    with held_by_qemu(path, writable=True), pytest.raises(OperatorError, match="in use by another process"):
        locked_by_us(path, writable=writable)

    os.close(locked_by_us(path, writable=writable))


def test_readers_share_53(tmp_path: Path) -> None:
    """A base may have any number of overlays, ours and QEMU's."""
    path = tmp_path / "image"
    create(str(path), "raw", MIB)

    with held_by_qemu(path, writable=False):
        fds = [locked_by_us(path, writable=False) for _ in range(3)]
        qemu("qemu-img", "info", "-f", "raw", path)

    for fd in fds:
        os.close(fd)


def test_qemu_can_inspect_a_running_image(tmp_path: Path) -> None:
    """`qemu-img info -U` accepts a writer."""
    path = tmp_path / "image"
    create(str(path), "qcow2", MIB)
    fd = locked_by_us(path, writable=True)

    qemu("qemu-img", "info", "-U", path)

    os.close(fd)


class Recorded:
    """A prober without a process, which returns what images record."""

    def probe(self, fd: int, name: str, format_hint: str, *, boots: bool = False) -> Probe:
        """Examine an image."""
        return probe(fd, name, format_hint)


def disk_of(path: Path) -> OpenDisk:
    """Open a disk as the parent does."""
    return open_disk(DiskConfig(path=str(path), format="qcow2"), Recorded())


def refused_by_qemu(*command: object) -> str:
    """Return the error message of one of QEMU's programs."""
    with pytest.raises(subprocess.CalledProcessError) as refused:
        qemu(*map(str, command))
    return str(refused.value.stderr)


@pytest.fixture
def overlays(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Return two disks on one base."""
    base, one, other = tmp_path / "base", tmp_path / "one", tmp_path / "other"
    create(str(base), "qcow2", MIB)
    for top in (one, other):
        create(str(top), "qcow2", MIB, "base", "qcow2")
    return base, one, other


def test_disk_of_a_vm_is_locked_for_qemu_53(overlays: tuple[Path, Path, Path]) -> None:
    """Hostile input 53: its base is locked too, against changes.  Other files are not locked."""
    base, one, other = overlays
    disk = disk_of(one)

    for command in (
        ("qemu-io", "-f", "qcow2", "-c", "write 0 512", one),
        ("qemu-io", "-f", "qcow2", "-c", "write 0 512", base),
        ("qemu-img", "commit", "-f", "qcow2", other),
        ("qemu-img", "resize", "-f", "qcow2", base, "2M"),
        ("qemu-img", "snapshot", "-c", "now", one),
        ("qemu-img", "check", "-r", "all", one),
    ):
        assert "lock" in refused_by_qemu(*command), command
    qemu("qemu-io", "-f", "qcow2", "-c", "write 0 512", other)
    qemu("qemu-img", "info", base)
    disk.close()

    qemu("qemu-io", "-f", "qcow2", "-c", "write 0 512", one)


def test_disk_of_qemu_is_refused_by_name_53(overlays: tuple[Path, Path, Path]) -> None:
    """Hostile input 53: the message names the file in use.  A base can be shared with QEMU."""
    base, one, other = overlays

    with held_by_qemu(one, writable=True, image_format="qcow2"):
        with pytest.raises(OperatorError, match=f"^disk {one}: is in use by another process, which writes to it$"):
            disk_of(one)
        with pytest.raises(OperatorError, match=f"^disk {base}: is in use by another process$"):
            disk_of(base)
        disk_of(other).close()
    with held_by_qemu(base, writable=True, image_format="qcow2"):
        words = f"^disk {one}: backing file {base}: is in use by another process, which writes to it$"
        with pytest.raises(OperatorError, match=words):
            disk_of(one)

    disk_of(one).close()


def test_the_device_process_holds_the_lock_53(overlays: tuple[Path, Path, Path]) -> None:
    """Hostile input 53: the lock lasts as long as that process, after all other holders have closed the file."""
    _, one, _ = overlays
    disk = disk_of(one)
    notes = [devmsg.RESOURCE_QCOW2] * len(disk.links)
    with Device("vioblk", [link.fd for link in disk.links], notes=notes) as device:
        device.start()
        disk.close()
        for fd in device.resources:
            os.close(fd)
        device.resources = []

        assert "lock" in refused_by_qemu("qemu-io", "-f", "qcow2", "-c", "write 0 512", one)
        with pytest.raises(OperatorError, match="in use by another process"):
            disk_of(one)
        device.child.kill(signal.SIGKILL)
        device.status()

    disk_of(one).close()
