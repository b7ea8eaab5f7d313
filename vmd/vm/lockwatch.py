"""Has the disks of a VM find out every now and then whether their images are still locked for them.

Storage of a network can lose locks: a server, or the other half of a cluster that was cut in two, drops those of a host
that it does not hear of.  Then somebody else may have the disk, and the guest here must not go on writing to it.
"""

from vmd.ipc import devmsg
from vmd.vm.departure import NOT_TAKEN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.ipc.loop import Loop
    from vmd.vm.devproc import DeviceProcesses

CHECK_S = 10.0


class LockWatch:
    """The locks of all disks of one VM; `DeviceProcess.serve` says who is told if one is lost."""

    def __init__(self, loop: "Loop", devices: "DeviceProcesses") -> None:
        self.loop = loop
        self.disks = [device for device in devices.running if device.kind.settles]
        if self.disks:
            loop.call_later(CHECK_S, self.check)

    def check(self) -> None:
        """Ask all disks, now and from now on."""
        for disk in self.disks:
            disk.check_lock()
        self.loop.call_later(CHECK_S, self.check)

    def take_back(self) -> str:
        """Take all locks again that were lost; return why one of them cannot be had, or "".  Raises PeerError."""
        for disk in self.disks:
            if disk.lock_lost and (status := disk.take_back()) != devmsg.TAKEN:
                return f"{disk.label}: its lock is lost; it {NOT_TAKEN.get(status, NOT_TAKEN[devmsg.TAKEN_FAILED])[1]}"
        return ""
