"""The table of comparisons: pairs, the confidence interval of their median, and the verdict."""

from statistics import median

import pytest

from bench.table import SURE, Row, interval, turns


def row(*ratios: float, goal: float = 1.0, larger: bool = False) -> Row:
    """Return a comparison of pairs.  Each pair is from a host that is ten times slower than that of the pair before."""
    theirs = [10.0**number for number in range(len(ratios))]
    ours = [ratio * other for ratio, other in zip(ratios, theirs, strict=True)]
    return Row("what", "ms", ours, theirs, goal, larger)


def test_turns() -> None:
    """One round is not counted, and the two sides take turns in going first."""
    counted = [side for counts, side in turns(("a", "b"), 4) if counts]
    assert counted == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert len(list(turns(("a", "b"), 4))) == 10


def test_the_ratio_is_of_pairs() -> None:
    """The host may change its speed between pairs."""
    assert [round(ratio, 6) for ratio in row(0.5, 0.5, 0.5).ratios] == [0.5] * 3


@pytest.mark.parametrize(("ratios", "goal", "larger", "expected"), [
    ([0.5] * 6, 1.0, False, "reached (<= 1.00)"),
    ([1.5] * 6, 1.0, False, "MISSED (<= 1.00)"),
    ([1.5] * 6, 1.0, True, "reached (>= 1.00)"),
    ([0.5] * 6, 1.0, True, "MISSED (>= 1.00)"),
    ([0.5, 0.5, 0.5, 1.5, 1.5, 1.5], 1.0, False, "open (<= 1.00)"),
    ([0.5] * 10 + [9.0], 1.0, False, "reached (<= 1.00)"),  # one outlier
    ([0.5] * 3, 1.0, False, "reached? (<= 1.00)"),
    ([1.5] * 3, 1.0, False, "MISSED? (<= 1.00)"),
])  # fmt: skip
def test_verdict(ratios: list[float], goal: float, larger: bool, expected: str) -> None:
    """A verdict needs an interval on one side of the goal.  With few pairs it is marked as uncertain."""
    assert row(*ratios, goal=goal, larger=larger).verdict == expected


def test_limits_and_rows_without_goals() -> None:
    """A limit is for our own figures.  Without a goal there is no verdict, and without QEMU no ratio."""
    assert Row("what", "MiB", [1.0] * 6, [4.0] * 3, limit=2.0).verdict == "reached (<= 2 MiB)"
    assert Row("what", "MiB", [1.0] * 6, [4.0] * 3).verdict == ""
    assert Row("what", "MiB", [1.0] * 6, [4.0] * 3).ratios == [0.25]
    assert Row("what", "MiB", [1.0]).ratios == []


def test_the_interval_has_its_confidence() -> None:
    """It contains the true median in at least SURE of all arrangements of values above and below that."""
    for count in range(5, 14):
        values = list(map(float, range(count)))
        low, high = interval(values)
        assert values[0] <= low <= median(values) <= high <= values[-1]
        # If `below` values are smaller than the median, it lies between values `below - 1` and `below`.
        within = sum(low <= below - 0.5 <= high for below in map(int.bit_count, range(2**count)))
        assert within / 2**count >= SURE
    low, high = interval(list(map(float, range(50))))
    assert high - low < 25, "many pairs must give a narrow interval"
