"""vioscsi: a CD-ROM drive behind a SCSI controller, three queues of 128.

Runs as  its VM's id, in its VM's cell, with file calls on descriptors only
Peers    its VM process
Holds    guest memory, three queues' eventfds, and the disc, read-only, if there is one
"""

from vmd.devices import process
from vmd.devices.vioscsi.device import Vioscsi
from vmd.errors import PeerError
from vmd.privsep.confine import VIOSCSI

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.devices.process import Process


def main() -> int:
    """Run the process."""
    return process.main(VIOSCSI, make)


def make(services: "Process") -> Vioscsi:
    """Put the disc in.  Raises PeerError or OSError."""
    resources = services.host.resources
    if len(resources) > 1:
        raise PeerError(process.VM, f"{len(resources)} discs for one drive")
    return Vioscsi(services, resources[0] if resources else None)
