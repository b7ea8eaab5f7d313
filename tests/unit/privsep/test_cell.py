"""The contents of the cell are the same for every source of our code: a directory or an archive."""

import importlib
import importlib.util
import marshal
import os
import struct
import sys
import zipfile
from pathlib import Path

import pytest

from tools.install import byte_code
from vmd.errors import VmdError
from vmd.privsep.cellfiles import import_path, package_files

MODULES = {"__init__.py": "", "main.py": "NAME = __name__\n", "deep/__init__.py": "", "deep/down.py": "WHERE = 2\n"}
FOREIGN = b"\x01\x02\r\n" + bytes(12) + marshal.dumps(compile("WHERE = 'another Python'\n", "x", "exec"))


def archive(path: Path, package: str, *, byte_code_too: bool) -> None:
    """Pack the package, without byte code or with byte code of another version of Python."""
    with zipfile.ZipFile(path, "w") as packed:
        for name, text in MODULES.items():
            packed.writestr(f"{package}/{name}", text)
            if byte_code_too:
                packed.writestr(f"{package}/{name}c", FOREIGN)


def run(pyc: bytes) -> dict[str, object]:
    """Run byte code.  Return what it defines."""
    assert pyc[:4] == importlib.util.MAGIC_NUMBER
    found: dict[str, object] = {"__name__": "it"}
    exec(marshal.loads(pyc[16:]), found)
    return found


@pytest.mark.parametrize("byte_code_too", [False, True], ids=["sources only", "byte code of another Python"])
def test_an_archive_gives_the_same_files_as_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, byte_code_too: bool
) -> None:
    """The modules have the same places, and byte code that this interpreter runs."""
    package = f"packed{byte_code_too}"
    for name, text in MODULES.items():
        path = tmp_path / "plain" / package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    archive(tmp_path / "code.zip", package, byte_code_too=byte_code_too)
    found = []
    for source in ("plain", "code.zip"):
        monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / source)])
        found.append(dict(package_files(package)))
        assert import_path((package,)) == (str(tmp_path / source),)
        sys.path.pop()
        importlib.invalidate_caches()

    plain, packed = found
    assert set(packed) == set(plain)
    sources = {name for name in plain if name.endswith(".py")}
    assert {name: packed[name] for name in sources} == {name: plain[name] for name in sources}
    (down,) = [name for name in packed if "down." in name and name.endswith(".pyc")]
    assert run(packed[down])["WHERE"] == run(plain[down])["WHERE"] == 2


def test_byte_code_of_an_archive_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling would take most of the time of the daemon's start."""
    with zipfile.ZipFile(tmp_path / "code.zip", "w") as packed:
        packed.writestr("compiled/__init__.py", "")
        packed.writestr("compiled/main.py", "WHO = 'source'\n")
        packed.writestr("compiled/main.pyc", byte_code(b"WHO = 'byte code'\n", "x"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "code.zip")])

    files = dict(package_files("compiled"))

    (pyc,) = [content for name, content in files.items() if name.startswith("/vmd/compiled/__pycache__/main.")]
    assert run(pyc)["WHO"] == "byte code"


@pytest.mark.parametrize(
    ("magic", "later_s", "longer", "who"),
    [
        (importlib.util.MAGIC_NUMBER, 0, 0, "byte code"),
        (importlib.util.MAGIC_NUMBER, 1, 0, "source"),
        (importlib.util.MAGIC_NUMBER, 0, 1, "source"),
        (b"\0\0\r\n", 0, 0, "source"),
    ],
    ids=["of this source", "of an older one", "of a shorter one", "of another Python"],
)
def test_byte_code_of_a_directory_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, magic: bytes, later_s: int, longer: int, who: str
) -> None:
    """It is used only if it belongs to that source, by the interpreter's rules (PEP 552)."""
    package = f"cached{later_s}{longer}{magic[0]}"
    source = tmp_path / package / "main.py"
    source.parent.mkdir()
    source.write_text("WHO = 'source'\n")
    os.utime(source, (1_700_000_001, 1_700_000_001))
    stamp = struct.pack("<III", 0, int(source.stat().st_mtime) + later_s, source.stat().st_size + longer)
    cached = Path(importlib.util.cache_from_source(str(source)))
    cached.parent.mkdir()
    cached.write_bytes(magic + stamp + marshal.dumps(compile("WHO = 'byte code'\n", "x", "exec")))
    (tmp_path / package / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])

    files = dict(package_files(package))

    (pyc,) = [content for name, content in files.items() if "__pycache__/main." in name]
    assert run(pyc)["WHO"] == who


def test_an_archive_that_was_replaced_meanwhile_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that starts during an installation must not use parts of two versions."""
    archive(tmp_path / "code.zip", "replaced", byte_code_too=False)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "code.zip")])
    package_files("replaced")  # now zipimport knows where each module is
    with zipfile.ZipFile(tmp_path / "code.zip", "w") as other:
        other.writestr("a comment that moves everything", "x" * 1000)
        for name, text in MODULES.items():
            other.writestr(f"replaced/{name}", text)

    with pytest.raises(VmdError, match=r"^read .*/code.zip"):
        package_files("replaced")
