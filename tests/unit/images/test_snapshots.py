"""Snapshots of qcow2 images: their table, their names, and the room that a change of them takes."""

import os
import struct
from pathlib import Path

import pytest

from tests.support.images import KIB, MIB, opened_qcow2, problems, qemu, read, write
from vmd.errors import ImageError
from vmd.images import rewrite, snapshots
from vmd.images.header import MAX_TABLE_BYTES, Header, parse_header
from vmd.images.names import check_name
from vmd.images.qcow2 import Qcow2Image
from vmd.images.rewrite import Rewrite
from vmd.images.snapshots import Snapshot, find, new_id, pack_snapshots, read_snapshots

SMALL = "cluster_size=512,refcount_bits=64"
TABLE = 512 * 64  # bytes that an L2 table of such an image maps


def made(folder: Path, size: int, options: str = SMALL) -> Qcow2Image:
    """Have QEMU make an empty image; return it."""
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", options, folder / "image", size)
    return opened_qcow2(folder / "image")


@pytest.mark.parametrize(
    "name", ["a", "7z", "a" * 64, "2026-12-01", "Before.the_update+1:2-", "9.", "A" + "9" * 63]
)
def test_valid_names(name: str) -> None:
    """Letters, digits and some marks, in any order behind the first character."""
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "a" * 65, "12", "0", ".a", "-a", "_a", "+", "a b", "a/b", "\u00e4", "a\u00e4", "a\u0663", "a\n", "a\0"]
)
def test_invalid_names(name: str) -> None:
    """QEMU takes a number for an id."""
    with pytest.raises(ValueError, match="name of a snapshot must"):
        check_name(name)


@pytest.mark.parametrize(("compat", "mark"), [("1.1", b"\4" + bytes(7)), ("0.10", None)])
def test_mark_of_disks_that_go_back(tmp_path: Path, compat: str, mark: bytes | None) -> None:
    """It is an autoclear feature, bit 58, which stays until the disk has gone back.  Version 2 has no features."""
    image = made(tmp_path, MIB, f"compat={compat}")
    change = Rewrite(image)
    change.create("one")
    change.commit()
    before = (tmp_path / "image").read_bytes()

    change = Rewrite(image)
    change.go_back("one")
    change.announce()
    after = (tmp_path / "image").read_bytes()
    assert after[88:96] == (mark or before[88:96])
    change.commit()
    assert (tmp_path / "image").read_bytes()[88:96] == before[88:96]
    image.close()


# -- the table


def a_snapshot(name: str, **fields: int) -> Snapshot:
    """Return a new snapshot of a small disk."""
    numbers = {"l1_offset": 4096, "l1_entries": 4, "size": 4 * TABLE, "date_s": 5, "date_ns": 6, "clock_ns": 7,
               "state_bytes": 0} | fields  # fmt: skip
    return Snapshot(id="1", name=name, **numbers)  # type: ignore[arg-type]


def stored(folder: Path, table: bytes, count: int, file_bytes: int = 16 << 20) -> tuple[int, Header]:
    """Return a file with a snapshot table, and the header that says where it is."""
    made(folder, 4 * TABLE).close()
    fd = os.open(folder / "image", os.O_RDWR)
    os.ftruncate(fd, file_bytes)
    os.pwrite(fd, table, 1 << 20)
    header = parse_header(fd, "image")
    return fd, header.replace(snapshots=count, snapshots_offset=1 << 20)


def read_again(folder: Path, *given: Snapshot, **how: int) -> list[Snapshot]:
    """Write a table and read it."""
    fd, header = stored(folder, pack_snapshots(list(given)), len(given), **how)
    try:
        return read_snapshots(fd, header, "image")
    finally:
        os.close(fd)


