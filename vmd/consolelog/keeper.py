"""One console log: copies the output of a VM from its backlog to a file, on a thread that may block.

Storage that does not answer may block the thread for ever, and this log alone.  Output that does not fit into the file
stays in the backlog, which has 64 KiB.  Output that the backlog loses is counted, and the log says where it is missing.
"""

import errno
import os
import threading
import time

from vmd.closing import close
from vmd.errors import sentence
from vmd.ipc import courier
from vmd.ipc import sockets as socket
from vmd.ipc.messages.consolelog import SILENT
from vmd.tasks import start_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.backlog import LoggedBacklog

RETRY_S = 5.0  # after a write that has failed
SAY_S = 5.0  # between two reports of losses only
TRIES = 4  # to read output before the guest overwrites it; then the next look tries again
STUCK_S = 30.0  # a write that takes longer is reported
# The file may exceed its limit by so much while the next file is opened.
OVERRUN_BYTES = 256 << 10
FULL = (errno.ENOSPC, errno.EDQUOT)  # another file would not help
MISSING = "\r\n[vmd: {} bytes are missing here]\r\n"


class State:
    """The state of a log, for the parent."""

    def __init__(
        self, text: str = "", lost: int = 0, *, files: int = 0, wants_file: bool = False, ended: bool = False
    ) -> None:
        self.text = text  # why the log cannot be written; empty if it can
        self.lost = lost  # bytes that are missing in the log
        self.files = files  # number of files that the keeper was given
        self.wants_file = wants_file  # needs another file
        self.ended = ended

    def copy(self, **changes: "str | int") -> "State":
        """Return a copy with some fields changed."""
        return State(**{**vars(self), **changes})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, State) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]  # it changes


class Keeper:
    """Writes one log.  The main thread calls `look`, `take_file` and `end`, and `report` is called on it."""

    def __init__(
        self,
        name: str,
        backlog: "LoggedBacklog",
        report: "Callable[[State], None]",
        call: "Callable[[Callable[[], None]], None]",
    ) -> None:
        """`call` makes a call on the main thread.  Raises HostError."""
        self.backlog = backlog
        self._report = report
        self._call = call
        self._changed = threading.Condition()
        self._woken = self._ending = False
        self._next: socket.socket | None = None  # a courier with another file
        self._limit = 0  # bytes of a file
        self._busy_s = 0.0  # when the thread began its present work; 0 if it has none
        self._stuck = False  # it was reported that the present write takes too long
        # Of the thread:
        self._file = -1
        self._size = 0
        self._gap = 0  # bytes that are missing, which the file does not say yet
        self._retry_s = 0.0
        self._state = State()
        self._said, self._said_s = State(), 0.0
        self.ended = False
        start_thread("keeper", threading.Thread(target=self._run, name=name, daemon=True).start)

    # --- the main thread -----------------------------------------------------------------------------------

    def look(self) -> bool:
        """Wake the thread if there is output.  Return whether there is.  Report a write that takes too long."""
        now_s, busy_s, state = time.monotonic(), self._busy_s, self._state
        stuck = bool(busy_s) and now_s > busy_s + STUCK_S
        if stuck != self._stuck:
            self._stuck = stuck
            self._report(state.copy(text=SILENT if stuck else state.text))
        if busy_s:
            return not stuck
        prints = self.backlog.shown() != self.backlog.logged and self._file >= 0 and now_s >= self._retry_s
        if prints:
            self._wake()
        return prints

    def take_file(self, sock: socket.socket | None, size_bytes: int) -> None:
        """Continue with the file that comes over a courier.  Without one, only change the size limit."""
        self._limit = size_bytes
        if sock is None:
            return
        with self._changed:
            before, self._next = self._next, sock
        if before is not None:
            before.close()
        self._wake()

    def end(self) -> None:
        """Write the rest and end: the VM prints nothing more."""
        self._ending = True
        self._wake()

    def _wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify()

    # --- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self.ended:
            with self._changed:
                self._changed.wait_for(lambda: self._woken)
                self._woken = False
                ending = self._ending
                another, self._next = self._next, None
            self._busy_s = time.monotonic()
            if another is not None:
                self._fetch(another)
            self._write_all()
            if ending:
                self._close()
                self._count_rest()
                self.ended = self._state.ended = True
            self._busy_s = 0.0
            self._say()

    def _say(self) -> None:
        """Tell the parent what has changed.  If only the count of lost bytes has changed, wait for SAY_S seconds."""
        now, said = self._state, self._said
        only_lost = said.copy(lost=now.lost) == now
        if now == said or (only_lost and time.monotonic() < self._said_s + SAY_S):
            return
        state = self._said = now.copy()
        self._said_s = time.monotonic()
        self._call(lambda: self._report(state))

    def _fetch(self, sock: socket.socket) -> None:
        """Continue with another file.  If none comes, keep the present one."""
        with sock:
            try:
                (fd,) = courier.fetch(sock)["log"]
            except (OSError, ValueError, KeyError):
                return  # the process "logfile" tells the parent why
        self._close()
        self._file, self._retry_s = fd, 0.0
        self._state.wants_file, self._state.text = False, ""
        self._state.files += 1

    def _close(self) -> None:
        fd, self._file = self._file, -1
        if fd >= 0:
            close(fd)

    def _write_all(self) -> None:
        """Write the output, as far as there is a file with room for it."""
        try:
            if self._file >= 0:
                status = os.fstat(self._file)
                self._size = status.st_size
                if not status.st_nlink:  # it was removed
                    self._close()
                    self._state.wants_file = True
            while self._file >= 0 and (data := self._take()):
                room = self._limit + OVERRUN_BYTES - self._size
                if room <= 0:
                    return
                if self._gap:
                    self._size += os.write(self._file, MISSING.format(self._gap).encode())
                    self._gap = 0
                written = os.write(self._file, data[:room])
                self.backlog.log(written)
                self._size += written
                if self._size >= self._limit:
                    self._state.wants_file = True
            if self._file >= 0:
                self._state.text = ""  # all is written
        except OSError as error:
            self._fail(error)

    def _take(self) -> bytes:
        """Return the next output.  Count the bytes that the backlog has lost."""
        for _ in range(TRIES):
            missing, data = self.backlog.fresh()
            if missing:
                self._gap += missing
                self._state.lost += missing
                self.backlog.log(missing)
            if data or not missing:
                return data
        return b""

    def _count_rest(self) -> None:
        """Count the output that will not be written."""
        self._state.lost += max(0, self.backlog.shown() - self.backlog.logged)

    def _fail(self, error: OSError) -> None:
        self._state.text = sentence(error)
        self._retry_s = time.monotonic() + RETRY_S
        if error.errno not in FULL:
            self._close()  # which also unlocks it
            self._state.wants_file = True
