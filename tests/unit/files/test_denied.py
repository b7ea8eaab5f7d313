"""Why a file cannot be used although its mode allows it."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.descriptors import open_descriptors
from vmd.errors import HostError
from vmd.files.denied import FUSE, NFS, explained, file_system, file_system_of, on_fuse
from vmd.privsep import linux

PROC = 0x9FA0


def is_on(monkeypatch: pytest.MonkeyPatch, magic: int) -> None:
    """Let all files be on this file system."""
    monkeypatch.setattr(linux, "file_system_type", lambda _fd: magic)


def fails(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the question for the file system fail."""

    def fail(_fd: int) -> int:
        raise HostError("ask", number)

    monkeypatch.setattr(linux, "file_system_type", fail)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EOVERFLOW])
@pytest.mark.parametrize(("magic", "words"), [(FUSE, "-o allow_other"), (NFS, "root_squash")])
def test_some_file_systems_serve_some_users_only(
    monkeypatch: pytest.MonkeyPatch, magic: int, words: str, number: int
) -> None:
    """The sentence says who was refused, and what to do."""
    is_on(monkeypatch, magic)

    said = explained(number, "/", "root")

    assert said.startswith(f"{os.strerror(number)}: root may not use it: ")
    assert words in said


def test_the_reason_may_not_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """An owner outside of the user namespace is the reason on any file system."""
    is_on(monkeypatch, PROC)

    assert explained(errno.EACCES, "/", "root") == "Permission denied"
    assert explained(errno.EOVERFLOW, "/", "root").endswith(": its owner is not known in this user namespace")


def test_other_errors_are_not_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """FUSE is not the reason of every error there."""
    is_on(monkeypatch, FUSE)

    assert explained(errno.ENOENT, "/", "root") == "No such file or directory"


@pytest.mark.parametrize("path", ["/proc", "/proc/self", "/proc/no-such/file/there", "/proc/self/stat/below"])
def test_the_file_system_of_a_path(path: str) -> None:
    """The path need not exist: what is missing would be on the same file system as the directory above it."""
    before = open_descriptors()
    assert file_system(path) == PROC
    assert open_descriptors() == before


@pytest.mark.parametrize("path", ["", "no-such-file", "nul\0nul"])
def test_a_path_without_a_file_system(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path has nothing above its first name."""
    monkeypatch.chdir(tmp_path)

    assert file_system(path) == 0


def test_a_number_is_the_kernels_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """statfs(2) may extend its sign."""
    is_on(monkeypatch, -1)

    assert file_system("/") == 0xFFFFFFFF


def test_a_fuse_server_may_lack_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSYS can only be its answer."""
    fails(monkeypatch, errno.ENOSYS)

    assert file_system_of(0) == file_system("/") == FUSE
    assert on_fuse(0)


def test_a_failed_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of an open file is raised; a path has no known file system."""
    fails(monkeypatch, errno.EIO)

    with pytest.raises(HostError):
        file_system_of(0)
    assert file_system("/") == 0
    assert not on_fuse(0)


@pytest.mark.parametrize(("magic", "answer"), [(FUSE, True), (NFS, False), (PROC, False)])
def test_fuse_is_told_from_others(monkeypatch: pytest.MonkeyPatch, magic: int, answer: bool) -> None:
    """It checks the user at each call, so imgprobe is asked about every image there."""
    is_on(monkeypatch, magic)

    assert on_fuse(0) is answer


def test_the_numbers_are_the_kernels() -> None:
    """A compiler compares them with those of <linux/magic.h>."""
    source = f"""#include <linux/magic.h>
        _Static_assert(FUSE_SUPER_MAGIC == {FUSE}, "FUSE");
        _Static_assert(NFS_SUPER_MAGIC == {NFS}, "NFS");
    """

    subprocess.run(["gcc", "-fsyntax-only", "-x", "c", "-"], input=source, text=True, check=True)
