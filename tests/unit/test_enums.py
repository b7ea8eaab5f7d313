"""Our enumerations behave like those of the standard library."""

import ast
import copy
import enum
import pickle
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vmd import enums

CLASSES = """
class Choice(Enum):
    A = 1
    B = "b"
    C = 1

    @property
    def first(self):
        return self.name[0]

    def again(self):
        return type(self)(self.value)


class Number(IntEnum):
    A = 1
    B = 2


class Flags(IntFlag):
    A = 1
    B = 2
"""


class Color(enums.Enum):
    """An enumeration at module level, so that it can be pickled."""

    RED = 1
    BLUE = "b"


def made(module: ModuleType) -> dict[str, Any]:
    """Return the three classes, made with the enumerations of a module."""
    names = {name: getattr(module, name) for name in ("Enum", "IntEnum", "IntFlag")}
    exec(CLASSES, names)
    return names


def said(module: ModuleType) -> list[object]:
    """Return the results of using the classes of a module."""
    classes = made(module)
    choice, number, flags = classes["Choice"], classes["Number"], classes["Flags"]
    both = flags.A | flags.B
    return [
        repr(choice.A), str(choice.A), f"{choice.A}", choice.A == 1, choice("b") is choice.B, choice["B"] is choice.B,
        len(choice), [each.name for each in choice], choice.A in choice, list(choice.__members__), choice.C is choice.A,
        choice.B.first, choice.B.again() is choice.B, {choice.A, choice.C} == {choice.A}, choice.A.value,
        repr(number.B), str(number.B), f"{number.B:03d}", number.B == 2, number.B + 1, number.B > number.A,
        {2: "two"}[number.B], number(1) is number.A, isinstance(number.A, int), number.A.value, bool(number.A),
        both == 3, both & flags.B is flags.B, ~flags.A == flags.B, flags(0) == 0, bool(both & ~both), flags.A in both,
        flags.B in flags.A, str(both), flags(8) == 8, 4 | flags.A, both ^ flags.A, isinstance(both, flags),
        flags.A.name, flags(1) is flags.A,
    ]  # fmt: skip


def test_they_are_used_like_those_of_the_standard_library() -> None:
    """Readers need not know the difference."""
    assert said(enums) == said(enum)


@pytest.mark.parametrize("value", [7, "A", [1], None])
def test_invalid_values_have_the_same_message(value: object) -> None:
    """Decoding of messages uses this, with values of any type."""
    words = []
    for module in (enums, enum):
        with pytest.raises(ValueError, match="is not a valid Number") as refused:
            made(module)["Number"](value)
        words.append(str(refused.value))

    assert words[0] == words[1]


def test_a_copy_of_a_member_is_the_member() -> None:
    """Members are compared by identity."""
    assert copy.deepcopy(Color.RED) is Color.RED
    assert copy.copy(Color.BLUE) is Color.BLUE
    assert pickle.loads(pickle.dumps(Color.RED)) is Color.RED


def test_members_of_each_enumeration_differ() -> None:
    """Two names of one value would be one member, and code that compares them would take one for the other."""
    top = Path(__file__).resolve().parents[2]
    found, same = 0, []
    for path in (*top.glob("vmd/**/*.py"), *top.glob("vmctl/**/*.py")):
        source = path.read_text()
        tree = ast.parse(source if "Enum):" in source or "IntFlag):" in source else "")
        for each in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            if {ast.unparse(base) for base in each.bases} & {"Enum", "IntEnum", "IntFlag"}:
                values = [ast.unparse(row.value) for row in each.body if isinstance(row, ast.Assign)]
                found += 1
                if len(set(values)) < len(values):
                    same.append(f"{path}: {each.name}")

    assert same == []
    assert found > 20
