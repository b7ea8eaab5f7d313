"""docs/security.md: each statement names a test, and all named tests exist."""

import re
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parent / "docs" / "security.md"
NAMED = re.compile(r"`(test_\w+(?:\.py)?)`")
IN_A_FILE = re.compile(r"`(test_\w+\.py)`: ((?:`test_\w+`(?:, )?)+)")  # a file name and the names of its tests
DEFINED = re.compile(r"^def (test_\w+)\(", re.MULTILINE)


def defined() -> dict[str, set[str]]:
    """Return the names of tests by file name."""
    found: dict[str, set[str]] = {}
    for path in HERE.rglob("test_*.py"):
        found.setdefault(path.name, set()).update(DEFINED.findall(path.read_text()))
    return found


def statements() -> Iterator[str]:
    """Yield each list item, each paragraph about an attacker, and each row of a table whose last column has tests."""
    for block in re.split(r"\n\n|\n(?=\* )", DOCUMENT.read_text()):
        if block.startswith(("* ", "An attacker who controls")):
            yield " ".join(block.split())
        elif block.startswith("| ") and "| test |" in block.splitlines()[0]:
            yield from block.splitlines()[2:]


def test_the_tests_that_are_named_are_there() -> None:
    """Each named test exists, in the file that is named before it."""
    text, found = " ".join(DOCUMENT.read_text().split()), defined()
    known = {*found, *(name for names in found.values() for name in names)}
    assert [name for name in NAMED.findall(text) if name not in known] == []
    placed = [(file, name) for file, names in IN_A_FILE.findall(text) for name in NAMED.findall(names)]
    assert placed
    assert [(file, name) for file, name in placed if name not in found[file]] == []


def test_each_statement_has_a_test() -> None:
    """A statement without a test would be only a wish."""
    assert [statement for statement in statements() if not NAMED.search(statement)] == []
