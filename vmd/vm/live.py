"""Sending a machine while it runs (arch. 15).

Its memory is written in rounds: all there is, then what has changed meanwhile, and so on, until what is left can be
written within the time that the guest may stand still, or enough rounds were made.  Then it stands still, and the rest
follows with its state.
"""

import time

from vmd import threads
from vmd.errors import PeerError, VmdError, sentence
from vmd.guestmem import PAGE
from vmd.ipc import devmsg
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
    """Writes a machine that runs; when `done` is told without a reason why not, it stands still."""

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
        """Raises VmdError or OSError, and then leaves the descriptor open; PeerError if a device is gone."""
        super().__init__(pause.machine, None, fd, loop, done, one_shot=one_shot, on_header=on_header)
        with Receivable():
            state.check_sent_header(self._header, pause.machine)
        self.still_s = 0.0  # how long it has stood still when all was written
        self._pause = pause
        self._goal = goal
        self._copy = memoryview(bytearray(PIECE_BYTES))
        self._log = DirtyLog(pause.machine)
        self._written_bytes, self._written_in_s = 0, 0.0  # of memory

    def let_be(self) -> None:
        """Look at the machine no more: it goes on here.  On the event thread, when `done` has been told."""
        self._log.end()

    def _write(self, writer: StreamWriter) -> None:
        writer.header(self._header)
        self._wait_accepted()
        self._log.begin()
        rest = self._write_while_it_runs(writer)
        began_s = time.monotonic()
        self._have_it_stand_still()
        self._begin_to_settle()
        self._write_pages(writer, either(rest, self._log.take()))
        writer.state(self._state)
        self._wait_settled()
        writer.end()
        self.still_s = time.monotonic() - began_s

    def _write_while_it_runs(self, writer: StreamWriter) -> bytes:
        """Make rounds; returns the pages that are left."""
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
                # Disks have the most of what they hold on stable storage before the guest has to wait for the rest.
                self._settle_ahead()
                self._wait_settled()
        return rest

    def _settle_ahead(self) -> None:
        """Have the disks begin to bring what was written until now to stable storage."""
        for disk in self._disks:
            disk.command(devmsg.SETTLE_AHEAD)
        self._begin_to_settle()

    def _write_pages(self, writer: StreamWriter, pages: bytes) -> None:
        """Write a copy of some pages: it does not change while it is hashed and written."""
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

    def _have_it_stand_still(self) -> None:
        """Wait until the machine stands still and its state is read.  Raises VmdError."""
        still = threads.Event()
        failures: list[VmdError] = [VmdError("internal error while its state was read")]

        def on_still(text: str) -> None:
            """Take its state, on the event thread."""
            try:
                if text:
                    raise VmdError(text)
                assert self._pause.clocks is not None
                self.freeze(self._pause.clocks)
            except (VmdError, OSError) as error:
                failures[:] = [VmdError(sentence(error))]
                if isinstance(error, PeerError):
                    self._pause.give_up(str(error))  # a device is gone: how the VM ends is the answer
            else:
                failures.clear()
            finally:
                still.set()

        self._loop.call_from_thread(lambda: self._pause.pause(on_still))
        still.wait()
        if failures:
            raise failures[0]
