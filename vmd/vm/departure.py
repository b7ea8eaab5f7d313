"""Sends a VM: the steps of the event thread.  A thread writes the stream (`sender`; `live` while the VM runs)."""

from vmd.closing import close
from vmd.errors import PeerError, VmdError, sentence
from vmd.ipc import devmsg
from vmd.ipc.messages.shared import TransferProgress
from vmd.ipc.messages.vm import HeaderSent, TakenBack
from vmd.vm.fetch import fetch_stream
from vmd.vm.live import LiveSender
from vmd.vm.sender import Sender

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from vmd.ipc.channel import Channel
    from vmd.ipc.loop import Loop
    from vmd.ipc.messages.vm import SendVm
    from vmd.vm.pause import Pause
    from vmd.vm.stream import Pipe

    class Transfer(Protocol):
        """A sender or a receiver, as `show_progress` sees it."""

        pipe: Pipe
        total_bytes: int
        round: int
        over: bool


PROGRESS_S = 0.5
NOT_TAKEN = {
    devmsg.TAKEN_IN_USE: (TakenBack.IN_USE, "is in use by somebody else"),
    devmsg.TAKEN_CHANGED: (TakenBack.CHANGED, "has been written to since it was let go: its guest has run elsewhere"),
    devmsg.TAKEN_FAILED: (TakenBack.FAILED, "cannot be locked; the log says why"),
}


def show_progress(transfer: "Transfer", loop: "Loop", vmm: "Channel") -> None:
    """Report how far a transfer is, every PROGRESS_S until it is over."""
    if not transfer.over:
        done, total = transfer.pipe.moved_bytes, transfer.total_bytes
        vmm.send(TransferProgress(done_bytes=done, total_bytes=max(done, total), round=transfer.round))
        loop.call_later(PROGRESS_S, lambda: show_progress(transfer, loop, vmm))


def start_sender(
    make: "Callable[[int], Sender]", stream: int, pause: "Pause", vmm: "Channel", failed: "Callable[[str], None]"
) -> Sender | None:
    """Start the sender that `make` returns, and report its progress.  `stream` is closed in any case.

    Return None if it could not start: then `failed` was called with the reason, or the VM has ended.
    """
    try:
        sender = make(stream)
        sender.start()
    except PeerError as error:
        close(stream)
        pause.give_up(str(error))  # a device has ended, so the VM ends, which is the answer
    except (VmdError, OSError) as error:
        close(stream)
        failed(sentence(error))
    else:
        show_progress(sender, pause.loop, vmm)
        return sender
    return None


class Departure:
    """Sends a VM.  The machine is paused before its memory is written, or with `live` before the last round.

    `done` is called once, with a sentence that says why the VM was not sent, or with "".
    """

    def __init__(
        self, message: "SendVm", courier: int, pause: "Pause", vmm: "Channel", done: "Callable[[Departure, str], None]"
    ) -> None:
        """The stream comes over `courier`, which is closed here."""
        self.keep = message.keep
        self.two_way = message.two_way
        # Two-way: the stream is complete, and the machine stays paused until EndSend says whether it runs elsewhere.
        self.written = False
        self.disks_gone = False
        self.stays_paused = pause.paused or pause.under_way
        self.then: Callable[[], None] = lambda: None  # called when sending is over and the VM stays here
        self._vmid = message.vmid
        self._one_shot = message.one_shot
        self._live = message.live
        self._pause, self._vmm, self._done = pause, vmm, done
        self._cancelled = False
        self._sender: Sender | None = None
        self._courier = courier
        self._stream = -1

    def begin(self) -> None:
        """Fetch the stream, pause the machine unless it is sent live, and send it.  The stream is always closed."""
        fetch_stream(self._pause.loop, self._courier, self._go)

    def _go(self, stream: int | None) -> None:
        """Go on with the stream, or fail if it did not come."""
        if stream is None:
            self._finish("the stream did not come")
            return
        self._stream = stream
        if self._live is None or self.stays_paused:
            self._pause.pause(self._send)
        else:
            self._send("")

    @property
    def sent_bytes(self) -> int:
        """How many bytes of the stream were written."""
        return self._sender.pipe.moved_bytes if self._sender is not None else 0

    @property
    def stopped_ns(self) -> int:
        """When the machine was paused for sending, by CLOCK_MONOTONIC; 0 if it was paused before."""
        return 0 if self.stays_paused else self._pause.since_ns

    def cancel(self) -> None:
        """Give up sending, also before it has begun."""
        self._cancelled = True
        if self._sender is not None:
            self._sender.cancel()

    @property
    def round(self) -> int:
        """How many rounds of memory were written while the machine ran."""
        return self._sender.round if self._sender is not None else 0

    @property
    def still_s(self) -> float:
        """For how long the machine was paused until all was written, if it was sent live; else 0."""
        return self._sender.still_s if isinstance(self._sender, LiveSender) else 0.0

    def _send(self, text: str) -> None:
        """Start the sender.  `text` says why the machine could not be paused, or is empty."""

        def make(stream: int) -> Sender:
            if text or self._cancelled:
                raise VmdError(text or "sending was interrupted")
            return self._made(stream)

        self._sender = start_sender(make, self._stream, self._pause, self._vmm, self._finish)

    def _made(self, stream: int) -> Sender:
        pause, live = self._pause, self._live
        on_header = self._tell_header if self.two_way else None
        if pause.clocks is None:
            assert live is not None
            return LiveSender(
                pause, stream, pause.loop, self._finish, one_shot=self._one_shot, on_header=on_header, goal=live
            )
        return Sender(
            pause.machine, pause.clocks, stream, pause.loop, self._finish, one_shot=self._one_shot,
            on_header=on_header,
        )  # fmt: skip

    def _tell_header(self) -> None:
        self._vmm.send(HeaderSent(vmid=self._vmid))

    def end_log(self) -> None:
        """End the log of changed pages: the machine stays here."""
        if isinstance(self._sender, LiveSender):
            self._sender.end_log()

    def _finish(self, text: str) -> None:
        self.written = self.two_way and not text
        self._done(self, text)

    # --- two-way -------------------------------------------------------------------------------------------

    def go_on(self) -> None:
        """Write the part of the stream that follows the header."""
        if self._sender is not None:
            self._sender.go_on()

    def let_disks_go(self) -> str:
        """Release the locks of all disks.  Return "", or a sentence that says why not: then no lock is released.

        Raises PeerError.
        """
        for disk in self._pause.machine.disks():
            if not disk.let_go():
                self.take_disks_back()
                return f"{disk.label}: cannot be handed over; the log says why"
        self.disks_gone = True
        return ""

    def take_disks_back(self) -> tuple[TakenBack, str]:
        """Take the locks of all disks, or of none of them.  Return the outcome and a sentence.  Raises PeerError."""
        for disk in self._pause.machine.disks():
            status = disk.take_back()
            if status not in devmsg.HAVE:
                outcome, text = NOT_TAKEN.get(status, NOT_TAKEN[devmsg.TAKEN_FAILED])
                self.let_disks_go()
                return outcome, f"{disk.label} {text}"
        self.disks_gone = False
        return TakenBack.DONE, ""
