"""The checksum of a file, computed while the file is copied."""

import hashlib
import os

from vmctl.errors import ArgumentError, CommandError

DIGITS = {"sha256": 64, "sha512": 128}  # of a checksum
HEXADECIMAL = frozenset("0123456789abcdef")
STEP_BYTES = 1 << 20


class Checksum:
    """The expected checksum of an open file."""

    def __init__(self, word: str) -> None:
        """Take `sha256:...` or `sha512:...`, in hexadecimal digits.  Raises ArgumentError."""
        self.kind, _, digits = word.partition(":")
        self.wanted = digits.lower()
        if self.kind not in DIGITS:
            likely = next((kind for kind, count in DIGITS.items() if len(word) == count), "")
            hint = f"; if it is a {likely}, write {likely}: in front" if likely else ""
            raise ArgumentError(f"invalid checksum: {word} begins with neither sha256: nor sha512:{hint}")
        if not HEXADECIMAL.issuperset(self.wanted):
            raise ArgumentError(f"invalid checksum: {digits} is not a hexadecimal number")
        if len(digits) != DIGITS[self.kind]:
            raise ArgumentError(
                f"invalid checksum: a {self.kind} has {DIGITS[self.kind]} digits, and {digits} has {len(digits)}"
            )
        self.digest = hashlib.new(self.kind, usedforsecurity=False)
        self.at = 0

    def begin(self, fd: int) -> None:
        """Take the file, which the caller keeps open."""
        self.fd = fd
        self.size = os.lseek(fd, 0, os.SEEK_END)
        self.before_ns = os.fstat(fd).st_ctime_ns  # unlike the mtime, it cannot be set

    def follow(self, done: int, whole: int) -> None:
        """Read the same fraction of the file as was copied, `done` of `whole`.  Raises OSError."""
        end = self.size * done // max(whole, 1)
        while self.at < end:
            data = os.pread(self.fd, min(STEP_BYTES, end - self.at), self.at)
            if not data:
                break  # the file has become shorter; `verify` detects it
            self.digest.update(data)
            self.at += len(data)

    def verify(self, path: str) -> None:
        """Read the rest, and compare; `path` is for messages.  Raises CommandError, OSError."""
        self.follow(1, 1)
        if os.fstat(self.fd).st_ctime_ns != self.before_ns or os.lseek(self.fd, 0, os.SEEK_END) != self.size:
            raise CommandError(f"{path} was changed while it was read")
        found = self.digest.hexdigest()
        if found != self.wanted:
            raise CommandError(
                f"{path} is damaged, or is another file: its {self.kind} is {found}, not {self.wanted}"
            )
