"""Lends the disks of a VM to another process (imgwriter), for snapshots.  The machine is paused meanwhile.

    1. the machine is paused, and all that its guest has written is on stable storage
    2. the disk processes pass on their open files, which stay locked, and touch them no more
    3. if a pipe was given, a thread writes the machine to it, as when a VM is sent: a snapshot contains that stream

The parent tells when the disks are back.  The disk processes then read their headers again, and the machine goes on.
"""

from vmd import threads
from vmd.closing import close, close_all
from vmd.errors import VmdError, sentence
from vmd.ipc import courier
from vmd.ipc import sockets as socket
from vmd.privsep.title import name_thread
from vmd.tasks import start_thread
from vmd.vm.departure import start_sender
from vmd.vm.sender import Sender, settle
from vmd.vm.stream import Cancelled

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.ipc.channel import Channel
    from vmd.ipc.messages.vm import LendDisks
    from vmd.vm.pause import Pause

ASKED_S = 60.0  # how long the borrower may take to ask for the disks


class Lending:
    """The disks of a VM that are lent.

    `done` is called once, when the disks (and the machine's stream) were given, or with a sentence that says why they
    were not.  The machine stays paused until `take_back`.
    """

    def __init__(
        self,
        message: "LendDisks",
        courier_fd: int,
        stream: int | None,
        pause: "Pause",
        vmm: "Channel",
        done: "Callable[[Lending, str], None]",
    ) -> None:
        """The borrower asks for the disks over `courier_fd`.  The machine is written to `stream`.

        Both descriptors are closed here.
        """
        self.look = message.look
        self.stays_paused = pause.paused or pause.under_way
        self.then: Callable[[], None] = lambda: None  # called when the disks are back
        self._one_shot = message.one_shot
        self._pause, self._vmm, self._done = pause, vmm, done
        self._courier, self._stream = courier_fd, stream
        self._disks = pause.machine.disks()
        self._cancelled = threads.Event()
        self._sender: Sender | None = None

    def begin(self) -> None:
        """Pause the machine, and then give the disks.  With `look` they are only read, and the machine runs on."""
        if self.look:
            self._give("")
        else:
            self._pause.pause(self._give)

    def cancel(self) -> None:
        """Give up lending.  `done` is still called."""
        self._cancelled.set()
        if self._sender is not None:
            self._sender.cancel()

    @property
    def sent_bytes(self) -> int:
        """How many bytes of the machine's stream were written."""
        return self._sender.pipe.moved_bytes if self._sender is not None else 0

    def _give(self, text: str) -> None:
        """Give the disks: the machine is paused, or `text` says why it is not."""
        try:
            if text:
                raise VmdError(text)
            start_thread("lend", threads.Thread(target=self._run, name="lend", daemon=True).start)
        except VmdError as error:
            close(self._courier)
            self._finish(str(error))

    def _run(self) -> None:
        name_thread("lend")
        text = "internal error while its disks were given away"
        fds: list[int] = []
        try:
            with socket.socket(fileno=self._courier) as sock:
                sock.settimeout(ASKED_S)
                if not self.look:
                    settle(self._disks, self._cancelled)
                for disk in self._disks:
                    fds += disk.lend()
                text = "" if courier.give(sock, {"disks": fds}) else "the process that was to take its disks has ended"
        except Cancelled:
            text = "it was interrupted"
        except (VmdError, OSError) as error:
            text = sentence(error)
        finally:
            close_all(fds)
            self._pause.loop.call_from_thread(lambda: self._given(text))

    def _given(self, text: str) -> None:
        """The disks were given: write the machine, if there is a stream."""
        pause, stream = self._pause, self._stream
        if text or stream is None:
            self._finish(text)
            return
        self._stream = None

        def make(stream: int) -> Sender:
            assert pause.clocks is not None
            return Sender(pause.machine, pause.clocks, stream, pause.loop, self._finish, one_shot=self._one_shot)

        self._sender = start_sender(make, stream, pause, self._vmm, self._finish)
        if self._sender is not None and self._cancelled.is_set():
            self._sender.cancel()

    def _finish(self, text: str) -> None:
        if self._stream is not None:
            close(self._stream)
            self._stream = None
        self._done(self, text)

    def take_back(self) -> str:
        """Tell the disk processes to read their images' headers again.

        Return a sentence if that has failed for a disk, or "".
        """
        wrong = [disk.label for disk in self._disks if not disk.reload()]
        return f"{' and '.join(wrong)}: cannot be used any more; the log says why" if wrong else ""
