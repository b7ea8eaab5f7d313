"""Snapshots of qcow2 images, tested with QEMU's programs and with power cuts during a snapshot."""

import os
import random
import subprocess
from pathlib import Path

import pytest

from tests.process.test_images_powercut import Recorder
from tests.support.images import KIB, MIB, opened, opened_qcow2, problems, qemu, read, small_file_system, write
from vmd.errors import ImageError
from vmd.images import rewrite
from vmd.images.header import CONTENT, OFFSET_MASK
from vmd.images.identify import probe
from vmd.images.qcow2 import Qcow2Image
from vmd.images.rewrite import Rewrite
from vmd.images.snapshots import ENTRY, Snapshot, find, read_snapshots, state_offset
from vmd.ipc.probemsg import GOING_BACK

SIZE = 4 * MIB
OPTIONS = [
    "cluster_size=512,refcount_bits=64",
    *(
        pytest.param(options, marks=pytest.mark.deep)
        for options in (
            "cluster_size=64k",
            "cluster_size=4k,compat=0.10",
            "cluster_size=4k,refcount_bits=2",
            "cluster_size=1k,refcount_bits=8",
        )
    ),
]


def create(image: Qcow2Image, name: str, state: bytes = b"") -> None:
    """Make a snapshot."""
    change = Rewrite(image)
    for at in range(0, len(state), MIB):
        part = state[at : at + MIB]
        change.add_state([memoryview(part)], len(part))
    change.create(name)
    change.commit()


def delete(image: Qcow2Image, name: str) -> None:
    """Delete a snapshot."""
    change = Rewrite(image)
    change.delete(name)
    change.commit()


def go_back(image: Qcow2Image, name: str) -> None:
    """Set the disk back to a snapshot."""
    change = Rewrite(image)
    change.go_back(name)
    change.commit()


def at_snapshot(path: Path, name: str) -> tuple[bytes, bytes]:
    """Return disk and state of a snapshot, read from a read-only image."""
    fd = os.open(path, os.O_RDONLY)
    plain = Qcow2Image(fd, str(path), writable=False)
    one = find(read_snapshots(fd, plain.header, str(path)), name)
    assert one is not None
    image = Qcow2Image(os.dup(fd), str(path), writable=False, snapshot=one)
    state = bytearray(one.state_bytes)
    if state:
        image.preadv(state_offset(one, plain.header), [memoryview(state)])
    disk = read(image, 0, one.size)
    image.close()
    plain.close()
    return disk, bytes(state)


@pytest.mark.parametrize("options", OPTIONS)
def test_qemu_and_we_use_the_same_snapshots(tmp_path: Path, options: str) -> None:
    """QEMU and we make, delete and go back to snapshots in turn.  Nothing is lost, leaked or damaged."""
    path = tmp_path / "image"
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", options, path, SIZE)
    choice = random.Random(options)
    most = 1 if "refcount_bits=2" in options else 5  # QEMU needs one more reference while it goes back
    disk = bytearray(SIZE)
    saved: dict[str, tuple[bytes, bytes]] = {}
    image = opened_qcow2(path)

    for number in range(60):
        what, name = choice.random(), choice.choice(list(saved)) if saved else ""
        ours = choice.random() < 0.7
        if what >= 0.6 and not ours:
            image.close()
        if what < 0.6:
            offset, length = choice.randrange(SIZE - 40 * KIB) & ~511, choice.randrange(1, 80) * 512
            data = choice.randbytes(length) if what < 0.5 else bytes(length)
            if what < 0.5:
                write(image, offset, data)
            else:
                image.write_zeroes(offset, length, True)
            disk[offset : offset + length] = data
        elif len(saved) < most and what < 0.8:
            name, state = f"at-{number}", choice.randbytes(choice.choice((0, 1, MIB + 77))) if ours else b""
            if ours:
                create(image, name, state)
            else:
                qemu("qemu-img", "snapshot", "-c", name, path)
            saved[name] = bytes(disk), state
        elif name and what < 0.88:
            if ours:
                delete(image, name)
            else:
                qemu("qemu-img", "snapshot", "-d", name, path)
            del saved[name]
        elif name:
            if ours:
                go_back(image, name)
            else:
                qemu("qemu-img", "snapshot", "-a", name, path)
            disk[:] = saved[name][0]
        if what >= 0.6 and not ours:
            image = opened_qcow2(path)
        assert read(image, 0, SIZE) == disk
        if number % 10 == 9:
            image.close()
            assert problems(path) == {}
            image = opened_qcow2(path)

    image.close()
    assert problems(path) == {}
    assert saved
    for name, (content, state) in saved.items():
        assert at_snapshot(path, name) == (content, state)
    listed = qemu("qemu-img", "snapshot", "-l", path)
    assert all(name in listed for name in saved)


