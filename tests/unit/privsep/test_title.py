"""Where the argument strings of a process are, on a model of its memory."""

import sys
from types import SimpleNamespace

import pytest

from vmd import native
from vmd.privsep import linux, title
from vmd.privsep.title import COMM_MAX, STACK_STRINGS_MAX, argument_area

ENVIRON, ARRAY = 50, 1000
STRINGS = b"python3\0-c\0pass\0"
FIRST = 5000  # the first string of the environment


@pytest.mark.parametrize(
    ("array", "first", "memory", "area"),
    [
        (ARRAY, FIRST, STRINGS, (FIRST - len(STRINGS), len(STRINGS))),
        (None, FIRST, STRINGS, None),  # there is no environment
        (ARRAY, None, STRINGS, None),  # it is empty
        (ARRAY, FIRST, STRINGS.upper(), None),
        (FIRST, FIRST, STRINGS, None),  # the array was moved
        (FIRST - len(STRINGS), FIRST, STRINGS, None),
        (FIRST - len(STRINGS) - 1, FIRST, STRINGS, (FIRST - len(STRINGS), len(STRINGS))),
        (ARRAY, ARRAY + STACK_STRINGS_MAX, STRINGS, None),  # the strings were moved
        (ARRAY, ARRAY + STACK_STRINGS_MAX - 1, STRINGS, (ARRAY + STACK_STRINGS_MAX - 1 - len(STRINGS), len(STRINGS))),
    ],
)
def test_the_argument_area(
    monkeypatch: pytest.MonkeyPatch, array: int | None, first: int | None, memory: bytes, area: tuple[int, int] | None
) -> None:
    """Only if array and strings are at their original places, the memory between them can be read."""
    read: list[tuple[int, int]] = []

    def memory_at(start: int, size: int) -> SimpleNamespace:
        read.append((start, size))
        return SimpleNamespace(raw=memory)

    pointers = {ENVIRON: array, array: first}
    c_void_p = SimpleNamespace(
        in_dll=lambda _library, _name: SimpleNamespace(value=pointers[ENVIRON]),
        from_address=lambda address: SimpleNamespace(value=pointers[address]),
    )
    monkeypatch.setattr(title, "native", SimpleNamespace(c_void_p=c_void_p, memory_at=memory_at))
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-c", "pass"])

    assert argument_area() == area
    assert read == ([area] if area else [(FIRST - len(STRINGS), len(STRINGS))] if memory != STRINGS else [])


def test_a_thread_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the beginning of a name that is too long."""
    named: list[tuple[int, bytes]] = []

    def prctl(_tried: str, option: int, address: int) -> None:
        named.append((option, native.memory_at(address, COMM_MAX + 1).raw))

    monkeypatch.setattr(linux, "prctl", prctl)
    title.name_thread("a name that is too long")
    assert named == [(linux.PR_SET_NAME, b"a name that is \0")]
