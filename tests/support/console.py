"""Reads a guest's console with a deadline, and keeps everything that was read."""

import os
import select
import time


class Console:
    """The output side of a console.  `fd` may be a pipe, a pty master or a socket; its owner closes it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.said = b""
        self.seen = 0  # how much of `said` an earlier `expect` has used up
        self.ended = False

    def expect(self, wanted: str, timeout_s: float) -> str:
        """Wait for a text; return the output since the last call, up to and including the text.

        Raises:
            AssertionError: the console ended or the time is up.  The message has all output.
        """
        raw = wanted.encode()
        deadline = time.monotonic() + timeout_s
        while (found := self.said.find(raw, self.seen)) < 0:
            assert not self.ended, f"the console ended without {wanted!r}:\n{self.text()}"
            assert self._read(deadline), f"no {wanted!r} within {timeout_s} s:\n{self.text()}"
        begin, self.seen = self.seen, found + len(raw)
        return self.said[begin : self.seen].decode(errors="replace")

    def drain(self, timeout_s: float) -> None:
        """Read to the end.  Raises AssertionError if the end does not come in time."""
        deadline = time.monotonic() + timeout_s
        while not self.ended:
            assert self._read(deadline), f"the console did not end within {timeout_s} s:\n{self.text()}"

    def text(self) -> str:
        """Return all output so far."""
        return self.said.decode(errors="replace")

    def _read(self, deadline: float) -> bool:
        """Read what comes before the deadline; return whether anything came."""
        ready, _, _ = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))
        if not ready:
            return False
        try:
            data = os.read(self.fd, 65536)
        except OSError:
            data = b""  # EIO: the other side of a pty has closed
        self.said += data
        self.ended = not data
        return True
