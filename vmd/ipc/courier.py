"""The courier: a pair of sockets that takes files directly from the process that opened them to the one that uses them.

The parent makes the pair and gives both ends away.  So descriptors of files that users chose never pass through the
parent, or through another process that all guests depend on.

If the last end of a socket is closed while files are in flight, the kernel closes these files in the closing process,
and that may block for ever.  So the giver sends nothing before the other end has asked.  Before that no file is in
flight; after that the receiver holds its end.

The files travel in one packet, which names each: `files boot disks disks cdrom`.
"""

import time

from vmd.closing import close_all
from vmd.errors import HostError
from vmd.ipc import sockets as socket
from vmd.ipc.rights import receive, refuse_files, rights_of
from vmd.readable import readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ASK = b"files"
HEAD = "files"  # the first word of a packet, so that a packet without files is not empty
NAMES = ("boot", "initrd", "disks", "cdrom", "stream", "kernel", "log", "seed")
FILES_MAX = 32  # four disks of four images, and the boot files
PACKET_MAX = 1024
PATIENCE_S = 30.0  # how long `fetch` waits; the files are open already


def pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a courier: the receiver's, then the giver's.  Raises HostError."""
    try:
        asks, gives = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as error:
        raise HostError("make a courier", error) from error
    refuse_files(gives)  # a VM process that was taken over could send files to root's control, which gives it a stream
    return asks, gives


def give(sock: socket.socket, files: "Mapping[str, Sequence[int]]") -> bool:
    """Wait until the other end asks, then send the files; return whether they were sent.  They stay open here.

    Raises OSError.
    """
    if sock.recv(len(ASK)) != ASK:
        return False
    send(sock, files)
    return True


def send(sock: socket.socket, files: "Mapping[str, Sequence[int]]") -> None:
    """Send files to the other end, which has asked.  Raises OSError."""
    names = " ".join((HEAD, *(name for name, fds in files.items() for _ in fds)))
    rights = rights_of(fd for each in files.values() for fd in each)
    sock.sendmsg([names.encode()], rights, socket.MSG_NOSIGNAL)


def ask(sock: socket.socket) -> None:
    """Ask for the files.  Raises OSError."""
    sock.send(ASK, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)


def take(sock: socket.socket) -> "dict[str, list[int]]":
    """Return the files that have arrived, by name.

    Raises:
        OSError: the giver has closed its end, or nothing has arrived.
        ValueError: the packet is malformed.
    """
    packet, fds, flags = receive(sock, PACKET_MAX, FILES_MAX, socket.MSG_DONTWAIT)
    if not packet and not fds:
        raise ConnectionResetError
    head, *names = packet.decode("ascii", "replace").split() or [""]
    fits = head == HEAD and len(names) == len(fds) and set(names) <= set(NAMES)
    if not fits or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close_all(fds)
        raise ValueError("the packet is not one of files")
    files: dict[str, list[int]] = {}
    for name, fd in zip(names, fds, strict=True):
        files.setdefault(name, []).append(fd)
    return files


def fetch(sock: socket.socket, timeout_s: float = PATIENCE_S) -> "dict[str, list[int]]":
    """Ask for the files and wait for them.  Raises OSError if they do not arrive in time; ValueError as `take`."""
    deadline_s = time.monotonic() + timeout_s
    ask(sock)
    if not readable(sock, max(0.0, deadline_s - time.monotonic())):
        raise TimeoutError
    return take(sock)
