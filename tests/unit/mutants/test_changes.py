"""The single changes of a source."""

import ast

import pytest

from mutants.changes import Change, changes_of, sample


def made(source: str) -> set[str]:
    """Return the source after each change."""
    return {change.apply(source.encode()).decode() for change in changes_of("vmd/it.py", source.encode())}


@pytest.mark.parametrize(
    ("source", "changed"),
    [
        ("a < b", {"(a <= b)", "(a >= b)"}),
        ("a == b", {"(a != b)"}),
        ("a is not b", {"(a is b)"}),
        ("a in b", {"(a not in b)"}),
        ("a <= b < c", {"(a < b < c)", "(a > b < c)", "(a <= b <= c)", "(a <= b >= c)"}),
        ("a and b and c", {"(a or b or c)"}),
        ("a or b", {"(a and b)"}),
        ("x = 7", {"x = (8)", "x = (6)"}),
        ("x = True", set()),
        ("x = a if b else c", {"x = a if (not (b)) else c"}),
        ("x = [a for a in b if c]", {"x = [a for a in b if (not (c))]"}),
        ("while a: b", {"while (not (a)): b"}),
        ("if a: b = c", {"if (not (a)): b = c"}),
        ("if a: raise b", {"if (not (a)): raise b", "if False: raise b"}),
        ("f(a)", {"pass"}),
        ("assert a < b", set()),
        ("log.debug(1)", {"log.debug((2))", "log.debug((0))"}),
        ("x: L[1] = a", set()),
        ("def f(a: L[1]) -> L[2]: return a", set()),
        ("if TYPE_CHECKING: f(1)", set()),
        ('x = f"{a < b}"', set()),
        ("ä = 'ä'; x = 1", {"ä = 'ä'; x = (2)", "ä = 'ä'; x = (0)"}),
    ],
)
def test_change(source: str, changed: set[str]) -> None:
    """They are those that HACKING.md lists."""
    assert made(source) == changed


def test_lines_stay_where_they_are() -> None:
    """The display of a change and the lines that tests reach depend on line numbers."""
    source = "f(a,\n  b)\nif (a and\n    b):\n    return_ = c\n"

    for after in made(source):
        ast.parse(after)
        assert after.count("\n") == source.count("\n")


def test_name_survives_lines_that_move() -> None:
    """An entry of equal.toml is valid until its line is rewritten."""
    source = b"class A:\n    def f(self):\n        return a < b\n"

    before, after = changes_of("vmd/it.py", source), changes_of("vmd/it.py", b"import os\n\n" + source)

    assert [change.name for change in before] == [change.name for change in after]
    assert before[0].name == ("vmd/it.py", "A.f", "return a < b", "a < b -> a <= b")
    assert [change.line for change in after] == [5, 5]


def test_names_tell_places_of_a_line_apart() -> None:
    """An entry is for one of these places."""
    changes = changes_of("vmd/it.py", b"x = 1, 1\ny = 1\n")

    assert [(change.line, change.what) for change in changes if "-> 2" in change.what] == [
        (1, "1 -> 2"), (1, "1 -> 2, place 2"), (2, "1 -> 2"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "lines", "at_import"),
    [
        ("x = (\n    1,\n)\n", (1, 3), True),
        ("def f(a=1):\n    return a\n", (1, 1), True),
        ("def f():\n    return (\n        1\n    )\n", (2, 4), False),
        ("def f(a):\n    if (\n        a == b\n    ):\n        return a\n", (2, 4), False),
        ("class A:\n    b = 1\n", (2, 2), True),
    ],
)
def test_lines_of_a_statement(source: str, lines: tuple[int, int], at_import: bool) -> None:
    """Python has no event for each line of a statement.  A test that reaches some of them reaches the change."""
    changes = changes_of("vmd/it.py", source.encode())

    assert {(change.lines, change.at_import) for change in changes} == {(lines, at_import)}


def test_sample_is_stable() -> None:
    """It depends on the seed, and not on other code of the module."""
    source = b"".join(b"x%d = a < b%d\n" % (number, number) for number in range(50))
    changes = changes_of("vmd/it.py", source)

    def taken(found: list[Change], seed: int = 1) -> set[str]:
        return {change.text for change in sample(found, 20, seed)}

    assert taken(changes) == taken(changes_of("vmd/it.py", b"\n" + source))
    assert taken(changes) != taken(changes, seed=2)
    assert len(taken(changes) & taken(changes_of("vmd/it.py", source + b"x = 7\n"))) >= 18
    assert [change.line for change in sample(changes, 20, 1)] == sorted(
        change.line for change in sample(changes, 20, 1)
    )
