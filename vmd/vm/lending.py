"""A VM whose disks somebody else has for a moment: it stands still, and its disks' processes touch them no more.

Whoever has them may also be told, through a pipe, what the machine is: for a snapshot.  In between:

    1. the machine stands still, and what its guest has written is on stable storage
    2. the processes of the disks give away the open files, which are locked and stay so
    3. a thread writes the machine to the pipe, as for a VM that is sent

It goes on when the disks come back, which the parent says: their processes then look at them anew.
"""

from vmd import threads
from vmd.closing import close, close_all
from vmd.errors import VmdError, sentence
from vmd.ipc import courier
from vmd.ipc import sockets as socket
from vmd.privsep.title import name_thread
from vmd.tasks import start_thread
from vmd.vm.departure import begun
from vmd.vm.sender import Sender, settle
from vmd.vm.stream import Cancelled

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.ipc.channel import Channel
    from vmd.ipc.messages.vm import LendDisks
    from vmd.vm.pause import Pause

ASKED_S = 60.0  # for who is to have the disks to ask for them


class Lending:
    """`done(why not)` is told once, when all was given; the machine stands still from then on until `take_back`."""

    def __init__(
        self,
        message: "LendDisks",
        courier_fd: int,
        stream: int | None,
        pause: "Pause",
        vmm: "Channel",
        done: "Callable[[Lending, str], None]",
    ) -> None:
        """`courier_fd` is where the disks are asked for, `stream` where the machine is written to; both are ours."""
        self.look = message.look
        self.stays_paused = pause.paused or pause.under_way
        self.then: Callable[[], None] = lambda: None  # when the disks are back
        self._one_shot = message.one_shot
        self._pause, self._vmm, self._done = pause, vmm, done
        self._courier, self._stream = courier_fd, stream
        self._disks = pause.machine.disks()
        self._cancelled = threads.Event()
        self._sender: Sender | None = None

    def begin(self) -> None:
        """Have the machine stand still, unless the disks are only looked at, and then give them away."""
        if self.look:
            self._give("")
        else:
            self._pause.pause(self._give)

    def cancel(self) -> None:
        """Give it up."""
        self._cancelled.set()
        if self._sender is not None:
            self._sender.cancel()

    @property
    def sent_bytes(self) -> int:
        """How much of the machine was written."""
        return self._sender.pipe.moved_bytes if self._sender is not None else 0

    def _give(self, text: str) -> None:
        """The machine stands still, or a text says why not."""
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
                text = "" if courier.give(sock, {"disks": fds}) else "nobody wants its disks any more"
        except Cancelled:
            text = "it was interrupted"
        except (VmdError, OSError) as error:
            text = sentence(error)
        finally:
            close_all(fds)
            self._pause.loop.call_from_thread(lambda: self._given(text))

    def _given(self, text: str) -> None:
        """The disks are away: write the machine, if somebody wants that."""
        pause, stream = self._pause, self._stream
        if text or stream is None:
            self._finish(text)
            return
        self._stream = None

        def make(stream: int) -> Sender:
            assert pause.clocks is not None
            return Sender(pause.machine, pause.clocks, stream, pause.loop, self._finish, one_shot=self._one_shot)

        self._sender = begun(make, stream, pause, self._vmm, self._finish)
        if self._sender is not None and self._cancelled.is_set():
            self._sender.cancel()

    def _finish(self, text: str) -> None:
        if self._stream is not None:
            close(self._stream)
            self._stream = None
        self._done(self, text)

    def take_back(self) -> str:
        """Have the disks' processes look at them anew; return what one of them found wrong, or nothing."""
        wrong = [disk.label for disk in self._disks if not disk.reload()]
        return f"{' and '.join(wrong)}: cannot be used any more; the log says why" if wrong else ""
