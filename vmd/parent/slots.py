"""Slots for VM processes: each has a user id and, if the host has control groups, a control group of its own.

vmm gets a slot for the process that it keeps in reserve.  With each VM it gets another one, for the next process.
"""

from vmd.errors import HostError
from vmd.ipc.messages.vmm import VmSlot
from vmd.ipc.routes import Proc
from vmd.log import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.ipc.loop import Loop
    from vmd.parent.groups import Groups
    from vmd.parent.peers import Peers
    from vmd.privsep.ids import Ids

REMOVE_S = 1.0  # between two attempts to remove groups whose processes have not ended yet


class Slots:
    """The room of slots for VM processes."""

    def __init__(self, loop: "Loop", peers: "Peers") -> None:
        self.loop = loop
        self.peers = peers
        self.ids: Ids | None = None  # None: all VM processes have the user id of vmm
        self.groups: Groups | None = None  # of the newest vmm; None: its VM processes are in the group of vmm
        self.all_groups: list[Groups] = []  # of all vmms
        self.removing = False  # a timer runs for the next attempt

    def use(self, groups: "Groups | None", *, newest: bool) -> None:
        """Add the groups of a vmm.  If it is the `newest`, new VMs get their groups there, or none without groups."""
        if newest:
            self.groups = groups
        if groups is not None:
            self.all_groups.append(groups)

    def give(self) -> None:
        """Give vmm a slot for the next VM process.  Raises HostError."""
        uid = self.ids.take() if self.ids is not None else 0
        group, fds = 0, {}
        if self.groups is not None:
            try:
                group, fd = self.groups.make()
                fds = {"group": [fd]}
            except HostError as error:
                log.warn(f"{error}: the next VM has no control group of its own")
        self.peers.send(Proc.VMM, VmSlot(uid=uid, group=group), fds=fds)

    def over(self, groups: "Groups | None", number: int) -> str:
        """A VM process has ended: kill what is left in its group.  Returns `groups.memory_lack` of it."""
        if groups is None or not number:
            return ""
        lack = groups.end(number)
        self.remove()
        return lack

    def remove(self) -> None:
        """Remove the groups that are empty, and set a timer for the others."""
        if self.removing:
            return
        left = [groups.remove() for groups in self.all_groups]
        if any(left):
            self.removing = True
            self.loop.call_later(REMOVE_S, self.remove_again)

    def remove_again(self) -> None:
        """Try again to remove groups: called by the timer."""
        self.removing = False
        self.remove()
