"""The courier: a pair of sockets over which files go straight from who has opened them to who uses them.

The parent makes the pair and gives both ends away, so no descriptor that others chose passes through it, or through
any other process that all guests hang on.  The kernel closes what is still on its way in the name of whoever closes
the socket last, and that may wait for ever.  So nothing is sent before the other end has asked for it: until then
nothing is on its way, and from then on its receiver holds that end.

The files travel in one packet, which names each: `files boot disks disks cdrom`.
"""

import select
import time

from vmd.closing import close_all
from vmd.errors import HostError
from vmd.ipc import sockets as socket
from vmd.ipc.rights import receive, refuse_files, rights_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ASK = b"files"
HEAD = "files"  # with which a packet begins, for there may be none in it
NAMES = ("boot", "initrd", "disks", "cdrom", "stream", "kernel", "log", "seed")
FILES_MAX = 32  # four disks of four images, and what a VM boots from
PACKET_MAX = 1024
PATIENCE_S = 30.0  # for files that are open already


def pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a courier: that of who asks, and that of who gives.  Raises HostError."""
    try:
        asks, gives = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as error:
        raise HostError("make a courier", error) from error
    refuse_files(gives)  # a VM that was taken over has files, and root's control gives it a stream
    return asks, gives


def give(sock: socket.socket, files: "Mapping[str, Sequence[int]]") -> bool:
    """Wait until the other end asks, send the files, and return whether they have left; they stay open here.

    Raises OSError.
    """
    if sock.recv(len(ASK)) != ASK:
        return False
    send(sock, files)
    return True


def send(sock: socket.socket, files: "Mapping[str, Sequence[int]]") -> None:
    """Send files to who has asked.  Raises OSError."""
    names = " ".join((HEAD, *(name for name, fds in files.items() for _ in fds)))
    rights = rights_of(fd for each in files.values() for fd in each)
    sock.sendmsg([names.encode()], rights, socket.MSG_NOSIGNAL)


def ask(sock: socket.socket) -> None:
    """Ask for the files.  Raises OSError."""
    sock.send(ASK, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)


def take(sock: socket.socket) -> "dict[str, list[int]]":
    """Return the files that have come, by name.  Raises OSError, if none will come; ValueError for anything else."""
    packet, fds, flags = receive(sock, PACKET_MAX, FILES_MAX, socket.MSG_DONTWAIT)
    if not packet and not fds:
        raise ConnectionResetError
    head, *names = packet.decode("ascii", "replace").split() or [""]
    fits = head == HEAD and len(names) == len(fds) and set(names) <= set(NAMES)
    if not fits or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close_all(fds)
        raise ValueError("something else came than files")
    files: dict[str, list[int]] = {}
    for name, fd in zip(names, fds, strict=True):
        files.setdefault(name, []).append(fd)
    return files


def fetch(sock: socket.socket, timeout_s: float = PATIENCE_S) -> "dict[str, list[int]]":
    """Ask for the files and wait for them.  Raises OSError if they do not come; ValueError as `take`."""
    deadline_s = time.monotonic() + timeout_s
    ask(sock)
    readable = select.poll()
    readable.register(sock, select.POLLIN)
    if not readable.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
        raise TimeoutError
    return take(sock)
