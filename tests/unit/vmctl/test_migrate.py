"""vmctl migrate: what its words may be, and what the two ends say to each other."""

import os

import pytest

from vmctl import carry
from vmctl.carry import ASKED, COMMIT, FAILED, SOURCE, TARGET, Ear, say
from vmctl.commands.migrate import destination, shell_words
from vmctl.errors import ArgumentError, CommandError


@pytest.mark.parametrize(("word", "host", "name"), [
    ("h2", "h2", ""), ("me@h2", "me@h2", ""), ("h2:b", "h2", "b"), ("me@h2.example:b", "me@h2.example", "b"),
    ("[fe80::1]", "fe80::1", ""), ("me@[::1]:b", "me@::1", "b"), ("10.0.0.1:b", "10.0.0.1", "b"),
])  # fmt: skip
def test_destination(word: str, host: str, name: str) -> None:
    """As ssh and scp have it."""
    assert destination(word) == (host, name)


@pytest.mark.parametrize("word", [
    "", ":", ":b", "h2:", "me@", "me@:b", "@h2", "-oProxyCommand=x", "me@-x", "-x:b", "fe80::1", "::1:b", "[]", "h2:3",
    "h2:-b", "-@h2",
])  # fmt: skip
def test_no_destination(word: str) -> None:
    """Nothing that ssh would take for an option, and no address that could be meant otherwise."""
    with pytest.raises(ArgumentError):
        destination(word)


def test_shell() -> None:
    """Its words, as a shell would split them."""
    assert shell_words("ssh -p 22 -i 'a b'") == ["ssh", "-p", "22", "-i", "a b"]
    for text in ("", "'"):
        with pytest.raises(ArgumentError, match="command"):
            shell_words(text)


def hear(said: bytes, *wanted: str, who: str = TARGET) -> "carry.Words | None":
    """Return what is heard of something."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as sink:
        sink.write(said)
    with os.fdopen(reading, "rb") as source:
        return Ear(source.fileno(), who).hear(*wanted)


def test_words_are_heard_behind_whatever_a_login_says() -> None:
    """Greetings, also long ones, and JSON of others."""
    reading, writing = os.pipe()
    os.write(writing, b'Welcome!\n\n[1]\n{"vmctl": 1}\n\xff\n' + b"x" * 20_000 + b"\n")
    say(writing, TARGET, ASKED, locks_travel=True)
    os.close(writing)
    ear = Ear(reading, TARGET)
    assert ear.hear(ASKED, FAILED) == {"vmctl": "receive", "at": "asked", "locks_travel": True}
    assert ear.hear(FAILED) is None
    os.close(reading)


@pytest.mark.parametrize("said", [b"", b'{"vmctl": "receive", "at": "asked"', b"x" * 9000, b"no\n"])
def test_no_words(said: bytes) -> None:
    """Half a line is none: what was to be said was not."""
    assert hear(said, ASKED) is None


def test_other_words_than_were_due() -> None:
    """Whoever says them is not to be relied upon."""
    with pytest.raises(CommandError, match="'asked', where running or failed was due"):
        hear(b'{"vmctl": "receive", "at": "asked"}\n', carry.RUNNING, FAILED)
    with pytest.raises(CommandError, match="something else than vmctl does"):
        hear(b"no\n" * 2000, ASKED)


def test_one_end_does_not_hear_itself() -> None:
    """A shell that sends back what it is sent."""
    assert hear(b'{"vmctl": "migrate", "at": "commit"}\n', COMMIT, FAILED) is None
    assert hear(b'{"vmctl": "migrate", "at": "commit"}\n', COMMIT, who=SOURCE) is not None
