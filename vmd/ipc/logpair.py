"""What leads to the process "log": a pair of sockets for each VM, and for each process of the daemon."""

import os

from vmd.ipc import sockets as socket

JOURNAL_FD = 4  # where the process "log" has a socket that is connected to the journal, if there is one


def logpair() -> tuple[socket.socket, socket.socket]:
    """Return the end that is read and the end that is written to; each line is a packet.  Raises OSError.

    With each packet comes, by the kernel's word, which process has sent it.
    """
    reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    os.set_blocking(reader.fileno(), False)
    os.set_blocking(writer.fileno(), False)  # for what Python itself writes, a traceback
    return reader, writer
