"""The place of openers: the host's file system, as root with few capabilities.

An opener later becomes the user who has named the files.
"""

import os

from vmd.privsep import linux
from vmd.privsep.confine import OPENER
from vmd.privsep.start import CODE_OUTSIDE


class HostFiles:
    """The host's file system.  Root's remaining capabilities are lost at the opener's first change of user."""

    own_pids = False
    vital = False
    CAPABILITIES = OPENER.capabilities

    import_path: tuple[str, ...] = (CODE_OUTSIDE,)

    def __init__(self, cell_fd: int) -> None:
        """`cell_fd` is the root of the cell, which has the code.  The caller keeps it open."""
        self.code_fd = cell_fd

    def prepare(self) -> None:
        """Do nothing."""

    def enter(self) -> None:
        """Give up all other capabilities, in the bounding set too: otherwise the exec would restore them."""
        os.chdir("/")
        linux.limit_bounding_set(self.CAPABILITIES)
        linux.set_capabilities(linux.permitted_capabilities() & self.CAPABILITIES)