@pytest.mark.parametrize(
    "what", ["create", *(pytest.param(what, marks=pytest.mark.deep) for what in ("delete", "go back"))]
)
@pytest.mark.parametrize(
    "options", ["cluster_size=64k", pytest.param("cluster_size=512,refcount_bits=64", marks=pytest.mark.deep)]
)
def test_power_cut_leaves_all_or_nothing_of_a_snapshot(
    tmp_path: Path, options: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is not even a leak.  The disk and each snapshot have the content before the operation, or after it."""
    path, cut = tmp_path / "image", tmp_path / "cut"
    size = 512 * KIB
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", options, path, size)
    image = opened_qcow2(path)
    first, second = b"1" * size, b"1" * (size // 2) + b"2" * (size // 2)
    write(image, 0, first)
    create(image, "old", b"s" * 1000)
    write(image, size // 2, second[size // 2 :])
    image.settle()
    before = {"disk": second, "old": first}
    recorder = Recorder(path, monkeypatch)
    if what == "create":
        create(image, "new", b"t" * 100 * KIB)
    elif what == "delete":
        delete(image, "old")
    else:
        go_back(image, "old")
    image.close()
    monkeypatch.undo()
    after = {
        "create": before | {"new": second}, "delete": {"disk": second}, "go back": {"disk": first, "old": first}
    }[what]  # fmt: skip

    found = []
    choice = random.Random(1)
    last = len(recorder.done)
    moments = sorted({*recorder.barriers(1), *choice.sample(range(1, last), min(6, last - 1)), last})
    for at in moments:
        for _ in range(2):
            cut.write_bytes(recorder.after_cut(at, recorder.any_sectors(at, choice)))
            assert problems(cut) == {}
            state = {"disk": qcow2_content(cut, tmp_path / "raw")}
            names = [one.name for one in snapshots_of(cut)]
            state |= {name: at_snapshot(cut, name)[0] for name in names}
            assert state in (before, after)
            found.append(state == after)
    assert not found[0]
    assert found[-1]


def qcow2_content(path: Path, raw: Path) -> bytes:
    """Return a disk's content, by QEMU."""
    qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
    return raw.read_bytes()


def snapshots_of(path: Path) -> list[Snapshot]:
    """Return the snapshots of an image file."""
    image = opened_qcow2(path, writable=False)
    try:
        return read_snapshots(image.fd, image.header, str(path))
    finally:
        image.close()


def test_snapshot_keeps_compressed_clusters_and_those_of_the_backing_file(tmp_path: Path) -> None:
    """A compressed cluster is counted in each cluster that it touches.  Unallocated clusters show the backing file."""
    base, path = tmp_path / "base", tmp_path / "image"
    content = random.Random(3).randbytes(64) * (SIZE // 64)
    base.write_bytes(content[: SIZE // 2])
    qemu("qemu-img", "create", "-qf", "qcow2", "-F", "raw", "-b", base, path, SIZE)
    packed = tmp_path / "packed"
    whole = tmp_path / "whole"
    whole.write_bytes(content)
    qemu("qemu-img", "convert", "-cf", "raw", "-O", "qcow2", whole, packed)

    for file, files in ((path, (path, base)), (packed, (packed,))):
        image = opened(*files, writable=True, formats=("qcow2", "raw")[: len(files)])
        assert isinstance(image, Qcow2Image)
        before = read(image, 0, SIZE)
        create(image, "one")
        write(image, 0, b"n" * MIB)
        create(image, "two")
        delete(image, "one")
        go_back(image, "two")
        assert read(image, 0, SIZE) == b"n" * MIB + before[MIB:]
        image.close()
        assert problems(file) == {}


def test_snapshot_without_room_changes_nothing(tmp_path: Path) -> None:
    """The snapshot fails with ENOSPC, and the disk stays writable."""
    with small_file_system(tmp_path / "small") as folder:
        path = folder / "image"
        qemu("qemu-img", "create", "-qf", "qcow2", path, SIZE)
        image = opened_qcow2(path)
        write(image, 0, b"d" * MIB)
        image.settle()
        filler = folder / "filler"
        with filler.open("wb") as file:
            left = os.statvfs(folder)
            os.posix_fallocate(file.fileno(), 0, left.f_bavail * left.f_bsize)
        change = Rewrite(image)
        with pytest.raises(OSError, match="No space"):
            change.create("full")
        change.abandon()

        write(image, 0, b"e" * MIB)
        filler.unlink()
        create(image, "now")
        assert read(image, 0, MIB) == b"e" * MIB
        image.close()
        assert problems(path) == {}
        assert [one.name for one in snapshots_of(path)] == ["now"]


def test_abandoned_snapshot_leaves_no_room_taken(tmp_path: Path) -> None:
    """After any amount of written state, the file is as before, and its storage is freed."""
    path = tmp_path / "image"
    qemu("qemu-img", "create", "-qf", "qcow2", path, SIZE)
    image = opened_qcow2(path)
    write(image, 0, b"d" * MIB)
    image.settle()
    before = path.stat().st_blocks
    change = Rewrite(image)
    change.add_state([memoryview(b"s" * MIB)], MIB)
    change.create("gone")
    assert path.stat().st_blocks > before + MIB // 512
    change.abandon()

    assert path.stat().st_blocks <= before
    image.close()
    assert problems(path) == {}
    assert snapshots_of(path) == []


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("", "1 to 64"), ("x" * 65, "1 to 64"), ("7", "must not be a number"), (".x", "must begin"),
        ("a/b", "a/b"), ("ä", "ä"), ("twice", "already"),
    ],
)  # fmt: skip
def test_bad_name_of_a_snapshot_is_refused(tmp_path: Path, name: str, what: str) -> None:
    """The sentence has the name, and nothing is changed."""
    path = tmp_path / "image"
    qemu("qemu-img", "create", "-qf", "qcow2", path, SIZE)
    image = opened_qcow2(path)
    create(image, "twice")

    with pytest.raises(ImageError, match=what):
        create(image, name)
    image.close()
    assert [one.name for one in snapshots_of(path)] == ["twice"]


def test_refcounts_without_room_refuse_one_more_snapshot(tmp_path: Path) -> None:
    """A refcount of one bit cannot count a second user of a cluster."""
    path = tmp_path / "image"
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", "refcount_bits=1", path, SIZE)
    image = opened_qcow2(path)
    write(image, 0, b"x" * MIB)
    change = Rewrite(image)

    with pytest.raises(ImageError, match="refcounts of 1 bits"):
        change.create("one")
    change.abandon()
    image.close()
    assert problems(path) == {}


def test_disk_goes_back_to_the_size_that_it_had(tmp_path: Path) -> None:
    """A disk that has grown since then has its earlier size again."""
    path = tmp_path / "image"
    qemu("qemu-img", "create", "-qf", "qcow2", path, SIZE)
    image = opened_qcow2(path)
    write(image, 0, b"x" * MIB)
    create(image, "small", b"state" * 1000)
    image.close()
    qemu("qemu-img", "resize", "-q", path, 600 * MIB)
    image = opened_qcow2(path)
    write(image, 550 * MIB, b"y" * MIB)
    go_back(image, "small")

    assert image.size == SIZE
    assert read(image, 0, SIZE) == b"x" * MIB + bytes(SIZE - MIB)
    image.close()
    assert problems(path) == {}
    assert at_snapshot(path, "small")[1] == b"state" * 1000


def test_a_damaged_snapshot_table_is_refused(tmp_path: Path) -> None:
    """Each prefix of the table, and each number in it set to ones, gives a sentence or a usable table."""
    path = tmp_path / "image"
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", "cluster_size=4k", path, SIZE)
    image = opened_qcow2(path)
    write(image, 0, b"x" * MIB)
    create(image, "one", b"state")
    image.close()
    whole = path.read_bytes()
    table = CONTENT.unpack_from(whole, 24)[7]
    damaged = [whole[: table + cut] for cut in range(0, 60, 7)]
    for at in range(0, ENTRY.size + 24, 2):
        damaged.append(whole[: table + at] + b"\xff" + whole[table + at + 1 :])
        damaged.append(whole[: table + at] + b"\xff" * 4 + whole[table + at + 4 :])

    refused = 0
    for raw in damaged:
        path.write_bytes(raw)
        try:
            image = opened_qcow2(path)
        except ImageError:
            refused += 1
            continue
        try:
            change = Rewrite(image)
            change.delete("one")
        except (ImageError, OSError):
            refused += 1
        image.close()
    assert refused > len(damaged) // 2


def test_dirty_image_takes_no_snapshot(tmp_path: Path) -> None:
    """The refcounts of a dirty image may be wrong."""
    path = tmp_path / "image"
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", "lazy_refcounts=on", path, SIZE)
    with path.open("r+b") as file:
        file.seek(79)
        file.write(b"\1")
    image = opened_qcow2(path)

    with pytest.raises(ImageError, match="is dirty"):
        Rewrite(image)
    image.close()


def test_qemu_writes_to_a_disk_with_our_snapshots(tmp_path: Path) -> None:
    """qemu-io writes to a disk with our snapshots, and the snapshots keep their content."""
    path = tmp_path / "image"
    qemu("qemu-img", "create", "-qf", "qcow2", path, SIZE)
    image = opened_qcow2(path)
    write(image, 0, b"a" * MIB)
    create(image, "a")
    image.close()
    subprocess.run(["qemu-io", "-c", "write -P 0x62 0 1M", str(path)], check=True, capture_output=True)

    assert problems(path) == {}
    assert at_snapshot(path, "a")[0] == b"a" * MIB + bytes(SIZE - MIB)
    image = opened_qcow2(path)
    go_back(image, "a")
    image.close()
    assert problems(path) == {}
    assert qcow2_content(path, tmp_path / "raw")[:MIB] == b"a" * MIB


def test_the_mark_of_several_disks_is_removed_with_the_change(tmp_path: Path) -> None:
    """Until the end of the change a probe finds the mark.  An abandoned change removes it, as QEMU would."""
    path = tmp_path / "image"
    qemu("qemu-img", "create", "-qf", "qcow2", path, SIZE)
    image = opened_qcow2(path)
    create(image, "one")

    def marked() -> bool:
        with path.open("rb") as file:
            return GOING_BACK in probe(file.fileno(), "image", "qcow2").notes

    for end in (Rewrite.abandon, Rewrite.commit):
        change = Rewrite(image)
        change.go_back("one")
        change.announce()
        assert marked()
        assert problems(path) == {}
        end(change)
        assert not marked()
    image.close()
    assert problems(path) == {}


def test_an_image_with_too_many_refcounts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image is refused with a message, before memory runs out."""
    path = tmp_path / "image"
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", "refcount_bits=1", path, SIZE)
    image = opened_qcow2(path)
    monkeypatch.setattr(rewrite, "MAX_COUNTS_BYTES", 64 * KIB * 8 - 1)

    with pytest.raises(ImageError, match="524288 bytes of refcounts are more than"):
        Rewrite(image)
    image.close()


def test_a_table_entry_without_a_refcount_is_corruption(tmp_path: Path) -> None:
    """The operation is refused, and changes nothing."""
    path = tmp_path / "image"
    qemu("qemu-img", "create", "-qf", "qcow2", path, SIZE)
    image = opened_qcow2(path)
    create(image, "one")
    write(image, 0, b"x" * MIB)
    image.settle()
    table = image.l1[0] & OFFSET_MASK
    image.close()
    with path.open("r+b") as file:
        file.seek(table)
        file.write((1 << 50).to_bytes(8, "big"))
    before = path.read_bytes()
    image = opened_qcow2(path)

    with pytest.raises(ImageError, match="image is corrupt: a cluster in use has no refcount"):
        delete(image, "one")
    image.close()
    assert path.read_bytes()[: len(before)] == before
