"""A guest's changes of a terminal are undone, and nothing else is changed."""

import random

import pytest

from vmctl.modes import ALTERNATE, ON, REPORTING, Modes, asks
from vmctl.vt import Parser

# output of a guest -> the output that undoes it
CHANGES = {
    b"\x1b[?7l": b"\x1b[?7h",
    b"\x1b[?25l": b"\x1b[?25h",
    b"\x1b[?8l": b"\x1b[?8h",
    b"\x1b[?5h": b"\x1b[?5l",
    b"\x1b[?1h": b"\x1b[?1l",
    b"\x1b[?1000;1006h": b"\x1b[?1000l\x1b[?1006l",
    b"\x1b[?1004h": b"\x1b[?1004l",
    b"\x1b[?2004h": b"\x1b[?2004l",
    b"\x1b[?6h": b"\x1b[?6l\x1b[999;1H",
    b"\x1b[?2l": b"\x1b<",
    b"\x1b[4h": b"\x1b[4l",
    b"\x1b[2h": b"\x1b[2l",
    b"\x1b[20h": b"\x1b[20l",
    b"\x1b[12l": b"\x1b[12h",
    b"\x1b[31;1m": b"\x1b[m",
    b"\x1b[48;2;0;0;0m": b"\x1b[m",
    b"\x1b(0": b"\x1b(B",
    b"\x1b)0\x0e": b"\x1b)B\x0f",
    b"\x1b-A": b"\x1b)B",
    b"\x1bn": b"\x0f",
    b"\x1b%@": b"\x1b%G",
    b"\x1b G": b"\x1b F",
    b"\x1b=": b"\x1b>",
    b"\x1b[2;5r": b"\x1b[r\x1b[999;1H",
    b"\x1b[3 q": b"\x1b[0 q",
    b"\x1b[1q": b"\x1b[0q",
    b'\x1b[1"q': b'\x1b[0"q',
    b"\x1b[>4;2m": b"\x1b[>4m",
    b"\x1b[>1u": b"\x1b[<99u",
    b"\x1b[=5u": b"\x1b[=0u",
    b"\x1b[?17c": b"\x1b[?0c",
    b"\x1b]4;1;red\x07": b"\x1b]104\x1b\\",
    b"\x1b]11;#000\x1b\\": b"\x1b]111\x1b\\",
    b"\x1b]8;;http://a\x07": b"\x1b]8;;\x1b\\",
    b'\x1b[1;2"q': b'\x1b[0"q',
    b"\xc2\x9b?25l": b"\x1b[?25h",
    # VT52 mode first, then the screen, because its end restores colours
    b"\x1b[31m\x1b[?1049h\x1b[?2l": b"\x1b<\x1b[?1049l\x1b[m",
}
TIDY = {
    "nothing": b"text\r\n\ttext",
    "an editor": b"\x1b[?1049h\x1b[?1h\x1b=\x1b[?25l\x1b[1;24r\x1b[31mx\x1b[m\x1b[r\x1b[?25h\x1b[?1l\x1b>\x1b[?1049l",
    "another way out of the screen": b"\x1b[?47h\x1b[?1049l",
    "reset": b"\x1b[?7l\x1b[4h\x1b(0\x1bc",
    "line drawing": b"\x1b(0qqq\x1b(B",
    "shell": b"\x1b[?2004h\x1b[?1034h$ exit\x1b[?2004l",
    "colours": b"\x1b]4;1;red\x07\x1b]104\x07\x1b]10;red\x07\x1b]110\x07",
    "question": b"\x1b]11;?\x07\x1b[6n",
    "palette": b"\x1b]P1ff0000\x1b\\\x1b]R\x1b\\",
    "first number of several": b"\x1b[1q\x1b[0;1q\x1b[3 q\x1b[0;1 q\x1b[?17c\x1b[?0;1c",
    "tabs": b"\x1b[3g\x1b[?5W",
    "strings of other kinds": b"\x1bP4;1;red\x1b\\\x1b_11;red\x1b\\",
    "link": b"\x1b]8;id=1;http://a\x07text\x1b]8;;\x07",
}


def after(raw: bytes) -> Modes:
    """Return the modes after some output."""
    modes, parser = Modes(), Parser()
    for item in parser.feed(raw):
        modes.follow(item)
    return modes


@pytest.mark.parametrize(("raw", "undo"), CHANGES.items())
def test_changes_are_undone(raw: bytes, undo: bytes) -> None:
    """After that nothing is left to undo.  `again` sets the same modes again."""
    modes = after(raw)

    assert modes.undo() == undo
    assert after(raw + undo).undo() in (b"", undo)  # modes without a usual state, such as a key protocol, may stay
    assert after(modes.again()).undo() == undo


@pytest.mark.parametrize("raw", TIDY.values(), ids=TIDY.keys())
def test_a_guest_that_cleans_up(raw: bytes) -> None:
    """There is nothing to undo."""
    assert after(raw).undo() == b""


def test_title_is_kept_before_it_is_changed() -> None:
    """The old title cannot be read, but a terminal can save and restore it."""
    modes, parser = Modes(), Parser()

    assert [modes.follow(item) for item in parser.feed(b"\x1b]0;guest\x07\x1b]2;more\x07")] == [b"\x1b[22;0t", b""]
    assert modes.undo() == b"\x1b[23;0t"


