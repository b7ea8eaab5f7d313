"""Changes that a guest's output has made to the operator's terminal, and how to undo them.

Only differences from the usual state of a terminal are undone.  If the guest has restored the terminal itself, or has
printed only plain text, the screen is not touched.
"""

from vmctl.vt import Item, Kind

NUMBERS_MAX = 16  # parameters of one sequence that are examined
CHANGES_MAX = 256  # a guest may use any numbers of modes
STYLES_MAX = 256  # bytes of SGR sequences, which are collected

# Private modes that are usually on: ANSI (not VT52), line wrap, auto-repeat, cursor, xterm's and readline's.
ON = frozenset((2, 7, 8, 25, 1034, 1035, 1046, 1070))
ANSI_ON = frozenset((12,))  # no local echo
ALTERNATE = frozenset((47, 1047, 1049))  # all three select the alternate screen
REPORTING = frozenset((9, 1000, 1001, 1002, 1003, 1004))  # mouse and focus: the terminal sends reports
TO_BOTTOM = b"\x1b[999;1H"  # follows a sequence that moves the cursor to the top
SAVE_TITLE, RESTORE_TITLE = b"\x1b[22;0t", b"\x1b[23;0t"
TAB_WIDTH = 8
COLUMNS_MAX = 400

# Final bytes of CSI that always ask for an answer: DA, DSR, DECREQTPARM, checksums, window reports.
ASKING = frozenset("cnxyt")
ASKING_WITH = {"p": b"$", "u": b"?", "q": b">"}  # DECRQM, the kitty keyboard, XTVERSION


class Change:
    """One difference from the usual state."""

    __slots__ = ("again", "undo")

    def __init__(self, again: bytes, undo: bytes) -> None:
        self.again = again  # the sequence that makes the change again
        self.undo = undo  # the sequence that undoes it


