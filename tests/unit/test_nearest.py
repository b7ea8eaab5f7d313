"""Suggestions for mistyped words."""

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


@pytest.mark.parametrize(
    ("typed", "meant", "mistakes"),
    [("", "", 0), ("abc", "abc", 0), ("acb", "abc", 1), ("ab", "abc", 1), ("abcd", "abc", 1), ("axc", "abc", 1),
     ("xyz", "abc", 3), ("", "abc", 3), ("abc", "", 3), ("ca", "abc", 3)],
)  # fmt: skip
def test_mistakes(typed: str, meant: str, mistakes: int) -> None:
    """A swap of neighbours is one mistake, and swapped letters are not changed again."""
    assert mistakes_in(typed, meant) == mistakes
