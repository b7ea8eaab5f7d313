"""Answers of seeder."""

import random

import pytest

from vmd.ipc.probemsg import ANSWER_MAX
from vmd.ipc.seedmsg import pack_error, pack_made, unpack


def test_both_answers() -> None:
    """Long answers are cut, and NUL is replaced."""
    assert unpack(pack_made([])) == []
    assert unpack(pack_made(["a", "b \u00e4"])) == ["a", "b \u00e4"]
    assert unpack(pack_made(["a\0b"])) == ["a?b"]
    assert unpack(pack_error("why")) == "why"
    many = unpack(pack_made(["x" * 5000] * 20))
    assert isinstance(many, list)
    assert (len(many), len(pack_made(["x" * 5000] * 20)) <= ANSWER_MAX) == (5, True)


@pytest.mark.parametrize(
    "line", [b"", b"\n", b"made", b"image\0raw\n", b"error\n", b"error\0a\0b\n", b"made\0" * 9 + b"\n"]
)
def test_malformed_lines(line: bytes) -> None:
    """Prefixes and random bytes are refused, too."""
    with pytest.raises(ValueError, match=r"is not complete|fields of kind"):
        unpack(line)
    chance = random.Random(line)
    for _ in range(50):
        with pytest.raises(ValueError, match=r"is not complete|fields of kind"):
            unpack(chance.randbytes(20) + b"\n")
    with pytest.raises(ValueError, match="is not complete"):
        unpack(b"made\0" + b"x" * ANSWER_MAX + b"\n")
