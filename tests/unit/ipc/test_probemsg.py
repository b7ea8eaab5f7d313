"""The line that imgprobe writes: packed answers can be unpacked, and all others are refused."""

import random

import pytest

from vmd.ipc.probemsg import ANSWER_MAX, Probe, pack_error, pack_image, unpack

PROBES = [
    Probe(format="raw", size=0, guessed=True),
    Probe(format="qcow2", size=2**63 - 1),
    Probe(format="qcow2", size=1 << 30, backing="../base\n\udcff", backing_format="raw"),
    Probe(format="qcow2", size=512, guessed=True, backing="b" * 1023, backing_format=""),
    Probe(format="", size=512, guessed=True, looks="VMDK"),
    Probe(format="raw", size=512, looks="7-Zip"),
    Probe(format="qcow2", size=512, notes=("dirty", "corrupt")),
]
GOOD = pack_image(PROBES[2])


@pytest.mark.parametrize("probe", PROBES)
def test_image_can_be_unpacked(probe: Probe) -> None:
    """Paths may have any bytes but NUL."""
    assert unpack(pack_image(probe)) == probe


@pytest.mark.parametrize(
    ("sentence", "comes_back"), [("is bad", "is bad"), ("a\nb\0c", "a\nb?c"), ("\udcff", "\\udcff"), ("", "")]
)
def test_message_can_be_unpacked(sentence: str, comes_back: str) -> None:
    """It is one string, and can be written to a terminal or a log."""
    assert unpack(pack_error(sentence)) == comes_back


def test_long_message_is_cut() -> None:
    """Every line fits the limit."""
    answer = unpack(pack_error("x" * 100_000))

    assert isinstance(answer, str)
    assert len(answer) == 4000


@pytest.mark.parametrize(
    "line",
    [
        b"", b"\n", b"image\n", b"error\0a\0b\n", b"image\0raw\x001\x000\0\0\0\0",
        b"image\0raw\x001\x000\0\n", b"image\0raw\x001\x000\0\0\0\n", b"image\0raw\x001\x000\0\0\0\0\0\n",
        b"image\0vmdk\x001\x000\0\0\0\0\n", b"image\0r\xff\x001\x000\0\0\0\0\n",
        b"image\0\x001\x000\0\0\0\0\n",
        b"image\0raw\0\x000\0\0\0\0\n", b"image\0raw\0-1\x000\0\0\0\0\n", b"image\0raw\0 1\x000\0\0\0\0\n",
        b"image\0raw\0" + b"9" * 20 + b"\x000\0\0\0\0\n", b"image\0raw\0" + b"9" * 5000 + b"\x000\0\0\0\0\n",
        b"image\0raw\x001\x002\0\0\0\0\n", b"image\0raw\x001\0\0\0\0\0\n",
        b"image\0qcow2\x001\x000\0" + b"b" * 1024 + b"\0\0\0\n", b"image\0qcow2\x001\x000\0b\0vmdk\0\0\n",
        b"image\0raw\x001\x000\0\0\0vmdk\0\n", b"image\0raw\x001\x000\0\0\0\xff\0\n",
        b"image\0raw\x001\x000\0\0\0\0loud\n", b"image\0raw\x001\x000\0\0\0\0" + b"dirty " * 3 + b"\n",
        b"error\0" + b"x" * ANSWER_MAX + b"\n",
    ],
)  # fmt: skip
def test_malformed_lines_are_refused(line: bytes) -> None:
    """Every field is checked."""
    with pytest.raises(ValueError, match=r"line|fields|format|size|flag|path|look|notes"):
        unpack(line)


def test_truncated_line_is_refused() -> None:
    """This holds for each prefix of a valid line."""
    for length in range(len(GOOD)):
        with pytest.raises(ValueError, match=r"not complete|fields"):
            unpack(GOOD[:length])


def test_random_changes_are_understood_or_refused() -> None:
    """Only ValueError is raised."""
    choice = random.Random(1)
    for _ in range(5000):
        line = bytearray(GOOD)
        for _ in range(choice.randrange(1, 4)):
            line[choice.randrange(len(line))] = choice.randrange(256)
        try:
            assert isinstance(unpack(bytes(line)), Probe | str)
        except ValueError:
            continue
