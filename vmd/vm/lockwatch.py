"""Takes back locks that the disks of a VM have lost.  The disk processes report a loss (devmsg.LOCK_LOST).

Network storage can lose locks: a server, or the other half of a cluster that was cut in two, drops the locks of a host
that it cannot reach.  Then another host may use the disk, and the guest here must not write to it.
"""

from vmd.ipc import devmsg
from vmd.vm.departure import NOT_TAKEN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.vm.devproc import DeviceProcesses

# Sentences for users about an image whose lock is held again.
WRITTEN = "somebody else has written to its image, and its guest does not know that"
FOUND = {
    devmsg.TAKEN: "nobody has written to its image since this VM was paused",
    devmsg.TAKEN_WRITTEN: WRITTEN,
    devmsg.TAKEN_UNSURE: "it is not known whether somebody else has written to its image",
}


class Locks:
    """The locks of the disks of one machine."""

    def __init__(self, devices: "DeviceProcesses") -> None:
        self._devices = devices
        self._written: list[str] = []  # disks that somebody else has written to
        self._notes: list[str] = []

    def take_back(self, *, force: bool) -> str:
        """Take back all locks that were lost.  Return why the machine must stay paused, or "".

        If somebody else has written to a disk, the machine goes on with `force` only.  Raises PeerError.
        """
        for disk in self._devices.running:
            if not disk.lock_lost:
                continue
            status = disk.take_back()
            if status not in FOUND:
                why = NOT_TAKEN.get(status, NOT_TAKEN[devmsg.TAKEN_FAILED])[1]
                return f"{disk.label}: its lock is lost; it {why}"
            if status == devmsg.TAKEN_WRITTEN:
                self._written.append(disk.label)
            self._notes.append(f"{disk.label}: its lock was lost, and is back: {FOUND[status]}")
        if self._written and not force:
            return f"{' and '.join(self._written)}: its lock was lost: {WRITTEN}: stop the VM, or force it to go on"
        self._written.clear()
        return ""

    def notes(self) -> tuple[str, ...]:
        """Return notes for the user who resumes the machine, and forget them."""
        notes, self._notes = tuple(self._notes), []
        return notes
