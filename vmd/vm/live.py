"""Sends a machine while it runs (arch. 15).

Its memory is written in rounds.  The first round writes all pages, each further round the pages that have changed
meanwhile.  The rounds end when the rest can be written within the time for which the guest may be paused, or when
the largest number of rounds is reached.  Then the machine is paused, and the rest of its memory and its state follow.
"""

import time

from vmd import threads
from vmd.errors import PeerError, VmdError, sentence
from vmd.ipc import devmsg
from vmd.units import PAGE
from vmd.vm import state
from vmd.vm.dirty import DirtyLog, either, runs
from vmd.vm.sender import Receivable, Sender
from vmd.vm.stream import PIECE_BYTES, RUNS_MAX, StreamWriter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.ipc.loop import Loop
    from vmd.ipc.messages.shared import Live
    from vmd.vm.pause import Pause


class LiveSender(Sender):
    """Writes a machine that runs.  When `done("")` is called, the machine is paused."""

    def __init__(
        self,
        pause: "Pause",
        fd: int,
        loop: "Loop",
        done: "Callable[[str], None]",
        *,
        one_shot: bool,
        goal: "Live",
        on_header: "Callable[[], None] | None" = None,
    ) -> None:
        """`goal` has the largest number of rounds, and for how long the guest may be paused.

        Raises VmdError or OSError, or PeerError if a device has ended; the descriptor then stays open.
        """
        super().__init__(pause.machine, None, fd, loop, done, one_shot=one_shot, on_header=on_header)
        with Receivable():
            state.check_sent_header(self._header, pause.machine)
        self.still_s = 0.0  # for how long the machine had been paused when all was written
        self._pause = pause
        self._goal = goal
        self._copy = memoryview(bytearray(PIECE_BYTES))
        self._log = DirtyLog(pause.machine)
        self._written_bytes, self._written_in_s = 0, 0.0  # memory that was written, and the time that this took

    def end_log(self) -> None:
        """End the log of changed pages: the machine stays here.  On the event thread, after `done` was called."""
        self._log.end()

    def _write(self, writer: StreamWriter) -> None:
        writer.header(self._header)
        self._wait_accepted()
        self._log.begin()
        rest = self._write_while_it_runs(writer)
        began_s = time.monotonic()
        self._pause_machine()
        self._begin_to_settle()
        self._write_pages(writer, either(rest, self._log.take()))
        writer.state(self._state)
        self._wait_settled()
        writer.end()
        self.still_s = time.monotonic() - began_s

    def _write_while_it_runs(self, writer: StreamWriter) -> bytes:
        """Write rounds.  Return the pages that are left to write."""
        settled = False
        self._settle_ahead()
        rest = self._log.touched()
        while self.round < self._goal.rounds:
            self.round += 1
            self._write_pages(writer, rest)
            rest = self._log.take()
            rest_s = rest.count(1) * PAGE * self._written_in_s / (self._written_bytes or 1)
            if rest_s * 1000 <= self._goal.still_ms:
                if settled:
                    return rest
                settled = True
                # The disks write most of their data to stable storage now.  The paused guest waits for the rest only.
                self._settle_ahead()
                self._wait_settled()
        return rest

    def _settle_ahead(self) -> None:
        """Tell the disks to begin to bring all that was written until now to stable storage."""
        for disk in self._disks:
            disk.command(devmsg.SETTLE_AHEAD)
        self._begin_to_settle()

    def _write_pages(self, writer: StreamWriter, pages: bytes) -> None:
        """Write some pages from a copy, which does not change while it is hashed and written."""
        memory, copy, began_s = self._memory, self._copy, time.monotonic()
        self.total_bytes = self.pipe.moved_bytes + pages.count(1) * PAGE
        found: list[tuple[int, int]] = []
        at = 0
        for region in memory.regions:
            first_page = region.offset // PAGE
            for first, count in runs(pages[first_page : first_page + region.size // PAGE]):
                start, left = first * PAGE, count * PAGE
                while left:
                    length = min(left, PIECE_BYTES - at)
                    memory.copy_into(copy[at : at + length], region.offset + start)
                    found.append((region.gpa + start, length))
                    at, start, left = at + length, start + length, left - length
                    if at == PIECE_BYTES or len(found) == RUNS_MAX:
                        writer.runs(found, copy[:at])
                        self._written_bytes += at
                        found, at = [], 0
        if found:
            writer.runs(found, copy[:at])
            self._written_bytes += at
        self._written_in_s += time.monotonic() - began_s

    def _pause_machine(self) -> None:
        """Pause the machine, and wait until its state is read.  Raises VmdError."""
        still = threads.Event()
        failures: list[VmdError] = [VmdError("internal error while its state was read")]

        def on_still(text: str) -> None:
            """Read the state of the machine, on the event thread."""
            try:
                if text:
                    raise VmdError(text)
                assert self._pause.clocks is not None
                self.freeze(self._pause.clocks)
            except (VmdError, OSError) as error:
                failures[:] = [VmdError(sentence(error))]
                if isinstance(error, PeerError):
                    self._pause.give_up(str(error))  # a device has ended, so the VM ends
            else:
                failures.clear()
            finally:
                still.set()

        self._loop.call_from_thread(lambda: self._pause.pause(on_still))
        still.wait()
        if failures:
            raise failures[0]
