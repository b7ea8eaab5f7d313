"""A VM on its way out: it stands still, and a thread writes what it is while the event thread goes on serving."""

import select
import threading

from vmd.closing import close
from vmd.errors import PeerError, VmdError, sentence
from vmd.ipc import devmsg
from vmd.ipc.imsg import pack
from vmd.ipc.messages import TransferProgress
from vmd.privsep.title import name_thread
from vmd.tasks import start_thread
from vmd.vm import state
from vmd.vm.fetch import fetch_stream
from vmd.vm.stream import Cancelled, Pipe, StreamError, StreamWriter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from vmd.ipc.channel import Channel
    from vmd.ipc.loop import Loop
    from vmd.ipc.messages import SendVm
    from vmd.vm.clocks import Clocks
    from vmd.vm.machine import Machine
    from vmd.vm.pause import Pause

    class Transfer(Protocol):
        """A sender or a receiver at work."""

        pipe: Pipe
        total_bytes: int
        over: bool


PROGRESS_S = 0.5
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
        """Begin.  Raises HostError."""
        start_thread("send", self._thread.start)

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


def show_progress(transfer: "Transfer", loop: "Loop", vmm: "Channel") -> None:
    """Tell every now and then how far a transfer is, until it is over."""
    if not transfer.over:
        vmm.send(TransferProgress(done_bytes=transfer.pipe.moved_bytes, total_bytes=transfer.total_bytes))
        loop.call_later(PROGRESS_S, lambda: show_progress(transfer, loop, vmm))


class Departure:
    """A VM that is sent: it stands still, and a thread writes what it is.

    `done(why not)` is told once, with everything as before unless it was sent for good.
    """

    def __init__(
        self, message: "SendVm", courier: int, pause: "Pause", vmm: "Channel", done: "Callable[[Departure, str], None]"
    ) -> None:
        """`courier` is what the stream comes over; ours."""
        self.keep = message.keep
        self.stays_paused = pause.paused or pause.under_way
        self.then: Callable[[], None] = lambda: None  # when it is over, and the VM lives
        self._one_shot = message.one_shot
        self._pause, self._vmm, self._done = pause, vmm, done
        self._cancelled = False
        self._sender: Sender | None = None
        self._courier = courier
        self._stream = -1

    def begin(self) -> None:
        """Fetch the stream, have the machine stand still, and then be sent; the stream is closed in any case."""
        fetch_stream(self._pause.loop, self._courier, self._go)

    def _go(self, stream: int | None) -> None:
        """The stream is there, or does not come."""
        if stream is None:
            self._finish("the stream did not come")
            return
        self._stream = stream
        self._pause.pause(self._send)

    @property
    def sent_bytes(self) -> int:
        """How far it came."""
        return self._sender.pipe.moved_bytes if self._sender is not None else 0

    def cancel(self) -> None:
        """Give up sending, or not even begin."""
        self._cancelled = True
        if self._sender is not None:
            self._sender.cancel()

    def _send(self, text: str) -> None:
        """The machine stands still, or a text says why not."""
        pause, stream = self._pause, self._stream
        try:
            if text or self._cancelled:
                raise VmdError(text or "sending was interrupted")
            assert pause.clocks is not None
            sender = Sender(pause.machine, pause.clocks, stream, pause.loop, self._finish, one_shot=self._one_shot)
            sender.start()
        except PeerError as error:
            close(stream)
            pause.give_up(str(error))  # a device is gone: how the VM ends is the answer
        except (VmdError, OSError) as error:
            close(stream)
            self._finish(sentence(error))
        else:
            self._sender = sender
            show_progress(sender, pause.loop, self._vmm)

    def _finish(self, text: str) -> None:
        self._done(self, text)
