"""Images for tests: qemu-img as the second implementation, and a flat copy of a disk's content."""

import contextlib
import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vmd.images.chain import Link, open_chain
from vmd.images.qcow2 import Qcow2Image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmd.images.image import Image

KIB = 1 << 10
MIB = 1 << 20


def qemu(program: str, *arguments: object) -> str:
    """Run one of QEMU's programs; return its output.  Raises CalledProcessError."""
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, done.args, done.stdout, done.stdout + done.stderr)
    return done.stdout


def check_report(path: Path) -> dict[str, Any]:
    """Return the report of `qemu-img check`.  Its exit status may be 2 (corruption) or 3 (leaks)."""
    done = subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", "--output=json", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 2, 3), done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def problems(path: Path) -> dict[str, int]:
    """Return the numbers of corruptions and leaks, without those that are 0."""
    report = check_report(path)
    return {name: report[name] for name in ("corruptions", "leaks", "check-errors") if report.get(name)}


def opened(*paths: Path, writable: bool = False, formats: tuple[str, ...] = (), guessed: bool = False) -> "Image":
    """Open a chain of images, top image first; by default all are qcow2."""
    links = []
    for number, path in enumerate(paths):
        fd = os.open(path, os.O_RDWR if writable and not number else os.O_RDONLY)
        image_format = formats[number] if formats else "qcow2"
        links.append(Link(fd=fd, path=str(path), format=image_format, guessed=guessed and not number))
    return open_chain(links, writable=writable)


def opened_qcow2(path: Path, *, writable: bool = True) -> Qcow2Image:
    """Open a single qcow2 image."""
    image = opened(path, writable=writable)
    assert isinstance(image, Qcow2Image)
    return image


def read(image: "Image", offset: int, length: int) -> bytes:
    """Return a range of a disk.  The memory has other bytes before, so that each byte must be read."""
    buffer = bytearray(b"\xee") * length
    image.preadv(offset, [memoryview(buffer)])
    return bytes(buffer)


def write(image: "Image", offset: int, data: bytes) -> None:
    """Write a range of a disk."""
    image.pwritev(offset, [memoryview(data)])


def pieces(data: "bytearray | bytes", choice: random.Random) -> list[memoryview]:
    """Return `data` as views, cut at random places."""
    view = memoryview(data)
    cuts = sorted(choice.randrange(len(data) + 1) for _ in range(choice.randrange(4)))
    return [view[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


class Scribbler:
    """Changes a disk and a flat copy of it at random.  After a discard the copy takes the disk's content."""

    def __init__(self, image: "Image", flat: bytearray, seed: int) -> None:
        self.image = image
        self.flat = flat
        self.choice = random.Random(seed)
        self.longest = 300 * KIB

    def place(self) -> tuple[int, int]:
        """Return a random range of the disk."""
        length = self.choice.choice((512, 4096, self.choice.randrange(1, 2000), self.choice.randrange(self.longest)))
        offset = self.choice.randrange(len(self.flat))
        if self.choice.random() < 0.7:
            offset, length = offset & ~511, (length + 511) & ~511
        return offset, min(length, len(self.flat) - offset)

    def step(self) -> None:
        """Do one random operation."""
        what = self.choice.random()
        offset, length = self.place()
        if what < 0.5:
            self.write(offset, length)
        elif what < 0.8:
            self.compare(offset, length)
        elif what < 0.9:
            self.image.write_zeroes(offset, length, self.choice.random() < 0.5)
            self.flat[offset : offset + length] = bytes(length)
        elif what < 0.97:
            self.image.discard(offset, length)
            self.flat[offset : offset + length] = read(self.image, offset, length)
        else:
            self.image.flush()

    def write(self, offset: int, length: int) -> None:
        """Write random bytes."""
        data = self.choice.randbytes(length)
        self.image.pwritev(offset, pieces(data, self.choice))
        self.flat[offset : offset + length] = data

    def compare(self, offset: int, length: int) -> None:
        """Read and compare."""
        buffer = bytearray(b"\xee") * length
        self.image.preadv(offset, pieces(buffer, self.choice))
        assert buffer == self.flat[offset : offset + length], f"{length} bytes at {offset} differ"

    def run(self, steps: int) -> None:
        """Do many operations, then compare the whole disk."""
        for _ in range(steps):
            self.step()
        for offset in range(0, len(self.flat), MIB):
            self.compare(offset, min(MIB, len(self.flat) - offset))


def flat_file(path: Path, size: int, seed: int, *, density: float = 0.5) -> bytearray:
    """Make a raw disk with random data here and there; return its content."""
    choice = random.Random(seed)
    flat = bytearray(size)
    for offset in range(0, size, 16 * KIB):
        if choice.random() < density:
            piece = choice.randbytes(choice.randrange(1, 16 * KIB))
            # Half of the data compresses well, so that compressed images have both kinds of clusters.
            piece = piece if choice.random() < 0.5 else piece[:50] * (len(piece) // 50)
            flat[offset : offset + len(piece)] = piece[: size - offset]
    path.write_bytes(flat)
    return flat


def same(image_path: Path, raw: "bytes | bytearray", tmp_path: Path) -> None:
    """Have qemu-img compare an image with bytes; raises if they differ."""
    expected = tmp_path / "expected.raw"
    expected.write_bytes(raw)
    qemu("qemu-img", "compare", "-f", "qcow2", "-F", "raw", image_path, expected)
    expected.unlink()


def make_chain(tmp_path: Path, options: str, size: int, levels: int) -> tuple[list[Path], bytearray]:
    """Have QEMU make an empty image on top of `levels` backing images; return the paths, top first, and content.

    Lower images are shorter and have other cluster sizes; the lowest image is raw.
    """
    flat = bytearray(size)
    paths: list[Path] = []
    for level in range(levels):
        path = tmp_path / f"base{level}"
        length = size - (levels - level) * 100 * KIB - 512
        if not paths:
            flat[:length] = flat_file(path, length, seed=levels)
        else:
            kind = "raw" if len(paths) == 1 else "qcow2"
            qemu("qemu-img", "create", "-qf", "qcow2", "-o", f"cluster_size={4 << level}k", "-F", kind, "-b",
                 paths[0], path, length)  # fmt: skip
            image = opened(path, *paths, writable=True, formats=("qcow2",) * len(paths) + ("raw",))
            part = flat[:length]
            Scribbler(image, part, seed=level).run(40)
            flat[:length] = part
            image.close()
        paths.insert(0, path)
    top = tmp_path / "top"
    below = ("-F", "raw" if levels == 1 else "qcow2", "-b", paths[0]) if paths else ()
    qemu("qemu-img", "create", "-qf", "qcow2", "-o", options, *below, top, size)
    return [top, *paths], flat


def chain_formats(paths: list[Path]) -> tuple[str, ...]:
    """Return the formats of a chain of `make_chain`."""
    return ("qcow2",) + ("qcow2",) * (len(paths) - 2) + ("raw",) * (len(paths) > 1)


@contextlib.contextmanager
def small_file_system(path: Path) -> Iterator[Path]:
    """Mount a file system of 2 MiB at a new directory while the context lasts.  Needs root."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "small", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)
