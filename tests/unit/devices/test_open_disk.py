"""The process of a disk opens its images with the formats of START, and guesses nothing."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.images import MIB, qemu, read
from vmd.devices.process import Host
from vmd.devices.vioblk import disk as module
from vmd.devices.vioblk import main, raw
from vmd.devices.vioblk.disk import VioblkProcess, granularity, make
from vmd.errors import ImageError, PeerError
from vmd.images.guard import Guard
from vmd.images.qcow2 import Qcow2Image
from vmd.images.raw import RawImage
from vmd.ipc import devmsg
from vmd.privsep.title import EVENT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.images.image import Image

RAW, QCOW2, GUESSED = 0, devmsg.RESOURCE_QCOW2, devmsg.RESOURCE_GUESSED


class Described(Host):
    """A host as START describes it."""

    def __init__(self, *images: tuple[Path, int], flags: int = 0) -> None:
        self.resources = [os.open(path, os.O_RDWR) for path, _ in images]
        self.notes = [note for _, note in images]
        self.names = [f"disk {path.name}" for path, _ in images]
        self.flags = flags
        self.serial = b""
        self.index = 3


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    """A qcow2 image, and its raw backing file."""
    base, top = tmp_path / "base", tmp_path / "top"
    base.write_bytes(b"b" * MIB)
    qemu("qemu-img", "create", "-qf", "qcow2", "-F", "raw", "-b", base, top)
    return top, base


EACH = pytest.mark.parametrize("opener", [main.open_disk, raw.open_disk], ids=["any", "raw"])


@EACH
@pytest.mark.parametrize("flags", [0, devmsg.START_READ_ONLY])
def test_raw_image_is_opened_as_it_is(paths: tuple[Path, Path], opener: "Callable[[Host], Image]", flags: int) -> None:
    """Even if its bytes are those of a qcow2 image: a guest may have written them (hostile 31)."""
    image = opener(Described((paths[0], RAW | 64 << devmsg.RESOURCE_DISCARD_SHIFT), flags=flags))
    assert isinstance(image, RawImage)
    assert read(image, 0, 4) == b"QFI\xfb"
    assert image.writable == (not flags)
    assert image.path == "disk top"
    assert image.guard is None
    image.close()


@EACH
def test_image_of_a_guessed_format_is_guarded(paths: tuple[Path, Path], opener: "Callable[[Host], Image]") -> None:
    """Its guest must not make it an image of another format (hostile 31)."""
    image = opener(Described((paths[1], RAW | GUESSED)))
    assert isinstance(image, RawImage)
    assert isinstance(image.guard, Guard)
    image.close()


@pytest.mark.parametrize("flags", [0, devmsg.START_READ_ONLY])
def test_chain_of_images(paths: tuple[Path, Path], flags: int) -> None:
    """Each has the format that START gives it."""
    image = main.open_disk(Described((paths[0], QCOW2), (paths[1], RAW), flags=flags))
    assert isinstance(image, Qcow2Image)
    assert isinstance(image.backing, RawImage)
    assert (image.writable, image.backing.writable) == (not flags, False)
    assert read(image, 0, 512) == b"b" * 512
    image.close()


@pytest.mark.parametrize("notes", [(QCOW2,), (RAW, RAW)])
def test_program_for_raw_images_opens_no_others(paths: tuple[Path, Path], notes: tuple[int, ...]) -> None:
    """It has no code for them."""
    host = Described(*zip(paths, notes, strict=False))
    with pytest.raises(PeerError, match="an image that is not raw"):
        raw.open_disk(host)
    for fd in host.resources:
        os.close(fd)


def test_raw_image_that_cannot_be_used(paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence names the disk."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(raw, "RawImage", fail)
    host = Described((paths[1], RAW))
    with pytest.raises(ImageError, match="disk base: cannot be used: Input/output error"):
        raw.open_disk(host)
    os.close(host.resources[0])


def test_granularity_of_a_note() -> None:
    """It is in sectors, and other bits do not count."""
    assert granularity(QCOW2 | GUESSED) == 0
    assert granularity(QCOW2 | 128 << devmsg.RESOURCE_DISCARD_SHIFT) == 64 << 10


class Made:
    """The device: it keeps what it was made of."""

    def __init__(self, image: "Image", _services: object, _workers: object, *, serial: bytes) -> None:
        self.image = image
        self.serial = serial
        self.watched = False

    def watch_lock(self) -> None:
        """Note it."""
        self.watched = True


class Bare(VioblkProcess):
    """The process without memory and loop."""

    def __init__(self, host: Host) -> None:
        self.host = host


@pytest.mark.parametrize("serial", [b"", b"mine"])
def test_disk_has_a_serial_and_its_lock_is_watched(
    paths: tuple[Path, Path], serial: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a serial of its own it is numbered.  The main thread has a name."""
    monkeypatch.setattr(module, "Vioblk", Made)
    monkeypatch.setattr(module, "Workers", lambda most: most)
    names: list[str] = []
    monkeypatch.setattr(module, "name_thread", names.append)
    host = Described((paths[1], RAW))
    host.serial = serial
    made = make(Bare(host), raw.open_disk)
    assert isinstance(made, Made)
    assert (made.serial, made.watched, names) == (serial or b"vioblk3", True, [EVENT])
    made.image.close()


@pytest.mark.parametrize(("size", "words"), [(0, "0 bytes are less than a sector of 512"), (None, "without an image")])
def test_disk_without_a_sector(tmp_path: Path, size: int | None, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest cannot use it."""
    monkeypatch.setattr(module, "name_thread", lambda _name: None)
    (tmp_path / "empty").touch()
    host = Described(*[(tmp_path / "empty", RAW)] * (size is not None))
    with pytest.raises((ImageError, PeerError), match=words):
        make(Bare(host), raw.open_disk)
    for fd in host.resources:
        os.close(fd)
