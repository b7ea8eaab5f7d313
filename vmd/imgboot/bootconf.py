"""The part of OpenBSD's /etc/boot.conf that vmd(8) of 2016 to 2018 read (boot.conf(8), boot(8)).

    set device hd0a | set image /bsd | boot [[hd0a:]/bsd] [-acds]

Other lines are for a boot loader and are skipped.  Of several lines of one kind the last counts.
"""

from vmd.ipc.bootmsg import OPTIONS
from vmd.record import Record

DEFAULT_DEVICE, DEFAULT_IMAGE = "hd0a", "/bsd"
BYTES_MAX = 64 << 10  # a larger file is no boot.conf
WORD_MAX = 1023  # bytes
PARTITIONS = frozenset("abcdefghijklmnopqrstuvwxyz")
DISKS = ("hd", "sd", "wd")  # other devices, such as softraid's sr0, cannot be booted from here


class BootConf(Record):
    """The kernel that it names.  `partition` is a letter of the disklabel, `options` are letters of boot(8)."""

    partition: str
    image: str
    options: str = ""


def parse(text: bytes) -> BootConf:
    """Parse an /etc/boot.conf, which may be empty.  Raises ValueError."""
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
                for letter in "".join(word[1:] for word in words if word.startswith("-")):
                    if letter in OPTIONS and letter not in options:
                        options += letter
    return BootConf(partition=partition_of(device), image=path_of(image), options=options)


def partition_of(device: str) -> str:
    """Return the partition of the disk itself that a device such as hd0a names.  Raises ValueError."""
    kind, number, letter = device[:2], device[2:-1], device[-1:]
    if kind not in DISKS or number != "0" or letter not in PARTITIONS:
        raise ValueError(f"device {device[:WORD_MAX]!r} is no partition of the disk itself, such as hd0a")
    return letter


def path_of(image: str) -> str:
    """Return the path of a kernel; a relative one begins at the root.  Raises ValueError."""
    if not image.strip("/") or len(image) > WORD_MAX:
        raise ValueError(f"image {image[:80]!r} is no path of a kernel")
    return "/" + image.lstrip("/")
