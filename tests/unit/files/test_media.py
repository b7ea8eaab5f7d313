"""The disks and the disc of a VM are opened all or none; what is told about them."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.descriptors import open_descriptors
from vmd.config.model import DiskConfig
from vmd.errors import InUse, OperatorError
from vmd.fileid import file_id
from vmd.files import media as media_module
from vmd.files.images import discard_granularity
from vmd.files.media import NAME_MAX_BYTES, Media, shortened
from vmd.images.locks import DENIES, USES, WRITE, lock
from vmd.ipc.probemsg import Probe

SECTOR = 512


class Knows:
    """An imgprobe that takes everything for raw."""

    def probe(self, _fd: int, _name: str, _format_hint: str, *, boots: bool = False) -> Probe:
        """Return that."""
        return Probe(format="raw", size=SECTOR)


Opens = Callable[..., Media]


@pytest.fixture
def opens(tmp_path: Path) -> Iterator[Opens]:
    """A function that opens files of this folder, as disks and, if it is there, `disc` as the disc."""
    opened: list[Media] = []

    def open_them(*names: str, others_have: bool = False, patience_s: float = 0, at: list[str] | None = None) -> Media:
        disks = [DiskConfig(path=str(tmp_path / name), format="raw") for name in names]
        cdrom = str(tmp_path / "disc") if (tmp_path / "disc").exists() else ""
        said: list[str] = [] if at is None else at
        opened.append(Media.open(disks, cdrom, Knows(), others_have=others_have, patience_s=patience_s, at=said.append))
        return opened[-1]

    yield open_them
    for each in opened:
        each.close()


@pytest.fixture(autouse=True)
def files(tmp_path: Path) -> None:
    """Two images of a sector each."""
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(SECTOR))


def held(path: Path, *, writable: bool) -> int:
    """Lock a file as another process would, and return its descriptor."""
    fd = os.open(path, os.O_RDWR)
    lock(fd, str(path), writable=writable)
    return fd


def test_all_files_are_opened(opens: Opens, tmp_path: Path) -> None:
    """The parent hears what is opened next, and gets the identity of each file."""
    (tmp_path / "disc").write_bytes(bytes(2048))
    said: list[str] = []

    media = opens("a", "b", at=said)

    assert said == [f"disk {tmp_path}/a", f"disk {tmp_path}/b", f"cdrom {tmp_path}/disc"]
    assert [(file.what, file.file) for file in media.files()] == [
        (what, file_id((tmp_path / name).stat()))
        for what, name in zip(said, ("a", "b", "disc"), strict=True)
    ]  # fmt: skip
    assert [[(image.path, image.format, image.guessed) for image in disk.images] for disk in media.describe()] == [
        [(f"{tmp_path}/a", "raw", False)], [(f"{tmp_path}/b", "raw", False)],
    ]  # fmt: skip
    assert media.unused() == (f"{tmp_path}/a", f"{tmp_path}/b")
    disks, discs = media.take_disks(), media.take_cdrom()
    assert (len(disks), len(discs)) == (2, 1)
    assert (media.take_disks(), media.take_cdrom()) == ([], [])
    for fd in (*disks, *discs):
        os.close(fd)


def test_a_base_is_named_with_its_disk(tmp_path: Path) -> None:
    """Its own name says little to the operator."""
    media = Media.open([DiskConfig(path=str(tmp_path / "a"), format="raw")], "", Knows())
    media.disks[0].links += [link.replace(fd=os.dup(link.fd), path="/base") for link in media.disks[0].links]

    assert media.files()[1].what == f"disk {tmp_path}/a: backing file /base"
    media.close()


@pytest.mark.parametrize("missing", ["disk", "disc"])
def test_none_stays_open_after_a_failure(opens: Opens, tmp_path: Path, missing: str) -> None:
    """The locks would stay, too."""
    if missing == "disc":
        (tmp_path / "disc").mkdir()
    before = open_descriptors()

    with pytest.raises(OperatorError):
        opens("a", "b" if missing == "disc" else "gone")

    assert open_descriptors() == before
    os.close(held(tmp_path / "a", writable=True))


def test_a_disk_that_others_write_to_may_be_left_out(opens: Opens, tmp_path: Path) -> None:
    """Only if that is asked for: the parent then waits for the process that has it."""
    other = held(tmp_path / "b", writable=True)

    with pytest.raises(InUse):
        opens("a", "b")
    media = opens("a", "b", others_have=True)

    assert [disk.links[0].path for disk in media.disks] == [f"{tmp_path}/a"]
    (in_use,) = media.in_use
    assert (in_use.what, in_use.file) == (f"disk {tmp_path}/b", file_id((tmp_path / "b").stat()))
    os.close(other)


def test_a_disk_that_others_read_is_an_error(opens: Opens, tmp_path: Path) -> None:
    """It may be the base of other disks, which writing would damage."""
    other = held(tmp_path / "b", writable=False)

    with pytest.raises(InUse):
        opens("a", "b", others_have=True)

    os.close(other)


def test_the_base_of_a_disk_that_others_write_to_is_an_error(
    opens: Opens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not this VM's disk that the other process has."""

    def refuse(*_: object) -> None:
        marks = (USES + WRITE, DENIES + WRITE)
        raise InUse("disk x: backing file y", file_id((tmp_path / "b").stat()), marks=marks)

    monkeypatch.setattr(media_module, "open_disk", refuse)

    with pytest.raises(InUse):
        opens("a", others_have=True)


