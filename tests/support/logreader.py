"""A reader of a daemon's log: a socket as standard error, which is read only when a test asks for it."""

import ctypes
import os
import select
import socket
import sys
import time
from pathlib import Path
from typing import Self

from tests.support.daemon import DEADLINE_S, Daemon

SYS_PIDFD_GETFD = 438
CONNECT = """
import os, socket, sys
path, *command = sys.argv[1:]
sock = socket.socket(socket.AF_UNIX)
sock.connect(path)
os.dup2(sock.fileno(), 2)
status = os.fstat(2)
os.environ["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
os.execvp(command[0], command)
"""


class LogReader:
    """The reading end of the log.  It keeps everything that was read."""

    def __init__(self, directory: Path) -> None:
        path = directory / "log.sock"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._sock: socket.socket | None = None
        self._raw = b""
        self.prefix = [sys.executable, "-c", CONNECT, str(path)]  # the prefix for a Daemon

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        if self._sock is not None:
            self._sock.close()

    @property
    def lines(self) -> list[str]:
        """Read everything available; return all lines so far."""
        if self._sock is None:
            self._sock, _ = self._listener.accept()
        while select.select([self._sock], [], [], 0)[0]:
            part = self._sock.recv(1 << 16)
            if not part:
                break
            self._raw += part
        return self._raw.decode(errors="replace").split("\n")[:-1]

    def wait(self, text: str) -> str:
        """Read until a line has a text; return that line."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            for line in self.lines:
                if text in line:
                    return line
            assert time.monotonic() < deadline, f"no {text!r} in the log:\n" + "\n".join(self.lines)
            assert self._sock is not None
            select.select([self._sock], [], [], 1)

    def fill(self, vmd: Daemon) -> None:
        """Fill the socket's buffer, so that vmd cannot log more until it is read."""
        with borrowed(vmd.pid, 2) as sock:
            while select.select([], [sock], [], 0)[1]:
                try:
                    sock.send(b"full\n" * 200, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    break
            while True:
                try:
                    sock.send(b"\n", socket.MSG_DONTWAIT)
                except BlockingIOError:
                    return


def borrowed(pid: int, fd: int) -> socket.socket:
    """Return a copy of a process's descriptor, to act as an attacker who controls the process."""
    pidfd = os.pidfd_open(pid)
    try:
        copy = ctypes.CDLL(None, use_errno=True).syscall(SYS_PIDFD_GETFD, pidfd, fd, 0)
        assert copy >= 0, os.strerror(ctypes.get_errno())
        return socket.socket(fileno=copy)
    finally:
        os.close(pidfd)