class Modes:
    """Follows the output, item by item, and collects the changes."""

    def __init__(self, *, utf8: bool = True, columns: int = 80) -> None:
        self._utf8 = utf8
        self._columns = columns
        self._changes: dict[str, Change] = {}

    def undo(self) -> bytes:
        """Return the sequences that undo all changes."""
        # First leave VT52 mode, in which no other sequence is understood.  Then leave the alternate screen, which
        # restores the colours and character sets that were saved when it was entered.
        first = [key for key in ("?2", "alternate") if key in self._changes]
        return b"".join(self._changes[key].undo for key in dict.fromkeys((*first, *self._changes)))

    def again(self) -> bytes:
        """Return the sequences that make all changes again."""
        return b"".join(change.again for change in self._changes.values())

    @property
    def reports(self) -> bool:
        """Whether the terminal sends reports of the mouse or of its focus."""
        return any(f"?{number}" in self._changes for number in REPORTING)

    def follow(self, item: Item) -> bytes:
        """Note the changes of an item; return the sequence that has to be printed before it to make them undoable."""
        before = b""
        if item.kind is Kind.CONTROL:
            self._control(item.final)
        elif item.kind is Kind.ESCAPE:
            self._escape(item)
        elif item.kind is Kind.CSI:
            self._csi(item)
        elif item.kind is Kind.STRING and item.final == "OSC":
            before = self._command(item.parameters)
        return before

    def _set(self, key: str, again: bytes, undo: bytes) -> None:
        if key in self._changes or len(self._changes) < CHANGES_MAX:
            self._changes[key] = Change(again, undo)

    def _clear(self, *keys: str) -> None:
        for key in keys:
            self._changes.pop(key, None)

    def _put(self, key: str, usual: bool, again: bytes, undo: bytes) -> None:
        if usual:
            self._clear(key)
        else:
            self._set(key, again, undo)

    def _control(self, character: str) -> None:
        if character in "\x0e\x0f":
            self._put("shift", character == "\x0f", b"\x0e", b"\x0f")

    def _escape(self, item: Item) -> None:
        place, final = item.intermediates, item.final
        raw = b"\x1b" + place + final.encode()
        if place in (b"(", b")", b"*", b"+", b"-", b".", b"/"):
            slot = place.translate(bytes.maketrans(b"-./", b")*+"))
            self._put(f"set {slot.decode()}", final == "B", raw, b"\x1b" + slot + b"B")
        elif place == b"%":
            usual, undo = ("G", b"\x1b%G") if self._utf8 else ("@", b"\x1b%@")
            self._put("coding", final == usual, raw, undo)
        elif place == b" " and final in "FG":
            self._put("8-bit controls", final == "F", raw, b"\x1b F")
        elif place:
            return
        elif final in "=>":
            self._put("keypad", final == ">", raw, b"\x1b>")
        elif final in "no":
            self._set("shift", raw, b"\x0f")
        elif final == "<":
            self._clear("?2")
        elif final == "H":
            self._set("tabs", b"", self._usual_tabs())
        elif final == "c":
            self._changes.clear()

    def _csi(self, item: Item) -> None:
        given, place, final = item.parameters, item.intermediates, item.final
        raw = b"\x1b[" + given + place + final.encode()
        prefix = given[:1] if given[:1] in (b"<", b"=", b">", b"?") else b""
        values = numbers(given[len(prefix) :])
        match (prefix + place, final):
            case (b"" | b"?", "h" | "l"):
                for number in values:
                    self._mode(prefix, number, on=final == "h")
            case (b"", "m"):
                if given.strip(b"0"):
                    earlier = self._changes["style"].again if "style" in self._changes else b""
                    again = earlier + raw
                    self._set("style", again if len(again) <= STYLES_MAX else raw, b"\x1b[m")
                else:
                    self._clear("style")
            case (b"", "r"):
                self._put("region", not given, raw, b"\x1b[r" + TO_BOTTOM)
            case (b" ", "q"):
                self._put("cursor style", values[:1] in ([], [0]), raw, b"\x1b[0 q")
            case (b"", "q"):
                self._put("leds", values[:1] in ([], [0]), raw, b"\x1b[0q")
            case (b'"', "q"):
                self._put("protection", values[:1] != [1], raw, b'\x1b[0"q')
            case (b'"', "p"):
                self._set("8-bit controls", raw, b"\x1b F")
            case (b"", "g"):
                self._set("tabs", raw, self._usual_tabs())
            case (b"?", "W"):
                self._clear("tabs")
            case (b"?", "c"):
                self._put("cursor size", values[:1] in ([], [0]), raw, b"\x1b[?0c")  # of the Linux console
            case (b">", "m"):
                kind = str(values[0]).encode() if values else b""
                self._put(f"keys {kind.decode()}", len(values) < 2, raw, b"\x1b[>" + kind + b"m")
            case (b">", "u"):
                self._set("kitty keys", raw, b"\x1b[<99u")
            case (b"=", "u"):
                self._set("kitty flags", raw, b"\x1b[=0u")
            case (b"<", "u"):
                self._clear("kitty keys")

    def _mode(self, prefix: bytes, number: int, *, on: bool) -> None:
        if prefix and number in ALTERNATE:
            self._put("alternate", not on, b"\x1b[?%dh" % number, b"\x1b[?%dl" % number)
            return
        usual = number in (ON if prefix else ANSI_ON)
        undo = b"\x1b[%s%d%s" % (prefix, number, b"h" if usual else b"l")
        if prefix and number == 2:
            undo = b"\x1b<"
        elif prefix and number == 6:  # origin mode
            undo += TO_BOTTOM
        again = b"\x1b[%s%d%s" % (prefix, number, b"h" if on else b"l")
        self._put(f"{prefix.decode()}{number}", on == usual, again, undo)

    def _command(self, string: bytes) -> bytes:
        kind, _, value = string.partition(b";")
        raw = b"\x1b]" + string + b"\x1b\\"
        if kind in (b"0", b"1", b"2") and "title" not in self._changes:
            self._set("title", b"", RESTORE_TITLE)
            return SAVE_TITLE
        if value == b"?":
            return b""
        if kind in (b"4", b"5") or (len(kind) == 2 and kind.isdigit() and 10 <= int(kind) <= 19):
            undo = b"10" + kind if len(kind) == 1 else b"1" + kind
            self._set(f"colour {kind.decode()}", raw, b"\x1b]" + undo + b"\x1b\\")
        elif len(kind) == 3 and kind.isdigit() and kind[:1] == b"1":
            if not value:
                self._clear(f"colour {kind.decode()[1:].lstrip('0')}")
        elif kind[:1] == b"P":
            self._set("palette", b"", b"\x1b]R\x1b\\")  # of the Linux console
        elif kind == b"R":
            self._clear("palette")
        elif kind == b"8":
            self._put("link", value.endswith(b";"), raw, b"\x1b]8;;\x1b\\")
        return b""

    def _usual_tabs(self) -> bytes:
        stops = range(1 + TAB_WIDTH, min(self._columns, COLUMNS_MAX) + 1, TAB_WIDTH)
        return b"\x1b[3g" + b"".join(b"\x1b[%dG\x1bH" % column for column in stops) + b"\r"


def asks(item: Item) -> bool:
    """Return whether a terminal answers an item.  The answer arrives like typed input."""
    if item.kind is Kind.CONTROL:
        return item.final == "\x05"  # ENQ
    if item.kind is Kind.ESCAPE:
        return item.final == "Z" and not item.intermediates
    if item.kind is Kind.CSI:
        mark = ASKING_WITH.get(item.final)
        return item.final in ASKING or (mark is not None and mark in item.parameters + item.intermediates)
    return item.kind is Kind.STRING and (item.final in ("DCS", "APC") or b"?" in item.parameters)


def numbers(parameters: bytes) -> list[int]:
    """Return the parameters that are numbers."""
    return [int(each[:5]) for each in parameters.split(b";")[:NUMBERS_MAX] if each.isdigit()]
