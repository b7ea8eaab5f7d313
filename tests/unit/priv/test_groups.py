"""The names of interface groups in the files of iproute2."""

from pathlib import Path

import pytest

from vmd.priv import groups


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Return the directories of the distribution and of the administrator."""
    distribution, administrator = tmp_path / "usr", tmp_path / "etc"
    (administrator / "group.d").mkdir(parents=True)
    distribution.mkdir()
    monkeypatch.setattr("vmd.priv.groups.PLACES", (str(distribution), str(administrator)))
    return distribution, administrator


def test_names_and_numbers(places: tuple[Path, Path]) -> None:
    """The administrator's files take precedence.  A number means itself."""
    distribution, administrator = places
    (distribution / "group").write_text("# device group names\n0\tdefault\n5 lab\n")
    (administrator / "group").write_text("6 lab # ours\n0x10 hex\nx nonsense\n7 too many words\n")
    (administrator / "group.d" / "more.conf").write_text("9 web\n")
    (administrator / "group.d" / "README").write_text("1 readme\n")

    last = (1 << 31) - 1
    names = ("default", "lab", "hex", "web", "nonsense", "readme", "unknown", "", "12", str(last + 1), str(last))
    assert [groups.number(name) for name in names] == [0, 6, 16, 9, None, None, None, None, 12, None, last]


def test_no_files_at_all(places: tuple[Path, Path]) -> None:
    """A host may not have iproute2."""
    assert groups.number("lab") is None
