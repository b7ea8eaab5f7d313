"""An image is copied into a new one: what is data, what is not written, and what is told meanwhile."""

import errno
import os
import random
from pathlib import Path

import pytest

from tests.support.images import KIB, MIB, opened, problems, read, write
from vmd.errors import HostError
from vmd.images import create as module
from vmd.images.create import convert, create
from vmd.images.raw import RawImage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmd.images.image import Image

SIZE = 3 * MIB + 512
FORMATS = ["raw", "qcow2"]


def filled(path: Path, kind: str) -> bytes:
    """Make an image with data, zeroes that are written, and holes; return its content."""
    create(str(path), kind, SIZE)
    image = opened(path, writable=True, formats=(kind,))
    choice = random.Random(1)
    for at, data in (
        (64 * KIB - 512, choice.randbytes(1024)),  # across a block
        (256 * KIB, choice.randbytes(4 * KIB) + bytes(256 * KIB) + choice.randbytes(100 * KIB)),
        (MIB, bytes(300 * KIB)),
        (2 * MIB, choice.randbytes(MIB + 512)),
    ):
        write(image, at, data)
    content = read(image, 0, SIZE)
    image.close()
    return content


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("kind", FORMATS)
def test_copy_has_the_content_and_no_zeroes(tmp_path: Path, kind: str, target: str) -> None:
    """A larger copy ends with zeroes.  Blocks that are zero take no storage, also if the source has stored them."""
    content = filled(tmp_path / "source", kind)
    source = opened(tmp_path / "source", formats=(kind,))
    told: list[tuple[int, int]] = []
    verified: list[int] = []
    convert(source, str(tmp_path / "copy"), target, SIZE + MIB, lambda *where: told.append(where),
            lambda: verified.append(len(told)))  # fmt: skip
    source.close()

    copy = opened(tmp_path / "copy", formats=(target,))
    assert copy.size == SIZE + MIB
    assert read(copy, 0, copy.size) == content + bytes(MIB)
    assert (tmp_path / "copy").stat().st_blocks * 512 < MIB + 700 * KIB
    copy.close()
    if target == "qcow2":
        assert problems(tmp_path / "copy") == {}
    whole = told[-1][1]
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert {of for _, of in told} == {whole}
    assert told[-1][0] == whole < SIZE
    assert verified == [len(told)]


class Written(RawImage):
    """A copy that keeps where it is written."""

    places: list[tuple[int, int]]

    def pwritev(self, offset: int, views: "Sequence[memoryview]") -> None:
        """Keep place and length."""
        self.places.append((offset, sum(map(len, views))))
        super().pwritev(offset, views)


def test_data_is_written_in_runs_without_zeroes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks begin at multiples of their size on the disk, wherever a piece that is read begins."""
    block = module.ZERO_BYTES
    places: list[tuple[int, int]] = []

    def target(fd: int, path: str, _kind: str) -> "Image":
        made = Written(fd, path, writable=True)
        made.places = places
        return made

    monkeypatch.setattr(module, "_open_target", target)
    parts = [b"x" * (2 * block), bytes(block), b"y" + bytes(block - 1), bytes(3 * block), b"z" * block, bytes(block)]
    (tmp_path / "source").write_bytes(b"".join(parts))
    source = opened(tmp_path / "source", formats=("raw",))
    convert(source, str(tmp_path / "copy"), "raw", source.size)
    source.close()

    assert places == [(0, 2 * block), (3 * block, block), (7 * block, block)]
    assert (tmp_path / "copy").read_bytes() == b"".join(parts)


@pytest.mark.parametrize("what", ["span", "preadv", "verify", "progress"])
def test_source_that_cannot_be_read(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence is about the source, and no file is left."""
    filled(tmp_path / "source", "raw")
    source = opened(tmp_path / "source", formats=("raw",))

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if what in ("span", "preadv"):
        monkeypatch.setattr(source, what, fail)
    with pytest.raises(HostError, match=r"^failed to read from source: Input/output error$"):
        convert(source, str(tmp_path / "copy"), "raw", SIZE, fail if what == "progress" else None,
                fail if what == "verify" else None)  # fmt: skip
    source.close()
    assert os.listdir(tmp_path) == ["source"]


def test_copy_without_room_says_how_much_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Holes need none.  Other errors keep their own sentence."""
    (tmp_path / "source").write_bytes(b"x" * 2 * MIB)
    os.truncate(tmp_path / "source", 10 * MIB)
    source = opened(tmp_path / "source", formats=("raw",))
    for number, words in (
        (errno.ENOSPC, "copy, which needs up to 2.0M where 5.0M were free: No space left on device"),
        (errno.EIO, "copy: Input/output error"),
    ):

        def fail(*_: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(module, "_free_bytes", lambda _fd: 5 * MIB)
        monkeypatch.setattr(module, "_write_data", fail)
        with pytest.raises(HostError, match=f"{words}$"):
            convert(source, str(tmp_path / "copy"), "raw", 10 * MIB)
    source.close()
    assert os.listdir(tmp_path) == ["source"]
