"""vioscsi: a CD-ROM drive behind a SCSI controller, three queues of 128.

Runs as  its VM's id, in its VM's cell, with file calls on descriptors only
Peers    its VM process
Holds    guest memory, three queues' eventfds, and the disc, read-only, if there is one
"""

import errno
import posix as os

from vmd.devices import process
from vmd.devices.process import Process, receive_files, unpack
from vmd.devices.vioscsi.device import Vioscsi
from vmd.errors import PeerError
from vmd.ipc import devmsg
from vmd.privsep.confine import VIOSCSI


class VioscsiProcess(Process):
    """A device process with the messages that only the CD-ROM drive gets."""

    device: Vioscsi
    disc: "list[int]"  # the descriptor that came with the current message, if any

    def on_inform(self) -> None:
        """Take a message of the async channel, and the disc's descriptor if one comes with it."""
        packet, self.disc = receive_files(self.informs, 1)
        self.take_inform(packet)

    def on_disc(self, packet: bytes) -> None:
        """Change the disc.  CHANGED tells the result."""
        force = bool(unpack(devmsg.DISC_HEAD, packet)[1] & devmsg.DISC_FORCE)
        fd = self.disc.pop() if self.disc else None
        try:
            if fd is None and packet[devmsg.DISC_HEAD.size :]:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            self.device.change(fd, force=force)
        except OSError as error:
            self.changed(error)
        else:
            self.changed()

    def on_export(self, packet: bytes) -> bytes:
        """Add the drive's own state to the answer."""
        return super().on_export(packet) + self.device.drive.state()

    def on_restore(self, packet: bytes) -> bytes:
        """Take the state of the drive of a received VM."""
        unpack(devmsg.TYPE, packet)
        self.device.drive.restore(packet[devmsg.TYPE.size :])
        return devmsg.STATUS.pack(devmsg.RESTORE, 0)

    INFORMS = Process.INFORMS | {devmsg.DISC: on_disc}
    QUESTIONS = Process.QUESTIONS | {devmsg.EXPORT: on_export, devmsg.RESTORE: on_restore}


def main() -> int:
    """Run the process."""
    return process.main("vioscsi", VIOSCSI, make, VioscsiProcess)


def make(services: "Process") -> Vioscsi:
    """Return the controller, with the disc in the drive.  Raises PeerError or OSError."""
    resources = services.host.resources
    if len(resources) > 1:
        raise PeerError(process.PEER, f"{len(resources)} discs for one drive")
    return Vioscsi(services, resources[0] if resources else None)
