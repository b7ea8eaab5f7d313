"""The table that `make bench` prints: pairs of runs, their ratios, and a verdict where the spread permits one.

Hosts differ and are noisy, and the noise comes in waves that are longer than a run.  So both sides run in turn, what
counts is the ratio of each pair, and of these the middle one with an interval in which the true one is by a sign test,
9 times of 10.  A goal is reached or missed if all of that interval is on one side of it, and open otherwise.
"""

from collections.abc import Iterator, Sequence
from math import comb
from statistics import median
from typing import NamedTuple, TypeVar

Side = TypeVar("Side")

SURE = 0.9
PAIRS_MIN = 5  # with fewer, all of them on one side are not sure enough


class Row(NamedTuple):
    """One comparison; for times and costs smaller is better, for rates larger is.

    `ours` and `qemu` are pairs, in order, if there are as many of both.
    """

    what: str
    unit: str
    ours: Sequence[float]
    qemu: Sequence[float] = ()  # none where QEMU has nothing like it
    goal: float | None = None  # the ratio ours / QEMU that is aimed at
    larger_is_better: bool = False
    limit: float | None = None  # of ours, where that and not the ratio is aimed at

    @property
    def ratios(self) -> list[float]:
        """Ours over QEMU's, sorted: of each pair, or of medians where there are none."""
        if not self.qemu:
            return []
        if len(self.ours) != len(self.qemu):
            return [median(self.ours) / median(self.qemu)]
        return sorted(mine / other for mine, other in zip(self.ours, self.qemu, strict=True))

    @property
    def verdict(self) -> str:
        """Whether the goal is reached."""
        if self.limit is not None:
            return f"{said(sorted(self.ours), self.limit, larger=False)} (<= {self.limit:.4g} {self.unit})"
        if self.goal is None or not self.qemu:
            return ""
        sign = ">=" if self.larger_is_better else "<="
        return f"{said(self.ratios, self.goal, larger=self.larger_is_better)} ({sign} {self.goal:.2f})"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return between which of these sorted values the true middle is, as sure as SURE or as they permit."""
    count = len(values)
    cut, beyond = 0, 1 / 2**count  # how many are left out at each end, and how likely the middle is among them
    while beyond + comb(count, cut + 1) / 2**count <= (1 - SURE) / 2:
        cut += 1
        beyond += comb(count, cut) / 2**count
    return values[cut], values[count - 1 - cut]


def said(values: Sequence[float], goal: float, *, larger: bool) -> str:
    """Return what sorted values say about a goal."""
    low, high = interval(values)
    if (low >= goal) if larger else (high <= goal):
        return "reached" if len(values) >= PAIRS_MIN else "reached?"
    if (high < goal) if larger else (low > goal):
        return "MISSED" if len(values) >= PAIRS_MIN else "MISSED?"
    return "open"


def turns(sides: "tuple[Side, Side]", rounds: int) -> "Iterator[tuple[bool, Side]]":
    """Yield whether it counts, and whose turn it is: each once before, then in pairs of changing order."""
    for number in range(rounds + 1):
        for side in sides if number % 2 else sides[::-1]:
            yield number > 0, side


def show(rows: Sequence[Row], *, header: bool = False) -> None:
    """Print rows: medians, their range, the middle ratio and its interval, the goal."""
    if header:
        print(f"{'measurement':48} {'unit':8} {'vmd':>22} {'QEMU':>22} {'ratio':>18}  goal")
    for row in rows:
        print(
            f"{row.what:48} {row.unit:8} {spread(row.ours):>22} {spread(row.qemu):>22}"
            f" {between(row.ratios):>18}  {row.verdict}",
            flush=True,
        )


def between(ratios: Sequence[float]) -> str:
    """Return the middle ratio and its interval."""
    if not ratios:
        return ""
    low, high = interval(ratios)
    return f"{median(ratios):.2f} [{low:.2f}-{high:.2f}]" if len(ratios) > 1 else f"{ratios[0]:.2f}"


def spread(values: Sequence[float]) -> str:
    """Return median [smallest-largest]."""
    return f"{median(values):.4g} [{min(values):.4g}-{max(values):.4g}]" if values else ""
