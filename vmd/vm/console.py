"""The console of a VM: connects the UART with a pty, and keeps the last output in a backlog.

The guest never waits for a viewer.  Output goes to the backlog, and from there to the pty.  While nobody reads the pty,
the backlog keeps the newest 64 KiB, and older output is dropped.  When the VM ends, the parent passes on the rest.
Input is read from the pty only as fast as the guest reads its UART: the rest of it waits in the pty.
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

INPUT_BYTES = 256  # largest read from the pty
WRITE_BYTES = 4096
# Bytes that come within this time are written together: each write wakes the viewer, which on a small host takes the
# processor from the guest.  The first byte after a pause is written at once.
BATCH_S = 0.002


class Console:
    """Moves bytes between a UART and a pty.

    `send` runs on vCPU threads, and everything else on the event thread.  `receive(data)` of the UART returns how many
    bytes it has accepted.  When the UART has room again, it calls `resume_input`, from any thread.
    """

    def __init__(self, master: int, slave: int, backlog: "BacklogWriter", loop: "Loop") -> None:
        """The console owns both sides of the pty.  `master` is non-blocking."""
        self._master = master
        self._slave = slave
        self._loop = loop
        self._lock = threads.Lock()
        self._backlog = backlog
        self._input = b""  # waits for room in the UART
        self._receive: Callable[[bytes], int] = len
        self._written_s = 0.0
        loop.add(master, self._on_pty)
        self._watch()  # the backlog may have output from before a reset of the guest that the pty has not got yet

    def connect(self, receive: "Callable[[bytes], int]") -> None:
        """Set the function that takes input."""
        self._receive = receive

    def send(self, data: bytes) -> None:
        """Show output of the guest."""
        with self._lock:
            waited = self._backlog.waiting
            self._backlog.write(data)
            if waited:
                return  # `_flush` is due when the pty has room, or at the end of the batch
            now_s = time.monotonic()
            if now_s - self._written_s < BATCH_S:
                self._loop.schedule(BATCH_S, self._flush)
                return
            self._written_s = now_s
            self._write_waiting()
            if self._backlog.waiting:
                self._loop.call_from_thread(self._flush)

    def resume_input(self) -> None:
        """Deliver waiting input and read on, because the UART has room.  May be called from any thread."""
        self._loop.call_from_thread(self._deliver)

    def snapshot(self) -> int:
        """Drop the output that waits in the pty and for it.

        Return the number of bytes of output until now: a viewer gets these from the backlog, and not from the pty.
        """
        with self._lock:
            drop_input(self._slave)
            return self._backlog.pass_all()

    def move(self, master: int, slave: int) -> None:
        """Go on with another pty.  The console owns both its sides."""
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
            except OSError:  # the pty is full, or hung up
                return
            self._backlog.pass_on(written)

    def _watch(self) -> None:
        with self._lock:
            events = 0 if self._input else select.EPOLLIN
            if self._backlog.waiting:
                events |= select.EPOLLOUT
            self._loop.modify(self._master, events)


def drop_input(tty: int) -> None:
    """Drop the bytes that wait in a terminal.

    This may fail: a user of the terminal may set a line discipline that does not support it.
    """
    try:
        termios.tcflush(tty, termios.TCIFLUSH)
    except termios.error:
        return
