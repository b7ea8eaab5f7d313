"""The file of changes whose effects do not matter."""

import tomllib
from pathlib import Path

import pytest

from mutants import known
from mutants.changes import changes_of

ROOT = Path(__file__).resolve().parents[3]
SOURCE = b"def f(a):\n    return 'it\\'s' if a < 1 else \"\\\\\"\n"


def checkout(top: Path, text: str) -> Path:
    """Make a checkout with one module and a file of entries."""
    (top / "vmd").mkdir()
    (top / "vmd" / "it.py").write_bytes(SOURCE)
    (top / "mutants").mkdir()
    (top / known.FILE).write_text(text)
    return top


def test_every_entry_is_a_change_of_the_source() -> None:
    """An entry whose line was rewritten must be removed or rewritten."""
    assert known.stale(ROOT, known.read(ROOT)) == [], f"{known.FILE} names changes that cannot be made any more"


def test_entry_is_read_as_it_is_printed(tmp_path: Path) -> None:
    """Quotes and backslashes are kept."""
    changes = changes_of("vmd/it.py", SOURCE)
    entries = "".join(f'{known.entry(change)}\nwhy = "because"\n' for change in changes)

    reasons = known.read(checkout(tmp_path, entries))

    assert reasons == dict.fromkeys((change.name for change in changes), "because")
    assert known.stale(tmp_path, reasons) == []


@pytest.mark.parametrize("lost", known.KEYS)
def test_an_entry_that_does_not_match_is_stale(tmp_path: Path, lost: str) -> None:
    """Any of its parts may differ."""
    entry = {**dict(zip(known.KEYS, changes_of("vmd/it.py", SOURCE)[0].name, strict=True)), lost: "other"}
    text = "[[change]]\n" + "".join(f"{key} = '''{value}'''\n" for key, value in entry.items()) + 'why = "because"\n'

    stale = known.stale(tmp_path, known.read(checkout(tmp_path, text)))

    assert len(stale) == 1
    assert "other" in stale[0]


@pytest.mark.parametrize("text", ["[[change]]\nmodule = 'vmd/it.py'\n", "[[change]]\nwhy = 'because'\n"])
def test_entry_that_lacks_something_is_refused(tmp_path: Path, text: str) -> None:
    """The reason is required, too."""
    with pytest.raises(ValueError, match="an entry has module, function, text, what, why"):
        known.read(checkout(tmp_path, text))


def test_entry_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    """One of the reasons would be lost."""
    entry = f"{known.entry(changes_of('vmd/it.py', SOURCE)[0])}\nwhy = 'because'\n"

    with pytest.raises(ValueError, match="is there twice"):
        known.read(checkout(tmp_path, entry * 2))


def test_every_reason_is_a_sentence() -> None:
    """This checks our own file."""
    entries = tomllib.loads((ROOT / known.FILE).read_text()).get("change", [])

    assert [entry for entry in entries if len(entry["why"]) < 10] == []
