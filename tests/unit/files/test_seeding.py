"""The parts of a seed: which files are read, how much of them, and what a client may say about its own."""

import errno
import os
from pathlib import Path

import pytest

from tests.support.descriptors import open_descriptors
from vmd.config.model import SeedConfig
from vmd.errors import OperatorError
from vmd.files.seeding import given_parts, hash_of, parts_of, read_all, read_file
from vmd.ipc.imsg import pack
from vmd.memfile import memory_file
from vmd.seed.parts import FILE_MAX, PARTS_MAX, SeedFile, SeedParts

HASH = "$6$salt$hash"


def quiet(_what: str) -> None:
    """Hear what is read next."""


def written(path: Path, data: bytes) -> str:
    """Write a file, and return its path."""
    path.write_bytes(data)
    return str(path)


def test_all_files_of_a_seed_are_read(tmp_path: Path) -> None:
    """The parent hears their names, in case that storage does not answer."""
    paths = {name: written(tmp_path / name, name.encode()) for name in ("k1", "k2", "u", "v", "n")}
    seed = SeedConfig(
        hostname="h", user="me", ssh_keys=(paths["k1"], paths["k2"]), password=HASH, user_data=paths["u"],
        vendor_data=paths["v"], network_config=paths["n"], network=False, instance_id="i",
    )  # fmt: skip
    said: list[str] = []

    parts = parts_of("web", seed, said.append)

    files = {name: SeedFile(name=path, data=name.encode()) for name, path in paths.items()}
    assert parts == SeedParts(
        vm="web", instance_id="i", hostname="h", user="me", password_hash=HASH, keys=(files["k1"], files["k2"]),
        user_data=files["u"], vendor_data=files["v"], network_config=files["n"], network=False,
    )  # fmt: skip
    keywords = {"k1": "ssh-key", "k2": "ssh-key", "u": "user-data", "v": "vendor-data", "n": "network-config"}
    assert said == [f"{keywords[name]} {path}" for name, path in paths.items()]


def test_a_seed_may_have_no_files() -> None:
    """Nothing is read."""
    assert parts_of("web", SeedConfig(), quiet) == SeedParts(vm="web")


@pytest.mark.parametrize("size", [0, FILE_MAX - 1, FILE_MAX])
def test_a_file_may_be_so_large(tmp_path: Path, size: int) -> None:
    """It is read as a whole."""
    assert read_file(written(tmp_path / "f", b"x" * size), "user-data", quiet).data == b"x" * size


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    """The sentence names it, and the limit."""
    path = written(tmp_path / "f", bytes(FILE_MAX + 1))

    with pytest.raises(OperatorError) as refused:
        read_file(path, "user-data", quiet)

    assert (refused.value.number, str(refused.value)) == (errno.EFBIG, f"user-data {path}: larger than 1024 KiB")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """The sentence begins with the keyword of vm.conf."""
    with pytest.raises(OperatorError, match=f"ssh-key {tmp_path}/gone: No such file") as refused:
        read_file(f"{tmp_path}/gone", "ssh-key", quiet)
    assert refused.value.number == errno.ENOENT


def test_a_large_file_is_not_read_further_than_needed(tmp_path: Path) -> None:
    """One byte more shows that it is too large."""
    with Path(written(tmp_path / "f", b"abcdef")).open("rb") as file:
        assert [read_all(file.fileno(), most) for most in (0, 3, 5, 6, 7)] == [
            b"a", b"abcd", b"abcdef", b"abcdef", b"abcdef",
        ]  # fmt: skip


@pytest.mark.parametrize("password", ["", HASH])
def test_a_password_hash_may_be_given_itself(password: str) -> None:
    """It is no path then."""
    assert hash_of(password, quiet) == password


@pytest.mark.parametrize("text", [HASH, f"{HASH}\n", f"\n  {HASH} \r\nmore\n"])
def test_a_password_hash_is_in_a_file(tmp_path: Path, text: str) -> None:
    """It is the first line, without blanks."""
    assert hash_of(written(tmp_path / "f", text.encode()), quiet) == HASH


@pytest.mark.parametrize("text", [b"", b"secret\n", b"secret\n$6$x$y\n", b"\xff$6$x"])
def test_a_password_itself_is_refused(tmp_path: Path, text: bytes) -> None:
    """The sentence shows no text of the file."""
    with pytest.raises(OperatorError, match="its first line does not begin with") as refused:
        hash_of(written(tmp_path / "f", text), quiet)

    assert refused.value.number == errno.EINVAL
    assert "secret" not in str(refused.value)


# --- from a client ------------------------------------------------------------------------------------------------


def given(raw: bytes, seed: SeedConfig) -> SeedParts:
    """Return the parts that a client has packed."""
    fd = memory_file("parts")
    try:
        os.write(fd, raw)
        return given_parts(fd, "web", seed)
    finally:
        os.close(fd)


def test_a_client_s_parts_are_those_of_its_request() -> None:
    """Other processes have checked the name, the host name and the user in the request."""
    theirs = SeedParts(vm="other", hostname="other", user="other", password_hash=HASH, instance_id="i")

    parts = given(pack(theirs), SeedConfig(hostname="h", user="me", instance_id="not this", password="not this"))

    assert parts == theirs.replace(vm="web", hostname="h", user="me")


@pytest.mark.parametrize("raw", [b"", b"\xc1", pack(SeedFile(name="", data=b""))])
def test_a_client_s_parts_that_are_none(raw: bytes) -> None:
    """Any bytes may come."""
    with pytest.raises(OperatorError, match="vm web: the parts of its seed: ") as refused:
        given(raw, SeedConfig())
    assert refused.value.number == errno.EINVAL


def test_a_client_s_parts_that_are_too_large() -> None:
    """They are not unpacked."""
    with pytest.raises(OperatorError, match=f"are larger than {PARTS_MAX} bytes") as refused:
        given(bytes(PARTS_MAX + 1), SeedConfig())
    assert refused.value.number == errno.EFBIG
    with pytest.raises(OperatorError, match="the parts of its seed: ") as refused:
        given(bytes(PARTS_MAX), SeedConfig())
    assert refused.value.number == errno.EINVAL


def test_a_file_that_fails_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence names it, and it is closed."""

    def fail(*_: object) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle")

    path = written(tmp_path / "f", b"x")
    before = open_descriptors()
    assert read_file(path, "user-data", quiet).data == b"x"
    assert open_descriptors() == before
    monkeypatch.setattr(os, "pread", fail)

    with pytest.raises(OperatorError) as refused:
        read_file(path, "user-data", quiet)

    words = f"user-data {path}: cannot be read: Stale file handle"
    assert (refused.value.number, str(refused.value)) == (errno.ESTALE, words)
    assert open_descriptors() == before
