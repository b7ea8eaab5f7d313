"""A block device of any size, full of old content.  Needs root."""

import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

GARBAGE = b"\xdb"
PIECE = 1 << 20


class LoopDevice:
    """A loop device on a file.  A context manager; `path` is the device."""

    def __init__(self, file: Path, size: int) -> None:
        self.file = file
        self.path = Path()
        self.size = 0
        self._lengthen(size)

    def _lengthen(self, size: int) -> None:
        with self.file.open("ab") as file:
            while self.size < size:
                step = min(PIECE, size - self.size)
                file.write(GARBAGE * step)
                self.size += step

    def __enter__(self) -> Self:
        done = subprocess.run(["losetup", "-f", "--show", self.file], check=True, capture_output=True, text=True)
        self.path = Path(done.stdout.strip())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        subprocess.run(["losetup", "-d", self.path], check=True)

    def load(self, image: Path) -> None:
        """Put an image at the start of the device."""
        with self.path.open("r+b") as file:
            file.write(image.read_bytes())

    def resize(self, size: int) -> None:
        """Change the size of the device, also during use."""
        if size > self.size:
            self._lengthen(size)
        else:
            os.truncate(self.file, size)
            self.size = size
        subprocess.run(["losetup", "-c", self.path], check=True)
