"""vioblk: a disk, one queue of 256.

Runs as  _vmd, in its VM's cell, with file calls on descriptors only
Peers    its VM process
Holds    guest memory, one queue's eventfds, and the disk's image chain, the disk itself first
"""

from vmd.devices import process
from vmd.devices.vioblk.device import WORKERS, Vioblk, Workers
from vmd.errors import PeerError
from vmd.images.chain import Link, open_chain
from vmd.images.header import MAGIC, parse_header
from vmd.images.hostfile import read_bytes
from vmd.ipc import devmsg
from vmd.privsep.confine import VIOBLK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.devices.process import Host, Process
    from vmd.images.image import Image


def main() -> int:
    """Run the process."""
    return process.main(VIOBLK, make)


def make(services: "Process") -> Vioblk:
    """Open the disk and start the threads.  Raises ImageError or PeerError."""
    host = services.host
    return Vioblk(open_disk(host), services, Workers(WORKERS), index=host.index)


def open_disk(host: "Host") -> "Image":
    """Open the chain of images.

    The VM says what the disk itself is; of those below, each but the last is a qcow2 image, or nothing would be
    below it, and the last is what the one above it says.  If that says nothing, its own first bytes do; it is
    never written, and `open_chain` lets it have nothing below it.
    """
    if not host.resources:
        raise PeerError(process.VM, "a disk without an image")
    disk = f"disk {host.index}"
    links: list[Link] = []
    form, guessed = "qcow2" if host.flags & devmsg.START_QCOW2 else "raw", bool(host.flags & devmsg.START_GUESSED)
    for depth, fd in enumerate(host.resources):
        path = f"backing file {depth} of {disk}" if depth else disk
        links.append(Link(fd=fd, path=path, format=form, guessed=guessed))
        if form == "qcow2":
            form, guessed = parse_header(fd, path).backing_format, False
            if not form and depth + 1 < len(host.resources):
                magic = read_bytes(host.resources[depth + 1], len(MAGIC), 0)
                form, guessed = "qcow2" if magic == MAGIC else "raw", True
    return open_chain(links, writable=not host.flags & devmsg.START_READ_ONLY)
