"""Locks that disks of a VM have lost, as their processes, which watch them, have said (devmsg.LOCK_LOST).

Storage of a network can lose locks: a server, or the other half of a cluster that was cut in two, drops those of a host
that it does not hear of.  Then somebody else may have the disk, and the guest here must not go on writing to it.
"""

from vmd.ipc import devmsg
from vmd.vm.departure import NOT_TAKEN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.vm.devproc import DeviceProcesses


def take_back(devices: "DeviceProcesses") -> str:
    """Take all locks again that were lost; return why one of them cannot be had, or "".  Raises PeerError."""
    for disk in devices.running:
        if disk.lock_lost and (status := disk.take_back()) != devmsg.TAKEN:
            return f"{disk.label}: its lock is lost; it {NOT_TAKEN.get(status, NOT_TAKEN[devmsg.TAKEN_FAILED])[1]}"
    return ""
