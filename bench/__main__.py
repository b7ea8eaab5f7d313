"""`make bench`: this vmd against QEMU, the same guest program on both sides, in one run; prints one table.

`make bench ROWS="net disk"` makes a part of it.  Figures are ratios of runs in turn, because hosts differ and are noisy
(`table.py`).  A goal that is missed is marked, not hidden; only a measurement that could not be made fails.
"""

import sys
import tempfile
from pathlib import Path

from bench import devices, disk, memory, migrate, net, network, scale, serial, start, transfer, vhost
from bench.table import Row, show
from tests.support.guests import guest

MEASUREMENTS = {
    module.__name__.rpartition(".")[2]: module.measure
    for module in (start, serial, devices, network, net, vhost, disk, transfer, migrate, memory, scale)
}


def main(names: list[str]) -> int:
    """Run these measurements, or every one, and show the table."""
    if unknown := [name for name in names if name not in MEASUREMENTS]:
        print(f"bench: no rows {', '.join(unknown)}; there are {', '.join(MEASUREMENTS)}", file=sys.stderr)
        return 2
    rows: list[Row] = []
    for name in names or MEASUREMENTS:
        with tempfile.TemporaryDirectory(prefix="vmd-bench-") as directory:
            more = MEASUREMENTS[name](Path(directory), guest)
            show(more)
            rows += more
    print()
    show(rows, header=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
