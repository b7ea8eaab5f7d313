"""The disc of a seed, read by programs of other projects."""

import hashlib
import os
import struct
import subprocess
from pathlib import Path

import pytest

from tests.support.seeds import FILES
from vmd.seed.iso import SECTOR, image


def run(*command: str | Path) -> str:
    """Run a program to its end, and return its output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def disc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disc with files of various sizes."""
    path = tmp_path_factory.mktemp("disc") / "seed.iso"
    path.write_bytes(image("cidata", FILES))
    return path


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        ("nojoliet", list(FILES)),  # Rock Ridge
        ("norock", list(FILES)),  # Joliet
        ("ecma119", [name.upper().replace("-", "_") for name in FILES]),  # neither
    ],
)
def test_libisofs_reads_each_of_the_trees(disc: Path, tmp_path: Path, tree: str, names: list[str]) -> None:
    """Rock Ridge, Joliet and plain ISO 9660 have the same files."""
    run("xorriso", "-read_fs", tree, "-osirrox", "on", "-indev", disc, "-extract", "/", tmp_path / "out")

    found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert found == dict(zip(names, FILES.values(), strict=True))


def test_grub_reads_it(disc: Path) -> None:
    """GRUB has its own implementation."""
    for name, data in FILES.items():
        if data:
            read = subprocess.run(["grub-fstest", disc, "cat", f"(loop0)/{name}"], capture_output=True, check=True)
            assert read.stdout == data
    assert "Label `cidata'" in run("grub-fstest", disc, "ls", "--", "-l")


def test_it_is_found_by_its_label(disc: Path) -> None:
    """cloud-init searches for this label."""
    assert {"LABEL=cidata", "TYPE=iso9660"} <= set(run("blkid", "-p", "-o", "export", disc).splitlines())


def test_its_files_are_root_s_alone(disc: Path) -> None:
    """They may contain a password."""
    listing = run("xorriso", "-indev", disc, "-find", "/", "-exec", "lsdl", "--").splitlines()

    assert {line.split()[0] for line in listing if line.endswith("'")} == {"dr-x------", "-r--------"}
    assert {tuple(line.split()[2:4]) for line in listing if line.endswith("'")} == {("0", "0")}


def test_it_has_whole_sectors_and_is_reproducible(disc: Path) -> None:
    """The volume ends where the file ends, and the order of the files does not matter."""
    data = disc.read_bytes()

    assert data == image("cidata", dict(reversed(FILES.items())))
    assert struct.unpack_from("<I", data, 16 * SECTOR + 80) == (len(data) // SECTOR,)
    assert len(data) % SECTOR == 0


def test_it_is_the_disc_that_other_programs_have_read(disc: Path) -> None:
    """Some fields matter to few readers only, so any other byte must be looked at."""
    digest = "5be6ede051e964dc327e1f1523400850b220595b02a569e39c0a5b7aabbca431"
    assert hashlib.sha256(disc.read_bytes()).hexdigest() == digest


def test_no_file_at_all(tmp_path: Path) -> None:
    """A disc without files is valid."""
    (tmp_path / "empty.iso").write_bytes(image("cidata", {}))
    run("xorriso", "-osirrox", "on", "-indev", tmp_path / "empty.iso", "-extract", "/", tmp_path / "out")

    assert os.listdir(tmp_path / "out") == []
