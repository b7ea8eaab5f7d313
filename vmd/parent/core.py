"""The state that the rooms of the parent share: VMs, peers, clients, and the configuration in force.

It only holds state.  Each room (such as `life`, `network` or `transfers`) gets this object and the other rooms that it
calls.  `main` makes all rooms, and brings each message to its room.
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
        self.on_change: Callable[[], None] = lambda: None  # the state for the next parent is to be written soon
        self.watchers: list[Callable[[], None]] = []  # also called after each change
        self.write: Callable[[], None] = lambda: None  # writes the state for the next parent at once
        self.touched: set[int] = set()  # ids of VMs that have changed since the state was written
        self._config = config
        self.verbosity = verbosity
        self.vms = VmTable(identities)
        self.vms.on_change = self.changed
        self.peers = Peers()
        self.clients = Clients(self.peers)
        self.events = Events(loop, self.clients, self.vms, self.now_s)
        self.slots = Slots(loop, self.peers)
        self.ready: set[Proc] = set()  # processes that are confined; of the vmms only the newest counts
        self.serving = False  # clients are served, and VMs are started
        self.ending = False  # the daemon ends
        self.adopts = False  # the daemon adopts VMs of an earlier one

    @property
    def config(self) -> "Config":
        """The configuration in force."""
        return self._config

    @config.setter
    def config(self, config: "Config") -> None:
        self._config = config
        self.changed()

    def changed(self, vmid: int = 0) -> None:
        """Something has changed that the next parent must know; `vmid` is 0 if it concerns no VM."""
        if vmid:
            self.touched.add(vmid)
        self.on_change()
        for watcher in self.watchers:
            watcher()

    def now_s(self) -> float:
        """Return the time, in seconds since 1970."""
        return time.time()