def test_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Names are of any length, and a state may have 4 GiB and more."""
    most = MAX_TABLE_BYTES // 8
    given = [a_snapshot("n" * length, date_s=length) for length in range(20)]
    given += [
        a_snapshot(f"state-{state}", l1_entries=most, state_bytes=state)
        for state in (1, (1 << 32) - 1, 1 << 32, (1 << 32) + 5)
    ]

    found = read_again(tmp_path, *given)

    assert [one.replace(raw=b"") for one in found] == given
    assert pack_snapshots(found) == pack_snapshots(given)
    assert [len(one.raw) % 8 for one in found] == [0] * len(given)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"l1_entries": MAX_TABLE_BYTES // 8}, ""),
        ({"l1_entries": MAX_TABLE_BYTES // 8 + 1}, "L1 table of 4194312 bytes is larger than 4194304"),
        ({"l1_offset": 512}, ""),
        ({"l1_offset": 0}, "L1 table at 0 is not at the start of a cluster"),
        ({"l1_offset": 513}, "L1 table at 513 is not at the start of a cluster"),
        ({"l1_offset": 0, "l1_entries": 0, "size": 0}, ""),
        ({"l1_offset": (16 << 20) - 512, "l1_entries": 64}, ""),
        ({"l1_offset": (16 << 20) - 512, "l1_entries": 65}, "is not inside the file of 16777216 bytes"),
        ({"size": 4 * TABLE + 1}, "L1 table of 4 entries is too small for 131073 bytes"),
        ({"size": 3 * TABLE + 1}, ""),
        ({"size": 3 * TABLE, "state_bytes": TABLE}, ""),
        ({"size": 3 * TABLE, "state_bytes": TABLE + 1}, "L1 table of 4 entries has no room for its state"),
        ({"size": 3 * TABLE + 1, "state_bytes": 1}, "L1 table of 4 entries has no room for its state"),
        ({"size": 512, "state_bytes": (1 << 63) - 512}, "of disk and 9223372036854775296 of state are too many"),
    ],
)
def test_numbers_of_a_snapshot_52(tmp_path: Path, fields: dict[str, int], words: str) -> None:
    """Each is allowed up to its edge (hostile 52)."""
    if not words:
        assert read_again(tmp_path, a_snapshot("one", **fields))[0].name == "one"
        return
    with pytest.raises(ImageError, match=f"^image: snapshot one: .*{words}"):
        read_again(tmp_path, a_snapshot("one", **fields))


def test_table_that_is_cut_short_52(tmp_path: Path) -> None:
    """In the first or a later snapshot, in its numbers or its name (hostile 52)."""
    table = pack_snapshots([a_snapshot("first"), a_snapshot("second")])
    begin, half = 1 << 20, len(pack_snapshots([a_snapshot("first")]))
    for end, words in (
        (39, "after 0 of 2 snapshots"),
        (40, "in snapshot 0"),
        (half - 4, "in snapshot 0"),
        (half + 39, "after 1 of 2 snapshots"),
        (half + 40, "in snapshot 1"),
    ):
        fd, header = stored(tmp_path, table, 2)
        os.ftruncate(fd, begin + end)
        with pytest.raises(ImageError, match=f"snapshot table is cut short {words}"):
            read_snapshots(fd, header, "image")
        os.close(fd)


@pytest.mark.parametrize(
    ("extra", "size", "state"),
    [(b"", 4 * TABLE, 9), (struct.pack(">Q", 0), 4 * TABLE, 0), (struct.pack(">QQ", 0, 512), 512, 0),
     (struct.pack(">QQ", 0, 512) + bytes(1008), 512, 0)],
)  # fmt: skip
def test_extra_fields_of_other_programs(tmp_path: Path, extra: bytes, size: int, state: int) -> None:
    """Old ones have fewer; QEMU's limit is 1024 bytes.  They are kept."""
    head = struct.pack(">QIHHIIQII", 4096, 5, 1, 3, 5, 6, 7, 9, len(extra))
    raw = head + extra + b"1one"
    table = raw + bytes(-len(raw) % 8)
    fd, header = stored(tmp_path, table, 1)
    (one,) = read_snapshots(fd, header, "image")
    os.close(fd)
    assert (one.name, one.id, one.size, one.state_bytes, one.raw) == ("one", "1", size, state, table)


