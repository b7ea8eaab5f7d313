"""Requests to imgboot and its answers: packed messages can be unpacked, and all others are refused."""

import random

import pytest

from vmd.config.model import DiskFile
from vmd.ipc.bootmsg import BootFile, BootLink, asked, pack_error, pack_file, question, unpack_file
from vmd.ipc.probemsg import ANSWER_MAX

GOOD = pack_file(BootFile(size=1 << 20, name="disk0p2:/vmlinuz", options="sd"))


def test_request_can_be_unpacked() -> None:
    """It has all images of the disk."""
    file = DiskFile(disk=1, partition="a", path="/bsd")
    links = [BootLink(path="/a\udcff", format="qcow2", guessed=False), BootLink(path="/b", format="raw", guessed=True)]

    assert asked(question(file, links)) == (file, links)


def test_answers_can_be_unpacked() -> None:
    """There are two kinds.  Names may have any characters."""
    found = BootFile(size=2**63 - 1, name="disk0:/\u00e4\udcff\n")
    assert unpack_file(pack_file(found)) == found.replace(name="disk0:/\u00e4\\udcff\n")
    assert unpack_file(pack_error("is bad")) == "is bad"


@pytest.mark.parametrize(
    "line",
    [
        b"", b"\n", b"file\n", b"file\x001\0a\n", b"file\0-1\0a\0\n", b"file\x001\0a\0\0\n", b"image\x001\0a\0\n",
        b"file\0" + b"9" * 20 + b"\0a\0\n", b"file\x001\0" + b"a" * 1201 + b"\0\n",
        b"file\x001\0a\0x\n", b"file\x001\0a\0sssss\n", b"file\x001\0a\0\xff\n",
        b"error\0a\0b\n", b"error\0" + b"x" * ANSWER_MAX + b"\n", GOOD[:-1],
    ],
)  # fmt: skip
def test_malformed_lines_are_refused(line: bytes) -> None:
    """Every field is checked."""
    with pytest.raises(ValueError, match=r"\w"):
        unpack_file(line)


def test_any_line() -> None:
    """The answer of an imgboot that was taken over raises ValueError, or is valid."""
    source = random.Random(15)
    for _ in range(2000):
        line = bytearray(GOOD)
        for _ in range(source.randrange(1, 4)):
            line[source.randrange(len(line))] = source.choice(b"\0\n09az\xff")
        try:
            unpack_file(bytes(line))
        except ValueError:
            continue
