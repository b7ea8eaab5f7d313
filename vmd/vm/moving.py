"""A VM on its way out, or in: what the event thread does about it, step by step.

Each object is one such way, and its steps are checked: a message that belongs to another one is refused.
"""

import errno
import os
import select
from enum import Enum

from vmd.errors import OperatorError, PeerError, VmdError, sentence
from vmd.guestmem import GuestMemory
from vmd.ipc.messages import ReceivedHeader, ReceivedMachine, TransferProgress
from vmd.log import log
from vmd.privsep.spawn import spawn
from vmd.vm import streamprobe
from vmd.vm.build import FromStream, check_host, unusable
from vmd.vm.kinds import kinds
from vmd.vm.machine import memory_regions
from vmd.vm.state import read_header
from vmd.vm.stream import Pipe
from vmd.vm.transfer import Receiver, Sender

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.ipc.channel import Channel
    from vmd.ipc.loop import Loop
    from vmd.ipc.messages import SendVm
    from vmd.vm.kinds import Kind
    from vmd.vm.pause import Pause
    from vmd.vm.state import Header, MachineState

PROGRESS_S = 0.5
PROBE_END_TIMEOUT_S = 1.0  # between its answer and its end


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

    HEADER = 1  # is read by streamprobe
    ASKED = 2  # whether such a VM may be
    MEMORY = 3  # and all the rest is read
    COMPLETE = 4  # but for its disks, which the sender lets go now


class Arrival:
    """A VM that is received; anything wrong is told to `fail`, and is the end.

    `narrow(kinds)` starts the processes of its devices and confines this one, before a byte of the stream is looked at.
    """

    def __init__(
        self,
        vmid: int,
        stream: int,
        loop: "Loop",
        vmm: "Channel",
        *,
        narrow: "Callable[[list[Kind]], None]",
        fail: "Callable[[Exception], None]",
    ) -> None:
        """Own `stream`.  Raises HostError or OSError."""
        self.step = Step.HEADER
        self._vmid, self._stream, self._loop, self._vmm = vmid, stream, loop, vmm
        self._narrow, self._fail = narrow, fail
        self._answer = b""
        self._version = 0
        self._header: Header | None = None
        self._memory: GuestMemory | None = None
        self._machine: MachineState | None = None
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            self._probe = spawn(
                f"{log.title}/streamprobe",
                fds={streamprobe.FD_ANSWER: writing, streamprobe.FD_STREAM: stream},
                entry="vmd.vm.streamprobe:main",
            )
        finally:
            os.close(writing)
        loop.add(reading, lambda _events: self._on_probe(reading))

    def _take(self, step: Step, message: str) -> None:
        """Take the next step, because of a message.  Raises PeerError."""
        if self.step.value != step.value - 1:
            raise PeerError(self._vmm.label, f"unexpected {message}")
        self.step = step

    def _on_probe(self, fd: int) -> None:
        """Take the answer, up to its end."""
        piece = os.read(fd, streamprobe.ANSWER_MAX)
        self._answer += piece
        if piece and len(self._answer) <= streamprobe.ANSWER_MAX:
            return
        self._loop.remove(fd)
        os.close(fd)
        status = self._probe.reap(PROBE_END_TIMEOUT_S)
        try:
            beginning = streamprobe.unpack(self._answer)
        except ValueError as error:
            self._fail(PeerError(self._probe.title, f"{error}, status {status}"))
            return
        if isinstance(beginning, str):
            self._fail(OperatorError(errno.EINVAL, beginning))
            return
        try:
            self._narrow(beginning.kinds)
        except (VmdError, OSError) as error:
            self._fail(error)
            return
        self._begin(beginning)

    def _begin(self, beginning: streamprobe.Beginning) -> None:
        """Ask whether such a VM may be, once it is clear that it could."""
        self.step = Step.ASKED
        self._version = beginning.version
        self._pipe = Pipe(self._stream, select.POLLIN, moved_bytes=beginning.read_bytes)
        try:
            self._header = header = read_header(beginning.version, beginning.header)
            if kinds(header.config) != beginning.kinds:
                raise ValueError("it has other devices than it says")
            check_host(header)
        except (ValueError, OSError) as error:
            self._fail(unusable(error))
            return
        try:
            self._vmm.send(ReceivedHeader(vmid=self._vmid, config=header.config, one_shot=header.one_shot))
        except ValueError:
            self._fail(unusable(ValueError("its configuration is longer than any here can be")))

    def read_on(self) -> None:
        """Read the rest of the stream.  Raises PeerError."""
        self._take(Step.MEMORY, "ReceiveMemory")
        header = self._header
        assert header is not None
        try:
            self._memory = GuestMemory.create(memory_regions(header.config.memory_bytes, header.firmware_bytes))
        except (VmdError, ValueError) as error:
            self._fail(error)
            return
        receiver = Receiver(
            self._pipe,
            self._version,
            header,
            self._memory,
            self._loop,
            on_machine=self._on_machine,
            on_failed=lambda text: self._fail(OperatorError(errno.EINVAL, text)),
        )
        receiver.start()
        show_progress(receiver, self._loop, self._vmm)

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
