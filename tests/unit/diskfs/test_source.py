"""Bytes of a disk are read within bounds, and the work is counted exactly."""

import pytest

from tests.support.filesystems import MIB, SECTOR
from vmd.diskfs.source import DiskFsError, Source, Store, printable, shown

DISK = bytes(number % 251 for number in range(4 * 4096 + 100))


def whole(data: bytes = DISK) -> Source:
    """Return a disk of these bytes."""
    return Source(Store(lambda offset, length: data[offset : offset + length], len(data)), 0, len(data))


@pytest.mark.parametrize("offset", [0, 1, 4095, 4096, 4097, 8191, len(DISK) - 101, len(DISK) - 100, len(DISK) - 1])
@pytest.mark.parametrize("length", [0, 1, 2, 100, 4095, 4096, 4097, 8192, 8193])
def test_a_structure_is_read_whatever_blocks_it_crosses(offset: int, length: int) -> None:
    """The cache has blocks of 4096 bytes.  The last one may be shorter."""
    part = whole().part(10, len(DISK) - 10)
    for source, begin in ((whole(), offset), (part, offset + 10)):
        if begin + length <= len(DISK):
            assert source.read(offset, length) == source.content(offset, length) == DISK[begin : begin + length]
        else:
            for reads in (source.read, source.content):
                with pytest.raises(DiskFsError, match=f"{length} bytes at {offset} are after its end at {source.size}"):
                    reads(offset, length)


@pytest.mark.parametrize(("offset", "length"), [(-1, 0), (-1, 1), (0, -1), (5, -1), (5, -5), (len(DISK) + 1, 0)])
def test_negative_numbers_are_outside(offset: int, length: int) -> None:
    """A field of a damaged structure may be the result of a subtraction."""
    for reads in (whole().read, whole().content, whole().part):
        with pytest.raises(DiskFsError, match="are after its end"):
            reads(offset, length)


def test_a_structure_has_at_most_a_mebibyte() -> None:
    """More would fill our memory."""
    source = whole(bytes(2 * MIB))

    assert len(source.read(1, MIB)) == MIB
    with pytest.raises(DiskFsError, match=r"a structure of 1048577 bytes \(limit is 1048576\)"):
        source.read(1, MIB + 1)
    assert len(source.content(1, MIB + 1)) == MIB + 1


@pytest.mark.parametrize(
    ("length", "work"),
    [(0, 1), (1, 2), (SECTOR - 1, 2), (SECTOR, 2), (SECTOR + 1, 3), (2 * SECTOR, 3), (2 * SECTOR + 1, 4)],
)
def test_the_work_of_a_read(length: int, work: int) -> None:
    """A read of nothing is work, too.  A copy of a file is none: its size is limited."""
    source = whole()
    before = source.store.work
    source.read(0, length)
    assert before - source.store.work == work
    source.content(0, length)
    assert before - source.store.work == work


def test_how_much_work_there_may_be() -> None:
    """A full journal of 1 GiB can be read."""
    store = Store(lambda _offset, length: bytes(length), 0)
    store.spend(1_600_000)
    store.spend((1 << 21) - 1_600_000)
    with pytest.raises(DiskFsError, match="too much would have to be read"):
        store.spend(1)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"a" * 100, "a" * 100), (b"a" * 101, "a" * 100 + "..."), ("ü".encode() * 100, "ü" * 100),
        ("ü".encode() * 101, "ü" * 100 + "..."), (b"\n" * 50, r"\n" * 50), (b"\n" * 51, r"\n" * 50 + "..."),
        (b"\xff\x1b\0", r"\xff\x1b\x00"), (b"", ""),
    ],
)  # fmt: skip
def test_a_name_is_shown_on_a_line_of_limited_length(name: bytes, text: str) -> None:
    """Characters are counted, not bytes."""
    assert shown(name) == text


@pytest.mark.parametrize(
    ("text", "said"), [("a b", "a b"), ("a\nb", r"a\nb"), ("\x07", r"\x07"), ("\udcff", r"\udcff")]
)
def test_text_is_made_printable(text: str, said: str) -> None:
    """Each unprintable character is escaped."""
    assert printable(text) == said


@pytest.mark.parametrize("known", [False, True])
def test_an_error_keeps_the_parts_that_it_knows(known: bool) -> None:
    """The innermost place is the exact one."""
    names = ("partition", "filesystem", "path")
    error = DiskFsError("is odd", **({name: f"inner {name}" for name in names} if known else {}))

    found = error.at(**{name: f"outer {name}" for name in names})

    one = "inner" if known else "outer"
    assert str(found) == f"{one} partition ({one} filesystem): {one} path: is odd"
    assert str(DiskFsError("is odd", filesystem="ext4")) == "ext4: is odd"
    assert str(DiskFsError("is odd")) == "is odd"
