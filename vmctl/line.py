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
# Limit of typed bytes that wait for a guest which does not read.  When it is reached, we stop reading the operator, and
# escapes are not seen any more.  So it is large: one must be able to leave after pasting a book into a hung guest.
TYPED_MAX = 1 << 20
GONE = (errno.EIO, errno.ENXIO, errno.EBADF)  # errors of a terminal that has hung up or was never open


class Ending(Enum):
    """Why a relay ended."""

    LEFT = 0
    VM_ENDED = 1
    DAEMON_LOST = 2
    TAKEN = 3  # by another user


def failed(what: str, error: OSError) -> CommandError:
    """Return the error for a failed system call."""
    return CommandError(f"{what}: {sentence(error)}", error.errno)


def open_line(path: str) -> int:
    """Open the pty with our own rights, which decide whether we may use the console.  Raises CommandError.

    O_NOCTTY: the pty must not become our controlling terminal.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise failed(f"cannot open console {path}", error) from None
    try:
        # An earlier user may have left echo on, which would send the guest's output back to it as input.
        tty.setraw(fd, termios.TCSANOW)
    except termios.error:
        os.close(fd)
        raise CommandError(f"cannot open console {path}: not a terminal", errno.ENOTTY) from None
    return fd


class Relay:
    """One connection to a console: the line, the operator at the terminal, and the daemon."""

    def __init__(self, client: Client, attached: ConsoleAttached, line: int, terminal: RawTerminal) -> None:
        self.client = client
        self.attached = attached
        self.line = line
        self.terminal = terminal
        self.escapes = Escapes()
        self.typed = bytearray()  # typed bytes that were not yet written to the line
        self.leaving = False
        self.last_words = ""  # the daemon's last failure
        self.on_message: Callable[[Record], None] = lambda _message: None  # called with the daemon's messages

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
        """Take a message of the daemon; return how it ends the connection, or None."""
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
        """Show output of the guest; return False if the line is closed."""
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
        """Write typed bytes, as many as the line takes; return False if the line is closed."""
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
            self.typed += typed  # a file or pipe has no escapes

    def _act(self, action: Action) -> None:
        if action is Action.LEAVE:
            self._flush()
            # Bytes that the guest does not take now are dropped: we would wait for it otherwise.
            self.leaving = True
            self.typed.clear()
        elif action is Action.BREAK:
            self.client.send(ConsoleBreak(vmid=self.attached.vmid, name=self.attached.name))
        elif action is Action.HELP:
            self.terminal.say(f"~?\n{HELP}")
        else:
            self.terminal.say("~^Z\n")
            self.terminal.suspend()
