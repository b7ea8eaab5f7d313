"""Runs the linters, and checks rules of this code that no linter knows."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("vmd", "vmctl", "tests", "bench", "fleet", "fuzz", "mutants", "tools")
CODE = [name for name in PLACES if any(Path(ROOT, name).rglob("*.py"))]
TEXT = (*CODE, "man", "etc", "guests", "Makefile", "pyproject.toml", "README.md", "vm.conf.example")
PAGES = sorted(Path(ROOT, "man").glob("*.[1-9]"))
# Written in parts, so that this file does not match its own pattern.
UNFINISHED = re.compile(r"\b(TO" r"DO|FIX" r"ME)\b")


def files(*names: str, suffix: str = "") -> list[Path]:
    """Return the files below some of the checkout's folders.  A name may also be a file."""
    roots = [ROOT / name for name in names]
    found = [root for root in roots if root.is_file()]
    found += [path for root in roots for path in root.rglob("*") if path.is_file()]
    return [path for path in found if path.name.endswith(suffix) and "__pycache__" not in path.parts]


def check(*command: str) -> None:
    """Run a checker.  Fail with its output if it complains."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{done.stdout}{done.stderr}", pytrace=False)


def test_ruff_is_content() -> None:
    """Ruff has no complaints, with the rules of pyproject.toml."""
    check(sys.executable, "-m", "ruff", "check", "--quiet", *CODE)


@pytest.mark.timeout(600)
def test_mypy_is_content() -> None:
    """Mypy has no complaints in strict mode, also about the tests."""
    check(sys.executable, "-m", "mypy", "--no-error-summary", *CODE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_manual_page_is_well_formed(page: Path) -> None:
    """The checker gives no warnings or errors."""
    check("mandoc", "-Tlint", "-Wwarning", str(page))


def shell_scripts() -> list[Path]:
    """Return every shell script, recognised by its first line."""
    found = files("tools", "tests", "etc", ".ci")
    return sorted(path for path in found if re.match(rb"#!.*(ba|busybox )?sh\n", path.read_bytes()[:40]))


@pytest.mark.parametrize("script", shell_scripts(), ids=lambda script: script.name)
def test_shell_script_parses(script: Path) -> None:
    """This finds syntax errors even in branches that seldom run."""
    check("bash", "-n", str(script))


def test_shared_memory_is_not_stored_to_with_pack_into() -> None:
    """`pack_into` clears its target before it writes, and a guest on another processor can see that."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files("vmd/devices", "vmd/virtio", "vmd/guestmem.py", suffix=".py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "pack_into"
    ]
    assert found == []


def test_descriptors_are_not_received_so_that_they_are_inherited() -> None:
    """`socket.recv_fds` ignores its flags, so it cannot set close-on-exec."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files("vmd", "vmctl", suffix=".py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "recv_fds"
    ]
    assert found == [], "use vmd.ipc.rights.receive"


def lines_with(pattern: str) -> list[str]:
    """Return the lines of the programs' sources that contain a match, each with its place."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files("vmd", "vmctl", suffix=".py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_programs_make_no_code_of_text_or_pickles() -> None:
    """Without eval, exec and pickle no file can become code, as PLY's tables could (CVE-2025-56005)."""
    assert lines_with(r"^\s*(import|from) (pickle|shelve)\b|(?<![\w.])(eval|exec)\(") == []


def test_there_are_no_notes_about_unfinished_work() -> None:
    """Such work is done or dropped."""
    found = []
    for path in files(*TEXT):
        text = path.read_bytes().decode(errors="replace")
        found += [f"{path.relative_to(ROOT)}: {hit[0]}" for hit in UNFINISHED.finditer(text)]
    assert found == []


def test_package_files_are_empty() -> None:
    """`__init__.py` files are empty, so that an import loads only the modules that it names."""
    markers = files("vmd", "vmctl", suffix="__init__.py")
    assert markers
    assert [str(path.relative_to(ROOT)) for path in markers if path.read_bytes()] == []


def test_strerror_is_not_called_without_a_number() -> None:
    """An OSError may lack a number, and `strerror(0)` is "Success".  `vmd.errors.sentence` handles that."""
    assert lines_with(r"strerror\([^)]*\bor\b") == []


def test_programs_do_not_wait_with_select() -> None:
    """`select` raises ValueError for a descriptor from 1024 on.  Without descriptors it only sleeps."""
    assert lines_with(r"select\.select\((?!\[\], \[\], \[\])") == []


def test_programs_do_not_count_on_python_s_files() -> None:
    """`sys.stdout` is None if its descriptor was closed at the start, and `print` then silently does nothing."""
    bad = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files("vmd", "vmctl", suffix=".py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"\bsys\.std(in|out|err)\b|\bprint\(", line)
    ]

    assert bad == []
