"""Sources of lines: each is the socket of one VM's processes, or of one process of the daemon.

A packet is a line, `<6>title: text`, or a piece of text that an interpreter writes itself, such as a traceback.
Any process of the source may have written it.  So the source decides which VM a line belongs to, not its text.
"""

import os

from vmd.ipc import sockets as socket
from vmd.log import ERR, LINE_MAX, RateLimit, visible
from vmd.privsep.linux import UCRED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CREDENTIALS_SPACE = socket.CMSG_SPACE(UCRED.size)  # no room for descriptors: the kernel closes them
TITLE_MAX = 64  # characters of a title behind the name of its VM


class Line:
    """One line of the log; `text` begins with the title of its process."""

    __slots__ = ("pid", "severity", "source", "text")

    def __init__(self, source: "Source", severity: int, text: str, pid: int) -> None:
        self.source = source
        self.severity = severity
        self.text = text
        self.pid = pid


class Source:
    """A socket that lines come from.  `vmid` is 0 if they belong to no VM; `limits` are its token buckets.

    `waiting` is the number of its lines that are not written yet.  The sink changes it.
    """

    def __init__(self, sock: socket.socket, name: str, vmid: int, limits: "tuple[RateLimit, ...]" = ()) -> None:
        self.sock = sock
        self.name = name
        self.vmid = vmid
        self.limits = limits
        self.ended = False
        self.waiting = 0
        self.on_room: Callable[[], None] | None = None
        self.said_s = 0.0  # when the log last said that this source writes too much
        self._unfinished = b""  # the start of a line that an interpreter writes
        sock.setblocking(False)

    def fileno(self) -> int:
        """Return the descriptor, for the loop."""
        return self.sock.fileno()

    def allows(self) -> bool:
        """Return whether another line may be taken now."""
        return all(limit.allow() for limit in self.limits)

    def receive(self) -> "list[Line] | None":
        """Return the lines of the next packet, or None if there is none now.  At the end of the socket, set `ended`."""
        try:
            packet, credentials, _, _ = self.sock.recvmsg(LINE_MAX + 1, CREDENTIALS_SPACE)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError:
            packet, credentials = b"", []
        pid = sender(credentials)
        if packet:
            return list(self._lines(packet, pid))
        if pid:  # a process sent an empty packet
            return []
        self.ended = True
        return [self._raw(self._unfinished, 0)] if self._unfinished else None

    def _lines(self, packet: bytes, pid: int) -> "Iterator[Line]":
        if packet[:1] == b"<" and packet[2:3] == b">" and packet[1:2] in b"01234567":
            text = visible(packet[3:].decode("utf-8", "backslashreplace"))
            yield Line(self, int(packet[1:2]), text if self._is_ours(text) else f"{self.name}: {text}", pid)
            return
        *lines, self._unfinished = (self._unfinished + packet).split(b"\n")
        if len(self._unfinished) > LINE_MAX:
            lines.append(self._unfinished)
            self._unfinished = b""
        for line in lines:
            yield self._raw(line, pid)

    def _raw(self, line: bytes, pid: int) -> Line:
        return Line(self, ERR, f"{self.name}: {visible(line.decode('utf-8', 'backslashreplace'))}", pid)

    def _is_ours(self, text: str) -> bool:
        """Return whether a line begins with a title that a process of this source can have."""
        title, colon, _ = text.partition(": ")
        if not colon or not title.startswith(self.name):
            return False
        device = title[len(self.name) :]
        return not device or (device[0] == "/" and device[1:].isalnum() and len(device) <= TITLE_MAX)


def sender(ancillary: "list[tuple[int, int, bytes]]") -> int:
    """Return the pid of the process that sent a packet; 0 at the end of the socket."""
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS and len(data) == UCRED.size:
            pid: int = UCRED.unpack(data)[0]
            return pid or os.getpid()
    return 0
