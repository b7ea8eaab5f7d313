"""A cell that holds the insider of `tests/process/insider` besides vmd."""

import pwd
import sys
from pathlib import Path

from vmd.privsep.cell import Cell

HERE = Path(__file__).resolve().parents[1] / "process"
PACKAGES = ("vmd", "msgpack", "insider")
USER = pwd.getpwnam("nobody")  # any user does: `_vmd` need not exist where tests run


def insider_cell() -> Cell:
    """Build one, which is the caller's to close."""
    sys.path.insert(0, str(HERE))
    try:
        return Cell.build(USER.pw_uid, USER.pw_gid, PACKAGES)
    finally:
        sys.path.remove(str(HERE))
