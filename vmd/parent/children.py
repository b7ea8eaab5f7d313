"""The parent's three children, each in the place it belongs to."""

import socket

from vmd.errors import HostError
from vmd.ipc.messages import Proc
from vmd.log import log
from vmd.parent.disks import ImageProber
from vmd.privsep.cell import Cell, Network, VmmCell
from vmd.privsep.spawn import Child, spawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.privsep.spawn import Place


class Children:
    """Starts and finally reaps control, vmm and priv."""

    def __init__(self, uid: int, gid: int) -> None:
        self.cell = cell = Cell.build(uid, gid)
        self.prober = ImageProber(cell)
        self._places: dict[Proc, Place] = {Proc.PRIV: Network(), Proc.CONTROL: cell, Proc.VMM: vmm_place(cell)}
        self._children: list[Child] = []

    def start(self, proc: Proc, channel: socket.socket, log_fd: int) -> None:
        """Start one child with its end of the channel, and what it writes its lines to.  Raises HostError."""
        name = proc.name.lower()
        arguments = [name, log.form, str(log.verbosity)]
        place = self._places[proc]
        self._children.append(spawn(name, arguments, channel=channel, log_fd=log_fd, place=place))

    def reap(self, timeout_s: float) -> None:
        """Wait for the children to end; kill the ones that do not."""
        for child in self._children:
            if child.reap(timeout_s) is None:
                log.warn(f"{child.title} does not end; killing it")
                child.kill()
                child.reap(timeout_s)


def vmm_place(cell: Cell) -> Cell:
    """Return where vmm runs, on a host that lacks something with a warning."""
    try:
        return VmmCell(cell)
    except HostError as error:
        log.warn(f"{error}: a process below vmm that is stopped can outlive the daemon")
        return cell
