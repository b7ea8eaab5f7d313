"""Frozen records behave like frozen keyword-only dataclasses."""

import pytest

from vmd.record import Part, Record


class Point(Record):
    """Two numbers, one with a default."""

    x: int
    y: int = 7


class Positive(Point):
    """A point with a check."""

    z: int = 0

    def check(self) -> None:
        """Refuse negative x."""
        if self.x < 0:
            raise ValueError("x is negative")


def test_defaults_and_equality() -> None:
    """An omitted field has its default, and records with equal fields are equal."""
    assert Point(x=1) == Point(x=1, y=7)
    assert Point(x=1) != Point(x=2)
    assert hash(Point(x=1)) == hash(Point(x=1, y=7))
    assert repr(Point(x=1)) == "Point(x=1, y=7)"


def test_records_of_different_classes_differ() -> None:
    """Equal fields are not enough."""
    assert Point(x=1) != Positive(x=1)


def test_is_frozen() -> None:
    """No field can be set, deleted or added."""
    point = Point(x=1)
    with pytest.raises(AttributeError, match=r"Point\.x is frozen"):
        point.x = 2  # type: ignore[misc]
    with pytest.raises(AttributeError):
        del point.x
    with pytest.raises(AttributeError):
        point.other = 3


@pytest.mark.parametrize(("values", "complaint"), [({}, "needs x"), ({"x": 1, "q": 2}, "has no q")])
def test_wrong_fields_are_named(values: dict[str, int], complaint: str) -> None:
    """A missing or unknown field is a TypeError that names it."""
    with pytest.raises(TypeError, match=complaint):
        Point(**values)


def test_inherited_fields_come_first_and_rules_are_checked() -> None:
    """A record extends the fields of its base, and `replace` checks again."""
    assert list(Positive.fields) == ["x", "y", "z"]
    with pytest.raises(ValueError, match="negative"):
        Positive(x=1).replace(x=-1)


def test_values_that_a_list_must_have() -> None:
    """It must have all fields up to the last one without a default."""
    assert (Record.least, Point.least, Positive.least) == (0, 1, 1)


class Old(Part):
    """A part without a new version."""


class New(Part):
    """A part of the third version."""

    VERSION = 3


def test_part_of_another_version() -> None:
    """Each version is read up to the one that is written.  The refusal names both."""
    assert (Old.VERSION, Old().version) == (1, 1)
    assert [New(version=version).version for version in (1, 2, 3)] == [1, 2, 3]
    for part, version in ((Old, 0), (Old, 2), (New, 0), (New, 4)):
        what = f"{part.__name__} of version {version}, where this vmd reads 1 to {part.VERSION}"
        with pytest.raises(ValueError, match=what):
            part(version=version)
