"""Locks that disks of a VM have lost, as their processes, which watch them, have said (devmsg.LOCK_LOST).

Storage of a network can lose locks: a server, or the other half of a cluster that was cut in two, drops those of a host
that it does not hear of.  Then somebody else may have the disk, and the guest here must not go on writing to it.
"""

from vmd.ipc import devmsg
from vmd.vm.departure import NOT_TAKEN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.vm.devproc import DeviceProcesses

# What is said of an image whose lock is ours again.
WRITTEN = "somebody else has written to its image, of which its guest knows nothing"
FOUND = {
    devmsg.TAKEN: "nobody has written to its image since this VM stands still",
    devmsg.TAKEN_WRITTEN: WRITTEN,
    devmsg.TAKEN_UNSURE: "it is not known whether somebody else has written to its image",
}


class Locks:
    """The locks of a machine that stands still."""

    def __init__(self, devices: "DeviceProcesses") -> None:
        self._devices = devices
        self._written: list[str] = []  # disks that somebody else has written to
        self._notes: list[str] = []

    def take_back(self, *, force: bool) -> str:
        """Take all locks again that were lost; return why the machine must stay as it is, or "".

        One whose disks somebody else has written to goes on by `force` only.  Raises PeerError.
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
        """Return what whoever has let the machine go on should know, once."""
        notes, self._notes = tuple(self._notes), []
        return notes
