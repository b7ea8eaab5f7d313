"""The table that `make bench` prints."""

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple


class Row(NamedTuple):
    """One comparison; for times and costs smaller is better, for rates larger is."""

    what: str
    unit: str
    ours: Sequence[float]
    qemu: Sequence[float] = ()  # none where QEMU has nothing like it
    goal: float | None = None  # the ratio ours / QEMU that is aimed at
    larger_is_better: bool = False
    limit: float | None = None  # of ours, where that and not the ratio is aimed at

    @property
    def ratio(self) -> float | None:
        """Ours over QEMU's, of medians."""
        return median(self.ours) / median(self.qemu) if self.qemu else None

    @property
    def verdict(self) -> str:
        """Whether the goal is reached."""
        if self.limit is not None:
            return f"{'reached' if median(self.ours) <= self.limit else 'MISSED'} (<= {self.limit:.4g} {self.unit})"
        if self.goal is None or self.ratio is None:
            return ""
        reached = self.ratio >= self.goal if self.larger_is_better else self.ratio <= self.goal
        sign = ">=" if self.larger_is_better else "<="
        return f"{'reached' if reached else 'MISSED'} ({sign} {self.goal:.2f})"


def show(rows: Sequence[Row], *, header: bool = False) -> None:
    """Print rows: medians, spread, ratio, goal."""
    if header:
        print(f"{'measurement':44} {'unit':8} {'vmd':>20} {'QEMU':>20} {'ratio':>6}  goal")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        print(
            f"{row.what:44} {row.unit:8} {spread(row.ours):>20} {spread(row.qemu):>20} {ratio:>6}  {row.verdict}",
            flush=True,
        )


def spread(values: Sequence[float]) -> str:
    """Return median [smallest-largest]."""
    return f"{median(values):.4g} [{min(values):.4g}-{max(values):.4g}]" if values else ""
