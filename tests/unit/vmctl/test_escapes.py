"""Typed bytes at a console: input for the guest, and escapes for vmctl."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmctl.escapes import Action, Escapes


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        (b"", []),
        (b"ls\r", [b"ls\r"]),
        (b"~.", [Action.LEAVE]),
        (b"~\x04", [Action.LEAVE]),
        (b"~#", [Action.BREAK]),
        (b"~b", [Action.BREAK]),
        (b"~?", [Action.HELP]),
        (b"~\x1a", [Action.SUSPEND]),
        (b"a\r~.", [b"a\r", Action.LEAVE]),
        (b"a\n~.", [b"a\n", Action.LEAVE]),
        (b"a~.", [b"a~."]),
        (b"~~.", [b"~."]),
        (b"~~", [b"~"]),
        (b"~x", [b"~x"]),
        (b"~x~.", [b"~x~."]),
        (b"~\r~.", [b"~\r", Action.LEAVE]),
        (b"~#~#x~.", [Action.BREAK, Action.BREAK, b"x~."]),
        (b"~", []),
    ],
)
def test_escapes(typed: bytes, parts: list[bytes | Action]) -> None:
    """An escape begins with `~` at the start of a line, or at the start of the session."""
    assert Escapes().feed(typed) == parts


def test_actions_differ() -> None:
    """Two members with one value would be one member."""
    assert len(Action) == 4


def joined(parts: list[bytes | Action]) -> list[bytes | Action]:
    """Return the parts with adjacent bytes joined."""
    result: list[bytes | Action] = []
    for part in parts:
        if isinstance(part, bytes) and result and isinstance(result[-1], bytes):
            result[-1] += part
        else:
            result.append(part)
    return result


@given(st.lists(st.binary(max_size=6) | st.text("~.#?\r\na", max_size=6).map(str.encode), max_size=8))
def test_escapes_do_not_depend_on_the_sizes_of_reads(pieces: list[bytes]) -> None:
    """An escape may arrive in two reads."""
    escapes = Escapes()
    in_pieces = [part for piece in pieces for part in escapes.feed(piece)]

    assert joined(in_pieces) == joined(Escapes().feed(b"".join(pieces)))


@given(st.binary(max_size=200).filter(lambda typed: b"~" not in typed))
def test_all_other_bytes_go_to_the_guest(typed: bytes) -> None:
    """Every byte arrives, in order."""
    assert b"".join(part for part in Escapes().feed(typed) if isinstance(part, bytes)) == typed
