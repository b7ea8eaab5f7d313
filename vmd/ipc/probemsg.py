"""What imgprobe is asked and answers: descriptors, arguments, and one line in a form that its reader need not parse.

    imgprobe [FORMAT]     the image is fd 4; without FORMAT it is told from the image's first bytes
    fd 3                  `image` NUL format NUL size NUL guessed NUL backing NUL backing format LF
                          `error` NUL sentence LF

The sentence does not name the image: imgprobe does not know what it is called.  Standard library only.
"""

import os

from vmd.record import Record

FD_ANSWER, FD_IMAGE = 3, 4  # a pipe's writing end; the image, for reading
ANSWER_MAX = 8192  # bytes of the line
SENTENCE_MAX = 4000  # bytes of a sentence
BACKING_MAX = 1023  # bytes of a path; the format's own limit
SIZE_DIGITS = len(str(2**63 - 1))
FORMATS = ("raw", "qcow2")

IMAGE, ERROR, END = b"image", b"error", b"\n"
FLAGS = {b"0": False, b"1": True}


class Probe(Record):
    """What an image says about itself; `backing` is the path as recorded, relative to the image's directory.

    `guessed`: nobody but its first bytes said that it has this format.  A guest writes them, so whatever names
    another file must not be followed then.
    """

    format: str
    size: int
    guessed: bool = False
    backing: str = ""
    backing_format: str = ""


def how_to_record(image: str, backing: str, backing_format: str) -> str:
    """Return what to do about an image that names a backing file, and not its format."""
    return (
        f"{image} does not record that it is {backing_format}; if you trust it, have it recorded:"
        f" qemu-img rebase -u -f qcow2 -F {backing_format} -b {backing} {image}"
    )


def pack_image(probe: Probe) -> bytes:
    """Return the line for an image."""
    fields = (
        IMAGE, probe.format.encode(), b"%d" % probe.size, b"%d" % probe.guessed,
        os.fsencode(probe.backing), probe.backing_format.encode(),
    )  # fmt: skip
    return b"\0".join(fields) + END


def pack_error(sentence: str) -> bytes:
    """Return the line for an image that cannot be used."""
    raw = sentence.replace("\0", "?").encode("utf-8", "backslashreplace")
    return b"\0".join((ERROR, raw[:SENTENCE_MAX])) + END


def unpack(line: bytes) -> Probe | str:
    """Return what the line says: an image, or the sentence why it cannot be used.

    Raises ValueError for a line that no imgprobe writes.
    """
    if not line.endswith(END) or len(line) > ANSWER_MAX:
        raise ValueError(f"line of {len(line)} bytes is not complete")
    kind, *fields = line.removesuffix(END).split(b"\0")
    if kind == ERROR and len(fields) == 1:
        return fields[0].decode("utf-8", "backslashreplace")
    if kind != IMAGE or len(fields) != 5:
        raise ValueError(f"{len(fields)} fields of kind {kind[:16]!r}")
    image_format, size, guessed, backing, backing_format = fields
    if image_format.decode("ascii", "replace") not in FORMATS:
        raise ValueError(f"format {image_format[:16]!r}")
    if not size.isdigit() or len(size) > SIZE_DIGITS:
        raise ValueError(f"size {size[:32]!r}")
    if guessed not in FLAGS:
        raise ValueError(f"flag {guessed[:16]!r}")
    if len(backing) > BACKING_MAX:
        raise ValueError(f"path of {len(backing)} bytes")
    if backing_format.decode("ascii", "replace") not in ("", *FORMATS):
        raise ValueError(f"format {backing_format[:16]!r}")
    return Probe(
        format=image_format.decode(),
        size=int(size),
        guessed=FLAGS[guessed],
        backing=os.fsdecode(backing),
        backing_format=backing_format.decode(),
    )
