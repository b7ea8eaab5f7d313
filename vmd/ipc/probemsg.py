"""The protocol of imgprobe: a question is one or two words; the answer is one line that is simple to split.

    FORMAT                raw or qcow2; "": guess it from the image's bytes; `disc`: the image of a CD-ROM
    BOOTS                 given if imgprobe is to check whether a BIOS finds something to start
    answer                `image` NUL format NUL size NUL guessed NUL backing NUL backing format NUL looks NUL notes LF
                          `error` NUL sentence LF

The sentence does not name the image, because imgprobe does not know its name.  If advice has to name the image,
imgprobe answers words of `foreign.FOREIGN` and NOTES instead, and the process that reads them makes the sentence.
Standard library only.
"""

import os

from vmd.ipc import foreign
from vmd.ipc.foreign import FOREIGN, quoted, refused
from vmd.record import Record

ANSWER_MAX = 8192  # bytes of the line
SENTENCE_MAX = 4000  # bytes of a sentence
BACKING_MAX = 1023  # bytes of a path; the limit of the qcow2 format
SIZE_DIGITS = len(str(2**63 - 1))
FORMATS = ("raw", "qcow2")
DISC = "disc"
NOT_QCOW2 = "not a qcow2 image"
DIRTY, CORRUPT, GOING_BACK = "dirty", "corrupt", "going-back"
# Answers to BOOTS about the disk's first sector: it has no boot code; it is not in this image but in the one below.
NO_CODE, BELOW = "no-code", "below"
NOTES = (DIRTY, CORRUPT, GOING_BACK, NO_CODE, BELOW)
BOOTS = "boots"  # the word that asks for NO_CODE and BELOW

IMAGE, ERROR, END = b"image", b"error", b"\n"
FLAGS = {b"0": False, b"1": True}


class Probe(Record):
    """The contents of an image's header.  `backing` is the path as recorded, relative to the image's directory.

    `guessed`: the format was guessed from the first bytes.  A guest may have written them, so a file that the image
    names must not be opened.

    `looks`: the name in `foreign.FOREIGN` of the format that the bytes look like.  `format` is "" if the image
    therefore cannot have the format that was asked for.  `notes`: words of NOTES.
    """

    format: str
    size: int
    guessed: bool = False
    backing: str = ""
    backing_format: str = ""
    looks: str = ""
    notes: tuple[str, ...] = ()


def how_to_record(image: str, backing: str, backing_format: str) -> str:
    """Return the advice for an image that names a backing file without its format."""
    return (
        f"{image} does not record that its format is {backing_format}; if you trust it, record that:"
        f" {recording(image, backing, backing_format)}"
    )


def recording(image: str, backing: str, backing_format: str) -> str:
    """Return the command that records the format of a backing file."""
    return f"qemu-img rebase -u -f qcow2 -F {backing_format} -b {quoted(backing)} {quoted(image)}"


def refusal(probe: Probe, format_hint: str, path: str, raw: str) -> str:
    """Return why an image cannot be used in the format that was stated, or "".

    `raw` is how to state that it is raw, or "" if it cannot be used as raw.
    """
    if probe.looks and (not probe.format or refused(probe.looks, probe.size, path)):
        return foreign.refusal(probe.looks, path, raw)
    return NOT_QCOW2 if format_hint == "qcow2" and probe.format != "qcow2" else ""


def warnings(probe: Probe, raw: str) -> list[str]:
    """Return the warnings about an image that is used; `raw` as for `refusal`."""
    return [foreign.warning(probe.looks, raw)] if probe.looks else []


def pack_image(probe: Probe) -> bytes:
    """Return the line for an image."""
    fields = (
        IMAGE, probe.format.encode(), b"%d" % probe.size, b"%d" % probe.guessed,
        os.fsencode(probe.backing), probe.backing_format.encode(), probe.looks.encode(), " ".join(probe.notes).encode(),
    )  # fmt: skip
    return b"\0".join(fields) + END


def pack_error(sentence: str) -> bytes:
    """Return the line for an image that cannot be used."""
    return b"\0".join((ERROR, as_field(sentence)[:SENTENCE_MAX])) + END


def as_field(text: str) -> bytes:
    """Return a text as a field of a line."""
    return text.replace("\0", "?").encode("utf-8", "backslashreplace")


def fields_of(line: bytes) -> list[bytes] | str:
    """Return the kind and the fields of a line, or the sentence of one that says an error.

    Raises ValueError for a line that is not whole.
    """
    if not line.endswith(END) or len(line) > ANSWER_MAX:
        raise ValueError(f"line of {len(line)} bytes is not complete")
    kind, *fields = line.removesuffix(END).split(b"\0")
    if kind == ERROR and len(fields) == 1:
        return fields[0].decode("utf-8", "backslashreplace")
    return [kind, *fields]


def unpack(line: bytes) -> Probe | str:
    """Return the contents of an answer: an image, or the sentence of an error.

    Raises ValueError for a malformed line.
    """
    answer = fields_of(line)
    if isinstance(answer, str):
        return answer
    kind, *fields = answer
    if kind != IMAGE or len(fields) != 7:
        raise ValueError(f"{len(fields)} fields of kind {kind[:16]!r}")
    image_format, size, guessed, backing, backing_format, looks, notes = fields
    if looks and looks.decode("ascii", "replace") not in FOREIGN:
        raise ValueError(f"look {looks[:16]!r}")
    if image_format.decode("ascii", "replace") not in (("", *FORMATS) if looks else FORMATS):
        raise ValueError(f"format {image_format[:16]!r}")
    if not size.isdigit() or len(size) > SIZE_DIGITS:
        raise ValueError(f"size {size[:32]!r}")
    if guessed not in FLAGS:
        raise ValueError(f"flag {guessed[:16]!r}")
    if len(backing) > BACKING_MAX:
        raise ValueError(f"path of {len(backing)} bytes")
    if backing_format.decode("ascii", "replace") not in ("", *FORMATS):
        raise ValueError(f"format {backing_format[:16]!r}")
    words = tuple(notes.decode("ascii", "replace").split())
    if len(set(words)) < len(words) or not set(words) <= set(NOTES):
        raise ValueError(f"notes {notes[:32]!r}")
    return Probe(
        format=image_format.decode(),
        size=int(size),
        guessed=FLAGS[guessed],
        backing=os.fsdecode(backing),
        backing_format=backing_format.decode(),
        looks=looks.decode(),
        notes=words,
    )
