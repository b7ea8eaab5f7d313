"""vioblk: a disk with one queue of 256.  `main` starts it for images of all formats, `raw` for a raw image.

Runs as  its VM's id, in its VM's cell, with file calls on descriptors only
Peers    its VM process
Holds    guest memory, one queue's eventfds, and the disk's image chain, the disk itself first
"""

from vmd.devices import process
from vmd.devices.process import Process, exact
from vmd.devices.vioblk.device import WORKERS_MAX, Vioblk, Workers
from vmd.errors import ImageError, PeerError, sentence
from vmd.ipc import devmsg
from vmd.log import log
from vmd.privsep.confine import VIOBLK
from vmd.privsep.title import EVENT, name_thread
from vmd.units import SECTOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.devices.process import Host
    from vmd.images.image import Image


class VioblkProcess(Process):
    """A device process with the questions that only disks answer."""

    device: Vioblk

    def on_settle(self, packet: bytes) -> bytes:
        """Bring acknowledged writes to stable storage, before another process opens the disk."""
        exact(devmsg.TYPE, packet)
        return devmsg.STATUS.pack(devmsg.SETTLE, self.device.settle())

    def on_settle_ahead(self, packet: bytes) -> bytes:
        """Have the next SETTLE flush, even if the disk has not been paused since the last one."""
        exact(devmsg.TYPE, packet)
        self.device.settle_ahead()
        return devmsg.STATUS.pack(devmsg.SETTLE_AHEAD, 0)

    def on_let_go(self, packet: bytes) -> bytes:
        """Let go of the disk's lock, because the guest may go on at another host."""
        exact(devmsg.TYPE, packet)
        return devmsg.STATUS.pack(devmsg.LET_GO, self.device.hand_over.let_go())

    def note_pause(self, *, paused: bool) -> None:
        """Note for the lock's thread whether this process may write to the image."""
        self.device.hand_over.paused = paused

    def on_take_back(self, packet: bytes) -> bytes:
        """Take the lock again, because the guest goes on here."""
        exact(devmsg.TYPE, packet)
        return devmsg.STATUS.pack(devmsg.TAKE_BACK, self.device.take_back())

    def on_lend(self, packet: bytes) -> bytes:
        """Send the image's descriptors to the VM.  Another process reads the image, or writes to it during a pause."""
        exact(devmsg.TYPE, packet)
        try:
            if self.paused:
                self.device.image.settle()
        except OSError as error:
            log.error(sentence(error))
            return devmsg.STATUS.pack(devmsg.LEND, 1)
        self.passing = self.host.resources
        return devmsg.STATUS.pack(devmsg.LEND, 0)

    def on_reload(self, packet: bytes) -> bytes:
        """Read the image's metadata again, after another process has written to it."""
        exact(devmsg.TYPE, packet)
        try:
            self.device.image.reload()
        except (ImageError, OSError) as error:
            log.error(sentence(error))
            return devmsg.STATUS.pack(devmsg.RELOAD, 1)
        return devmsg.STATUS.pack(devmsg.RELOAD, 0)

    def on_sign(self, packet: bytes) -> bytes:
        """Write to the image without changing it: the guest has come from another host, and is about to run."""
        exact(devmsg.TYPE, packet)
        return devmsg.STATUS.pack(devmsg.SIGN, self.device.hand_over.sign())

    def on_resize(self, packet: bytes) -> None:
        """Make the disk larger.  CHANGED tells the result."""
        self.device.resize(exact(devmsg.RESIZE_BODY, packet)[1])

    def lock_lost(self, why: str) -> None:
        """Send LOCK_LOST, which makes the VM pause; on any thread."""
        self.tell(devmsg.TYPE.pack(devmsg.LOCK_LOST) + why.encode()[: devmsg.TROUBLE_MAX])

    def on_limit(self, packet: bytes) -> None:
        """Limit the requests and bytes that are served each second."""
        _, requests, rate = exact(devmsg.LIMIT_BODY, packet)
        self.device.limit(requests, rate)

    INFORMS = Process.INFORMS | {devmsg.RESIZE: on_resize, devmsg.LIMIT: on_limit}
    QUESTIONS = Process.QUESTIONS | {
        devmsg.SETTLE: on_settle,
        devmsg.SETTLE_AHEAD: on_settle_ahead,
        devmsg.LET_GO: on_let_go,
        devmsg.TAKE_BACK: on_take_back,
        devmsg.SIGN: on_sign,
        devmsg.LEND: on_lend,
        devmsg.RELOAD: on_reload,
    }


def run(open_disk: "Callable[[Host], Image]") -> int:
    """Run the process.  `open_disk` raises ImageError or PeerError."""
    return process.main("vioblk", VIOBLK, lambda services: make(services, open_disk), VioblkProcess)


def make(services: VioblkProcess, open_disk: "Callable[[Host], Image]") -> Vioblk:
    """Open the disk and start the threads.  Raises ImageError or PeerError."""
    host = services.host
    name_thread(EVENT)
    if not host.resources:
        raise PeerError(process.PEER, "a disk without an image")
    image = open_disk(host)
    if image.size < SECTOR:
        raise ImageError(image.path, f"{image.size} bytes are less than a sector of {SECTOR}")
    disk = Vioblk(image, services, Workers(WORKERS_MAX), serial=host.serial or b"vioblk%d" % host.index)
    disk.watch_lock()
    return disk


def granularity(note: int) -> int:
    """Return the discard granularity of a block device in bytes, as a resource's note has it; 0 if unknown."""
    return (note >> devmsg.RESOURCE_DISCARD_SHIFT) * SECTOR
