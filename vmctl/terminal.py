"""The operator's terminal while it shows a console: in raw mode, and always restored afterwards."""

import os
import termios
import tty

from vmctl.errors import CommandError
from vmctl.output import notice
from vmctl.screen import Screen
from vmd import signals as signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType, TracebackType

ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)


class RawTerminal:
    """A context in which `fd` is in raw mode and `screen` shows a guest.  Only a terminal is changed.

    Within the context, a signal that ends vmctl raises CommandError, so that the terminal is always restored.
    SIGTSTP restores the terminal while vmctl is stopped.
    """

    def __init__(self, fd: int, command: str = "console") -> None:
        self.fd = fd
        self.command = command
        self.is_tty = os.isatty(fd)
        self.screen = Screen(fd if self.is_tty else None)
        self._saved = termios.tcgetattr(fd) if self.is_tty else []
        self._handlers: dict[int, object] = {}
        self._ended = False

    def __enter__(self) -> "RawTerminal":
        if self.is_tty or self.screen.is_tty:
            try:
                for signum in ENDING:
                    self._handlers[signum] = signal.signal(signum, self._on_end)
                self._handlers[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._on_stop)
                self._set_raw()
            except BaseException:
                self._give_back()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: "TracebackType | None"
    ) -> None:
        try:
            self._ended = True
        finally:
            # No signal interrupts this: `_on_end` raises at most once, before or at the line above.
            self._give_back()

    def say(self, text: str) -> None:
        """Show a text to the operator.  In raw mode a line feed needs a carriage return, too."""
        notice(text.replace("\n", "\r\n") if self.is_tty else text)

    def suspend(self) -> None:
        """Stop with our whole process group until SIGCONT.  For a terminal only."""
        self._restore()
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(0, signal.SIGTSTP)  # returns after SIGCONT
        signal.signal(signal.SIGTSTP, handler)
        self._set_raw()
        self.screen.again()

    def _set_raw(self) -> None:
        if self.is_tty:
            tty.setraw(self.fd, termios.TCSADRAIN)

    def _restore(self) -> None:
        self.screen.put_back()
        if self.is_tty:
            try:
                termios.tcsetattr(self.fd, termios.TCSADRAIN, self._saved)
            except termios.error:  # the terminal has hung up
                return

    def _give_back(self) -> None:
        self._restore()
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def _on_end(self, signum: int, _frame: "FrameType | None") -> None:
        if not self._ended:
            self._ended = True
            raise CommandError(f"{self.command}: ended by {signal.name_of(signum)}")

    def _on_stop(self, _signum: int, _frame: "FrameType | None") -> None:
        self.suspend()
