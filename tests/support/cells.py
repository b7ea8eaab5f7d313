"""A cell that also contains the program of `tests/process/insider`."""

import pwd
import sys
from pathlib import Path

from vmd.privsep.cell import Cell

HERE = Path(__file__).resolve().parents[1] / "process"
PACKAGES = ("vmd", "msgpack", "insider")
USER = pwd.getpwnam("nobody")  # any user will do, because `_vmd` may not exist on a test host


def insider_cell() -> Cell:
    """Build the cell.  The caller closes it."""
    sys.path.insert(0, str(HERE))
    try:
        return Cell.build(USER.pw_uid, USER.pw_gid, PACKAGES)
    finally:
        sys.path.remove(str(HERE))
