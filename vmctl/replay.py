"""A console's backlog, made fit to be shown again.

Output of a guest acts on the terminal at which it is printed.  What is shown again later is only read: text, lines,
colours and what happens within one line.  Everything else stays out, above all what clears or moves the screen, sets
modes, or makes the terminal answer (the answer would be typed into the guest, or into a shell).
"""

from vmctl.vt import Item, Kind, Parser

# CSI with digits only: colours (SGR), and what changes the line that the cursor is on:
# EL, CUF, CUB, CHA, DCH, ECH, ICH.
HARMLESS = frozenset("mKCDGPX@")
# The cursor goes to another line: to a place, or a line up or down.  Their texts would run into each other.
TO_OTHER_LINES = frozenset("HfdE")
DIGITS_MAX = 4  # of one parameter; no screen is larger
PARAMETERS_MAX = 64
KEPT_CONTROLS = {"\n": b"\n", "\r": b"\r", "\t": b"\t", "\b": b"\b", "\v": b"\n", "\f": b"\n"}


class Replay:
    """Takes the backlog, in pieces, and then the end of what the backlog has cut off."""

    def __init__(self, *, utf8: bool = True) -> None:
        self.utf8 = utf8
        self._parser = Parser(utf8=utf8)
        self._line_used = False

    def shown(self, backlog: bytes) -> bytes:
        """Return what of it may be shown."""
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
    """Return whether parameters are numbers that a terminal has to expect."""
    if len(parameters) > PARAMETERS_MAX:
        return False
    values = parameters.replace(b":", b";").split(b";")
    return all(len(value) <= DIGITS_MAX and (not value or value.isdigit()) for value in values)