def test_table_has_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For writing and for reading."""
    given = [a_snapshot(name) for name in ("first", "second", "third")]
    table = pack_snapshots(given)
    monkeypatch.setattr(snapshots, "MAX_BYTES", len(table))
    monkeypatch.setattr(snapshots, "MAX_SNAPSHOTS", 3)
    assert len(read_again(tmp_path, *given)) == 3
    with pytest.raises(ValueError, match="4 snapshots are more than 3"):
        pack_snapshots([*given, given[0]])
    monkeypatch.setattr(snapshots, "MAX_BYTES", len(table) - 1)
    with pytest.raises(ValueError, match=f"snapshot table of {len(table)} bytes is larger than {len(table) - 1}"):
        pack_snapshots(given)
    fd, header = stored(tmp_path, table, 3)
    with pytest.raises(ImageError, match=f"snapshot table is larger than {len(table) - 1} bytes"):
        read_snapshots(fd, header, "image")
    os.close(fd)
    fd, header = stored(tmp_path, table[:36] + (1025).to_bytes(4, "big") + table[40:], 3)
    with pytest.raises(ImageError, match="snapshot 0 has 1025 bytes of extra data, more than 1024"):
        read_snapshots(fd, header, "image")
    os.close(fd)


def test_snapshot_is_found_by_name_before_id() -> None:
    """Other programs allow a name that is the id of another one."""
    first, second = a_snapshot("2").replace(id="1"), a_snapshot("b").replace(id="2")
    for tag, found in (("2", first), ("1", first), ("b", second), ("c", None)):
        assert find([first, second], tag) is found
    assert new_id([]) == "1"
    assert new_id([first.replace(id="x"), first.replace(id="41"), second, first.replace(id="\u0667")]) == "42"


# -- changes


def test_state_takes_free_clusters(tmp_path: Path) -> None:
    """The file becomes longer only if there are none."""
    image = made(tmp_path, 2 * MIB, "cluster_size=4k")
    write(image, 0, b"x" * MIB)
    image.discard(256 * KIB, 256 * KIB)
    image.settle()
    end = image.refcounts.end

    change = Rewrite(image)
    for _ in range(3):
        change.add_state([memoryview(b"s" * 32 * KIB)], 32 * KIB)
    change.add_state([memoryview(b"end")], 3)
    assert max(change.state) < end
    assert len(set(change.state)) == 3 * 8 + 1
    change.create("one")
    change.commit()
    image.close()
    assert problems(tmp_path / "image") == {}


@pytest.mark.parametrize("entries", [70, 8192])
def test_snapshot_of_a_table_of_several_clusters(tmp_path: Path, entries: int) -> None:
    """All of its clusters are freed with the snapshot."""
    image = made(tmp_path, entries * TABLE)
    write(image, 0, b"a" * 512)
    for state in (b"", b"state"):
        change = Rewrite(image)
        if state:
            change.add_state([memoryview(state)], len(state))
        change.create("one")
        change.commit()
        assert problems(tmp_path / "image") == {}
        write(image, 0, b"b" * 512)
        change = Rewrite(image)
        change.go_back("one")
        change.commit()
        assert problems(tmp_path / "image") == {}
        assert read(image, 0, 512) == b"a" * 512
        change = Rewrite(image)
        change.delete("one")
        change.commit()
        assert problems(tmp_path / "image") == {}
    image.close()


@pytest.mark.parametrize("fits", [True, False])
def test_state_has_a_bound(tmp_path: Path, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table that leads to it must not be larger than one that can be read."""
    image = made(tmp_path, 511 * 2 * MIB if fits else 512 * 2 * MIB, "cluster_size=4k")
    monkeypatch.setattr(rewrite, "MAX_TABLE_BYTES", 4096)
    change = Rewrite(image)
    change.add_state([memoryview(b"state")], 5)
    if fits:
        change.create("one")
        change.commit()
    else:
        with pytest.raises(ImageError, match="5 bytes of state are too many for it"):
            change.create("one")
        change.abandon()
    image.close()
    assert problems(tmp_path / "image") == {}
