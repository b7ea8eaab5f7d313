"""vioblk for images of all formats, with the images that they are based on."""

from vmd.devices.vioblk.disk import granularity, run
from vmd.images.chain import Link, open_chain
from vmd.ipc import devmsg

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.devices.process import Host
    from vmd.images.image import Image


def main() -> int:
    """Run the process."""
    return run(open_disk)


def open_disk(host: "Host") -> "Image":
    """Open the chain of images.  The VM says the format of each; no format is guessed from an image's bytes here."""
    links = [
        Link(
            fd=fd,
            path=name,
            format="qcow2" if note & devmsg.RESOURCE_QCOW2 else "raw",
            guessed=bool(note & devmsg.RESOURCE_GUESSED),
            discard_granularity=granularity(note),
        )
        for fd, note, name in zip(host.resources, host.notes, host.names, strict=True)
    ]
    return open_chain(links, writable=not host.flags & devmsg.START_READ_ONLY)
