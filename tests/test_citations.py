"""Citations are valid: numbers name a section, names a file, and standards are in the list of standards.

A citation is one of

    *cat. 4.4*   hostile 14   *arch. 5*     a section of one of `DOCUMENTS`
    docs/formats.md 4                       a section of a document by its name
    docs/security.md, CHANGELOG.md          a document
    `vm/bus.py`, in a document              a file below the checkout, `vmd` or `vmd/devices`
    RFC 2131, virtio 1.2                    a standard of docs/standards.md
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
DOCUMENTS = {"cat.": "upstream.md", "hostile": "hostile-input.md", "arch.": "architecture.md"}
PLACES = (
    "bench", "completions", "debian", "docs", "etc", "fleet", "fuzz", "guests", "man", "mutants", "tests", "tools",
    "vmctl", "vmd",
)  # fmt: skip
# CHANGELOG.md may name files that no longer exist.
HANDBOOK = sorted(path for path in (*ROOT.glob("*.md"), *DOCS.glob("*.md")) if path.name != "CHANGELOG.md")

NUMBER = r"\d+(?:\.\d+)?"
NUMBERS = rf"{NUMBER}(?:(?: ?- ?|, and |, | and ){NUMBER}(?![\w:]))*"
SHORT = re.compile(rf"\b(cat\.|[Hh]ostile(?:[- ]input)?|arch\.) ({NUMBERS})", re.IGNORECASE)
LONG = re.compile(rf"\bdocs/([\w-]+\.md) ({NUMBERS})")
FILE = re.compile(r"\b(?:docs/[\w.-]+\.(?:md|json)|[A-Z]{4,}\.md)\b")
HEADING = re.compile(rf"^(?:#{{2,3}} )?({NUMBER})\.? ", re.MULTILINE)
# Written in parts, so that this file does not match its own pattern.
NOT_HERE = re.compile(
    r"\b(?:DES" r"IGN \d|STY" r"LE \d|linux-no" r"tes\b|guests\.m" r"d\b|vmd-cata" r"logue\b|field-rep" r"orts\b)"
)
STANDARD = re.compile(
    r"\b(?:(?:virtio|ACPI|PCI|UEFI|OpenMetrics) \d+\.\d+|RFC \d+|SPC-\d|MMC-\d|SBC-\d|ECMA-\d+|SUSP|IEEE P\d+|SDM"
    r"|System V ABI|api\.rst)(?![\w-])"
)
PATH = re.compile(r"`([\w.-]+(?:/[\w.-]+)*/?[\w-]*\.(?:py|md|json|conf|service))`")
NO_STANDARD = {"virtio 2.0"}  # a deliberately wrong value in a test
OF_USERS = {"vm.conf"}  # files of users, which are not in the checkout
ROOTS = ("", "vmd", "vmd/devices", "vmctl", "tests", "tests/process", "tests/unit")


class Place(NamedTuple):
    """A line of a file."""

    path: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.text.strip()[:160]}"


def files() -> list[Path]:
    """Return every text file of ours in the checkout, without golden files."""
    found = [path for path in ROOT.iterdir() if path.is_file() and path.suffix in (".md", ".toml", ".example", "")]
    found += [path for place in PLACES for path in Path(ROOT, place).rglob("*") if path.is_file()]
    return sorted(path for path in found if not {"golden", "__pycache__"}.intersection(path.parts))


def lines(paths: list[Path]) -> Iterator[Place]:
    """Yield each line, joined with the next one if a citation may continue there."""
    for path in paths:
        text = path.read_bytes().decode(errors="replace").splitlines()
        for number, line in enumerate(text, 1):
            following = text[number].lstrip(" #*") if number < len(text) else ""
            ends = re.search(r"(?:\bcat\.|\b[Hh]ostile|\barch\.|\bRFC|\bvirtio|\.md|-input)$", line.rstrip())
            yield Place(path, number, f"{line.rstrip()} {following}" if ends else line)


@pytest.fixture(scope="module")
def places() -> list[Place]:
    """Return all lines of all files."""
    return list(lines(files()))


def sections(document: str) -> set[str]:
    """Return the numbers of a document's sections."""
    return set(HEADING.findall((DOCS / document).read_text()))


def numbers(text: str) -> list[str]:
    """Return the numbers that a citation means: for `1-3, 6` 1, 2, 3 and 6, for `2.3 - 2.5` both ends."""
    found: list[str] = []
    for part in re.split(r", and |, | and ", text):
        first, _, last = (each.strip() for each in part.partition("-"))
        if last and "." not in part:
            found += [str(number) for number in range(int(first), int(last) + 1)]
        else:
            found += [each for each in (first, last) if each]
    return found


def cited(place: Place) -> Iterator[tuple[str, str]]:
    """Yield each section that a line cites, with its document."""
    for word, text in SHORT.findall(place.text):
        document = DOCUMENTS["hostile" if word.lower().startswith("hostile") else word.lower()]
        yield from ((document, number) for number in numbers(text))
    for document, text in LONG.findall(place.text):
        yield from ((document, number) for number in numbers(text))


def test_sections_that_are_cited_are_there(places: list[Place]) -> None:
    """Each cited section is in its document."""
    known = {path.name: sections(path.name) for path in DOCS.glob("*.md")}
    missing = [
        f"{place}: there is no {number} in docs/{document}"
        for place in places
        for document, number in cited(place)
        if number not in known.get(document, set())
    ]
    assert missing == []


def test_documents_that_are_named_are_there(places: list[Place]) -> None:
    """Each named document is in this tree."""
    missing = [
        f"{place}: there is no {name}"
        for place in places
        for name in FILE.findall(place.text)
        if not (ROOT / name).exists() and not (DOCS / name).exists()
    ]
    assert missing == []
    assert [str(place) for place in places if NOT_HERE.search(place.text)] == []


@pytest.mark.parametrize("document", HANDBOOK, ids=lambda path: path.name)
def test_files_that_documents_name_are_there(document: Path) -> None:
    """A path in backquotes is below the checkout, `vmd` or `vmd/devices`.  A bare name may be anywhere."""
    anywhere = OF_USERS | {path.name for path in files()}
    missing = [
        f"{place}: there is no {name}"
        for place in lines([document])
        for name in PATH.findall(place.text)
        if not any((ROOT / root / name).exists() for root in ROOTS) and ("/" in name or name not in anywhere)
    ]
    assert missing == []


def test_standards_that_are_cited_are_listed(places: list[Place]) -> None:
    """docs/standards.md lists each cited standard, with title and year."""
    listed = set(re.findall(r"^\| ([^|`]+?) \|", (DOCS / "standards.md").read_text(), re.MULTILINE))
    missing = {
        f"{place}: {name} is not in docs/standards.md"
        for place in places
        for name in STANDARD.findall(place.text)
        if name not in listed | NO_STANDARD
    }
    assert sorted(missing) == []


def test_hostile_input_is_tried(places: list[Place]) -> None:
    """A test cites each number, unless the document says that it does not apply to vmd."""
    tested = {
        number
        for place in places
        if place.path.is_relative_to(ROOT / "tests") and place.path.name != Path(__file__).name
        for document, number in cited(place)
        if document == "hostile-input.md"
    }
    text = (DOCS / "hostile-input.md").read_text()
    points = dict(re.findall(r"^(\d+)\. (.+?)(?=^\d+\. |^#|\Z)", text, re.MULTILINE | re.DOTALL))
    assert [number for number, point in points.items() if number not in tested and "Not here" not in point] == []
