"""viornd: a virtio entropy device, one queue of 64.

Runs as  its VM's id, in its VM's cell, with no system call beyond those of any leaf
Peers    its VM process
Holds    guest memory, one queue's eventfds; the random bytes come from getrandom(2)
"""

from vmd.devices import process
from vmd.devices.viornd.device import Viornd
from vmd.privsep.confine import LEAF


def main() -> int:
    """Run the process."""
    return process.main("viornd", LEAF, Viornd)
