"""The terminal that shows a guest, without a terminal: the mode changes that are noticed and undone."""

import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from vmctl import screen as screen_
from vmctl.screen import ANSWER, QUESTION, Screen


class Terminal:
    """The output that a terminal gets, its answers, and a clock."""

    def __init__(self) -> None:
        self.got = bytearray()
        self.now_s = 100.0
        self.keyboard, self.keys = os.pipe()

    def write_all(self, _fd: int, data: bytes) -> None:
        """Take output."""
        self.got += data

    def taken(self) -> bytes:
        """Return the output since the last call."""
        got = bytes(self.got)
        self.got.clear()
        return got


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """A terminal of 132 columns."""
    terminal = Terminal()
    monkeypatch.setattr(screen_, "put", terminal.got.extend)
    monkeypatch.setattr(screen_, "write_all", terminal.write_all)
    monkeypatch.setattr(screen_, "time", SimpleNamespace(monotonic=lambda: terminal.now_s))
    monkeypatch.setattr(os, "isatty", lambda _fd: True)
    monkeypatch.setattr(os, "get_terminal_size", lambda _fd: os.terminal_size((132, 24)))
    yield terminal
    os.close(terminal.keyboard)
    os.close(terminal.keys)


@pytest.mark.parametrize(
    ("pieces", "undone"),
    [
        ([b"text"], b""),
        ([b"\x0e"], b"\x0f"),
        ([b"\x0e", b"\x0f"], b""),
        ([b"\x1b[?25l"], b"\x1b[?25h"),
        ([b"\x1b", b"[?25l"], b"\x1b[?25h"),
        ([b"\xc2", b"\x9b?25l"], b"\x1b[?25h"),
        ([b"\xc2\x9b?25l"], b"\x1b[?25h"),
        ([b"\x1b]0;unfinished"], b"\x18\x1b\\"),
    ],
)
def test_changes_are_noticed_in_any_piece(terminal: Terminal, pieces: list[bytes], undone: bytes) -> None:
    """The output itself is unchanged."""
    screen = Screen()
    for piece in pieces:
        screen.show(piece)
    assert terminal.taken() == b"".join(pieces)

    screen.put_back()
    screen.put_back()

    assert terminal.taken() == undone


@pytest.mark.parametrize(
    ("utf8", "shown", "undone"),
    [
        ("utf-8", b"\x9b?25l", b""),
        ("iso8859-1", b"\x9b?25l", b"\x1b[?25h"),
        ("iso8859-1", b"\x9funfinished", b"\x18\x1b\\"),
    ],
)
def test_characters_of_the_terminal(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, utf8: str, shown: bytes, undone: bytes
) -> None:
    """One byte begins a sequence only if the terminal is not UTF-8."""
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: utf8)
    screen = Screen()
    screen.show(shown)
    terminal.taken()
    screen.put_back()

    assert terminal.taken() == undone


@pytest.mark.parametrize(
    ("shown", "later_s", "asked"),
    [
        (b"text", 0.0, False),
        (b"\x05", 0.0, True),
        (b"\x05", 0.9, True),
        (b"\x05", 1.1, False),
        (b"\x1b[6n", 0.0, True),
        (b"\x1b[?1000h", 9.0, True),
        (b"\x1b[?1000h\x1b[?1000l", 9.0, False),
    ],
)
def test_answers_are_waited_for(terminal: Terminal, shown: bytes, later_s: float, asked: bool) -> None:
    """Only if the terminal may still send some: after a question of the guest, and while it sends reports."""
    os.write(terminal.keys, b"\x1b[3;4R" + b"x" * 5000 + ANSWER)
    screen = Screen(terminal.keyboard)
    screen.show(shown)
    terminal.now_s += later_s
    screen.put_back()

    assert terminal.taken().endswith(QUESTION) is asked


def test_output_that_is_no_terminal_is_unchanged(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a terminal, its title would be saved first."""
    title = b"\x1b]0;title\x07"
    Screen().show(title)
    assert terminal.taken() == b"\x1b[22;0t" + title
    monkeypatch.setattr(os, "isatty", lambda _fd: False)
    screen = Screen()
    screen.show(title)
    screen.put_back()

    assert terminal.taken() == title


def test_a_terminal_that_does_not_answer(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """vmctl does not wait for ever."""
    monkeypatch.setattr(screen_, "ANSWER_S", 0.0)
    screen = Screen(terminal.keyboard)
    screen.show(b"\x05")
    screen.put_back()

    assert terminal.taken() == b"\x05" + QUESTION


def test_keyboard_that_ends_gives_no_answers(terminal: Terminal) -> None:
    """The wait ends with it."""
    screen = Screen(terminal.keyboard)
    screen.show(b"\x05")
    os.close(terminal.keys)
    terminal.keys = os.dup(terminal.keyboard)
    screen.put_back()

    assert terminal.taken() == b"\x05" + QUESTION


def test_changes_are_made_again(terminal: Terminal) -> None:
    """After a suspension, and undone once more at the end."""
    screen = Screen()
    screen.show(b"\x1b[?25l")
    screen.put_back()
    terminal.taken()
    screen.again()
    assert terminal.taken() == b"\x1b[?25l"
    screen.put_back()

    assert terminal.taken() == b"\x1b[?25h"


def test_columns(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal without a size counts as one of the usual width."""
    assert screen_.columns() == 132
    monkeypatch.setattr(os, "get_terminal_size", lambda _fd: os.terminal_size((0, 0)))
    assert screen_.columns() == 80

    def fail(_fd: int) -> os.terminal_size:
        raise OSError(25, "no terminal")

    monkeypatch.setattr(os, "get_terminal_size", fail)
    assert screen_.columns() == 80
