"""The table of comparisons: pairs, the interval of their middle, and when there is a verdict."""

from statistics import median

import pytest

from bench.table import SURE, Row, interval, turns


def row(*ratios: float, goal: float = 1.0, larger: bool = False) -> Row:
    """Return a comparison of pairs, each of which is on a host that is ten times as fast as the one before."""
    theirs = [10.0**number for number in range(len(ratios))]
    ours = [ratio * other for ratio, other in zip(ratios, theirs, strict=True)]
    return Row("what", "ms", ours, theirs, goal, larger)


def test_turns() -> None:
    """One round does not count, and each side is the first one every other time."""
    counted = [side for counts, side in turns(("a", "b"), 4) if counts]
    assert counted == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert len(list(turns(("a", "b"), 4))) == 10


def test_the_ratio_is_of_pairs() -> None:
    """A host that changes its speed from pair to pair does not matter."""
    assert [round(ratio, 6) for ratio in row(0.5, 0.5, 0.5).ratios] == [0.5] * 3


@pytest.mark.parametrize(("ratios", "goal", "larger", "expected"), [
    ([0.5] * 6, 1.0, False, "reached (<= 1.00)"),
    ([1.5] * 6, 1.0, False, "MISSED (<= 1.00)"),
    ([1.5] * 6, 1.0, True, "reached (>= 1.00)"),
    ([0.5] * 6, 1.0, True, "MISSED (>= 1.00)"),
    ([0.5, 0.5, 0.5, 1.5, 1.5, 1.5], 1.0, False, "open (<= 1.00)"),
    ([0.5] * 10 + [9.0], 1.0, False, "reached (<= 1.00)"),  # one pair went wrong
    ([0.5] * 3, 1.0, False, "reached? (<= 1.00)"),
    ([1.5] * 3, 1.0, False, "MISSED? (<= 1.00)"),
])  # fmt: skip
def test_verdict(ratios: list[float], goal: float, larger: bool, expected: str) -> None:
    """There is one where all of the interval is on one side, and none that few pairs could give."""
    assert row(*ratios, goal=goal, larger=larger).verdict == expected


def test_limits_and_rows_without_goals() -> None:
    """A limit is of our own figures; without a goal there is no verdict, and without QEMU no ratio."""
    assert Row("what", "MiB", [1.0] * 6, [4.0] * 3, limit=2.0).verdict == "reached (<= 2 MiB)"
    assert Row("what", "MiB", [1.0] * 6, [4.0] * 3).verdict == ""
    assert Row("what", "MiB", [1.0] * 6, [4.0] * 3).ratios == [0.25]
    assert Row("what", "MiB", [1.0]).ratios == []


def test_the_interval_is_as_sure_as_it_says() -> None:
    """Of all ways in which values may be above and below the true middle, it has that middle in enough of them."""
    for count in range(5, 14):
        values = list(map(float, range(count)))
        low, high = interval(values)
        assert values[0] <= low <= median(values) <= high <= values[-1]
        # The middle is between value number `below - 1` and value number `below`, if so many are below it.
        within = sum(low <= below - 0.5 <= high for below in map(int.bit_count, range(2**count)))
        assert within / 2**count >= SURE
    low, high = interval(list(map(float, range(50))))
    assert high - low < 25, "many pairs narrow it"
