"""Slots for VM processes: each has a user id and a control group of its own, where the host has such.

vmm is given one for the process that it keeps in reserve, and one with each VM for the next process.
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

REMOVE_S = 1.0  # from one look at groups whose processes have not ended yet to the next


class Slots:
    """The room of what VM processes are given before they exist."""

    def __init__(self, loop: "Loop", peers: "Peers") -> None:
        self.loop = loop
        self.peers = peers
        self.ids: Ids | None = None  # None: all VM processes have that of vmm
        self.groups: Groups | None = None  # of the newest vmm; None: all are in that of vmm
        self.all_groups: list[Groups] = []  # of every vmm
        self.removing = False

    def use(self, groups: "Groups | None", *, newest: bool) -> None:
        """Have the groups of one more vmm; with `newest` new VMs are given some there, or none."""
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
        """A VM process has ended: so does all that it may have left.  Returns which memory it has lacked."""
        if groups is None or not number:
            return ""
        lack = groups.end(number)
        self.remove()
        return lack

    def remove(self) -> None:
        """Remove groups that are empty, and come back for the others."""
        if self.removing:
            return
        left = [groups.remove() for groups in self.all_groups]
        if any(left):
            self.removing = True
            self.loop.call_later(REMOVE_S, self.remove_again)

    def remove_again(self) -> None:
        """Look again."""
        self.removing = False
        self.remove()
