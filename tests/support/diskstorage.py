"""Storage of disk images: files and block devices that fill up, have odd sizes, or grow."""

import contextlib
import errno
import os
import random
import resource
import subprocess
from pathlib import Path

from tests.support.fusefile import FSYNC, WRITE, FuseFile, Operation
from tests.support.images import KIB, MIB

SECTOR = 512
PAGE = 4 * KIB
GARBAGE = b"\xdb"
AMPLE = 512 * MIB  # bytes; more than a sequence ever writes, and allocated only when written


def run(*command: object) -> str:
    """Run a program that must succeed; return its output."""
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout.strip()


class Storage:
    """A regular file without limits.  A context manager; `path` is the image once `place` has put it there."""

    limited = False  # it may run out of space
    broken = False  # it has lost data and reported that
    forgets = False  # discarded sectors of a raw disk on it may have any old content

    def __init__(self, folder: Path, choice: random.Random) -> None:
        self.folder = folder
        self.choice = choice
        self.path = folder / "image"
        self.raw = False  # the image is raw, so the disk is as long as the storage
        self.undo = contextlib.ExitStack()

    def __enter__(self) -> "Storage":
        return self

    def __exit__(self, *_error: object) -> None:
        self.undo.close()

    def place(self, made: Path, room: int) -> None:
        """Copy an image from a regular file to this storage; the image may need `room` bytes."""
        os.rename(made, self.path)

    def confine(self, pid: int) -> None:
        """Set the resource limits of a new disk process."""

    def grow(self) -> None:
        """Add space."""

    def repair(self) -> None:
        """End the failure, before a new process starts."""

    def readable(self) -> Path:
        """Return the path at which other programs read the image."""
        return self.path

    def odd(self, least: int, most: int) -> int:
        """Return a number of bytes that is a multiple of a sector and of nothing else."""
        pages = -(-self.choice.randrange(least, max(least + 1, most)) // PAGE)
        return pages * PAGE + SECTOR * self.choice.choice((1, 3, 5, 7))


class LoopDevice(Storage):
    """A block device with ample space and an odd size.

    On a device that cannot write zeroes, fallocate(2) drops the page cache before it fails, so a discarded sector shows
    the device's content from before the last writes.
    """

    forgets = True

    def __init__(self, folder: Path, choice: random.Random) -> None:
        super().__init__(folder, choice)
        self.file = folder / "device"

    def size(self, made: int, room: int) -> int:
        """Return the size of the device in bytes, for an image of `made` bytes that may need `room` in the end."""
        return self.odd(made, made + MIB) if self.raw else self.odd(AMPLE, 2 * AMPLE)

    def place(self, made: Path, room: int) -> None:
        """See Storage.  The rest of the device holds garbage."""
        os.rename(made, self.file)
        used = self.file.stat().st_size
        with self.file.open("ab") as file:
            file.write(GARBAGE * self.choice.choice((0, 512, MIB, 3 * MIB)))
        self.resize(self.size(used, room))
        self.path = Path(run("losetup", "-f", "--show", self.file))
        self.undo.callback(run, "losetup", "-d", self.path)

    def resize(self, size: int) -> None:
        """Set the length of the file below the device.  Added space holds garbage."""
        os.truncate(self.file, size)


class FullDevice(LoopDevice):
    """A block device that is too short for the image."""

    limited = True

    def size(self, made: int, room: int) -> int:
        """See LoopDevice."""
        return self.odd(made, made + (room - made) // self.choice.choice((2, 4, 16)))


class GrowingDevice(FullDevice):
    """A block device that is too short, and is extended during use."""

    def grow(self) -> None:
        """See Storage."""
        with self.file.open("ab") as file:
            file.write(GARBAGE * self.choice.choice((0, 512, MIB)))
        size = self.file.stat().st_size
        if self.choice.random() < 0.5 and not self.raw:
            self.limited = False
            size = AMPLE
        self.resize(self.odd(size, size + 4 * MIB))
        run("losetup", "-c", self.path)


class FullFileSystem(Storage):
    """A file on an almost full file system, which can get more space."""

    limited = True

    def place(self, made: Path, room: int) -> None:
        """See Storage."""
        self.folder = self.folder / "small"
        self.folder.mkdir()
        run("mount", "-t", "tmpfs", "-o", f"size={AMPLE}", "small", self.folder)
        self.undo.callback(run, "umount", self.folder)
        self.path = self.folder / "image"
        run("cp", "--sparse=always", made, self.path)
        made.unlink()
        used = self.path.stat().st_blocks * 512
        left = self.choice.randrange((room + used) // self.choice.choice((2, 8, 64)))
        run("mount", "-o", f"remount,size={used + left + 8 * KIB}", self.folder)

    def grow(self) -> None:
        """See Storage."""
        run("mount", "-o", f"remount,size={AMPLE}", self.folder)
        self.limited = False


class LimitedFile(Storage):
    """A file that cannot grow above the process's file size limit: EFBIG."""

    limited = True

    def place(self, made: Path, room: int) -> None:
        """See Storage."""
        super().place(made, room)
        length = self.path.stat().st_size
        self.limit = self.choice.randrange(length // 2, length + max(1, room - length) // 2)
        self.limit -= self.limit % self.choice.choice((1, SECTOR, PAGE))
        self.limit = max(self.limit, length if length < room else 0)

    def confine(self, pid: int) -> None:
        """See Storage."""
        _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (self.limit, most))
        self.pid = pid

    def grow(self) -> None:
        """See Storage."""
        self.limit, self.limited = AMPLE, False
        self.confine(self.pid)


class ForgetfulFile(FuseFile):
    """A file whose fsync fails once on request.  Part of the data written since the last fsync is then lost."""

    def __init__(self, content: bytes, choice: random.Random) -> None:
        self.choice = choice
        self.failing = self.failed = False
        self.synced = bytearray(content)
        self.unsynced: set[int] = set()  # sectors
        super().__init__(content)

    def _decide(self, unique: int, operation: Operation, body: bytes) -> None:
        first, end = operation.offset // SECTOR, -(-(operation.offset + operation.length) // SECTOR)
        if operation.opcode == WRITE:
            self.unsynced.update(range(first, end))
        elif operation.opcode == FSYNC and self.sync():
            self._reply(unique, error=errno.EIO)
            return
        super()._decide(unique, operation, body)

    def sync(self) -> bool:
        """Make the writes durable, or lose some of them; return whether any were lost."""
        lost = self.failing and not self.failed
        self.synced.extend(bytes(max(0, len(self.content) - len(self.synced))))
        for sector in self.unsynced:
            there = slice(sector * SECTOR, (sector + 1) * SECTOR)
            if lost and self.choice.random() < 0.5:
                self.content[there] = self.synced[there][: len(self.content[there])]
            else:
                self.synced[there] = self.content[there].ljust(len(self.synced[there]), b"\0")
        self.unsynced.clear()
        self.failed |= lost
        return lost


class FailingFile(Storage):
    """A FUSE file that fails.  `grow` makes only the next fsync fail, because the kernel reports an error once."""

    def place(self, made: Path, room: int) -> None:
        """See Storage."""
        self.file = ForgetfulFile(made.read_bytes(), self.choice)
        self.undo.callback(self.file.close)
        made.unlink()
        self.path = Path(f"/proc/self/fd/{self.file.fd}")

    def grow(self) -> None:
        """See FailingFile."""
        self.file.failing = True

    @property
    def broken(self) -> bool:  # type: ignore[override]
        """See Storage."""
        return self.file.failed

    def repair(self) -> None:
        """End all failures; the present content stays."""
        self.file.failing = self.file.failed = False
        self.file.sync()

    def readable(self) -> Path:
        """See Storage."""
        path = self.folder / "readable"
        path.write_bytes(self.file.content)
        return path


STORAGES = {
    "file": Storage,
    "odd-device": LoopDevice,
    "growing-device": GrowingDevice,
    "full-device": FullDevice,
    "full-tmpfs": FullFileSystem,
    "file-limit": LimitedFile,
    "failing-file": FailingFile,
}
