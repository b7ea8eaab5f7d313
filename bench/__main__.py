"""`make bench`: this vmd against QEMU, the same guest program on both sides, in one run; prints one table.

Figures are ratios of medians of alternated runs, because hosts differ and are noisy.  A goal that is missed is
marked, not hidden; only a measurement that could not be made fails.
"""

import sys
import tempfile
from pathlib import Path

from bench import devices, disk, memory, migrate, net, network, serial, start, transfer
from bench.table import Row, show
from tests.support.guests import guest

MEASUREMENTS = (
    start.measure, serial.measure, devices.measure, network.measure, net.measure, disk.measure, transfer.measure,
    migrate.measure, memory.measure,
)  # fmt: skip


def main() -> int:
    """Run every measurement and show the table."""
    rows: list[Row] = []
    for measure in MEASUREMENTS:
        with tempfile.TemporaryDirectory(prefix="vmd-bench-") as directory:
            more = measure(Path(directory), guest)
            show(more)
            rows += more
    print()
    show(rows, header=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
