"""Suggestions for mistyped words."""

import itertools

import pytest

from vmd.nearest import mistakes_in, nearest

WORDS = ("boot", "cdrom", "disk", "interface", "interfaces", "local", "memory", "vcpus", "vm")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("memroy", "memory"),
        ("memori", "memory"),
        ("emmory", "memory"),
        ("Memory", "memory"),
        ("mem", "memory"),  # only one word has this prefix
        ("dsik", "disk"),
        ("dis", "disk"),
        ("vmm", "vm"),
        ("interfcae", "interface"),
        ("interfacess", "interfaces"),
        ("vcpu", "vcpus"),
        ("inter", ""),  # two words have this prefix, and it is not similar to either
        ("vx", ""),  # with two letters no mistake is allowed
        ("size", ""),
        ("kernel", ""),
        ("", ""),
        ("m" * 1000, ""),
    ],
)
def test_nearest(typed: str, meant: str) -> None:
    """A suggestion is similar to the word.  Otherwise there is none."""
    assert nearest(typed, WORDS) == meant


def test_nothing_to_choose_from() -> None:
    """Without words there is no suggestion."""
    assert nearest("memory", ()) == ""


@pytest.mark.parametrize(("typed", "meant"), [("", ""), ("m" * 32, "m" * 33), ("m" * 33, "")])
def test_lengths(typed: str, meant: str) -> None:
    """A word of any length but 0 is compared, up to that of a keyword."""
    assert nearest(typed, ("m" * 33,)) == meant


def distance(typed: str, meant: str) -> int:
    """Return the number of mistakes, by its definition."""
    if not typed or not meant:
        return len(typed) + len(meant)
    found = [
        distance(typed[:-1], meant) + 1, distance(typed, meant[:-1]) + 1,
        distance(typed[:-1], meant[:-1]) + (typed[-1] != meant[-1]),
    ]  # fmt: skip
    if len(typed) > 1 and len(meant) > 1 and typed[-2:] == meant[:-3:-1]:
        found.append(distance(typed[:-2], meant[:-2]) + 1)
    return min(found)


def test_all_short_words() -> None:
    """The fast computation counts as the definition does."""
    words = ["".join(letters) for length in range(4) for letters in itertools.product("ab", repeat=length)]
    for typed, meant in itertools.product([*words, "abab", "baab", "abcb"], repeat=2):
        assert mistakes_in(typed, meant) == distance(typed, meant), (typed, meant)


@pytest.mark.parametrize(
    ("typed", "meant", "mistakes"),
    [("", "", 0), ("abc", "abc", 0), ("acb", "abc", 1), ("ab", "abc", 1), ("abcd", "abc", 1), ("axc", "abc", 1),
     ("xyz", "abc", 3), ("", "abc", 3), ("abc", "", 3), ("ca", "abc", 3)],
)  # fmt: skip
def test_mistakes(typed: str, meant: str, mistakes: int) -> None:
    """A swap of neighbours is one mistake, and swapped letters are not changed again."""
    assert mistakes_in(typed, meant) == mistakes
