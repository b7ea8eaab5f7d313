"""Filters the backlog of a console, so that it can be shown again.

Output of a guest controls the terminal.  Of the backlog, only text, lines, colours and changes within one line are
shown.  Everything else is left out: sequences that clear or move the screen, set modes, or make the terminal answer.
Such an answer would be typed into the guest, or into a shell.
"""

from vmctl.vt import Item, Kind, Parser

# CSI with digits only: colours (SGR), and changes of the line that the cursor is on:
# EL, CUF, CUB, CHA, DCH, ECH, ICH.
HARMLESS = frozenset("mKCDGPX@")
# These move the cursor to another line, so a new line begins: otherwise the texts of two lines would be joined.
TO_OTHER_LINES = frozenset("HfdE")
DIGITS_MAX = 4  # of one parameter; screens are smaller
PARAMETERS_MAX = 64
KEPT_CONTROLS = {"\n": b"\n", "\r": b"\r", "\t": b"\t", "\b": b"\b", "\v": b"\n", "\f": b"\n"}


class Replay:
    """Takes the backlog in pieces, and then live output, whose beginning may complete a sequence of the backlog."""

    def __init__(self, *, utf8: bool = True) -> None:
        self.utf8 = utf8
        self._parser = Parser(utf8=utf8)
        self._line_used = False

    def shown(self, backlog: bytes) -> bytes:
        """Return the part of the backlog that may be shown."""
        return b"".join(self._piece(item) for item in self._parser.feed(backlog))

    def rest(self, live: bytes) -> bytes:
        """Return live output without the end of a sequence that began in the backlog."""
        for at, byte in enumerate(live):
            if not self._parser.in_sequence:
                return live[at:]
            self._parser.feed(bytes((byte,)))
        return b""

    def _piece(self, item: Item) -> bytes:
        if item.kind is Kind.TEXT:
            self._line_used = True
            return self._text(item.parameters)
        if item.kind is Kind.CONTROL:
            kept = KEPT_CONTROLS.get(item.final, b"")
            self._line_used = self._line_used and kept != b"\n"
            return kept
        if item.kind is Kind.ESCAPE and not item.intermediates:
            return self._new_line() if item.final in "cDE" else b""
        if item.kind is Kind.CSI and not item.intermediates:
            if item.final in TO_OTHER_LINES:
                return self._new_line()
            if item.final in HARMLESS and are_small(item.parameters):
                return b"\x1b[" + item.parameters + item.final.encode()
        return b""

    def _text(self, raw: bytes) -> bytes:
        if self.utf8:
            return raw.decode("utf-8", "replace").encode()
        return bytes(byte if byte < 0x80 else ord("?") for byte in raw)

    def _new_line(self) -> bytes:
        if not self._line_used:
            return b""
        self._line_used = False
        return b"\r\n"


def are_small(parameters: bytes) -> bool:
    """Return whether all parameters are small numbers, as terminals expect them."""
    if len(parameters) > PARAMETERS_MAX:
        return False
    values = parameters.replace(b":", b";").split(b";")
    return all(len(value) <= DIGITS_MAX and (not value or value.isdigit()) for value in values)
