"""A VM on its way out: it stands still, and a thread writes what it is while the event thread goes on serving."""

import select
import threading

from vmd.closing import close
from vmd.errors import PeerError, VmdError, sentence
from vmd.ipc import devmsg
from vmd.ipc.imsg import pack
from vmd.ipc.messages import HeaderSent, TakenBack, TransferProgress
from vmd.privsep.title import name_thread
from vmd.tasks import start_thread
from vmd.vm import state
from vmd.vm.fetch import fetch_stream
from vmd.vm.stream import LOOK_S, Cancelled, Pipe, StreamError, StreamWriter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from vmd.ipc.channel import Channel
    from vmd.ipc.loop import Loop
    from vmd.ipc.messages import SendVm
    from vmd.vm.clocks import Clocks
    from vmd.vm.devproc import DeviceProcess
    from vmd.vm.machine import Machine
    from vmd.vm.pause import Pause

    class Transfer(Protocol):
        """A sender or a receiver at work."""

        pipe: Pipe
        total_bytes: int
        over: bool


PROGRESS_S = 0.5
NOT_TAKEN = {
    devmsg.TAKEN_IN_USE: (TakenBack.IN_USE, "is in use by somebody else"),
    devmsg.TAKEN_CHANGED: (TakenBack.CHANGED, "has been written to since it was let go: its guest has run elsewhere"),
    devmsg.TAKEN_FAILED: (TakenBack.FAILED, "cannot be locked; the log says why"),
}
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
        on_header: "Callable[[], None] | None" = None,
    ) -> None:
        """Read the machine's state.  With `on_header` only the header is written until `go_on`.

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
        self._on_header = on_header
        self._goes_on = threading.Event()
        self.pipe = Pipe(fd, select.POLLOUT)
        self.over = False
        self.total_bytes = len(self._header) + len(self._state) + machine.memory.resident_bytes()
        self._thread = threading.Thread(target=self._run, name="send", daemon=True)

    def start(self) -> None:
        """Begin.  Raises HostError."""
        start_thread("send", self._thread.start)

    def go_on(self) -> None:
        """Write what follows the header."""
        self._goes_on.set()

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
            self._wait_accepted()
            for region in self._memory.regions:
                for gpa, offset, length in self._memory.touched_runs(region):
                    writer.memory(gpa, self._memory.memory[offset : offset + length])
            writer.state(self._state)
            self._wait_settled()
            writer.end()
        finally:
            writer.hasher.close()

    def _wait_accepted(self) -> None:
        """Wait until the receiver is known to take it, where that is asked for.  Raises Cancelled."""
        if self._on_header is not None:
            self._loop.call_from_thread(self._on_header)
            while not self._goes_on.wait(LOOK_S):
                if self._cancelled.is_set():
                    raise Cancelled("cancelled")

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
        self.two_way = message.two_way
        self.written = False  # two-way: all is, and the machine stands still until it is known to run elsewhere
        self.disks_gone = False
        self.stays_paused = pause.paused or pause.under_way
        self.then: Callable[[], None] = lambda: None  # when it is over, and the VM lives
        self._vmid = message.vmid
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

    @property
    def stopped_ns(self) -> int:
        """When the machine came to stand still for this, by CLOCK_MONOTONIC; 0: it did so before."""
        return 0 if self.stays_paused else self._pause.since_ns

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
            on_header = self._tell_header if self.two_way else None
            sender = Sender(
                pause.machine, pause.clocks, stream, pause.loop, self._finish, one_shot=self._one_shot,
                on_header=on_header,
            )  # fmt: skip
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

    def _tell_header(self) -> None:
        self._vmm.send(HeaderSent(vmid=self._vmid))

    def _finish(self, text: str) -> None:
        self.written = self.two_way and not text
        self._done(self, text)

    # --- two-way -------------------------------------------------------------------------------------------

    def go_on(self) -> None:
        """Write what follows the header."""
        if self._sender is not None:
            self._sender.go_on()

    def let_disks_go(self) -> str:
        """Let go of the locks of all disks; returns why not, and then has them all.  Raises PeerError."""
        for disk in self._disks():
            if not disk.let_go():
                self.take_disks_back()
                return f"{disk.label}: cannot be handed over; the log says why"
        self.disks_gone = True
        return ""

    def take_disks_back(self) -> tuple[TakenBack, str]:
        """Take the locks of all disks, or none; returns what became of that, and a sentence.  Raises PeerError."""
        for disk in self._disks():
            status = disk.take_back()
            if status != devmsg.TAKEN:
                outcome, text = NOT_TAKEN.get(status, NOT_TAKEN[devmsg.TAKEN_FAILED])
                self.let_disks_go()
                return outcome, f"{disk.label} {text}"
        self.disks_gone = False
        return TakenBack.DONE, ""

    def _disks(self) -> "list[DeviceProcess]":
        processes = (function.process for function in self._pause.machine.virtio)
        return [process for process in processes if process.kind.settles]
