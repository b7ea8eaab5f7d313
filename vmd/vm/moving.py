"""A VM on its way out, or in: what the event thread does about it, step by step.

Each object is one such way, and its steps are checked: a message that belongs to another one is refused.
"""

import errno
import os
from enum import Enum

from vmd.errors import OperatorError, PeerError, VmdError, sentence
from vmd.guestmem import GuestMemory
from vmd.ipc.messages import ReceivedHeader, ReceivedMachine, TransferProgress
from vmd.vm.build import FromStream, check_host, unusable
from vmd.vm.machine import memory_regions
from vmd.vm.transfer import Receiver, Sender

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.ipc.channel import Channel
    from vmd.ipc.loop import Loop
    from vmd.ipc.messages import SendVm
    from vmd.vm.pause import Pause
    from vmd.vm.state import Header, MachineState

PROGRESS_S = 0.5


def show_progress(transfer: "Sender | Receiver", loop: "Loop", vmm: "Channel") -> None:
    """Tell every now and then how far a transfer is, until it is over."""
    if not transfer.over:
        vmm.send(TransferProgress(done_bytes=transfer.pipe.moved_bytes, total_bytes=transfer.total_bytes))
        loop.call_later(PROGRESS_S, lambda: show_progress(transfer, loop, vmm))


class Departure:
    """A VM that is sent: it stands still, and a thread writes what it is.

    `done(why not)` is told once, with everything as before unless it was sent for good.
    """

    def __init__(
        self, message: "SendVm", stream: int, pause: "Pause", vmm: "Channel", done: "Callable[[Departure, str], None]"
    ) -> None:
        self.keep = message.keep
        self.stays_paused = pause.paused or pause.under_way
        self.then: Callable[[], None] = lambda: None  # when it is over, and the VM lives
        self._one_shot = message.one_shot
        self._pause, self._vmm, self._done = pause, vmm, done
        self._cancelled = False
        self._sender: Sender | None = None
        self._stream = stream

    def begin(self) -> None:
        """Have it stand still, and then be sent; the descriptor is closed in any case."""
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
        except PeerError as error:
            os.close(stream)
            pause.give_up(str(error))  # a device is gone: how the VM ends is the answer
        except (VmdError, OSError) as error:
            os.close(stream)
            self._finish(sentence(error))
        else:
            self._sender = sender
            sender.start()
            show_progress(sender, pause.loop, self._vmm)

    def _finish(self, text: str) -> None:
        self._done(self, text)


class Step(Enum):
    """How far a VM is that is received."""

    HEADER = 1  # is read
    ASKED = 2  # whether such a VM may be
    MEMORY = 3  # and all the rest is read
    COMPLETE = 4  # but for its disks, which the sender lets go now


class Arrival:
    """A VM that is received; anything wrong is told to `fail`, and is the end."""

    def __init__(
        self, vmid: int, stream: int, loop: "Loop", vmm: "Channel", fail: "Callable[[Exception], None]"
    ) -> None:
        """Own `stream`."""
        self.step = Step.HEADER
        self._vmid, self._vmm, self._fail = vmid, vmm, fail
        self._header: Header | None = None
        self._memory: GuestMemory | None = None
        self._machine: MachineState | None = None
        self._receiver = Receiver(
            stream,
            loop,
            on_header=self._on_header,
            on_machine=self._on_machine,
            on_failed=lambda text: fail(OperatorError(errno.EINVAL, text)),
        )
        self._receiver.start()
        show_progress(self._receiver, loop, vmm)

    def _take(self, step: Step, message: str) -> None:
        """Take the next step, because of a message.  Raises PeerError."""
        if self.step.value != step.value - 1:
            raise PeerError(self._vmm.label, f"unexpected {message}")
        self.step = step

    def _on_header(self, header: "Header") -> None:
        """Ask whether such a VM may be, once it is clear that it could."""
        self._header = header
        self.step = Step.ASKED
        answer = ReceivedHeader(vmid=self._vmid, config=header.config, one_shot=header.one_shot)
        try:
            check_host(header)
        except (ValueError, OSError) as error:
            self._fail(unusable(error))
            return
        try:
            self._vmm.send(answer)
        except ValueError:
            self._fail(unusable(ValueError("its configuration is longer than any here can be")))

    def read_on(self) -> None:
        """Read the rest of the stream.  Raises PeerError."""
        self._take(Step.MEMORY, "ReceiveMemory")
        assert self._header is not None
        try:
            regions = memory_regions(self._header.config.memory_bytes, self._header.firmware_bytes)
            self._memory = GuestMemory.create(regions)
        except (VmdError, ValueError) as error:
            self._fail(error)
            return
        self._receiver.go_on(self._memory)

    def _on_machine(self, machine: "MachineState") -> None:
        """The stream is complete."""
        self._machine = machine
        self.step = Step.COMPLETE
        self._vmm.send(ReceivedMachine(vmid=self._vmid))

    def source(self) -> FromStream:
        """Return what a machine can be built from.  Raises PeerError."""
        if self.step is not Step.COMPLETE:
            raise PeerError(self._vmm.label, "unexpected ResumeReceived")
        assert self._header is not None
        assert self._memory is not None
        assert self._machine is not None
        return FromStream(self._header, self._memory, self._machine)
