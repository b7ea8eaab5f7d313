"""The escapes of a console: a `~` typed at the start of a line speaks to us, not to the guest (cu(1))."""

from vmd.enums import Enum


class Action(Enum):
    """What an escape asks for."""

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
Escapes are seen at the start of a line only.
"""


class Escapes:
    """Splits what is typed into bytes for the guest and actions for us, however it is cut into reads."""

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
                    continue  # still at the start of a line, as far as the guest knows
                if byte != TILDE:
                    plain.append(TILDE)  # no escape of ours: both belong to the guest
            elif byte == TILDE and self._at_line_start:
                self._after_tilde = True
                continue
            plain.append(byte)
            self._at_line_start = byte in b"\r\n"
        if plain:
            parts.append(bytes(plain))
        return parts
