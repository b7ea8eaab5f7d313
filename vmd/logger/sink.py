"""Where lines go: standard error, the journal or syslog, written by a thread of its own, which may wait.

Whoever reads the log may take as long as they like, and a terminal, pipe, file or socket makes its writer wait.  What
waits to be written is bounded for each source: its next lines stay in its socket, and when that is full its processes
lose lines, which they count.
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
    """Return a line as the journal's own protocol has it (systemd.journal-fields(7))."""
    fields = [f"PRIORITY={line.severity}", f"SYSLOG_FACILITY={LOG_DAEMON >> 3}", "SYSLOG_IDENTIFIER=vmd"]
    fields += [f"SYSLOG_PID={line.pid}"] if line.pid else []
    if line.source.vmid:
        fields += [f"VM_ID={line.source.vmid}", f"VM_NAME={line.source.name.removeprefix('vm/')}"]
    fields.append(f"MESSAGE={line.text}")
    return "\n".join((*fields, "")).encode("utf-8", "backslashreplace")


class Sink:
    """Lines on their way out.  `put` and `idle` belong to the main thread; `call` makes a call there."""

    def __init__(self, form: str, journal: socket.socket | None, call: "Callable[[Callable[[], None]], None]") -> None:
        """Where there is a `journal`, it gets entries with fields, and what it refuses goes to standard error.

        Raises HostError.
        """
        self.form = form
        self.journal = journal
        self._call = call
        self._lines: deque[Line] = deque()
        self._changed = threading.Condition()
        self._lost = 0  # for which there is no place any more
        start_thread("writer", threading.Thread(target=self._run, name="writer", daemon=True).start)

    def put(self, line: Line) -> bool:
        """Have a line written; return whether another one of its source would have room."""
        with self._changed:
            line.source.waiting += 1
            self._lines.append(line)
            self._changed.notify_all()
            return line.source.waiting < WAITING_MAX

    def has_room(self, source: "Source", on_room: "Callable[[], None]") -> bool:
        """Return whether a line of a source has room; if not, `on_room` is called as soon as it has."""
        with self._changed:
            if source.waiting < WAITING_MAX:
                return True
            source.on_room = on_room
            return False

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until everything is written; return whether it is."""
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
        """Write a line, and before it how many could not be written."""
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
                pass  # a journal that was replaced; the stream may be another one
            else:
                return True
        raw = shaped(JOURNAL if self.journal is not None else self.form, line.severity, line.text, line.pid)
        try:
            while raw:
                raw = raw[os.write(OUTPUT_FD, raw) :]
        except BlockingIOError:  # whoever else has this open made it so
            return False
        except OSError:
            return False
        return True
