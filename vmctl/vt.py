"""Splits output of a guest into text, control characters and escape sequences (ECMA-48, as xterm reads them)."""

from vmd.enums import Enum

CAN, SUB, ESC, BEL, DEL = 0x18, 0x1A, 0x1B, 0x07, 0x7F
C1_LEAD = 0xC2  # in UTF-8 the C1 controls, U+0080 to U+009F, are this byte and then 80 to 9F
ST = ord("\\")  # as the second byte of ESC \, the end of a string
INTRODUCERS = {ord("]"): "OSC", ord("P"): "DCS", ord("X"): "SOS", ord("^"): "PM", ord("_"): "APC"}
KEPT_MAX = 4096  # bytes of one sequence that are kept; the rest of a longer one is skipped


class Kind(Enum):
    """The kind of an item."""

    TEXT = 0
    CONTROL = 1  # one C0 control character
    ESCAPE = 2  # ESC, intermediates, final
    CSI = 3  # CSI, parameters, intermediates, final
    STRING = 4  # OSC, DCS, SOS, PM or APC: `final` is the introducer, `parameters` the string


class State(Enum):
    """The state of the parser: the item to which the next byte belongs."""

    GROUND = 0
    ESCAPE = 1
    CSI = 2
    STRING = 3
    STRING_ESCAPE = 4  # after ESC in a string: ESC \ ends the string, and any other sequence discards it


class Item:
    """One piece of output."""

    __slots__ = ("final", "intermediates", "kind", "parameters")

    def __init__(self, kind: Kind, parameters: bytes = b"", intermediates: bytes = b"", final: str = "") -> None:
        self.kind = kind
        self.parameters = parameters  # of TEXT: the text
        self.intermediates = intermediates
        self.final = final  # of CONTROL: the character


class Parser:
    """Splits output into items.  A read may end at any byte.

    With `utf8`, C1 controls are the characters U+0080 to U+009F; without, the bytes 80 to 9F.
    """

    def __init__(self, *, utf8: bool = True) -> None:
        self.utf8 = utf8
        self._state = State.GROUND
        self._lead = False  # the last byte was C1_LEAD
        self._introducer = ""
        self._parameters = bytearray()
        self._intermediates = bytearray()
        self._text = bytearray()
        self._items: list[Item] = []

    @property
    def in_sequence(self) -> bool:
        """Whether there is an unfinished sequence."""
        return self._state is not State.GROUND or self._lead

    def feed(self, data: bytes) -> list[Item]:
        """Return the items that `data` completes.  Text is returned at once."""
        self._items = []
        for byte in data:
            if self._lead:
                self._lead = False
                if 0x80 <= byte < 0xA0:
                    self._c1(byte)
                    continue
                self._plain(C1_LEAD)
            if byte == C1_LEAD and self.utf8:
                self._lead = True
            elif 0x80 <= byte < 0xA0 and not self.utf8:
                self._c1(byte)
            else:
                self._byte(byte)
        self._end_text()
        return self._items

    def _c1(self, byte: int) -> None:
        """Take a C1 control, which stands for ESC and a letter."""
        self._byte(ESC)
        self._byte(byte - 0x40)

    def _plain(self, byte: int) -> None:
        """Take a byte above 7F, which can only be in text or in a string."""
        if self._state is State.STRING:
            self._keep(self._parameters, byte)
        else:
            self._state = State.GROUND
            self._text.append(byte)

    def _byte(self, byte: int) -> None:
        if self._state is State.GROUND and byte >= 0x20 and byte != DEL:
            self._text.append(byte)
            return
        self._end_text()  # bytes before and after a control must not join to one character
        if byte == ESC:
            self._state = State.STRING_ESCAPE if self._state is State.STRING else State.ESCAPE
            self._intermediates.clear()
        elif byte in (CAN, SUB):
            self._state = State.GROUND
        elif self._state is State.STRING:
            self._string(byte)
        elif byte < 0x20:  # it takes effect at once, also within a sequence
            self._item(Kind.CONTROL, final=chr(byte))
        elif byte == DEL:
            return
        elif byte >= 0x80:
            self._plain(byte)
        elif self._state is State.CSI:
            self._csi(byte)
        else:
            self._escape(byte)

    def _string(self, byte: int) -> None:
        ends = byte == BEL and self._introducer == "OSC"
        # Only DCS strings have line ends.  A terminal would wait for the end of the string, and show nothing.
        if ends or (byte in b"\r\n" and self._introducer != "DCS"):
            self._end_string()
            if not ends:
                self._item(Kind.CONTROL, final=chr(byte))
        else:
            self._keep(self._parameters, byte)

    def _escape(self, byte: int) -> None:
        if self._state is State.STRING_ESCAPE:
            if byte == ST:
                self._end_string()
                return
            self._state = State.ESCAPE
        if byte < 0x30:
            self._keep(self._intermediates, byte)
        elif byte == ord("[") and not self._intermediates:
            self._state = State.CSI
            self._parameters.clear()
        elif byte in INTRODUCERS and not self._intermediates:
            self._state = State.STRING
            self._introducer = INTRODUCERS[byte]
            self._parameters.clear()
        else:
            self._state = State.GROUND
            self._item(Kind.ESCAPE, intermediates=bytes(self._intermediates), final=chr(byte))

    def _csi(self, byte: int) -> None:
        if byte < 0x30:
            self._keep(self._intermediates, byte)
        elif byte < 0x40:
            self._keep(self._parameters, byte)
        else:
            self._state = State.GROUND
            self._item(Kind.CSI, bytes(self._parameters), bytes(self._intermediates), chr(byte))

    def _end_string(self) -> None:
        self._state = State.GROUND
        self._item(Kind.STRING, bytes(self._parameters), final=self._introducer)

    def _item(self, kind: Kind, parameters: bytes = b"", intermediates: bytes = b"", final: str = "") -> None:
        self._items.append(Item(kind, parameters, intermediates, final))

    def _end_text(self) -> None:
        if self._text:
            self._items.append(Item(Kind.TEXT, bytes(self._text)))
            self._text.clear()

    @staticmethod
    def _keep(part: bytearray, byte: int) -> None:
        if len(part) < KEPT_MAX:
            part.append(byte)
