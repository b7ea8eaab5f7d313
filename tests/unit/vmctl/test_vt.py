"""Output of a guest as text, controls and sequences: where each of them ends."""

import pytest

from vmctl.vt import Kind, Parser, State

Found = tuple[Kind, bytes, bytes, str]


def items(raw: bytes, *, utf8: bool = True) -> list[Found]:
    """Return the items of some output."""
    return [(item.kind, item.parameters, item.intermediates, item.final) for item in Parser(utf8=utf8).feed(raw)]


def text(raw: bytes) -> Found:
    """Return an item of text."""
    return Kind.TEXT, raw, b"", ""


def control(character: str) -> Found:
    """Return a control character."""
    return Kind.CONTROL, b"", b"", character


def escape(final: str, intermediates: bytes = b"") -> Found:
    """Return an escape sequence."""
    return Kind.ESCAPE, b"", intermediates, final


def csi(final: str, parameters: bytes = b"", intermediates: bytes = b"") -> Found:
    """Return a control sequence."""
    return Kind.CSI, parameters, intermediates, final


def string(final: str, content: bytes) -> Found:
    """Return a string."""
    return Kind.STRING, content, b"", final


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (b" ~", [text(b" ~")]),
        (b"\x00\x1f", [control("\0"), control("\x1f")]),
        (b"a\x7fb", [text(b"a"), text(b"b")]),
        (b"a\x1b[0/~b", [text(b"a"), csi("~", b"0", b"/"), text(b"b")]),
        (b"\x1b[?9@", [csi("@", b"?9")]),
        (b"\x1b[1\x1fm", [control("\x1f"), csi("m", b"1")]),
        (b"\x1b[1\x7fm", [csi("m", b"1")]),
        (b"\x1b[1\x1amx", [text(b"mx")]),
        (b"\x1b[1\x18mx", [text(b"mx")]),
        (b"\x1b(0", [escape("0", b"(")]),
        (b"\x1b /", []),
        (b"\x1b([", [escape("[", b"(")]),
        (b"\x1b(]x", [escape("]", b"("), text(b"x")]),
        (b"\x1b\x1b[m", [csi("m")]),
        (b"\x1b]0;a\x07b", [string("OSC", b"0;a"), text(b"b")]),
        (b"\x1b]0;a\x08b\x07", [string("OSC", b"0;a\x08b")]),
        (b"\x1bPa\x07\r\nb\x1b\\", [string("DCS", b"a\x07\r\nb")]),
        (b"\x1bXa\x1b\\\x1b^b\x1b\\\x1b_c\x1b\\", [string("SOS", b"a"), string("PM", b"b"), string("APC", b"c")]),
        (b"\x1b]a\nb", [string("OSC", b"a"), control("\n"), text(b"b")]),
        (b"\x1b]a\x1b[mb", [csi("m"), text(b"b")]),
        (b"\x1b[\xe9x", [text(b"\xe9x")]),
        (b"\x1b[" + b"1" * 5000 + b"m", [csi("m", b"1" * 4096)]),
        (b"\x1b]" + b"x" * 5000 + b"\x07", [string("OSC", b"x" * 4096)]),
    ],
)
@pytest.mark.parametrize("utf8", [False, True])
def test_items(raw: bytes, found: list[Found], utf8: bool) -> None:
    """They are complete, and in order."""
    assert items(raw, utf8=utf8) == found


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (b"\xc2\x80", [escape("@")]),
        (b"\xc2\x9bm", [csi("m")]),
        (b"\xc2\x9fa\xc2\x9c", [string("APC", b"a")]),
        (b"\xc2\xa0", [text(b"\xc2\xa0")]),
        (b"\xc2\x7fa", [text(b"\xc2"), text(b"a")]),
        (b"\xc2a", [text(b"\xc2a")]),
        (b"\xc1\x9b", [text(b"\xc1\x9b")]),
        (b"\x1b]\xc2\xa9\x07", [string("OSC", b"\xc2\xa9")]),
    ],
)
def test_controls_in_utf_8(raw: bytes, found: list[Found]) -> None:
    """They have two bytes, of which the second is from 80 to 9F."""
    assert items(raw) == found


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (b"\x80", [escape("@")]),
        (b"\x9fa\x9c", [string("APC", b"a")]),
        (b"\xa0", [text(b"\xa0")]),
        (b"\xc2\x9bm", [text(b"\xc2"), csi("m")]),
    ],
)
def test_controls_of_one_byte(raw: bytes, found: list[Found]) -> None:
    """Terminals that are not UTF-8 have them."""
    assert items(raw, utf8=False) == found


def test_kinds_and_states_differ() -> None:
    """Two members with one value would be one member."""
    assert (len(Kind), len(State)) == (5, 5)


@pytest.mark.parametrize("raw", [b"\x1b", b"\xc2", b"\x1b[", b"\x1b[1", b"\x1b(", b"\x1b]a", b"\x1b]a\x1b", b"\x1b_"])
def test_unfinished_sequences(raw: bytes) -> None:
    """They give nothing until their end."""
    parser = Parser()
    seen = [parser.in_sequence]
    for piece in (raw, b"\x18"):
        parser.feed(piece)
        seen.append(parser.in_sequence)

    assert seen == [False, True, False]
