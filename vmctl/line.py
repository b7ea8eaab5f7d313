"""Relays between the operator and the pty that is a VM's serial line, as cu(1) does."""

import errno
import os
import select
import termios
import tty

from vmctl.errors import CommandError
from vmctl.escapes import HELP, Action, Escapes
from vmctl.output import clean
from vmctl.terminal import RawTerminal
from vmd.client import LOOK_UP_MS, Client, ClientError, failed_text
from vmd.enums import Enum
from vmd.errors import VMD_CONSOLE_TAKEN, sentence
from vmd.ipc.messages.clients import ConsoleAttached, ConsoleBreak, Failed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmd.record import Record

READ_MAX = 16384
# What waits for a guest that does not read; beyond it we do not read the operator either.  Large, since an
# escape behind it would not be seen: who has pasted a book into a hung guest must still be able to leave.
TYPED_MAX = 1 << 20
GONE = (errno.EIO, errno.ENXIO, errno.EBADF)  # what a terminal that hung up, or was never there, answers


class Ending(Enum):
    """Why a relay ended."""

    LEFT = 0
    VM_ENDED = 1
    DAEMON_LOST = 2
    TAKEN = 3  # by another viewer


def failed(what: str, error: OSError) -> CommandError:
    """Return a failed call as a sentence."""
    return CommandError(f"{what}: {sentence(error)}", error.errno)


def open_line(path: str) -> int:
    """Open the pty with our own rights: they decide who may use a console.  Raises CommandError.

    O_NOCTTY: it must not become the terminal whose ^C ends us.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise failed(f"cannot open console {path}", error) from None
    try:
        # Whoever used it before us may have left it echoing, which turns the guest's output into its input.
        tty.setraw(fd, termios.TCSANOW)
    except termios.error:
        os.close(fd)
        raise CommandError(f"cannot open console {path}: not a terminal", errno.ENOTTY) from None
    return fd


class Relay:
    """One attachment: the line, the operator on `stdin` and standard output, and the daemon."""

    def __init__(self, client: Client, attached: ConsoleAttached, line: int, terminal: RawTerminal) -> None:
        self.client = client
        self.attached = attached
        self.line = line
        self.terminal = terminal
        self.escapes = Escapes()
        self.typed = bytearray()  # not yet taken by the line
        self.leaving = False
        self.last_words = ""  # of the daemon
        self.on_message: Callable[[Record], None] = lambda _message: None  # ... what it says besides

    def run(self) -> Ending:
        """Relay until the operator leaves, the VM has ended or the daemon is gone."""
        while True:
            if self.leaving and not self.typed:
                return Ending.LEFT
            ready = self._poll()
            if self.client.fileno() in ready:
                ending = self._on_daemon()
                if ending is not None:
                    return ending
            if self.line in ready and not (self._flush() and self._on_output()):
                return Ending.VM_ENDED
            if self.terminal.fd in ready:
                self._on_typed()

    def _poll(self) -> set[int]:
        poll = select.poll()
        poll.register(self.client.fileno(), select.POLLIN)
        poll.register(self.line, select.POLLIN | (select.POLLOUT if self.typed else 0))
        if not self.leaving and len(self.typed) < TYPED_MAX:
            poll.register(self.terminal.fd, select.POLLIN)
        return {fd for fd, _ in poll.poll(LOOK_UP_MS)}

    def _on_daemon(self) -> Ending | None:
        """Take a message that came unasked; return what it ends."""
        try:
            message = self.client.receive()
        except ClientError:
            return Ending.DAEMON_LOST
        if isinstance(message, Failed):
            self.last_words = failed_text(message)
            if message.code == VMD_CONSOLE_TAKEN:
                return Ending.TAKEN
            self.terminal.say(f"\n[{clean(self.last_words)}]\n")
        self.on_message(message)
        return None

    def _on_output(self) -> bool:
        """Show what the guest printed; False if the line is no more."""
        try:
            data = os.read(self.line, READ_MAX)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno in GONE:
                return False
            raise failed(f"console {self.attached.tty}", error) from None
        if not data:  # the other side is closed
            return False
        self.terminal.screen.show(data)
        return True

    def _flush(self) -> bool:
        """Write what was typed, as far as the line takes it; False if the line is no more."""
        try:
            while self.typed:
                del self.typed[: os.write(self.line, self.typed)]
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno in GONE:
                return False
            raise failed(f"console {self.attached.tty}", error) from None
        return True

    def _on_typed(self) -> None:
        try:
            typed = os.read(self.terminal.fd, READ_MAX)
        except OSError as error:
            if error.errno not in GONE:
                raise failed("standard input", error) from None
            typed = b""
        if not typed:
            self.leaving = True
        elif self.terminal.is_tty:
            for part in self.escapes.feed(typed):
                if self.leaving:
                    return
                if isinstance(part, bytes):
                    self.typed += part
                else:
                    self._act(part)
        else:
            self.typed += typed  # a file or pipe means every byte of it

    def _act(self, action: Action) -> None:
        if action is Action.LEAVE:
            self._flush()
            # What the guest does not take now would keep us here.
            self.leaving = True
            self.typed.clear()
        elif action is Action.BREAK:
            self.client.send(ConsoleBreak(vmid=self.attached.vmid, name=self.attached.name))
        elif action is Action.HELP:
            self.terminal.say(f"~?\n{HELP}")
        else:
            self.terminal.say("~^Z\n")
            self.terminal.suspend()
