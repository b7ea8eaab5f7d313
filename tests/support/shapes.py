"""vm.conf files in the styles of other users, each with the verdict of OpenBSD's `vmd -n`.

The head of a file has `# upstream: accepted`, or line and text of the first upstream error.  `# here: ...` is present
where our verdict differs on purpose, and `# differs: ...` quotes what vm.conf(5) says about the difference.  Images are
in /var/vm, which a test replaces with its own folder.
"""

import re
from pathlib import Path
from typing import NamedTuple

from tests.support.guests import guest
from vmd.images.create import create

FOLDER = Path(__file__).resolve().parents[1] / "data/conf"
IMAGES = b"/var/vm"
MIB = 1 << 20
ACCEPTED = "accepted"
VERDICT = re.compile(rb"# (upstream|here|differs): ([^\r\n]*)")


class Shape(NamedTuple):
    """One file with its verdicts."""

    name: str
    text: bytes
    upstream: str
    here: str
    differs: str


def shapes() -> list[Shape]:
    """Return all files."""
    found = []
    for path in sorted(FOLDER.glob("*.conf")):
        said = {who.decode(): verdict.decode() for who, verdict in VERDICT.findall(path.read_bytes())}
        upstream, here, differs = said["upstream"], said.get("here", said["upstream"]), said.get("differs", "")
        found.append(Shape(path.stem, path.read_bytes(), upstream, here, differs))
    return found


def fill(folder: Path) -> None:
    """Make the images that the files name, except those with `missing` in the name."""
    for name in ("disk", "second", "third", "fourth", "fifth"):
        create(str(folder / f"{name}.img"), "raw", MIB)
    create(str(folder / "disk.qcow2"), "qcow2", MIB)
    create(str(folder / "derived.qcow2"), "qcow2", MIB, "disk.qcow2", "qcow2")
    (folder / "disc.iso").write_bytes(bytes(2048 * 32))
    (folder / "kernel").write_bytes(Path(guest("demo")).read_bytes())
    (folder / "minimal.conf").write_bytes((FOLDER / "minimal.conf").read_bytes().replace(IMAGES, str(folder).encode()))


def write(shape: Shape, folder: Path) -> Path:
    """Write the file with the image paths in a folder; return its path."""
    path = folder / "vm.conf"
    path.write_bytes(shape.text.replace(IMAGES, str(folder).encode()))
    return path
