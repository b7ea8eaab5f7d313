"""Which files may be booted, and how they are copied."""

import os
import pwd
import stat
from pathlib import Path

import pytest

from tests.support.users import acting_as
from vmd.config.model import Owner
from vmd.errors import OperatorError
from vmd.files import boot
from vmd.files.boot import require_readable
from vmd.memfile import is_constant, memory_file

NOBODY = pwd.getpwnam("nobody")


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (stat.S_IFBLK, "kernel /dev/vda: not a regular file but a block device: give it as disk"),
        (stat.S_IFCHR, "kernel /dev/vda: not a regular file"),
        (stat.S_IFDIR, "kernel /dev/vda: not a regular file"),
    ],
)
def test_only_regular_files_are_booted(kind: int, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message for a block device names the keyword to use instead."""
    fd = os.open("/dev/null", os.O_RDONLY)
    monkeypatch.setattr(os, "fstat", lambda fd: os.stat_result((kind | 0o600, *[0] * 9)))
    try:
        with pytest.raises(OperatorError) as refused:
            boot.require_regular(fd, "kernel /dev/vda")
    finally:
        os.close(fd)

    assert str(refused.value) == sentence


@pytest.mark.root
@pytest.mark.parametrize(
    ("mode", "uid", "gid", "allowed"),
    [
        (0o400, 0, 0, False),
        (0o404, 0, 0, True),
        (0o400, NOBODY.pw_uid, 0, True),
        (0o040, 0, NOBODY.pw_gid, True),
        (0o004, NOBODY.pw_uid, 0, False),  # for the owner only the owner's bits count
        (0o004, 0, NOBODY.pw_gid, False),
    ],
)
def test_readable_is_judged_on_the_open_file(tmp_path: Path, mode: int, uid: int, gid: int, allowed: bool) -> None:
    """The mode bits of the open file are applied to the caller as the kernel would."""
    path = tmp_path / "image"
    path.touch()
    os.chown(path, uid, gid)
    path.chmod(mode)
    groups = (NOBODY.pw_gid,)
    with path.open("rb") as file:
        with acting_as(Owner(uid=NOBODY.pw_uid, gid=NOBODY.pw_gid)):
            if allowed:
                require_readable(file.fileno(), str(path), groups)
            else:
                with pytest.raises(OperatorError, match=str(path)):
                    require_readable(file.fileno(), str(path), groups)
        require_readable(file.fileno(), str(path), ())


def test_a_copy_that_cannot_be_changed(tmp_path: Path) -> None:
    """The copy has the whole file and is sealed.  A file that is too large is not copied."""
    content = os.urandom((2 << 20) + 5)
    (tmp_path / "image").write_bytes(content)
    with (tmp_path / "image").open("rb") as file, os.fdopen(memory_file("kernel"), "w+b") as copy:
        with pytest.raises(OperatorError, match="image: larger than 1 MiB"):
            boot.copy_to_memory(file.fileno(), copy.fileno(), "image", 1 << 20, lambda: None)
        assert not is_constant(copy.fileno())
        os.ftruncate(copy.fileno(), 0)
        os.lseek(copy.fileno(), 0, os.SEEK_SET)

        boot.copy_to_memory(file.fileno(), copy.fileno(), "image", 3 << 20, lambda: None)

        assert is_constant(copy.fileno())
        assert os.pread(copy.fileno(), 4 << 20, 0) == content
        with pytest.raises(PermissionError):
            os.pwrite(copy.fileno(), b"x", 0)
