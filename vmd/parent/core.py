"""What the rooms of the parent share: the VMs, the peers, the clients, and the configuration in force.

It does nothing by itself.  The rooms (`life`, `consoles`, `network`, `transfers`, `configuration`, `status`) are each
given this and those of the others that they call; `main` makes them all, and knows which message is whose.
"""

from vmd.parent.clients import Clients
from vmd.parent.peers import Peers
from vmd.parent.slots import Slots
from vmd.parent.vmtable import VmTable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.config.model import Config
    from vmd.ipc.loop import Loop
    from vmd.parent.identity import Identities


class Core:
    """The parent's state."""

    def __init__(
        self, loop: "Loop", config: "Config", *, verbosity: int = 0, identities: "Identities | None" = None
    ) -> None:
        self.loop = loop
        self.config = config  # in force
        self.verbosity = verbosity
        self.vms = VmTable(identities)
        self.peers = Peers()
        self.clients = Clients(self.peers)
        self.slots = Slots(loop, self.peers)
        self.serving = False  # clients are served, and VMs started
        self.ending = False  # the daemon is
