"""Where the image of a disk may lie: in files and on block devices that fill up, end in odd places, or grow."""

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
AMPLE = 512 * MIB  # more than a sequence ever writes; nothing of it is allocated before


def run(*command: object) -> str:
    """Run a program that has to succeed; return what it prints."""
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout.strip()


class Storage:
    """A regular file without limits.  A context manager; `path` is the image once `place` has put it there."""

    limited = False  # it may say that there is no room
    broken = False  # it has lost something and said so
    forgets = False  # a raw disk on it may show anything old where it was discarded

    def __init__(self, folder: Path, choice: random.Random) -> None:
        self.folder = folder
        self.choice = choice
        self.path = folder / "image"
        self.raw = False  # the disk is as long as what it lies on
        self.undo = contextlib.ExitStack()

    def __enter__(self) -> "Storage":
        return self

    def __exit__(self, *_error: object) -> None:
        self.undo.close()

    def place(self, made: Path, room: int) -> None:
        """Bring an image that was made as a regular file to where it is used; `room` bytes are what it may need."""
        os.rename(made, self.path)

    def confine(self, pid: int) -> None:
        """Put limits on a process that has just started."""

    def grow(self) -> None:
        """Give more room."""

    def repair(self) -> None:
        """Forget what was broken; a new process starts."""

    def readable(self) -> Path:
        """Return where others read the image."""
        return self.path

    def odd(self, least: int, most: int) -> int:
        """Return a number of bytes that is a multiple of a sector and of nothing else."""
        pages = -(-self.choice.randrange(least, max(least + 1, most)) // PAGE)
        return pages * PAGE + SECTOR * self.choice.choice((1, 3, 5, 7))


class LoopDevice(Storage):
    """A block device that has all the room in the world, and an odd size.

    Where the device cannot write zeroes itself, fallocate(2) first forgets what the page cache has and then fails: a
    discarded sector shows what the device had before the last writes.
    """

    forgets = True

    def __init__(self, folder: Path, choice: random.Random) -> None:
        super().__init__(folder, choice)
        self.file = folder / "device"

    def size(self, made: int, room: int) -> int:
        """Return the bytes of the device, for an image of `made` bytes that may come to need `room`."""
        return self.odd(made, made + MIB) if self.raw else self.odd(AMPLE, 2 * AMPLE)

    def place(self, made: Path, room: int) -> None:
        """See Storage; what the device held before is garbage."""
        os.rename(made, self.file)
        used = self.file.stat().st_size
        with self.file.open("ab") as file:
            file.write(GARBAGE * self.choice.choice((0, 512, MIB, 3 * MIB)))
        self.resize(self.size(used, room))
        self.path = Path(run("losetup", "-f", "--show", self.file))
        self.undo.callback(run, "losetup", "-d", self.path)

    def resize(self, size: int) -> None:
        """Set the length of the file below the device; what it held before is garbage as well."""
        os.truncate(self.file, size)


class FullDevice(LoopDevice):
    """A block device that ends before the image does."""

    limited = True

    def size(self, made: int, room: int) -> int:
        """See LoopDevice."""
        return self.odd(made, made + (room - made) // self.choice.choice((2, 4, 16)))


class GrowingDevice(FullDevice):
    """A block device that ends too early, and is extended while it is in use."""

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
    """A file on a file system with next to no room, which may get some."""

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
    """A file that may not become longer than what a limit says: EFBIG."""

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
    """A file whose fsync fails once when it is told to; what was written since the last one is lost in part."""

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
        """Make what was written durable, or lose some of it; return whether it was lost."""
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
    """A file on storage that fails: FUSE.  `grow` lets the next fsync fail, and no other, as the kernel has it."""

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
        """From now on nothing fails, and what there is stays."""
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