def test_a_file_in_use_is_tried_again(opens: Opens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A VM that was just killed has its locks until its processes have ended."""
    other = held(tmp_path / "b", writable=True)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            os.close(other)

    monkeypatch.setattr("vmd.files.media.time.sleep", sleep)

    assert len(opens("a", "b", patience_s=3600).disks) == 2
    assert len(slept) == 3


def test_other_errors_are_not_tried_again(opens: Opens, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing file will not come."""
    monkeypatch.setattr("vmd.files.media.time.sleep", lambda _seconds: pytest.fail("sleeps"))

    with pytest.raises(OperatorError, match="No such file"):
        opens("gone", patience_s=3600)


def test_patience_ends(opens: Opens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is that of the last attempt."""
    other = held(tmp_path / "a", writable=True)
    times = iter((10.0, 12.0, 15.0, 15.1))
    clock = SimpleNamespace(monotonic=lambda: next(times), sleep=lambda _seconds: None)
    monkeypatch.setattr(media_module, "time", clock)

    with pytest.raises(InUse) as error:
        opens("a", patience_s=5)

    assert error.value.number == errno.EBUSY
    assert list(times) == []
    os.close(other)


@pytest.mark.parametrize("path", ["/" + "x" * (NAME_MAX_BYTES - 1), "/short"])
def test_a_path_that_fits_is_whole(path: str) -> None:
    """Most paths do."""
    assert shortened(path) == path


@pytest.mark.parametrize("path", ["/" + "x" * NAME_MAX_BYTES, "/" + "ü" * 500, "/\udcff" * 200])
def test_a_long_path_is_cut(path: str) -> None:
    """Its end tells more.  It may be cut inside a character."""
    found = shortened(path)

    assert found.startswith("...")
    assert len(os.fsencode(found.replace("\ufffd", "?"))) <= NAME_MAX_BYTES
    assert found[-1] == path[-1].replace("\udcff", "\ufffd")


def test_only_a_device_has_a_granularity(tmp_path: Path) -> None:
    """A file is punched as it is."""
    with (tmp_path / "a").open() as file:
        assert discard_granularity(file.fileno()) == 0


def test_the_notes_of_all_files_are_told(opens: Opens, tmp_path: Path) -> None:
    """In the order of the configuration."""
    for name, size in (("a", 513), ("b", 700), ("disc", 2048)):
        (tmp_path / name).write_bytes(bytes(size))

    media = opens("a", "b")

    assert [note.partition(" bytes")[0] for note in media.notes] == [
        f"disk {tmp_path}/a: its 513", f"disk {tmp_path}/b: its 700", f"cdrom {tmp_path}/disc: its 512",
    ]  # fmt: skip


def test_nothing_is_tried_again_unless_patience_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client waits for the answer."""
    other = held(tmp_path / "a", writable=True)
    times = iter((10.0, 10.001))
    clock = SimpleNamespace(monotonic=lambda: next(times), sleep=lambda _seconds: pytest.fail("sleeps"))
    monkeypatch.setattr(media_module, "time", clock)

    with pytest.raises(InUse):
        Media.open([DiskConfig(path=str(tmp_path / "a"), format="raw")], "", Knows())

    os.close(other)


def test_a_fault_closes_what_is_open(tmp_path: Path) -> None:
    """It may be an error of ours, or the end of the process."""
    disks = [DiskConfig(path=str(tmp_path / name), format="raw") for name in ("a", "b")]
    before = open_descriptors()

    def at(what: str) -> None:
        if what.endswith("b"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Media.open(disks, "", Knows(), at=at)

    assert open_descriptors() == before


def test_a_device_or_a_base_may_be_in_use_elsewhere(opens: Opens, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks of a device hold on this host only.  Bases are shared."""
    media = opens("a", "b")
    media.disks[0].links += [link.replace(fd=os.dup(link.fd), path="/base") for link in media.disks[0].links]
    device = media.disks[1].links[0].fd
    real = os.fstat
    monkeypatch.setattr(
        os, "fstat", lambda fd: os.stat_result((stat.S_IFBLK, *real(fd)[1:])) if fd == device else real(fd)
    )

    assert media.unused() == (media.disks[0].links[0].path,)


def test_a_cut_path_is_as_long_as_possible() -> None:
    """All of the room is used."""
    assert shortened("/" + "x" * NAME_MAX_BYTES) == "..." + "x" * (NAME_MAX_BYTES - 3)
