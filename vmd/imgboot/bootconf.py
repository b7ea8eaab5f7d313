"""What /etc/boot.conf of an OpenBSD system says, as far as vmd(8) of 2016 to 2018 read it (boot.conf(8), boot(8)).

    set device hd0a | set image /bsd | boot [[hd0a:]/bsd] [-acds]

All else is for a boot loader and passed over.  The last of several lines counts.
"""

from vmd.ipc.bootmsg import OPTIONS
from vmd.record import Record

DEFAULT_DEVICE, DEFAULT_IMAGE = "hd0a", "/bsd"
BYTES_MAX = 64 << 10  # of the file: more is no boot.conf
WORD_MAX = 1023  # bytes
PARTITIONS = frozenset("abcdefghijklmnopqrstuvwxyz")
DISKS = ("hd", "sd", "wd")  # a disk; what else there is cannot be booted from here, such as softraid's sr0


class BootConf(Record):
    """What it says; `partition` is a letter of the disklabel, `options` those of boot(8), without the hyphen."""

    partition: str
    image: str
    options: str = ""


def parse(text: bytes) -> BootConf:
    """Return what an /etc/boot.conf says, of which "" is one.  Raises ValueError."""
    device, image, options = DEFAULT_DEVICE, DEFAULT_IMAGE, ""
    for line in text.split(b"\n"):
        match [word.decode("utf-8", "surrogateescape") for word in line.split()]:
            case ["set", "device", name, *_]:
                device = name
            case ["set", "image", name, *_]:
                image = name
            case ["boot", *words]:
                if words and not words[0].startswith("-"):
                    place, colon, path = words.pop(0).rpartition(":")
                    device, image = (place if colon else device), path
                given = "".join(word[1:] for word in words if word.startswith("-"))
                options += "".join(letter for letter in given if letter in OPTIONS and letter not in options)
    return BootConf(partition=partition_of(device), image=path_of(image), options=options)


def partition_of(device: str) -> str:
    """Return which partition of the disk itself a device is, such as hd0a.  Raises ValueError."""
    kind, number, letter = device[:2], device[2:-1], device[-1:]
    if kind not in DISKS or number != "0" or letter not in PARTITIONS:
        raise ValueError(f"device {device[:WORD_MAX]!r} is no partition of the disk itself, such as hd0a")
    return letter


def path_of(image: str) -> str:
    """Return the path of a kernel; a relative one begins at the root.  Raises ValueError."""
    if not image.strip("/") or len(image) > WORD_MAX:
        raise ValueError(f"image {image[:80]!r} is no path of a kernel")
    return "/" + image.lstrip("/")
