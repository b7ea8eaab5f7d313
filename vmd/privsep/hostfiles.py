"""The place of openers: the host's file system, as root with few capabilities.

An opener later becomes the user who has named the files.
"""

import os

from vmd.privsep import linux
from vmd.privsep.cellfiles import import_path
from vmd.privsep.confine import OPENER


class HostFiles:
    """The host's file system.  Root's remaining capabilities are lost at the opener's first change of user."""

    own_pids = False
    vital = False
    CAPABILITIES = OPENER.capabilities

    def __init__(self) -> None:
        self.import_path = import_path(("vmd", "msgpack"))

    def prepare(self) -> None:
        """Do nothing."""

    def enter(self) -> None:
        """Give up all other capabilities, in the bounding set too: otherwise the exec would restore them."""
        os.chdir("/")
        linux.limit_bounding_set(self.CAPABILITIES)
        linux.set_capabilities(linux.permitted_capabilities() & self.CAPABILITIES)
