"""Where files are opened: the host, as root with few capabilities, until a process becomes whoever has named them."""

import os

from vmd.privsep import linux
from vmd.privsep.cell import import_path
from vmd.privsep.confine import OPENER


class HostFiles:
    """The host's file system; what is left of root's rights goes with the first change of user."""

    own_pids = False
    vital = False
    CAPABILITIES = OPENER.capabilities

    def __init__(self) -> None:
        self.import_path = import_path(("vmd", "msgpack"))

    def prepare(self) -> None:
        """Nothing."""

    def enter(self) -> None:
        """Give up all other capabilities; an exec would bring back no more than the bounding set has."""
        os.chdir("/")
        linux.limit_bounding_set(self.CAPABILITIES)
        linux.set_capabilities(linux.permitted_capabilities() & self.CAPABILITIES)
