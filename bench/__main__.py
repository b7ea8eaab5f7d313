"""`make bench`: compares this vmd with QEMU in one run, with the same guest program on both sides, and prints a table.

`make bench ROWS="net disk"` makes a part of the table.  Hosts differ and are noisy, so vmd and QEMU run in turn, and
their ratios count (`table.py`).  A missed goal is marked in the table.  Only a measurement that was impossible is a
failure.
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
    """Run the named measurements, or all of them without names, and show the table."""
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
