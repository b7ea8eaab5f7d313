"""The parts of starting processes that can be tested without starting one."""

import os
import sys
from pathlib import Path

import pytest

from vmd.errors import VmdError
from vmd.privsep import cellfiles, spawn


@pytest.mark.parametrize(
    ("used", "between"),
    [
        ([0, 1, 2], [(3, 0x7FFFFFFF)]),
        ([0, 1, 2, 3, 7], [(4, 6), (8, 0x7FFFFFFF)]),
        ([0, 2], [(1, 1), (3, 0x7FFFFFFF)]),
    ],
)
def test_gaps_between_descriptors(used: list[int], between: list[tuple[int, int]]) -> None:
    """Each descriptor that is not used is in one of the ranges."""
    assert spawn.gaps(used) == between


def test_interpreter_is_the_real_one() -> None:
    """The link of a virtual environment is not started, because the cell has none."""
    assert os.path.realpath(spawn.INTERPRETER) == spawn.INTERPRETER
    assert os.access(spawn.INTERPRETER, os.X_OK)


def test_missing_package_is_named() -> None:
    """The error names a dependency that is not installed."""
    with pytest.raises(VmdError, match="python package nosuchpackage is not installed"):
        cellfiles.import_path(("vmd", "nosuchpackage"))


def test_import_path_names_each_directory_once() -> None:
    """Packages in the same directory need one entry."""
    assert cellfiles.import_path(("vmd", "vmctl")) == (
        os.path.dirname(os.path.dirname(cellfiles.package_directory("vmd.privsep"))),
    )


def test_cell_code_has_byte_code_for_every_module() -> None:
    """Processes in the cell neither compile nor write: each source has unchecked byte code."""
    files = dict(cellfiles.package_files("vmd"))
    sources = {path for path in files if path.endswith(".py")}

    assert "/vmd/vmd/privsep/cell.py" in sources
    for path in sources:
        directory, name = os.path.split(path)
        pyc = files[f"{directory}/__pycache__/{name[:-3]}.cpython-{sys.version_info[0]}{sys.version_info[1]}.pyc"]
        assert pyc[4:8] == b"\1\0\0\0"


def test_libraries_have_the_names_the_loader_asks_for() -> None:
    """The C library and the dynamic loader are among them.  Our extension modules are not."""
    names = cellfiles.loaded_libraries([cellfiles.package_directory("msgpack")])

    assert any(os.path.basename(name).startswith("ld-") for name in names)
    assert any(os.path.basename(name).startswith("libc.") for name in names)
    assert not any("msgpack" in name for name in names)


def test_extensions_of_other_interpreters_are_left_out() -> None:
    """They are neither loaded nor copied.  An extension for any version is."""
    ours = f"_c.cpython-{sys.version_info[0]}{sys.version_info[1]}-x86_64-linux-gnu.so"

    assert [cellfiles.is_extension(name) for name in (ours, "_c.abi3.so", "_c.so")] == [True, True, True]
    assert not cellfiles.is_extension("_c.cpython-36m-x86_64-linux-gnu.so")
    assert not cellfiles.is_extension("libc.so.6")


def test_modules_beside_our_packages_do_not_hide_the_standard_library(tmp_path: Path) -> None:
    """Our path may be a directory of the distribution that contains any module, such as a back-port."""
    (tmp_path / "bisect.py").write_text("import os\nos._exit(3)\n")
    (tmp_path / "probe.py").write_text("import bisect\n\n\ndef main():\n    return bisect.bisect([1, 2], 3)\n")

    child = spawn.spawn("probe", import_path=(str(tmp_path), *cellfiles.import_path(("vmd",))), entry="probe:main")

    assert child.reap(60) == 2
