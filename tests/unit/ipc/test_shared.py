"""Sentences that are cut so that they fit a message."""

import pytest

from vmd.ipc.messages.shared import TEXT_BYTES_MAX, brief, fitting


@pytest.mark.parametrize(
    ("text", "most", "shown"),
    [
        ("", 3, ""), ("abc", 3, "abc"), ("abcd", 3, "abc ..."), ("a\u00fc", 3, "a\u00fc"), ("ab\u00fc", 3, "ab ..."),
        ("a\udcff", 2, "a\udcff"), ("x" * (TEXT_BYTES_MAX + 1), TEXT_BYTES_MAX, "x" * TEXT_BYTES_MAX + " ..."),
    ],
)  # fmt: skip
def test_a_sentence_is_cut_between_characters(text: str, most: int, shown: str) -> None:
    """Its length counts in bytes."""
    assert brief(text, most) == shown


@pytest.mark.parametrize(
    ("lines", "lines_max", "bytes_max", "shown"),
    [
        ([], 3, 10, []),
        (["a", "b", "c"], 3, 6, ["a", "b", "c"]),
        (["a", "b", "c"], 3, 5, ["a", "b", "and 1 more; see the log"]),
        (["a", "b", "c"], 2, 6, ["a", "b", "and 1 more; see the log"]),
        (["a", "b", "c"], 3, 2, ["a", "and 2 more; see the log"]),
        (["abcdef", "b"], 3, 2, ["abcdef", "and 1 more; see the log"]),
        (["\u00fc", "b"], 2, 5, ["\u00fc", "b"]),
        (["\u00fc", "b"], 2, 4, ["\u00fc", "and 1 more; see the log"]),
    ],
)
def test_the_first_lines_are_shown(lines: list[str], lines_max: int, bytes_max: int, shown: list[str]) -> None:
    """At least one, and the number of the others.  Each line needs one more byte."""
    assert fitting(lines, lines_max, bytes_max) == shown
