"""The files of a console log: how they are opened, rotated and refused."""

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmd.errors import OperatorError
from vmd.ipc.logfile import LogFile, pack, unpack
from vmd.logfile import main
from vmd.logfile.main import open_log

SIZE = 65536


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    """Yield the descriptor of a directory."""
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def wanted(path: Path, keep: int = 3, *, shared: bool = False) -> LogFile:
    """Return a log of 64 KiB."""
    return LogFile(path=str(path), size_bytes=SIZE, keep=keep, uid=0, gid=0, groups=(), shared=shared)


def names(path: Path) -> dict[str, bytes]:
    """Return the first byte of each file, by name."""
    return {each.name: each.read_bytes()[:1] for each in sorted(path.iterdir())}


def test_the_arguments_survive_the_command_line() -> None:
    """Any path and any groups are possible."""
    asked = LogFile(path="/v/\udcff a\n.log", size_bytes=1, keep=2, uid=3, gid=4, groups=(5, 6), shared=True)

    assert unpack(pack(asked)) == asked


@pytest.mark.parametrize(("shared", "mode"), [(False, 0o600), (True, 0o640)])
def test_a_new_log_is_for_its_owner(directory: int, tmp_path: Path, *, shared: bool, mode: int) -> None:
    """Its group may read it if vm.conf names one.  Output is appended."""
    old_mask = os.umask(0)
    try:
        fd = open_log(directory, wanted(tmp_path / "a.log", shared=shared))
    finally:
        os.umask(old_mask)

    assert (tmp_path / "a.log").stat().st_mode & 0o777 == mode
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_APPEND | os.O_ACCMODE) == os.O_APPEND | os.O_WRONLY
    os.close(fd)


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (0, {"a.log": b""}),
        (1, {"a.log": b"", "a.log.1": b"c"}),
        (3, {"a.log": b"", "a.log.1": b"c", "a.log.2": b"1", "a.log.3": b"2"}),
        (9, {"a.log": b"", "a.log.1": b"c", "a.log.2": b"1", "a.log.3": b"2", "a.log.4": b"3", "a.log.6": b"5"}),
    ],
)
def test_a_full_log_is_rotated(directory: int, tmp_path: Path, keep: int, left: dict[str, bytes]) -> None:
    """Each file gets the next name.  Files beyond `keep` are removed, also after `keep` was reduced."""
    (tmp_path / "a.log").write_bytes(b"c" * SIZE)
    for number in (1, 2, 3, 5):
        (tmp_path / f"a.log.{number}").write_bytes(b"%d" % number)

    os.close(open_log(directory, wanted(tmp_path / "a.log", keep)))

    assert names(tmp_path) == left


def test_a_log_that_is_not_full_is_used_again(directory: int, tmp_path: Path) -> None:
    """Nothing is rotated."""
    (tmp_path / "a.log").write_bytes(b"c" * (SIZE - 1))

    os.close(open_log(directory, wanted(tmp_path / "a.log")))

    assert names(tmp_path) == {"a.log": b"c"}


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("symlink", "is a symbolic link"),
        ("hardlink", r"has other names \(hard links\)"),
        ("fifo", "is not a regular file"),
        ("directory", "is not a regular file"),
    ],
)
def test_a_file_that_is_not_a_log_is_refused(directory: int, tmp_path: Path, kind: str, sentence: str) -> None:
    """Otherwise a user who can write to the directory could have another file of the owner overwritten."""
    path, other = tmp_path / "a.log", tmp_path / "other"
    other.write_bytes(b"precious")
    match kind:
        case "symlink":
            path.symlink_to(other)
        case "hardlink":
            path.hardlink_to(other)
        case "fifo":
            os.mkfifo(path)
        case _:
            path.mkdir()

    with pytest.raises(OperatorError, match=sentence):
        open_log(directory, wanted(path))

    assert other.read_bytes() == b"precious"


def test_a_log_has_one_writer(directory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If two VMs have the same path, the second one gets an error.  It gets the log when the first has ended."""
    monkeypatch.setattr(main, "LOCK_S", 0.0)
    fd = open_log(directory, wanted(tmp_path / "a.log"))

    with pytest.raises(OperatorError, match="is in use by another VM or program") as refused:
        open_log(directory, wanted(tmp_path / "a.log"))
    os.close(fd)
    os.close(open_log(directory, wanted(tmp_path / "a.log")))

    assert refused.value.number == errno.EBUSY
