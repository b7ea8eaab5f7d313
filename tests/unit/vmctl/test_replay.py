"""The replay of a console's backlog: text and colours, without sequences that change a terminal or make it answer."""

import random
import re

import pytest

from vmctl.replay import Replay
from vmctl.vt import Parser

# The only output that is allowed, for any input.
SHOWABLE = re.compile(
    rb"(?:[\x20-\x7e\r\n\t\b]|[\xc3-\xf4][\x80-\xbf]+|\xc2[\xa0-\xbf]|\x1b\[[0-9;:]{0,64}[mKCDGPX@])*"
)

# The first output of SeaBIOS on a serial line, and sequences as of GRUB.
SEABIOS = b"\x1bc\x1b[?7l\x1b[2J\x1b[0mSeaBIOS (version 1.16)\r\n\x1b[02;01HBooting\r\n"
# Sequences from real backlogs.  Each changes a terminal, or makes it answer.
REMOVED = {
    "soft reset": b"\x1b[!p",
    "no line wrap": b"\x1b[?7l",
    "no cursor": b"\x1b[?25l",
    "alternate screen": b"\x1b[?1049h",
    "mouse": b"\x1b[?1000;1006h",
    "bracketed paste": b"\x1b[?2004h",
    "insert mode": b"\x1b[4h",
    "keyboard locked": b"\x1b[2h",
    "scroll region": b"\x1b[5;10r",
    "screen cleared": b"\x1b[2J",
    "rest of the screen cleared": b"\x1b[J",
    "cursor up": b"\x1b[5A",
    "lines scrolled": b"\x1b[3S",
    "repeated character": b"\x1b[9999b",
    "line drawing": b"\x1b(0",
    "shift out": b"\x0e",
    "bell": b"\x07",
    "answerback": b"\x05",
    "who are you": b"\x1b[c",
    "who are you, secondary": b"\x1b[>c",
    "who are you, VT52": b"\x1bZ",
    "where is the cursor": b"\x1b[6n",
    "what is the size": b"\x1b[18t",
    "what is the title": b"\x1b[21t",
    "what is a mode": b"\x1b[?25$p",
    "what is a setting": b"\x1bP$qm\x1b\\",
    "what can it do": b"\x1bP+q544e\x1b\\",
    "what is a colour": b"\x1b]11;?\x07",
    "title": b"\x1b]0;owned\x07",
    "title, with ST": b"\x1b]2;owned\x1b\\",
    "clipboard": b"\x1b]52;c;ZWNobw==\x07",
    "status line": b"\x1b_text\x1b\\",
    "privacy message": b"\x1b^text\x1b\\",
    "start of string": b"\x1bXtext\x1b\\",
    "tabs cleared": b"\x1b[3g",
    "C1 in UTF-8": b"\xc2\x9b6n",
    "C1 string in UTF-8": b"\xc2\x9d0;owned\xc2\x9c",
    "C1 byte": b"\x9b",
    "delete": b"\x7f",
    "colour with a prefix": b"\x1b[>4;2m",
    "huge number": b"\x1b[99999C",
    "another code": b"\x1b%@",
    "control in a sequence": b"\x1b[6\x07n",
    "sequence given up": b"\x1b[6\x18",
    "a character set of one letter": b"\x1b(D",
    "too many parameters": b"\x1b[" + b"1;" * 32 + b"1m",
}
KEPT = {
    "colours": b"\x1b[1;38;5;196mred\x1b[m",
    "colours with colons": b"\x1b[38:2::1:2:3mred\x1b[0m",
    "a line rewritten": b"10%\r\x1b[K20%\r\n",
    "a line edited": b"lx\b\x1b[Ks\r\n",
    "characters put in": b"ab\x1b[D\x1b[@c",
    "tab": b"a\tb",
    "large number": b"a\x1b[1234Cb",
    "many parameters": b"a\x1b[" + b"1;" * 32 + b"mb",
    "other languages": "žluťoučký 機械 🙂".encode(),
}


@pytest.mark.parametrize("raw", REMOVED.values(), ids=REMOVED.keys())
def test_sequences_that_act_are_removed(raw: bytes) -> None:
    """The text around them is shown."""
    shown = Replay().shown(b"before" + raw + b"after")

    assert shown.replace("\N{REPLACEMENT CHARACTER}".encode(), b"") == b"beforeafter"


@pytest.mark.parametrize("raw", KEPT.values(), ids=KEPT.keys())
def test_text_is_shown_as_it_was(raw: bytes) -> None:
    """Colours and changes within a line are kept."""
    assert Replay().shown(raw) == raw


def test_seabios() -> None:
    """Texts on different lines are not joined."""
    assert Replay().shown(b"a\x1bcb") == b"a\r\nb"
    assert Replay().shown(b"a\t\x1b[5;1Hb") == b"a\t\r\nb"
    assert Replay().shown(b"\r\x1b[5;1Hb") == b"\rb"
    assert Replay().shown(b"a\n\x1b[5;1Hb") == b"a\nb"
    assert Replay().shown(SEABIOS + b"a\x1b[10;1Hb\x1bDc\x1bEd") == (
        b"\x1b[0mSeaBIOS (version 1.16)\r\nBooting\r\na\r\nb\r\nc\r\nd"
    )


@pytest.mark.parametrize("raw", REMOVED.values(), ids=REMOVED.keys())
def test_a_sequence_cut_in_two_is_left_out_as_a_whole(raw: bytes) -> None:
    """Its end arrives in the live output, where it would be shown as text.  Other live output is unchanged."""
    for cut in range(1, len(raw)):
        replay, begun = Replay(), Parser()
        begun.feed(raw[:cut])
        replay.shown(raw[:cut])

        rest = replay.rest(raw[cut:]) + replay.rest(b"\x1b[2Jlive")

        assert rest == (b"" if begun.in_sequence else raw[cut:]) + b"\x1b[2Jlive"


def test_a_string_without_an_end_hides_its_line_only() -> None:
    """Random bytes may look like the start of one."""
    assert Replay().shown(b"a\x1b]noise\r\nb") == b"a\r\nb"


def test_a_terminal_that_is_not_utf_8() -> None:
    """It would read single bytes of a UTF-8 character as controls."""
    assert Replay(utf8=False).shown("aě\x9b6nb".encode()) == b"a??b"


def test_noise() -> None:
    """Only allowed output is produced, even if reads split the input at any byte."""
    noise = random.Random(20)
    alphabet = b"\x1b\x1b\x1b[[]PX^_;?>!$ 0123456789mhlcnHJKrq\\\x07\x18\x05\x0e\x7f\xc2\xc2\x9b\x9d\x9c\xc4\x90\r\nab"
    for _ in range(300):
        raw = bytes(noise.choices(alphabet, k=200)) + noise.randbytes(20)
        for utf8 in (True, False):
            replay = Replay(utf8=utf8)
            cut = noise.randrange(len(raw))
            shown = replay.shown(raw[:cut]) + replay.shown(raw[cut:])
            assert SHOWABLE.fullmatch(shown), (raw, shown)
            parser = Parser(utf8=utf8)
            parser.feed(shown)
            assert not parser.in_sequence
