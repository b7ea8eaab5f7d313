"""One console log: takes what a VM prints out of its backlog and writes it to a file, on a thread that may wait.

Storage may keep the thread for ever, and with it nothing but this log.  What the file has no room for stays in the
backlog, which has 64 KiB; what is lost beyond that is counted, and said where it is missing.
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
TRIES = 4  # to read what is not written over meanwhile, until the next look
STUCK_S = 30.0  # in one write
# The file may grow so much larger than it should while the next one is opened.
OVERRUN_BYTES = 256 << 10
FULL = (errno.ENOSPC, errno.EDQUOT)  # of which another file is no cure
MISSING = "\r\n[vmd: {} bytes are missing here]\r\n"


class State:
    """How a log fares, for the parent."""

    def __init__(
        self, text: str = "", lost: int = 0, *, files: int = 0, wants_file: bool = False, ended: bool = False
    ) -> None:
        self.text = text  # why it is not written
        self.lost = lost  # bytes
        self.files = files  # that it was given
        self.wants_file = wants_file  # another one
        self.ended = ended

    def copy(self, **changes: "str | int") -> "State":
        """Return one like it."""
        return State(**{**vars(self), **changes})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, State) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]  # it changes


class Keeper:
    """Writes one log.  `look`, `take_file` and `end` belong to the main thread, where `report` is called, too."""

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
        self._limit = 0  # of its size
        self._busy_s = 0.0  # since when the thread is at work
        self._stuck = False  # for so long that this was said
        # Of the thread:
        self._file = -1
        self._size = 0
        self._gap = 0  # bytes that are missing and of which the file does not say so yet
        self._retry_s = 0.0
        self._state = State()
        self._said, self._said_s = State(), 0.0
        self.ended = False
        start_thread("keeper", threading.Thread(target=self._run, name=name, daemon=True).start)

    # --- the main thread -----------------------------------------------------------------------------------

    def look(self) -> bool:
        """Have written what is there, and return whether there is something; say so if that does not end."""
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
        """Write to the file that comes over a courier from now on; without one to the same, up to another size."""
        self._limit = size_bytes
        if sock is None:
            return
        with self._changed:
            before, self._next = self._next, sock
        if before is not None:
            before.close()
        self._wake()

    def end(self) -> None:
        """Nothing more will be printed: write what is left and end."""
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
        """Tell the parent what has changed; of losses alone only now and then."""
        now, said = self._state, self._said
        only_lost = said.copy(lost=now.lost) == now
        if now == said or (only_lost and time.monotonic() < self._said_s + SAY_S):
            return
        state = self._said = now.copy()
        self._said_s = time.monotonic()
        self._call(lambda: self._report(state))

    def _fetch(self, sock: socket.socket) -> None:
        """Go on with another file; without one as before."""
        with sock:
            try:
                (fd,) = courier.fetch(sock)["log"]
            except (OSError, ValueError, KeyError):
                return  # who should have opened it says why
        self._close()
        self._file, self._retry_s = fd, 0.0
        self._state.wants_file, self._state.text = False, ""
        self._state.files += 1

    def _close(self) -> None:
        fd, self._file = self._file, -1
        if fd >= 0:
            close(fd)

    def _write_all(self) -> None:
        """Write all there is, as far as there is a file with room."""
        try:
            if self._file >= 0:
                status = os.fstat(self._file)
                self._size = status.st_size
                if not status.st_nlink:  # somebody has removed it
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
        """Return what is to be written next; what the backlog has no more is counted."""
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
        """Count what will be written no more."""
        self._state.lost += max(0, self.backlog.shown() - self.backlog.logged)

    def _fail(self, error: OSError) -> None:
        self._state.text = sentence(error)
        self._retry_s = time.monotonic() + RETRY_S
        if error.errno not in FULL:
            self._close()  # and with that unlock it
            self._state.wants_file = True
