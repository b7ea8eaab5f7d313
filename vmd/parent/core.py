"""What the rooms of the parent share: the VMs, the peers, the clients, and the configuration in force.

It does nothing by itself.  The rooms (`life`, `consoles`, `network`, `transfers`, `configuration`, `status`) are each
given this and those of the others that they call; `main` makes them all, and knows which message is whose.
"""

from vmd.parent.clients import Clients
from vmd.parent.peers import Peers
from vmd.parent.vmtable import VmTable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.config.model import Config
    from vmd.ipc.loop import Loop
    from vmd.parent.disks import Prober
    from vmd.parent.identity import Identities
    from vmd.privsep.ids import Ids


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
        self.ids: Ids | None = None  # for VM processes, on a host where they have their own
        self.prober: Prober  # there from the moment that processes are started
        self.serving = False  # clients are served, and VMs started
        self.ending = False  # the daemon is

    def take_id(self) -> int:
        """Return a user id for the next VM process; 0 for that of vmm.  Raises HostError."""
        return self.ids.take() if self.ids is not None else 0
