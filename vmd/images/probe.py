"""imgprobe: reads what an image says about itself, for a parent that must not.

Runs as  _vmd, confined to the descriptors it was started with, for a moment
Peers    parent (starts it, reads one line from fd 3)
Holds    one image, for reading, as fd 4
"""

import json
import os

from vmd.errors import ImageError
from vmd.images.identify import probe

ANSWER_FD, IMAGE_FD = 3, 4


def answer(fd: int, path: str, format_hint: str = "") -> bytes:
    """Return one line of JSON: the fields of Probe, or `error` with a sentence."""
    try:
        fields: dict[str, object] = probe(fd, path, format_hint).as_dict()
    except ImageError as error:
        fields = {"error": str(error)}
    return json.dumps(fields).encode() + b"\n"


def main(path: str, format_hint: str = "") -> int:
    """Answer and be gone."""
    line = memoryview(answer(IMAGE_FD, path, format_hint))
    while line:
        line = line[os.write(ANSWER_FD, line) :]
    return 0
