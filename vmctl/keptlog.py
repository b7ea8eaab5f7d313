"""The files of a console log, read with the rights of whoever runs vmctl, while vmd puts full ones aside."""

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
    """A log: `path`, and before that `path`.1 up to `path`.`keep`.  `show` gets what is in there, in order."""

    def __init__(self, path: str, keep: int, show: "Callable[[bytes], None]") -> None:
        self.paths = [path, *(f"{path}.{number}" for number in range(1, keep + 1))]
        self.show = show
        self.file = -1  # the newest one that was shown
        self.at = (0, 0)  # which that is

    def show_all(self, *, wait: bool = False) -> None:
        """Show what there is; with `wait` there may be nothing yet.  Raises CommandError."""
        self._go_through(self._newer(None))
        if self.file < 0 and not wait:
            raise CommandError(f"console log {self.paths[0]}: {os.strerror(errno.ENOENT)}", errno.ENOENT)

    def follow(self) -> None:
        """Show what comes, for ever.  Raises CommandError."""
        while True:
            self.follow_once()
            select.select([], [], [], LOOK_S)

    def follow_once(self) -> None:
        """Show what there is by now.  Raises CommandError."""
        newer = self._newer(self.at)
        # As long as the next file is empty, its writer may not have seen that there is one.
        if newer and (len(newer) > 1 or self._size(newer[0])):
            self._show_rest()
            self._go_through(newer)
            return
        for fd in newer:
            os.close(fd)
        self._show_rest()

    def close(self) -> None:
        """Let the last file go."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def _go_through(self, files: list[int]) -> None:
        """Show these files, oldest first, and stay at the last one."""
        for fd in files:
            self.close()
            self.file, self.at = fd, which(fd)
            self._show_rest()

    def _newer(self, known: tuple[int, int] | None) -> list[int]:
        """Return the files that are newer than the present one, which is `known`, open, the oldest first.

        Raises CommandError.

        They are opened the newest first: so none is missed while they get other names, and one met twice is known.
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
                # It was removed, or put aside so often that it is gone: what was written after it is newer.
                changed_ns = os.fstat(self.file).st_mtime_ns
                for this, fd in list(found.items()):
                    if os.fstat(fd).st_mtime_ns <= changed_ns:
                        os.close(found.pop(this))
        return list(found.values())[::-1]

    def _size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def _show_rest(self) -> None:
        """Show what has been added to the present file; from its beginning if it was cut.  Raises CommandError."""
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
    """Return which file it is, whatever it is called."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino
