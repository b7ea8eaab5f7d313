"""Writes a machine to a stream, on a thread of its own.  The event thread goes on serving."""

import select

from vmd import threads
from vmd.errors import VmdError, sentence
from vmd.ipc import devmsg
from vmd.ipc.imsg import pack
from vmd.privsep.title import name_thread
from vmd.tasks import start_thread
from vmd.vm import state
from vmd.vm.stream import LOOK_S, STILL, Cancelled, Pipe, StreamError, StreamWriter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmd.ipc.loop import Loop
    from vmd.vm.clocks import Clocks
    from vmd.vm.devproc import DeviceProcess
    from vmd.vm.machine import Machine

SETTLE_LOOK_S, SETTLE_FIRST_LOOK_S = 0.05, 0.001  # largest and first interval of asking whether a disk has settled


class Sender:
    """Writes a paused machine to a descriptor, and closes the descriptor.

    `done` is called once, with a sentence that says why the machine was not sent, or with "".
    """

    round = 0  # counted by `live` only

    def __init__(
        self,
        machine: "Machine",
        clocks: "Clocks | None",
        fd: int,
        loop: "Loop",
        done: "Callable[[str], None]",
        *,
        one_shot: bool,
        on_header: "Callable[[], None] | None" = None,
    ) -> None:
        """Read the state of a paused machine, whose clocks are given.  `clocks` is None for a machine that runs.

        With `on_header`, the sender writes the header, calls `on_header`, and writes the rest after `go_on`.

        Raises VmdError or OSError, or PeerError if a device has ended; the descriptor then stays open.
        """
        self._machine = machine
        self._memory = machine.memory
        self._state = b""
        with Receivable():
            self._header = pack(state.header(machine, one_shot=one_shot))
        if clocks is not None:
            self.freeze(clocks)
        self._disks = machine.disks()
        self._loop = loop
        self._done = done
        self._cancelled = threads.Event()
        self._on_header = on_header
        self._goes_on = threads.Event()
        self.pipe = Pipe(fd, select.POLLOUT)
        self.over = False
        self.total_bytes = len(self._header) + len(self._state) + machine.memory.resident_bytes()
        self._thread = threads.Thread(target=self._run, name="send", daemon=True)

    def freeze(self, clocks: "Clocks") -> None:
        """Read the state of the machine, which is paused now.  Raises as the constructor does."""
        with Receivable():
            self._state = pack(state.save(self._machine, clocks))
            state.check_sent(self._header, self._state, self._machine)

    def start(self) -> None:
        """Start the thread.  Raises HostError."""
        start_thread("send", self._thread.start)

    def go_on(self) -> None:
        """Write the part of the stream that follows the header."""
        self._goes_on.set()

    def cancel(self) -> None:
        """Make the sender fail soon.  If it has nearly finished, it may still succeed."""
        self.pipe.cancelled = True
        self._cancelled.set()

    def _run(self) -> None:
        name_thread("send")
        text = "internal error while it was sent"  # for an unexpected exception: the log shows it, and the guest lives
        try:
            try:
                writer = StreamWriter(self.pipe)
                try:
                    self._write(writer)
                finally:
                    writer.hasher.close()
            finally:
                self.pipe.close()
        except Cancelled:
            text = "sending was interrupted"
        except StreamError as error:
            text = f"the stream {error}"
        except OSError as error:
            text = f"its memory cannot be read: {sentence(error)}"
        except VmdError as error:
            text = str(error)
        else:
            text = ""
        finally:
            self.over = True
            self._loop.call_from_thread(lambda: self._done(text))

    def _write(self, writer: StreamWriter) -> None:
        self._begin_to_settle()
        writer.header(self._header, STILL)
        self._wait_accepted()
        for region in self._memory.regions:
            for gpa, offset, length in self._memory.touched_runs(region):
                writer.memory(gpa, self._memory.memory[offset : offset + length])
        writer.state(self._state)
        self._wait_settled()
        writer.end()

    def _wait_accepted(self) -> None:
        """With `on_header`: wait until the receiver has accepted the header.  Raises Cancelled."""
        if self._on_header is not None:
            self._loop.call_from_thread(self._on_header)
            while not self._goes_on.wait(LOOK_S):
                if self._cancelled.is_set():
                    raise Cancelled("cancelled")

    def _begin_to_settle(self) -> None:
        """Tell the disks to write their data to stable storage.  They do so while memory is written."""
        for disk in self._disks:
            disk.settle()

    def _wait_settled(self) -> None:
        """Wait until all that the guest has written to its disks is on stable storage.

        This comes before the end of the stream: after it a failure would be too late.  Raises VmdError.
        """
        settle(self._disks, self._cancelled)


def settle(disks: "Sequence[DeviceProcess]", cancelled: threads.Event) -> None:
    """Wait until all that the guest has written to disks is on stable storage.  Raises VmdError, or Cancelled."""
    for disk in disks:
        look_s = SETTLE_FIRST_LOOK_S  # short at first: most disks have little left to write, and the guest waits
        while (how_far := disk.settle()) == devmsg.SETTLED_NOT_YET:
            if cancelled.wait(look_s):
                raise Cancelled("cancelled")
            look_s = min(2 * look_s, SETTLE_LOOK_S)
        if how_far != devmsg.SETTLED:
            raise VmdError(
                f"{disk.label}: what the guest has written cannot be brought to stable storage;"
                " `vmctl status -v` and the log say why"
            )


class Receivable:
    """A context that turns a ValueError or OverflowError into a VmdError: no receiver could take the record."""

    def __enter__(self) -> None:
        """Enter the context."""

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Convert the exception.  msgpack raises OverflowError for a number that is too large for it."""
        if isinstance(error, ValueError | OverflowError):
            raise VmdError(f"nobody could receive it: {error}") from error
