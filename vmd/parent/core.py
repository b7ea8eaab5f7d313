"""What the rooms of the parent share: the VMs, the peers, the clients, and the configuration in force.

It does nothing by itself.  The rooms (`life`, `consoles`, `network`, `transfers`, `changes`, `configuration`, `status`)
are each given this and those of the others that they call; `main` makes them all, and knows which message is whose.
"""

import time

from vmd.parent.clients import Clients
from vmd.parent.events import Events
from vmd.parent.peers import Peers
from vmd.parent.slots import Slots
from vmd.parent.vmtable import VmTable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.config.model import Config
    from vmd.ipc.loop import Loop
    from vmd.ipc.routes import Proc
    from vmd.parent.identity import Identities


class Core:
    """The parent's state."""

    def __init__(
        self, loop: "Loop", config: "Config", *, verbosity: int = 0, identities: "Identities | None" = None
    ) -> None:
        self.loop = loop
        self.on_change: Callable[[], None] = lambda: None  # another parent is to know it
        self.watchers: list[Callable[[], None]] = []  # who else looks when something has changed
        self.write: Callable[[], None] = lambda: None  # ... before what follows can happen
        self.touched: set[int] = set()  # VMs, by id, of which something has changed since this was emptied
        self._config = config
        self.verbosity = verbosity
        self.vms = VmTable(identities)
        self.vms.on_change = self.changed
        self.peers = Peers()
        self.clients = Clients(self.peers)
        self.events = Events(loop, self.clients, self.vms, self.now_s)
        self.slots = Slots(loop, self.peers)
        self.ready: set[Proc] = set()  # these processes are confined, of vmms the newest
        self.serving = False  # clients are served, and VMs started
        self.ending = False  # the daemon is
        self.adopts = False  # it goes on with VMs of an earlier one

    @property
    def config(self) -> "Config":
        """The configuration in force."""
        return self._config

    @config.setter
    def config(self, config: "Config") -> None:
        self._config = config
        self.changed()

    def changed(self, vmid: int = 0) -> None:
        """Something has changed that another parent is to know: of a VM, or with 0 of what is no VM's."""
        if vmid:
            self.touched.add(vmid)
        self.on_change()
        for watcher in self.watchers:
            watcher()

    def now_s(self) -> float:
        """Return the time, in seconds since 1970."""
        return time.time()
