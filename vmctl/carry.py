"""The protocol between the two ends of `vmctl migrate`: each line is a JSON object.

    target      {"vmctl": "receive", "at": "asked", "locks_travel": true}
                {"vmctl": "receive", "at": "complete"}
    source      {"vmctl": "migrate", "at": "commit", "paused": false}    after the last byte of the stream
    target      {"vmctl": "receive", "at": "running", "id": 3, "tty": "/dev/pts/7"}

At any step the target can fail instead.  Its last line is then {"vmctl": "receive", "at": "failed", "text": ...,
"in_doubt": false}.  With `in_doubt` the target does not know whether the VM runs there, or has run there.  All other
lines are skipped, because the remote shell may print a greeting.
"""

import json
import os
import select

from vmctl.errors import CommandError
from vmctl.output import write_all
from vmd.errors import sentence

LINE_MAX = 8192
LINES_MAX = 1000  # lines that may be skipped
SOURCE, TARGET = "migrate", "receive"
ASKED, COMPLETE, COMMIT, RUNNING, FAILED = "asked", "complete", "commit", "running", "failed"

Words = dict[str, object]


def say(fd: int, who: str, at: str, **more: object) -> None:
    """Write a line.  Raises OSError."""
    write_all(fd, (json.dumps({"vmctl": who, "at": at, **more}) + "\n").encode())


class Ear:
    """Reads the lines of the other side from a descriptor."""

    def __init__(self, fd: int, who: str) -> None:
        self.fd = fd
        self.who = who
        self._read = b""
        self._passed_over = 0

    def hear(self, *wanted: str) -> Words | None:
        """Return the next line, which must be one of those wanted; None at the end.  Raises CommandError."""
        while True:
            words = self._next_line()
            if words is None or words.get("at") in wanted:
                return words
            raise CommandError(f"the other side says {words.get('at')!r}, where {' or '.join(wanted)} was expected")

    def poll(self, timeout_ms: int) -> bool:
        """Wait for a line or the end; return False after `timeout_ms`."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return bool(self._read.count(b"\n") or poll.poll(timeout_ms))

    def _next_line(self) -> Words | None:
        while True:
            line, newline, rest = self._read.partition(b"\n")
            if newline:
                self._read = rest
                words = words_of(line, self.who)
                if words is not None:
                    return words
                self._passed_over += 1
            elif len(line) > LINE_MAX:
                self._read = b""
                self._passed_over += 1
            if self._passed_over > LINES_MAX:
                raise CommandError("the other side does not answer as vmctl")
            if not newline:
                try:
                    piece = os.read(self.fd, LINE_MAX)
                except OSError as error:
                    raise CommandError(f"the other side: {sentence(error)}", error.errno) from None
                if not piece:
                    return None
                self._read += piece


def words_of(line: bytes, who: str) -> Words | None:
    """Return the object of a line; None if the line is not part of the protocol."""
    try:
        words = json.loads(line)
    except ValueError:
        return None
    return words if isinstance(words, dict) and words.get("vmctl") == who else None
