"""The escapes of a console: a `~` typed at the start of a line is a command for us, not for the guest (cu(1))."""

from vmd.enums import Enum


class Action(Enum):
    """The action of an escape."""

    LEAVE = 0
    BREAK = 1
    HELP = 2
    SUSPEND = 3


TILDE = ord("~")
ACTIONS = {
    ord("."): Action.LEAVE,
    0x04: Action.LEAVE,  # ^D
    ord("#"): Action.BREAK,
    ord("b"): Action.BREAK,
    ord("?"): Action.HELP,
    0x1A: Action.SUSPEND,  # ^Z
}
HELP = """\
~.    leave (also ~^D)
~#    send a BREAK (also ~b)
~^Z   suspend vmctl
~?    this text
~~    send one ~
Escapes work only at the start of a line.
"""


class Escapes:
    """Splits typed bytes into bytes for the guest and actions for us.  A read may end at any byte."""

    def __init__(self) -> None:
        self._at_line_start = True
        self._after_tilde = False

    def feed(self, typed: bytes) -> list[bytes | Action]:
        """Return the bytes to send and the actions to take, in their order."""
        parts: list[bytes | Action] = []
        plain = bytearray()
        for byte in typed:
            if self._after_tilde:
                self._after_tilde = False
                action = ACTIONS.get(byte)
                if action is not None:
                    if plain:
                        parts.append(bytes(plain))
                        plain.clear()
                    parts.append(action)
                    continue  # for the guest this is still the start of a line
                if byte != TILDE:
                    plain.append(TILDE)  # not an escape: both bytes are for the guest
            elif byte == TILDE and self._at_line_start:
                self._after_tilde = True
                continue
            plain.append(byte)
            self._at_line_start = byte in b"\r\n"
        if plain:
            parts.append(bytes(plain))
        return parts
