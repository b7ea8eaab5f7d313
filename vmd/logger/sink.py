"""Writes lines to standard error, the journal or syslog, on a thread of its own, which may block.

A terminal, pipe, file or socket makes its writer wait for a slow reader.  The number of unwritten lines is bounded for
each source.  Beyond it the source's lines stay in its socket.  When that is full, its processes drop lines and count
them.
"""

import os
import threading
from collections import deque

from vmd.ipc import sockets as socket
from vmd.log import JOURNAL, LOG_DAEMON, WARNING, shaped
from vmd.logger.source import Line
from vmd.tasks import start_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.logger.source import Source

WAITING_MAX = 64  # lines of one source
OUTPUT_FD = 2


def entry(line: Line) -> bytes:
    """Return a line in the journal's native protocol (systemd.journal-fields(7))."""
    fields = [f"PRIORITY={line.severity}", f"SYSLOG_FACILITY={LOG_DAEMON >> 3}", "SYSLOG_IDENTIFIER=vmd"]
    fields += [f"SYSLOG_PID={line.pid}"] if line.pid else []
    if line.source.vmid:
        fields += [f"VM_ID={line.source.vmid}", f"VM_NAME={line.source.name.removeprefix('vm/')}"]
    fields.append(f"MESSAGE={line.text}")
    return "\n".join((*fields, "")).encode("utf-8", "backslashreplace")


class Sink:
    """A queue of lines and the thread that writes them.  The main thread calls `put`, `has_room` and `wait_idle`."""

    def __init__(self, form: str, journal: socket.socket | None, call: "Callable[[Callable[[], None]], None]") -> None:
        """Start the thread.  `call` makes a call on the main thread.  Raises HostError.

        A `journal` gets entries with fields.  Entries that it refuses go to standard error.
        """
        self.form = form
        self.journal = journal
        self._call = call
        self._lines: deque[Line] = deque()
        self._changed = threading.Condition()
        self._lost = 0  # lines that could not be written
        start_thread("writer", threading.Thread(target=self._run, name="writer", daemon=True).start)

    def put(self, line: Line) -> bool:
        """Queue a line.  Return whether there is room for another line of its source."""
        with self._changed:
            line.source.waiting += 1
            self._lines.append(line)
            self._changed.notify_all()
            return line.source.waiting < WAITING_MAX

    def has_room(self, source: "Source", on_room: "Callable[[], None]") -> bool:
        """Return whether there is room for a line of a source.  If not, `on_room` is called once there is."""
        with self._changed:
            if source.waiting < WAITING_MAX:
                return True
            source.on_room = on_room
            return False

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until all lines are written.  Return False if that takes longer than `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._lines, timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines)
                line = self._lines[0]
            self._deliver(line)
            with self._changed:
                self._lines.popleft()
                source = line.source
                source.waiting -= 1
                if source.on_room is not None and source.waiting <= WAITING_MAX // 2:
                    self._call(source.on_room)
                    source.on_room = None
                self._changed.notify_all()

    def _deliver(self, line: Line) -> None:
        """Write a line.  If lines before it were lost, first write how many."""
        if self._lost:
            if not self._write(Line(line.source, WARNING, f"log: {self._lost} lines could not be written", 0)):
                self._lost += 1
                return
            self._lost = 0
        if not self._write(line):
            self._lost += 1

    def _write(self, line: Line) -> bool:
        if self.journal is not None:
            try:
                self.journal.send(entry(line))
            except OSError:
                pass  # the journal was restarted; standard error may still have a reader
            else:
                return True
        raw = shaped(JOURNAL if self.journal is not None else self.form, line.severity, line.text, line.pid)
        try:
            while raw:
                raw = raw[os.write(OUTPUT_FD, raw) :]
        except BlockingIOError:  # another process that shares it has made it non-blocking
            return False
        except OSError:
            return False
        return True
