"""Sending and receiving a machine: the work of a thread, while the event thread goes on serving.

Both are made, started and told of by the event thread; `done` and the other callbacks come there too.
"""

import select
import threading

from vmd.errors import GuestError, HostError, VmdError, sentence
from vmd.guestmem import GuestMemory
from vmd.ipc import devmsg
from vmd.ipc.imsg import pack
from vmd.privsep.title import name_thread
from vmd.vm import state
from vmd.vm.stream import Cancelled, Pipe, StreamError, StreamReader, StreamWriter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.ipc.loop import Loop
    from vmd.vm.clocks import Clocks
    from vmd.vm.machine import Machine

SETTLE_LOOK_S = 0.05  # between two looks at whether the disks are on stable storage


class Sender:
    """Writes a machine that stands still to a descriptor, which it closes; `done(why not)` is told once.

    Why not is a sentence.
    """

    def __init__(
        self,
        machine: "Machine",
        clocks: "Clocks",
        fd: int,
        loop: "Loop",
        done: "Callable[[str], None]",
        *,
        one_shot: bool,
    ) -> None:
        """Read the machine's state.

        Raises VmdError or OSError, and then leaves the descriptor open; PeerError if a device is gone.
        """
        try:
            self._header = pack(state.header(machine, one_shot=one_shot))
            self._state = pack(state.save(machine, clocks))
            state.check_sent(self._header, self._state, machine)
        except (ValueError, OverflowError) as error:  # the latter is of a number that no record takes
            raise VmdError(f"nobody could receive it: {error}") from error
        self._memory = machine.memory
        self._disks = [function.process for function in machine.virtio if function.process.kind.settles]
        self._loop = loop
        self._done = done
        self._cancelled = threading.Event()
        self.pipe = Pipe(fd, select.POLLOUT)
        self.over = False
        self.total_bytes = len(self._header) + len(self._state) + machine.memory.resident_bytes()
        self._thread = threading.Thread(target=self._run, name="send", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def cancel(self) -> None:
        """Have it fail soon, unless it is about to be done."""
        self.pipe.cancelled = True
        self._cancelled.set()

    def _run(self) -> None:
        name_thread("send")
        text = "internal error while it was sent"  # where an exception passes by: it is shown, and the guest lives
        try:
            try:
                self._write(StreamWriter(self.pipe))
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
        try:
            for disk in self._disks:
                disk.settle()  # begins; it goes on beside the rest
            writer.header(self._header)
            for region in self._memory.regions:
                for gpa, offset, length in self._memory.touched_runs(region):
                    writer.memory(gpa, self._memory.memory[offset : offset + length])
            writer.state(self._state)
            self._wait_settled()
            writer.end()
        finally:
            writer.hasher.close()

    def _wait_settled(self) -> None:
        """Wait until the disks hold what the guest has written.  After the end of the stream none of them can refuse.

        Raises VmdError.
        """
        for disk in self._disks:
            while (state := disk.settle()) == devmsg.SETTLED_NOT_YET:
                if self._cancelled.wait(SETTLE_LOOK_S):
                    raise Cancelled("cancelled")
            if state != devmsg.SETTLED:
                raise VmdError(
                    f"{disk.label}: what the guest has written cannot be brought to stable storage;"
                    " `vmctl status -v` and the log say why"
                )


class Receiver:
    """Reads what comes behind a stream's header from a descriptor, which it closes.

    At the end `on_machine(state)` is told.  Anything wrong is told to `on_failed(sentence)`, and is the end.
    """

    def __init__(
        self,
        pipe: Pipe,
        version: int,
        header: state.Header,
        memory: GuestMemory,
        loop: "Loop",
        *,
        on_machine: "Callable[[state.MachineState], None]",
        on_failed: "Callable[[str], None]",
    ) -> None:
        """`version` is the stream's; `memory` is empty."""
        self._loop = loop
        self._on_machine, self._on_failed = on_machine, on_failed
        self.pipe = pipe
        self.over = False
        self.total_bytes = header.touched_bytes
        self._state_max = state.bytes_max(header)
        self._version = version
        self._memory = memory
        self._next_offset = 0
        self._machine: state.MachineState | None = None
        self._thread = threading.Thread(target=self._run, name="receive", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def _run(self) -> None:
        name_thread("receive")
        try:
            try:
                machine = self._read(StreamReader(self.pipe))
            finally:
                self.over = True
                self.pipe.close()
        except StreamError as error:
            text = f"the stream {error}"
            self._loop.call_from_thread(lambda: self._on_failed(text))
        except HostError as error:
            text = str(error)
            self._loop.call_from_thread(lambda: self._on_failed(text))
        except BaseException:
            self._loop.call_from_thread(lambda: self._on_failed("internal error while the stream was read"))
            raise
        else:
            self._loop.call_from_thread(lambda: self._on_machine(machine))

    def _read(self, reader: StreamReader) -> state.MachineState:
        try:
            reader.sections_until_end(self._take_memory, self._take_state, state_max=self._state_max)
        finally:
            reader.hasher.close()
        if self._machine is None:
            raise StreamError("has no state of the machine")
        return self._machine

    def _take_memory(self, gpa: int, data: memoryview) -> None:
        """Take a run of memory: they come in ascending order, so none comes twice."""
        memory = self._memory
        try:
            offset = memory.offset(gpa, len(data))
        except GuestError as error:
            raise ValueError(str(error)) from None
        if offset < self._next_offset:
            raise ValueError(f"memory at {gpa:#x} comes again, or out of order")
        self._next_offset = offset + len(data)
        memory.fill(offset, data)

    def _take_state(self, body: bytes) -> None:
        if self._machine is not None:
            raise ValueError("the state of the machine comes again")
        self._machine = state.read_machine(self._version, body)
