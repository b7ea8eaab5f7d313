"""The table that `make bench` prints: pairs of runs, their ratios, and a verdict where the spread permits one.

Hosts differ and are noisy, and the noise comes in waves that are longer than a run.  So both sides run in turn.  The
result is the median of the ratios of the pairs, with a confidence interval of 90% by the sign test.  A goal is reached
or missed if the whole interval is on one side of the goal.  Otherwise it is open.
"""

from collections.abc import Iterator, Sequence
from math import comb
from statistics import median
from typing import NamedTuple, TypeVar

Side = TypeVar("Side")

SURE = 0.9
PAIRS_MIN = 5  # with fewer pairs, the interval of all ratios has less than the wanted confidence


class Row(NamedTuple):
    """One comparison.  Times and costs are better if smaller, rates are better if larger.

    If `ours` and `qemu` have the same length, their items are pairs, in order.
    """

    what: str
    unit: str
    ours: Sequence[float]
    qemu: Sequence[float] = ()  # empty if QEMU has no counterpart
    goal: float | None = None  # wanted ratio ours / QEMU
    larger_is_better: bool = False
    limit: float | None = None  # largest wanted value of ours, if the goal is no ratio

    @property
    def ratios(self) -> list[float]:
        """The ratios ours / QEMU, sorted: one per pair, or the ratio of the medians if there are no pairs."""
        if not self.qemu:
            return []
        if len(self.ours) != len(self.qemu):
            return [median(self.ours) / median(self.qemu)]
        return sorted(mine / other for mine, other in zip(self.ours, self.qemu, strict=True))

    @property
    def verdict(self) -> str:
        """Whether the goal is reached, and the goal; empty without a goal."""
        if self.limit is not None:
            return f"{said(sorted(self.ours), self.limit, larger=False)} (<= {self.limit:.4g} {self.unit})"
        if self.goal is None or not self.qemu:
            return ""
        sign = ">=" if self.larger_is_better else "<="
        return f"{said(self.ratios, self.goal, larger=self.larger_is_better)} ({sign} {self.goal:.2f})"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the confidence interval of the median of sorted values: at SURE, or all of them if they are too few."""
    count = len(values)
    cut, beyond = 0, 1 / 2**count  # values left out at each end, and the probability that the median is beyond one end
    while beyond + comb(count, cut + 1) / 2**count <= (1 - SURE) / 2:
        cut += 1
        beyond += comb(count, cut) / 2**count
    return values[cut], values[count - 1 - cut]


def said(values: Sequence[float], goal: float, *, larger: bool) -> str:
    """Return the verdict of sorted values on a goal."""
    low, high = interval(values)
    if (low >= goal) if larger else (high <= goal):
        return "reached" if len(values) >= PAIRS_MIN else "reached?"
    if (high < goal) if larger else (low > goal):
        return "MISSED" if len(values) >= PAIRS_MIN else "MISSED?"
    return "open"


def turns(sides: "tuple[Side, Side]", rounds: int) -> "Iterator[tuple[bool, Side]]":
    """Yield whether the run counts, and the side: once each uncounted, then `rounds` pairs, in alternating order."""
    for number in range(rounds + 1):
        for side in sides if number % 2 else sides[::-1]:
            yield number > 0, side


def show(rows: Sequence[Row], *, header: bool = False) -> None:
    """Print rows: medians, ranges, the median ratio with its interval, and the verdict."""
    if header:
        print(f"{'measurement':48} {'unit':8} {'vmd':>22} {'QEMU':>22} {'ratio':>18}  goal")
    for row in rows:
        print(
            f"{row.what:48} {row.unit:8} {spread(row.ours):>22} {spread(row.qemu):>22}"
            f" {between(row.ratios):>18}  {row.verdict}",
            flush=True,
        )


def between(ratios: Sequence[float]) -> str:
    """Return the text of the median ratio and its interval."""
    if not ratios:
        return ""
    low, high = interval(ratios)
    return f"{median(ratios):.2f} [{low:.2f}-{high:.2f}]" if len(ratios) > 1 else f"{ratios[0]:.2f}"


def spread(values: Sequence[float]) -> str:
    """Return the text "median [smallest-largest]"."""
    return f"{median(values):.4g} [{min(values):.4g}-{max(values):.4g}]" if values else ""
