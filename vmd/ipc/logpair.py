"""The sockets to the process "log": a pair for each VM, and for each process of the daemon."""

import os

from vmd.ipc import sockets as socket

JOURNAL_FD = 4  # in the process "log": a socket that is connected to the journal, if there is one


def logpair() -> tuple[socket.socket, socket.socket]:
    """Return the reading end and the writing end; each line is a packet.  Raises OSError.

    With each packet the kernel tells the reader which process has sent it (SCM_CREDENTIALS).
    """
    reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    os.set_blocking(reader.fileno(), False)
    os.set_blocking(writer.fileno(), False)  # so that a traceback written by Python itself does not block either
    return reader, writer
