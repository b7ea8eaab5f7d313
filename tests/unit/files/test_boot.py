"""What a VM boots: which file is the firmware, and which files are none."""

import errno
import os
from pathlib import Path

import pytest

from tests.support.descriptors import open_descriptors
from vmd.errors import VMD_BIOS_MISSING, OperatorError
from vmd.files import boot
from vmd.files.boot import BootFiles, copy_to_memory, open_boot_files, open_firmware, open_regular, require_regular
from vmd.memfile import memory_file


@pytest.fixture
def firmware(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The paths of firmware on this host, where none is yet."""
    paths = [tmp_path / "bios-256k", tmp_path / "bios", tmp_path / "file" / "bios"]
    (tmp_path / "file").touch()
    monkeypatch.setattr(boot, "FIRMWARE_PATHS", tuple(map(str, paths)))
    return paths


def content(fd: int) -> bytes:
    """Return what is in a file, and close it."""
    data = os.pread(fd, 100, 0)
    os.close(fd)
    return data


@pytest.mark.parametrize("path", [0, 1])
def test_the_first_firmware_is_taken(firmware: list[Path], path: int) -> None:
    """Distributions have different ones."""
    for each in firmware[path:2]:
        each.write_text(each.name)

    fd, name = open_firmware()

    assert name == str(firmware[path])
    assert content(fd) == firmware[path].name.encode()


def test_there_may_be_no_firmware(firmware: list[Path]) -> None:
    """The sentence says where it was looked for."""
    with pytest.raises(OperatorError, match="install package seabios") as refused:
        open_firmware()

    assert refused.value.number == VMD_BIOS_MISSING
    assert all(str(path) in str(refused.value) for path in firmware)


def test_firmware_that_is_none_is_an_error(firmware: list[Path]) -> None:
    """The next one would hide what is wrong."""
    firmware[0].mkdir()
    firmware[1].touch()

    with pytest.raises(OperatorError, match=f"firmware {firmware[0]}"):
        open_firmware()


def test_kernel_and_initrd_are_opened(tmp_path: Path) -> None:
    """Each descriptor is taken once.  Those that are not taken are closed."""
    for name in ("kernel", "initrd"):
        (tmp_path / name).write_text(name)
    before = open_descriptors()

    files = open_boot_files(str(tmp_path / "kernel"), str(tmp_path / "initrd"))
    assert files.boot_name == str(tmp_path / "kernel")
    assert content(files.take_boot()) == b"kernel"
    assert [content(fd) for fd in files.take_initrd()] == [b"initrd"]
    assert files.take_initrd() == []
    files.close()
    files = open_boot_files(str(tmp_path / "kernel"), str(tmp_path / "initrd"))
    files.close()
    files.close()

    assert open_descriptors() == before


def test_a_vm_without_a_kernel_boots_firmware(firmware: list[Path]) -> None:
    """It has no initrd unless one is given."""
    firmware[1].write_text("bios")

    files = open_boot_files("", "")

    assert files.boot_name == str(firmware[1])
    assert content(files.take_boot()) == b"bios"
    assert files.take_initrd() == []


def test_a_missing_initrd_closes_the_kernel(tmp_path: Path) -> None:
    """Nothing is left open."""
    (tmp_path / "kernel").touch()
    before = open_descriptors()

    with pytest.raises(OperatorError, match=f"initrd {tmp_path}/initrd: No such file") as refused:
        open_boot_files(str(tmp_path / "kernel"), str(tmp_path / "initrd"))

    assert refused.value.number == errno.ENOENT
    assert open_descriptors() == before


def test_there_may_be_nothing_to_take() -> None:
    """A VM that boots from its disk has neither."""
    BootFiles().close()
    assert BootFiles().take_initrd() == []


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_only_a_regular_file_is_booted(tmp_path: Path, kind: str) -> None:
    """Opening a FIFO does not wait for a writer."""
    path = tmp_path / kind
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    before = open_descriptors()

    with pytest.raises(OperatorError, match=rf"kernel {path}: (not|neither) a regular file") as refused:
        open_regular(str(path), "kernel")

    assert refused.value.number == errno.EINVAL
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("flags", "accepted"), [(os.O_RDONLY, True), (os.O_RDWR, True), (os.O_WRONLY, False), (os.O_PATH, False)]
)
def test_a_client_s_descriptor_shows_that_it_may_read(tmp_path: Path, flags: int, accepted: bool) -> None:
    """It may have opened the file for another purpose, for which it needs fewer rights."""
    (tmp_path / "kernel").touch()
    fd = os.open(tmp_path / "kernel", flags)
    try:
        if accepted:
            require_regular(fd, "kernel k")
        else:
            with pytest.raises(OperatorError, match="kernel k: not open for reading") as refused:
                require_regular(fd, "kernel k")
            assert refused.value.number == errno.EACCES
    finally:
        os.close(fd)


def test_a_closed_descriptor_is_named() -> None:
    """The error is the kernel's."""
    with pytest.raises(OperatorError, match="kernel k: Bad file descriptor") as refused:
        require_regular(999, "kernel k")
    assert refused.value.number == errno.EBADF


@pytest.mark.parametrize("size", [boot.PIECE, boot.PIECE + 1])
def test_the_parent_hears_of_each_piece_of_a_copy(tmp_path: Path, size: int) -> None:
    """Otherwise it would give up a copy from slow storage.  The limit itself is allowed."""
    (tmp_path / "kernel").write_bytes(bytes(size))
    heard: list[None] = []
    memory = memory_file("copy")
    with (tmp_path / "kernel").open("rb") as file:
        copy_to_memory(file.fileno(), memory, "kernel k", size, lambda: heard.append(None))

    assert len(heard) == -(-size // boot.PIECE)
    assert os.fstat(memory).st_size == size
    os.close(memory)


def test_a_copy_may_fail() -> None:
    """The sentence names the file."""
    with pytest.raises(OperatorError, match="kernel k: cannot be copied: Bad file descriptor") as refused:
        copy_to_memory(999, 998, "kernel k", 1, lambda: None)
    assert refused.value.number == errno.EBADF


@pytest.mark.parametrize(("user", "words"), [(0, "not a regular file"), (1000, "neither a regular file nor a block")])
def test_with_the_rights_of_a_user_a_file_is_checked_before_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: int, words: str
) -> None:
    """Opening a device can have an effect.  Only root decides for itself."""
    monkeypatch.setattr(os, "geteuid", lambda: user)
    os.mkfifo(tmp_path / "fifo")

    with pytest.raises(OperatorError) as refused:
        open_regular(str(tmp_path / "fifo"), "kernel")

    assert str(refused.value).startswith(f"kernel {tmp_path}/fifo: {words}")


@pytest.mark.parametrize(
    ("error", "folder", "number", "words"),
    [
        (OSError(errno.EACCES, ""), False, errno.EACCES, "Permission denied"),
        (OSError(errno.EACCES, ""), True, errno.EINVAL, "not a regular file"),
        (OSError("odd"), False, errno.EIO, "Input/output error"),
    ],
)
def test_why_a_file_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, folder: bool, number: int, words: str
) -> None:
    """A directory is named as one, even without the right to list it."""
    path = tmp_path / "kernel"
    if folder:
        path.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(OperatorError) as refused:
        open_regular(str(path), "kernel")

    assert (refused.value.number, str(refused.value)) == (number, f"kernel {path}: {words}")


@pytest.mark.parametrize(("user", "number"), [(0, 0), (1, errno.EBADF), (1000, errno.EBADF)])
def test_only_root_may_read_without_a_check(monkeypatch: pytest.MonkeyPatch, user: int, number: int) -> None:
    """Every other user is checked with the mode of the open file, and that of a closed one is not known."""
    monkeypatch.setattr(os, "geteuid", lambda: user)
    try:
        boot.require_readable(999, "kernel k", ())
    except OperatorError as error:
        found = error.number
    else:
        found = 0

    assert found == number
