"""Each list of the processes names all of them."""

import functools
import re
from pathlib import Path

import pytest

from vmd.__main__ import PROCESSES
from vmd.vm.kinds import KINDS

ROOT = Path(__file__).resolve().parents[2]
ENTRY = re.compile(r'(?:^(\w+)_ENTRY = )?"(vmd\.[\w.]+:main)"', re.MULTILINE)
PARENT = "vmd"


@functools.cache
def entries() -> dict[str, str]:
    """Return the entries of single-purpose programs, by the program's name."""
    found = {}
    for path in sorted(Path(ROOT, "vmd").rglob("*.py")):
        for name, entry in ENTRY.findall(path.read_text()):
            if entry != "vmd.__main__:main":
                found[name.lower()] = entry
    return found


def processes() -> set[str]:
    """Return the name of each process, without the name of its VM or user."""
    return {PARENT, *PROCESSES, *entries(), *(kind.process for kind in KINDS if not kind.inside)}


def table() -> list[str]:
    """Return the names in the first column of the table of the README."""
    part = Path(ROOT, "README.md").read_text().partition("## How it is built")[2].partition("\nEvery process is")[0]
    names = [name for row in part.splitlines()[4:] for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    return [re.sub(r"/?<\w+>$|\d$", "", name).rpartition("/")[2] for name in names]


def test_each_entry_has_a_name() -> None:
    """The constant NAME_ENTRY gives the program's name to the rest of this file."""
    assert "" not in entries(), f"{entries().get('')} is started, but no constant NAME_ENTRY has its name"


def test_the_readme_has_every_process() -> None:
    """It has no other ones."""
    missing, others = processes() - set(table()), set(table()) - processes()

    assert missing == set(), f"the table of processes in README.md has no row for {sorted(missing)}"
    assert others == set(), f"the table of processes in README.md has {sorted(others)}, which vmd does not start"


@pytest.mark.parametrize("document", ["docs/architecture.md", "docs/security.md"])
def test_a_document_names_every_process(document: str) -> None:
    """It says what the process is for, or what it may do."""
    text = Path(ROOT, document).read_text()
    missing = {name for name in processes() if not re.search(rf"\b{name}\b", text)}

    assert missing == set(), f"{document} does not name {sorted(missing)}"
