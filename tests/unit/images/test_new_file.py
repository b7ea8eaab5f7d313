"""A new file gets its name when it is complete, on file systems with more or fewer features."""

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.descriptors import open_descriptors
from vmd.errors import HostError
from vmd.images import create as module
from vmd.images.create import STEM_BYTES, new_file

# Features that a file system lacks, each in addition to the ones before: unnamed files, RENAME_NOREPLACE, links.
KINDS = ["local", "no-tmpfile", "no-noreplace", "no-links"]
NO_PROC = "no-proc"  # without /proc a file without a name cannot get one


class Rename:
    """Stands in for the C library: renameat2(2) fails."""

    def __init__(self, number: int) -> None:
        self.number = number

    def renameat2(self, *_: object) -> int:
        """Fail."""
        ctypes.set_errno(self.number)
        return -1


@pytest.fixture(params=[*KINDS, NO_PROC])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the file system lack the features of a kind."""
    kind: str = request.param
    if kind == NO_PROC:
        real = os.path.exists
        monkeypatch.setattr(os.path, "exists", lambda path: not str(path).startswith("/proc/") and real(path))
        return kind
    lacks = KINDS.index(kind)
    def no_link(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links")

    if lacks >= 1:
        monkeypatch.setattr(module, "UNNAMED", 0)  # an old file system ignores the flag
    if lacks >= 2:
        monkeypatch.setattr(module, "libc", Rename(errno.EINVAL))
    if lacks >= 3:
        monkeypatch.setattr(os, "link", no_link)
    return kind


def test_file_appears_complete(kind: str, tmp_path: Path) -> None:
    """Before the end its name does not exist.  Afterwards no other file is left."""
    path, descriptors = tmp_path / ("n" * 255), open_descriptors()
    with new_file(str(path)) as fd:
        os.write(fd, b"content")
        assert not path.exists()
        hidden = [name.name for name in tmp_path.iterdir()]

    assert len(hidden) == (kind != "local")
    assert all(name.startswith("." + "n" * STEM_BYTES + ".") and name.endswith(".part") for name in hidden)
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_bytes() == b"content"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_nlink == 1
    assert open_descriptors() == descriptors


@pytest.mark.usefixtures("kind")
def test_file_made_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """No existing file is ever replaced."""
    path = tmp_path / "disk"
    with pytest.raises(HostError, match=r"could not create .*/disk: File exists"), new_file(str(path)):
        path.write_bytes(b"theirs")

    assert os.listdir(tmp_path) == ["disk"]
    assert path.read_bytes() == b"theirs"


@pytest.mark.usefixtures("kind")
def test_existing_name_is_reported_before_anything_is_written(tmp_path: Path) -> None:
    """A copy may take hours, so the error comes first."""
    (tmp_path / "disk").symlink_to("nowhere")

    with pytest.raises(HostError, match=r"could not create .*/disk: File exists"), new_file(f"{tmp_path}/disk"):
        raise AssertionError("the file was opened")

    assert os.listdir(tmp_path) == ["disk"]


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bad"), OSError(errno.ENOSPC, "full")])
def test_failure_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    """This holds for every exception."""
    descriptors = open_descriptors()

    def half(fd: int) -> None:
        os.write(fd, b"half")
        raise error

    with pytest.raises((type(error), HostError)), new_file(f"{tmp_path}/disk") as fd:
        half(fd)

    assert os.listdir(tmp_path) == []
    assert open_descriptors() == descriptors


@pytest.mark.usefixtures("kind")
def test_failure_to_sync_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the file or its name is not on stable storage, it is not reported as made."""
    real: Callable[[int], None] = os.fsync

    for failing in (1, 2):
        calls: list[int] = []

        def fail(fd: int, calls: list[int] = calls, failing: int = failing) -> None:
            calls.append(fd)
            if len(calls) == failing:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            real(fd)

        monkeypatch.setattr(os, "fsync", fail)
        lost = r"could not write .*/disk: Input/output error"
        with pytest.raises(HostError, match=lost), new_file(f"{tmp_path}/disk") as new:
            os.write(new, b"content")
        assert os.listdir(tmp_path) == []


def test_rename_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system may have no room for another name."""
    monkeypatch.setattr(module, "UNNAMED", 0)
    monkeypatch.setattr(module, "libc", Rename(errno.ENOSPC))
    with pytest.raises(HostError, match=r"could not write .*/disk: No space left"), new_file(f"{tmp_path}/disk"):
        pass

    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "words"), [("no/disk", "No such file"), ("file/disk", "Not a directory"), ("dir/", "Is a directory")]
)
def test_places_where_no_file_can_be(tmp_path: Path, name: str, words: str) -> None:
    """The error comes before any data is written."""
    (tmp_path / "file").touch()
    (tmp_path / "dir").mkdir()

    with pytest.raises(HostError, match=f"could not create .*: {words}"), new_file(f"{tmp_path}/{name}"):
        raise AssertionError("the file was opened")


def test_new_file_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given by its bare name."""
    monkeypatch.chdir(tmp_path)

    with new_file("disk"):
        pass

    assert os.listdir(tmp_path) == ["disk"]
