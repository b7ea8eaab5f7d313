"""/etc/boot.conf, as vmd(8) of 2016 to 2018 read it."""

import random

import pytest

from vmd.imgboot.bootconf import BootConf, parse


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"", ("a", "/bsd", "")),
        (b"set tty com0\nstty com0 115200\nset timeout 5\n", ("a", "/bsd", "")),
        (b"set image /bsd.mp\n", ("a", "/bsd.mp", "")),
        (b"set image bsd.sp", ("a", "/bsd.sp", "")),
        (b"set device hd0d\nset image /6.2/bsd", ("d", "/6.2/bsd", "")),
        (b"boot", ("a", "/bsd", "")),
        (b"boot /bsd.rd", ("a", "/bsd.rd", "")),
        (b"boot hd0e:/bsd -s\n", ("e", "/bsd", "s")),
        (b"boot -c -da", ("a", "/bsd", "cda")),
        (b"  boot\t/obsd  \r\n", ("a", "/obsd", "")),
        (b"# boot /no\nset image /a\nset image /b\nset image", ("a", "/b", "")),
        (b"set device sd0a", ("a", "/bsd", "")),
        (b"boot -sssss -xcs\nboot -c -a", ("a", "/bsd", "sca")),  # each letter once
        (b"set image /" + b"x" * 1022, ("a", "/" + "x" * 1022, "")),
    ],
)
def test_valid_files(text: bytes, found: tuple[str, str, str]) -> None:
    """The last of several lines counts, and lines for a boot loader are skipped."""
    partition, image, options = found
    assert parse(text) == BootConf(partition=partition, image=image, options=options)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"set device hd1a", "device 'hd1a' is no partition of the disk itself"),
        (b"boot sr0a:/bsd", "device 'sr0a' is no partition of the disk itself"),
        (b"set device hd0", "device 'hd0' is no partition of the disk itself"),
        (b"boot hd0a:", "image '' is no path of a kernel"),
        (b"set image /", "image '/' is no path of a kernel"),
        (b"set image /" + b"x" * 1023, "image '/x"),
        (b"boot x0a:/bsd", "device 'x0a' is no partition of the disk itself"),
        (b"boot hd00a:/bsd", "device 'hd00a' is no partition of the disk itself"),
    ],
)
def test_invalid_values(text: bytes, why: str) -> None:
    """The message has the value."""
    with pytest.raises(ValueError, match=f"^{why}"):
        parse(text)


def test_any_bytes() -> None:
    """A guest has written the file."""
    words = [b"set", b"boot", b"image", b"device", b"hd0a", b":", b"/", b"-s", b"\n", b" ", b"\0", b"\xff", b"\xc3"]
    source = random.Random(15)
    for _ in range(2000):
        text = b" ".join(source.choices(words, k=source.randrange(12)))
        try:
            found = parse(text)
        except ValueError:
            continue
        assert found.image.startswith("/")
        assert len(found.partition) == 1
