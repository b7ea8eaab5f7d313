"""Standard output while it shows a console.  A terminal is restored afterwards."""

import os
import select
import sys
import time

from vmctl.modes import Modes, asks
from vmctl.output import put, write_all
from vmctl.replay import Replay
from vmctl.vt import Parser
from vmd.stdio import STDOUT

# Without any of these bytes output is plain text.
MARKS = bytes((0x05, 0x0E, 0x0F, 0x1B)) + bytes(range(0x80, 0xA0)) + b"\xc2"
ASKED_S = 1.0  # the terminal may take this long to answer a question of the guest
ANSWER_S = 1.0  # the terminal may take this long to answer us
QUESTION, ANSWER = b"\x1b[5n", b"\x1b[0n"  # DSR, device status report
GIVE_UP = b"\x18\x1b\\"  # ends an unfinished sequence of the guest: CAN, and ST for strings


class Screen:
    """Shows output of a guest: first the backlog, then live output.

    `keyboard` is a descriptor from which answers of the terminal come, None if standard input is no terminal.
    """

    def __init__(self, keyboard: int | None = None) -> None:
        self.is_tty = os.isatty(STDOUT)
        self._keyboard = keyboard
        utf8 = sys.getfilesystemencoding() == "utf-8"
        self._replay = Replay(utf8=utf8)
        self._parser = Parser(utf8=utf8)
        self._modes = Modes(utf8=utf8, columns=columns())
        self._given_back = False
        self._asked_s = -ASKED_S

    def replay(self, backlog: bytes) -> None:
        """Show the backlog.  Raises CommandError."""
        self._show(self._replay.shown(backlog) if self.is_tty else backlog)

    def show(self, data: bytes) -> None:
        """Show live output of the guest, which may control the terminal.  Raises CommandError."""
        self._show(self._replay.rest(data) if self.is_tty else data)

    def _show(self, data: bytes) -> None:
        if self.is_tty and (self._parser.in_sequence or len(data.translate(None, MARKS)) < len(data)):
            before = b""
            for item in self._parser.feed(data):
                before += self._modes.follow(item)
                if asks(item):
                    self._asked_s = time.monotonic()
            data = before + data
        put(data)

    def put_back(self) -> None:
        """Undo what the guest has done to the terminal, and discard answers of the terminal that are still to come.

        A second call has no effect.
        """
        if not self.is_tty or self._given_back:
            return
        self._given_back = True
        undo = (GIVE_UP if self._parser.in_sequence else b"") + self._modes.undo()
        awaited = self._modes.reports or time.monotonic() < self._asked_s + ASKED_S
        try:
            write_all(STDOUT, undo)
            if awaited and self._keyboard is not None:
                self._take_answers(self._keyboard)
        except OSError:  # the terminal has hung up
            return

    def again(self) -> None:
        """Restore the guest's changes of the terminal, after `put_back`."""
        self._given_back = False
        if self.is_tty:
            try:
                write_all(STDOUT, self._modes.again())
            except OSError:
                return

    def _take_answers(self, keyboard: int) -> None:
        """Discard answers of the terminal.  We ask it a question: when this is answered, so are all earlier ones."""
        write_all(STDOUT, QUESTION)
        poll = select.poll()
        poll.register(keyboard, select.POLLIN)
        deadline_s = time.monotonic() + ANSWER_S
        taken = b""
        while ANSWER not in taken and poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
            data = os.read(keyboard, 4096)
            if not data:
                return
            taken = taken[-len(ANSWER) :] + data


def columns() -> int:
    """Return the width of the terminal."""
    try:
        return os.get_terminal_size(STDOUT).columns or 80
    except OSError:
        return 80
