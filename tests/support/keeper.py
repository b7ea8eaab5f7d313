"""Plays the service manager for one daemon: keeps stored descriptors and passes them to the next (sd_notify(3))."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.daemon import DEADLINE_S, START_DEADLINE_S, Daemon

MESSAGE_BYTES = 4096
FDS_MAX = 253  # descriptors in one message (SCM_MAX_FD)
# Executes a program whose descriptors from 3 on are those that the first argument lists.
LAUNCHER = """
import fcntl, os, sys
fds = [fcntl.fcntl(int(word), fcntl.F_DUPFD_CLOEXEC, 3 + len(sys.argv[1])) for word in sys.argv[1].split()]
for number, fd in enumerate(fds, 3):
    os.dup2(fd, number)
os.closerange(3 + len(fds), 65536)  # those that it came with; a hang-up is to be seen when the named ones are closed
if fds:
    os.environ["LISTEN_PID"] = str(os.getpid())
os.execvp(sys.argv[2], sys.argv[2:])
"""


class Stored:
    """One stored descriptor."""

    def __init__(self, name: str, fd: int, *, poll: bool) -> None:
        self.name = name
        self.fd = fd
        self.poll = poll  # it is removed when it hangs up


class Keeper:
    """The store and the notifications of one service; a context manager.

    A thread serves the daemon, because the daemon may wait until its message is read.
    """

    def __init__(self, path: Path) -> None:
        """`path` is the path of the notification socket, which is made here."""
        self.path = path
        self.said: list[str] = []  # every line in order, except those about descriptors
        self._stored: list[Stored] = []
        self._changed = threading.Condition()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._end_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.eventfd_write(self._end_fd, 1)
        self._thread.join()
        self._socket.close()
        os.close(self._end_fd)
        self.path.unlink()
        self.empty()

    @property
    def names(self) -> list[str]:
        """Return the sorted names of the stored descriptors, without those that have hung up."""
        with self._changed:
            return sorted(stored.name for stored in self._stored)

    def fd(self, name: str) -> int:
        """Return the descriptor of a name.  The keeper closes it."""
        with self._changed:
            return next(stored.fd for stored in self._stored if stored.name == name)

    def empty(self) -> None:
        """Remove all descriptors, as for a stopped unit."""
        with self._changed:
            for stored in self._stored:
                os.close(stored.fd)
            self._stored.clear()

    def wait_said(self, line: str, *, after: int = 0, timeout_s: float = DEADLINE_S) -> bool:
        """Wait for a line after the first `after` lines; return whether it came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: line in self.said[after:], timeout_s)

    def wait_names(self, *names: str) -> None:
        """Wait until exactly these names are stored."""
        with self._changed:
            kept = self._changed.wait_for(
                lambda: sorted(stored.name for stored in self._stored) == sorted(names), DEADLINE_S
            )
            assert kept, f"stored: {[stored.name for stored in self._stored]}, not {names}"

    def spawn(
        self, command: Sequence[str | Path], *, log: Path, cwd: Path, environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a program with all stored descriptors; append its standard output and error to `log`."""
        with self._changed:
            stored = tuple(self._stored)
            listen = {"LISTEN_FDS": str(len(stored)), "LISTEN_FDNAMES": ":".join(one.name for one in stored)}
            fds = [one.fd for one in stored]
            with log.open("ab") as output:
                return subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", LAUNCHER, " ".join(map(str, fds)), *map(str, command)],
                    cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=fds,
                    env={**environment, "NOTIFY_SOCKET": str(self.path), **(listen if stored else {})},
                )  # fmt: skip

    # --- the thread ----------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            poll = select.poll()
            poll.register(self._end_fd, select.POLLIN)
            poll.register(self._socket, select.POLLIN)
            with self._changed:
                for stored in self._stored:
                    if stored.poll:
                        poll.register(stored.fd, 0)
            ready = dict(poll.poll())
            if self._end_fd in ready:
                return
            with self._changed:
                # Like systemd, handle messages from before a hang-up before the hang-up.
                if self._socket.fileno() in ready:
                    self._hear()
                else:
                    self._drop({stored for stored in self._stored if stored.poll and stored.fd in ready})
                self._changed.notify_all()

    def _hear(self) -> None:
        text, fds, _, _ = socket.recv_fds(self._socket, MESSAGE_BYTES, FDS_MAX)
        lines = text.decode().splitlines()
        assigned = dict(line.split("=", 1) for line in lines)
        name = assigned.get("FDNAME", "stored")
        if assigned.get("FDSTORE") == "1":
            poll = assigned.get("FDPOLL") != "0"
            self._stored += [Stored(name, fd, poll=poll) for fd in fds]
            return
        for fd in fds:  # BARRIER=1: its sender waits for this
            os.close(fd)
        if assigned.get("FDSTOREREMOVE") == "1":
            self._drop({stored for stored in self._stored if stored.name == name})
        else:
            self.said += lines

    def _drop(self, over: set[Stored]) -> None:
        for stored in over:
            self._stored.remove(stored)
            os.close(stored.fd)


class KeptDaemon(Daemon):
    """A daemon with a keeper.  The next daemon of the same directory starts with the descriptors of the last one."""

    keeper: Keeper

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        with self._stack:
            self.keeper = self._stack.enter_context(Keeper(self.directory / "notify.sock"))
            super().__enter__()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            super().__exit__(kind, error, trace)

    def start(self) -> None:
        """Start the daemon and wait until it logs that it serves."""
        said = len(self.keeper.said)
        self.process = process = self.keeper.spawn(
            [*self.prefix, *self.vmd, "-d", "-s", self.socket, "-f", self.conf], log=self.log_path, cwd=self.code,
            environment={**os.environ, "STATE_DIRECTORY": str(self.state)},
        )  # fmt: skip
        deadline = time.monotonic() + START_DEADLINE_S
        while not self.keeper.wait_said("READY=1", after=said, timeout_s=0.2):
            if process.poll() is not None:
                raise AssertionError(f"vmd did not start:\n{self.log}")
            if time.monotonic() > deadline:
                process.kill()
                process.wait()
                raise AssertionError(f"vmd is not ready after {START_DEADLINE_S} s:\n{self.log}")

    def stop(self) -> int:
        """Stop the service: the daemon asks the guests to shut down, and afterwards the store is empty."""
        status = super().stop()
        self.keeper.empty()
        return status

    def hand_over(self) -> int:
        """End the daemon for a restart (SIGUSR2) while its guests go on; return its exit status."""
        return self._end(signal.SIGUSR2)

    def kill(self) -> int:
        """Kill the daemon; return its exit status."""
        return self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Restart the daemon as `systemctl restart` does."""
        assert self.hand_over() == 0, self.log
        self.start()

    def _end(self, signum: int) -> int:
        assert self.process is not None
        process, self.process = self.process, None
        process.send_signal(signum)
        return process.wait(DEADLINE_S)
