"""The files of a console log, read with the rights of the user while vmd may rotate them."""

import errno
import os
import select

from vmctl.errors import CommandError
from vmd.errors import sentence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

PIECE_BYTES = 1 << 16
LOOK_S = 0.2


class KeptLog:
    """A log: `path`, and the older files `path`.1 to `path`.`keep`.  `show` gets their content, the oldest first."""

    def __init__(self, path: str, keep: int, show: "Callable[[bytes], None]") -> None:
        self.paths = [path, *(f"{path}.{number}" for number in range(1, keep + 1))]
        self.show = show
        self.file = -1  # the newest file that was shown
        self.at = (0, 0)  # its device and inode

    def show_all(self, *, wait: bool = False) -> None:
        """Show the present content.  Without `wait` there must be a file.  Raises CommandError."""
        self._go_through(self._newer(None))
        if self.file < 0 and not wait:
            raise CommandError(f"console log {self.paths[0]}: {os.strerror(errno.ENOENT)}", errno.ENOENT)

    def follow(self) -> None:
        """Show new content; does not return.  Raises CommandError."""
        while True:
            self.follow_once()
            select.select([], [], [], LOOK_S)

    def follow_once(self) -> None:
        """Show the content that is new since the last call.  Raises CommandError."""
        newer = self._newer(self.at)
        # While the next file is empty, its writer may still append to the present one.
        if newer and (len(newer) > 1 or self._size(newer[0])):
            self._show_rest()
            self._go_through(newer)
            return
        for fd in newer:
            os.close(fd)
        self._show_rest()

    def close(self) -> None:
        """Close the last file."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def _go_through(self, files: list[int]) -> None:
        """Show these files, the oldest first.  The last one becomes the present file."""
        for fd in files:
            self.close()
            self.file, self.at = fd, which(fd)
            self._show_rest()

    def _newer(self, known: tuple[int, int] | None) -> list[int]:
        """Return open files that are newer than the present file `known`, the oldest first.  Raises CommandError.

        The newest is opened first.  So a rotation in between hides no file, and a file that is met twice is recognised.
        """
        found: dict[tuple[int, int], int] = {}
        for path in self.paths:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise CommandError(f"console log {path}: {sentence(error)}", error.errno) from None
            this = which(fd)
            if this == known or this in found:
                os.close(fd)
                if this == known:
                    break
            else:
                found[this] = fd
        else:
            if known is not None and self.file >= 0:
                # The present file was removed, also by rotation: newer files were modified after it.
                changed_ns = os.fstat(self.file).st_mtime_ns
                for this, fd in list(found.items()):
                    if os.fstat(fd).st_mtime_ns <= changed_ns:
                        os.close(found.pop(this))
        return list(found.values())[::-1]

    def _size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def _show_rest(self) -> None:
        """Show new content of the present file, or all of it if the file was truncated.  Raises CommandError."""
        if self.file < 0:
            return
        try:
            if self._size(self.file) < os.lseek(self.file, 0, os.SEEK_CUR):
                os.lseek(self.file, 0, os.SEEK_SET)
            while data := os.read(self.file, PIECE_BYTES):
                self.show(data)
        except OSError as error:
            raise CommandError(f"console log {self.paths[0]}: {sentence(error)}", error.errno) from None


def which(fd: int) -> tuple[int, int]:
    """Return the device and inode of a file, which do not depend on its name."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino
