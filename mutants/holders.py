"""Finds the tests that cover a module: those with its name, and those that import it.

A unit test that imports the module indirectly counts, too.  So do all unit tests of its folder, because commands are
loaded by name.  Running the tests shows which of them reach a changed line (`reach`).  That is not possible for tests
with processes, which are chosen by name.
"""

import ast
import functools
import re
from pathlib import Path

FAR = 2  # most imports between a unit test and a module that it covers; imports of test support do not count
PROGRAMS = ("vmd", "vmctl")
DOTTED = re.compile(r"(vmd|vmctl)(\.\w+)+")  # for `import_module`
UNIT, REST = "tests/unit", ("tests/process", "tests/guest")
# Tests with processes whose names differ from the module's, by the beginning of the module's path.
NAMES = {
    "vmd/agentx/": "agentx",
    "vmd/config/": "config_check mistakes",
    "vmd/consolelog/": "console_log",
    "vmd/devices/": "device_start rings virtio",
    "vmd/devices/vioblk/": "vioblk",
    "vmd/devices/vionet/": "vionet",
    "vmd/devices/vioscsi/": "vioscsi",
    "vmd/diskfs/": "imgboot",
    "vmd/files/": "core_opener permissions denied",
    "vmd/images/": "images vioblk_images vmctl_create",
    "vmd/images/locks.py": "lost_locks lockholder",
    "vmd/ipc/": "core_routes garbage hostile_clients",
    "vmd/kvmapi/": "kvmapi",
    "vmd/logger/": "core_log",
    "vmd/metrics/": "metrics",
    "vmd/opener/": "core_opener",
    "vmd/parent/": "daemon core_clients",
    "vmd/priv/": "priv network",
    "vmd/privsep/": "confinement core_cell refused_calls",
    "vmd/virtio/": "rings virtio vioblk",
    "vmd/vm/": "machine",
    "vmd/vm/boot/": "boot",
    "vmd/vm/entropy.py": "rings",
    "vmd/vm/pci.py": "virtio",
    "vmd/vm/state.py": "transfer",
    "vmd/vm/stream.py": "transfer",
    "vmd/vmm/": "daemon core_stopped",
    "vmctl/": "daemon",
}


def modules(top: Path) -> list[str]:
    """Return the modules that can be changed: all that are not empty."""
    found = [path for program in PROGRAMS for path in sorted((top / program).rglob("*.py")) if path.stat().st_size]
    return [str(path.relative_to(top)) for path in found]


def unit_tests(top: Path, module: str) -> list[list[str]]:
    """Return the unit tests that cover a module: the nearest, those one import farther away, and others beside it."""
    far = {str(test.relative_to(top)): _far(top, test, module) for test in sorted((top / UNIT).rglob("test_*.py"))}
    nearest = min(far.values(), default=FAR + 1)
    found = [[test for test in far if far[test] == distance] for distance in (nearest, nearest + 1) if distance <= FAR]
    near = {test for files in found for test in files}
    beside = [test for test in far if test not in near and _is_beside(Path(test).parent.relative_to(UNIT), module)]
    if found:  # tests without a folder of their own cover anything
        beside = [test for test in beside if Path(test).parent != Path(UNIT)]
    return [files for files in (*found, beside) if files]


def process_tests(top: Path, module: str) -> list[str]:
    """Return the tests with processes or guests that cover a module."""
    path = Path(module)
    words = {path.parent.name if path.stem in ("main", "device") else path.stem}
    for beginning, names in NAMES.items():
        if module.startswith(beginning):
            words |= set(names.split())
    found = [test for folder in REST for test in sorted((top / folder).glob("test_*.py"))]
    return [
        str(test.relative_to(top)) for test in found
        if _dotted(module) in _imports(test) or any(f"{test.stem}_".startswith(f"test_{word}_") for word in words)
    ]  # fmt: skip


def _far(top: Path, test: Path, module: str) -> int:
    """Return the number of imports between a test and a module, or 0 if their names match."""
    path = Path(module)
    names = {f"test_{path.stem}_", f"test_{path.parent.name}_{path.stem}_"}
    beside = _is_beside(test.relative_to(top / UNIT).parent, module)
    if beside and any(f"{test.stem}_".startswith(name) for name in names):
        return 0
    rings = _rings(top, test)
    return next((distance for distance, ring in enumerate(rings, 1) if _dotted(module) in ring), FAR + 1)


def _is_beside(folder: Path, module: str) -> bool:
    """Return whether a folder of unit tests is the module's, or its parent."""
    place = Path(module).parent
    own = place.relative_to("vmd") if place.parts[0] == "vmd" else place
    return folder in (own, own.parent)


@functools.cache
def _rings(top: Path, test: Path) -> tuple[frozenset[str], ...]:
    """Return the modules that a test imports, then those that these import, and so on until there are no more."""
    rings: list[frozenset[str]] = []
    seen: set[Path] = set()
    now = {test, *_conftests(top, test)}
    for _ in range(FAR):
        now = _with_support(top, now) - seen
        seen |= now
        rings.append(frozenset().union(*map(_imports, now)))
        now = {file for name in rings[-1] for file in _files(top, name)}
    return tuple(rings)


def _dotted(module: str) -> str:
    return module.removesuffix(".py").replace("/", ".")


def _conftests(top: Path, test: Path) -> list[Path]:
    folders = [folder for folder in test.parents if folder != top / "tests" and top / "tests" in folder.parents]
    return [folder / "conftest.py" for folder in folders if (folder / "conftest.py").exists()]


def _with_support(top: Path, files: set[Path]) -> set[Path]:
    """Return files and the test support that they import, which is part of the tests."""
    found, left = set(files), set(files)
    while left:
        names = {name for one in left for name in _imports(one) if name.startswith("tests.")}
        left = {file for name in names for file in _files(top, name)} - found
        found |= left
    return found


@functools.cache
def _files(top: Path, name: str) -> tuple[Path, ...]:
    path = top.joinpath(*name.split(".")).with_suffix(".py")
    return (path,) if path.exists() else ()


@functools.cache
def _imports(path: Path) -> frozenset[str]:
    """Return the modules that a file imports or names in a text, and the names that it imports from them, dotted."""
    found = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and DOTTED.fullmatch(node.value):
            found.add(node.value)
    return frozenset(found)
