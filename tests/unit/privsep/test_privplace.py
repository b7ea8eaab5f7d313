"""priv's directory: it and the files in it belong to the user that priv has now."""

import os
from pathlib import Path

import pytest

from vmd.privsep import privplace
from vmd.privsep.privplace import make_priv_directory


class Owners:
    """The owners that files have been given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: dict[str, tuple[int, int]] = {}
        monkeypatch.setattr(os, "chown", self.chown)

    def chown(self, path: str, uid: int, gid: int) -> None:
        """Note a new owner; a descriptor's link counts as its file."""
        self.given[os.path.basename(os.path.realpath(path))] = (uid, gid)


@pytest.fixture
def owners(monkeypatch: pytest.MonkeyPatch) -> Owners:
    """The owners that files have been given."""
    return Owners(monkeypatch)


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The directory's path."""
    path = tmp_path / "vmd" / "priv"
    path.parent.mkdir()
    monkeypatch.setattr(privplace, "PRIV_DIRECTORY", str(path))
    return path


def test_the_directory_is_made(directory: Path, owners: Owners) -> None:
    """Only priv can read it."""
    make_priv_directory(77)

    assert directory.stat().st_mode & 0o777 == 0o700
    assert owners.given == {"priv": (77, 77)}


def test_files_of_an_earlier_version_are_moved(directory: Path, owners: Owners) -> None:
    """Only its settings of the network: other files there belong to the daemon."""
    for name in ("network-settings", "state"):
        (directory.parent / name).write_text(name)

    make_priv_directory(77)
    make_priv_directory(78)

    assert (directory / "network-settings").read_text() == "network-settings"
    assert (directory.parent / "state").exists()
    assert owners.given == {"priv": (78, 78), "network-settings": (78, 78)}


def test_only_priv_s_own_files_are_given(directory: Path, owners: Owners, tmp_path: Path) -> None:
    """A taken-over priv could have put another name of a precious file there, by a link of either kind."""
    directory.mkdir()
    precious = tmp_path / "precious"
    precious.touch()
    (directory / "hard").hardlink_to(precious)
    (directory / "soft").symlink_to(tmp_path / "also")
    (tmp_path / "also").touch()
    (directory / "folder").mkdir()
    os.mkfifo(directory / "fifo")
    (directory / "own").touch()

    make_priv_directory(77)

    assert owners.given == {"priv": (77, 77), "own": (77, 77)}
