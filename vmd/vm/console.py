"""The console of a VM: UART on one side, pty on the other, and a memory of what was shown last.

The guest never waits for a viewer.  Output goes to the backlog, and from there to the pty; while nobody reads the
pty, the newest 64 KiB are kept for it and older ones dropped.  What waits at the end of the VM is the parent's.
Input is taken from the pty only as fast as the guest reads its UART, so that a flood from a viewer stays in the
viewer's pty.
"""

import os
import select
import termios
import time

from vmd import threads
from vmd.closing import close

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.backlog import BacklogWriter
    from vmd.ipc.loop import Loop

INPUT_BYTES = 256  # read from the pty at once
WRITE_BYTES = 4096
# Bytes that follow one another faster than this leave together: each write wakes a viewer, which on a small
# host takes the processor from the guest.  The first byte after a pause leaves at once.
BATCH_S = 0.002


class Console:
    """Moves bytes between a UART and a pty.

    `send` runs on vCPU threads; everything else on the event thread.  `receive(data)` of the UART returns
    how many bytes it accepted and calls `resume_input` (from any thread) once it has room again.
    """

    def __init__(self, master: int, slave: int, backlog: "BacklogWriter", loop: "Loop") -> None:
        """Own both sides of the pty.  `master` does not block."""
        self._master = master
        self._slave = slave
        self._loop = loop
        self._lock = threads.Lock()
        self._backlog = backlog
        self._input = b""  # waits for room in the UART
        self._receive: Callable[[bytes], int] = len
        self._written_s = 0.0
        loop.add(master, self._on_pty)
        self._watch()  # the guest's last life may have left something for the pty

    def connect(self, receive: "Callable[[bytes], int]") -> None:
        """Say where input goes."""
        self._receive = receive

    def send(self, data: bytes) -> None:
        """Show output of the guest."""
        with self._lock:
            waited = self._backlog.waiting
            self._backlog.write(data)
            if waited:
                return  # for room in the pty, or for its batch
            now_s = time.monotonic()
            if now_s - self._written_s < BATCH_S:
                self._loop.schedule(BATCH_S, self._flush)
                return
            self._written_s = now_s
            self._write_waiting()
            if self._backlog.waiting:
                self._loop.call_from_thread(self._flush)

    def resume_input(self) -> None:
        """The UART has room: deliver what waits and read on.  From any thread."""
        self._loop.call_from_thread(self._deliver)

    def snapshot(self) -> int:
        """Drop what waits in the pty and for it; return how much of the output that leaves for other ways."""
        with self._lock:
            drop_input(self._slave)
            return self._backlog.pass_all()

    def move(self, master: int, slave: int) -> None:
        """Go on on another pty, whose sides are ours from now on."""
        with self._lock:
            self._loop.remove(self._master)
            close(self._master)
            close(self._slave)
            self._master, self._slave = master, slave
            self._loop.add(master, self._on_pty)
        self._watch()

    def _on_pty(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self._flush()
        if events & select.EPOLLIN and not self._input:
            try:
                self._input = os.read(self._master, INPUT_BYTES)
            except (BlockingIOError, OSError):
                return
            self._deliver()

    def _deliver(self) -> None:
        if self._input:
            accepted = self._receive(self._input)
            self._input = self._input[accepted:]
        self._watch()

    def _flush(self) -> None:
        with self._lock:
            self._written_s = time.monotonic()
            self._write_waiting()
        self._watch()

    def _write_waiting(self) -> None:
        while self._backlog.waiting:
            try:
                written = os.write(self._master, self._backlog.next_piece(WRITE_BYTES))
            except OSError:  # full, or nobody has it open any more
                return
            self._backlog.pass_on(written)

    def _watch(self) -> None:
        with self._lock:
            events = 0 if self._input else select.EPOLLIN
            if self._backlog.waiting:
                events |= select.EPOLLOUT
            self._loop.modify(self._master, events)


def drop_input(tty: int) -> None:
    """Drop what waits in a terminal.  Whoever may open it may give it a line discipline that does not know this."""
    try:
        termios.tcflush(tty, termios.TCIFLUSH)
    except termios.error:
        return
