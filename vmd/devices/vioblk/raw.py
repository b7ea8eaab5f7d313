"""vioblk for a raw image.  It imports no code for other formats, which saves 0.5 MiB of memory."""

from vmd.devices import process
from vmd.devices.vioblk.disk import granularity, run
from vmd.errors import ImageError, PeerError
from vmd.images.raw import RawImage
from vmd.ipc import devmsg

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.devices.process import Host


def main() -> int:
    """Run the process."""
    return run(open_disk)


def open_disk(host: "Host") -> RawImage:
    """Open the image."""
    fd, note, path = host.resources[0], host.notes[0], host.names[0]
    if len(host.resources) > 1 or note & devmsg.RESOURCE_QCOW2:
        raise PeerError(process.PEER, "an image that is not raw")
    try:
        return RawImage(
            fd,
            path,
            writable=not host.flags & devmsg.START_READ_ONLY,
            guessed=bool(note & devmsg.RESOURCE_GUESSED),
            discard_granularity=granularity(note),
        )
    except OSError as error:
        raise ImageError(path, f"cannot be used: {error.strerror}") from error
