"""A VM on its way out: a thread writes what it is (`sender`, or `live` while it runs)."""

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
        """A sender or a receiver at work."""

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
    """Tell every now and then how far a transfer is, until it is over."""
    if not transfer.over:
        done, total = transfer.pipe.moved_bytes, transfer.total_bytes
        vmm.send(TransferProgress(done_bytes=done, total_bytes=max(done, total), round=transfer.round))
        loop.call_later(PROGRESS_S, lambda: show_progress(transfer, loop, vmm))


def begun(
    make: "Callable[[int], Sender]", stream: int, pause: "Pause", vmm: "Channel", failed: "Callable[[str], None]"
) -> Sender | None:
    """Have what `make` makes write the machine to `stream`, which is closed in the end, and tell how far it is.

    None: that could not begin, and `failed` was told why, or the VM is at its end.
    """
    try:
        sender = make(stream)
        sender.start()
    except PeerError as error:
        close(stream)
        pause.give_up(str(error))  # a device is gone: how the VM ends is the answer
    except (VmdError, OSError) as error:
        close(stream)
        failed(sentence(error))
    else:
        show_progress(sender, pause.loop, vmm)
        return sender
    return None


class Departure:
    """A VM that is sent: it stands still, at once or in the end, and a thread writes what it is.

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
        self._live = message.live
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
        if self._live is None or self.stays_paused:
            self._pause.pause(self._send)
        else:
            self._send("")

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

    @property
    def round(self) -> int:
        """How many rounds were made while it ran."""
        return self._sender.round if self._sender is not None else 0

    @property
    def still_s(self) -> float:
        """How long it stood still until all was written, if it was sent while it ran."""
        return self._sender.still_s if isinstance(self._sender, LiveSender) else 0.0

    def _send(self, text: str) -> None:
        """The machine stands still, or is sent while it runs, or a text says why not."""

        def make(stream: int) -> Sender:
            if text or self._cancelled:
                raise VmdError(text or "sending was interrupted")
            return self._made(stream)

        self._sender = begun(make, self._stream, self._pause, self._vmm, self._finish)

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

    def let_be(self) -> None:
        """Leave the machine as it was before; it goes on here."""
        if isinstance(self._sender, LiveSender):
            self._sender.let_be()

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
        for disk in self._pause.machine.disks():
            if not disk.let_go():
                self.take_disks_back()
                return f"{disk.label}: cannot be handed over; the log says why"
        self.disks_gone = True
        return ""

    def take_disks_back(self) -> tuple[TakenBack, str]:
        """Take the locks of all disks, or none; returns what became of that, and a sentence.  Raises PeerError."""
        for disk in self._pause.machine.disks():
            status = disk.take_back()
            if status not in devmsg.HAVE:
                outcome, text = NOT_TAKEN.get(status, NOT_TAKEN[devmsg.TAKEN_FAILED])
                self.let_disks_go()
                return outcome, f"{disk.label} {text}"
        self.disks_gone = False
        return TakenBack.DONE, ""
