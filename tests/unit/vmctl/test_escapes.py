"""What is typed at a console: bytes for the guest, escapes for us."""

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
    """Only a `~` at the start of a line is one; the beginning is such a start."""
    assert Escapes().feed(typed) == parts


def joined(parts: list[bytes | Action]) -> list[bytes | Action]:
    """Return the parts with neighbouring bytes made one."""
    result: list[bytes | Action] = []
    for part in parts:
        if isinstance(part, bytes) and result and isinstance(result[-1], bytes):
            result[-1] += part
        else:
            result.append(part)
    return result


@given(st.lists(st.binary(max_size=6) | st.text("~.#?\r\na", max_size=6).map(str.encode), max_size=8))
def test_how_typing_is_cut_into_reads_changes_nothing(pieces: list[bytes]) -> None:
    """An escape may come in two reads."""
    escapes = Escapes()
    in_pieces = [part for piece in pieces for part in escapes.feed(piece)]

    assert joined(in_pieces) == joined(Escapes().feed(b"".join(pieces)))


@given(st.binary(max_size=200).filter(lambda typed: b"~" not in typed))
def test_all_else_is_the_guests(typed: bytes) -> None:
    """Every byte, in its order."""
    assert b"".join(part for part in Escapes().feed(typed) if isinstance(part, bytes)) == typed