def test_palette() -> None:
    """That of the Linux console can only be set to its usual colours."""
    assert after(b"\x1b]P1ff0000\x1b\\").undo() == b"\x1b]R\x1b\\"


def test_tabs() -> None:
    """They are set to every eighth column."""
    modes, parser = Modes(columns=20), Parser()
    for item in parser.feed(b"\x1b[3g"):
        modes.follow(item)

    assert modes.undo() == b"\x1b[3g\x1b[9G\x1bH\x1b[17G\x1bH\r"


@pytest.mark.parametrize(
    "raw",
    [
        b"\x05", b"\x1bZ", b"\x1b[c", b"\x1b[>c", b"\x1b[5n", b"\x1b[?6n", b"\x1b[18t", b"\x1b[?25$p", b"\x1b[>q",
        b"\x1b[?u", b"\x1bP$qm\x1b\\", b"\x1b]11;?\x07", b"\x1b]4;1;?\x07", b"\x1b]52;c;?\x07", b"\x1b_Gi=1;AA\x1b\\",
    ],
)  # fmt: skip
def test_questions(raw: bytes) -> None:
    """A terminal sends an answer to each of these."""
    assert any(asks(item) for item in Parser().feed(raw))


def test_noise_is_bounded() -> None:
    """A guest cannot make vmctl store or print an unlimited amount."""
    noise = random.Random(21)
    raw = b"".join(b"\x1b[?%dh\x1b[%dm" % (noise.randrange(99999), noise.randrange(1, 99)) for _ in range(5000))

    modes = after(raw + noise.randbytes(20_000))

    assert len(modes.undo()) + len(modes.again()) < 20_000


@pytest.mark.parametrize(
    "raw",
    [
        b"text", b"\x07", b"\x1bc", b"\x1b(Z", b"\x1b[!p", b"\x1b[1q", b"\x1b[>1u", b"\x1b[m", b"\x1b[?25h",
        b"\x1b]0;title\x07", b"\x1b^text\x1b\\",
    ],
)  # fmt: skip
def test_no_questions(raw: bytes) -> None:
    """vmctl would wait for an answer in vain."""
    assert not any(asks(item) for item in Parser().feed(raw))


def test_private_modes() -> None:
    """These are usually on, and all others are off."""
    assert {2, 7, 8, 25, 1034, 1035, 1046, 1070} == ON
    for number in sorted(ON | {1, 3, 5, 6, 9, 24, 26, 46, 48, 1000, 1046, 1048, 1050, 2004} | ALTERNATE):
        usual, other = (b"h", b"l") if number in ON else (b"l", b"h")
        assert after(b"\x1b[?%d" % number + usual).undo() == b""
        assert after(b"\x1b[?%d" % number + other).undo() != b""
        assert after(b"\x1b[?%d" % number + other + b"\x1b[?%d" % number + usual).undo() == b""


def test_alternate_screen() -> None:
    """Three modes select it, and each of them leaves it."""
    assert {47, 1047, 1049} == ALTERNATE
    for enter in ALTERNATE:
        for leave in ALTERNATE:
            assert after(b"\x1b[?%dh\x1b[?%dl" % (enter, leave)).undo() == b""
    assert after(b"\x1b[?10470h").undo() == b"\x1b[?10470l"


@pytest.mark.parametrize("number", [9, 1000, 1001, 1002, 1003, 1004])
def test_reports(number: int) -> None:
    """The terminal sends them until the mode is off again."""
    assert number in REPORTING
    assert after(b"\x1b[?%dh" % number).reports
    assert not after(b"\x1b[?%dh\x1b[?%dl" % (number, number)).reports
    assert not after(b"\x1b[?1005h").reports


@pytest.mark.parametrize("kind", [4, 5, *range(10, 20)])
def test_colours(kind: int) -> None:
    """Each colour has a sequence that resets it."""
    reset = b"\x1b]%d\x1b\\" % (100 + kind)
    assert after(b"\x1b]%d;red\x07" % kind).undo() == reset
    assert after(b"\x1b]%d;red\x07" % kind + reset).undo() == b""
    for other in (3, 6, 9, 20, 200):
        assert after(b"\x1b]%d;red\x07" % other).undo() == b""


def test_styles_are_set_again_in_whole_sequences() -> None:
    """A part of a sequence would be printed as text.  Not all of them are kept."""
    assert after(b"\x1b[1m" * 64).again() == b"\x1b[1m" * 64
    assert after(b"\x1b[1m" * 65).again() == b"\x1b[1m"
    assert after(b"\x1b[31m" * 52).again() == b"\x1b[31m"


def test_numbers_of_one_sequence() -> None:
    """Sixteen of them are examined."""
    modes = after(b"\x1b[?" + b";".join(b"%d" % number for number in range(1005, 1025)) + b"h")

    assert modes.undo().count(b"l") == 16


@pytest.mark.parametrize(("columns", "last"), [(16, 9), (17, 17), (80, 73), (1000, 393)])
def test_tabs_of_any_width(columns: int, last: int) -> None:
    """The last one is within the screen.  There are no more than for 400 columns."""
    modes = Modes(columns=columns)
    for item in Parser().feed(b"\x1b[3g"):
        modes.follow(item)

    assert modes.undo().endswith(b"\x1b[%dG\x1bH\r" % last)


def test_usual_width() -> None:
    """It is that of most terminals."""
    assert after(b"\x1b[3g").undo().endswith(b"\x1b[73G\x1bH\r")
