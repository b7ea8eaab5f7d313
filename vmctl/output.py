"""Output of vmctl: sentences to standard error, results to standard output.

Output is not buffered.  So no text is lost if a signal ends vmctl, and the end of a reader is noticed at once.
Control characters are removed from everything except the bytes of a console: names and sentences come from the daemon,
and may have been chosen by other users.
"""

import os
import select

from vmctl.errors import CommandError
from vmd.errors import sentence
from vmd.stdio import STDERR, STDOUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

SHOWN_DATE = "%Y-%m-%d %H:%M:%S"
SCHEMA_VERSION = 1  # of docs/vmctl.schema.json


def clean(text: str) -> str:
    """Return `text` with unprintable characters as escapes."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def write_all(fd: int, data: bytes) -> None:
    """Write everything; waits if the descriptor is non-blocking.  Raises OSError."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            poll.poll()


def warn(text: str) -> None:
    """Print a sentence to standard error, as warnx(3) does."""
    notice(f"vmctl: {clean(text)}\n")


def notice(text: str) -> None:
    """Write text to standard error, unchanged.  Errors of writing are ignored."""
    try:
        write_all(STDERR, text.encode("utf-8", "backslashreplace"))
    except OSError:
        return


def put(data: bytes, fd: int = STDOUT) -> None:
    """Write to standard output, or to standard error if the text must arrive.  Raises CommandError."""
    try:
        write_all(fd, data)
    except OSError as error:
        name = "output" if fd == STDOUT else "error"
        raise CommandError(f"standard {name}: {sentence(error)}", error.errno) from None


def put_lines(lines: "list[str]") -> None:
    """Write lines of text to standard output.  Raises CommandError."""
    put("".join(f"{clean(line)}\n" for line in lines).encode("utf-8", "backslashreplace"))


def put_json_line(document: "Mapping[str, object]") -> None:
    """Write one of many JSON documents, on a line of its own.  Raises CommandError."""
    import json  # as below

    put((json.dumps({"schema": SCHEMA_VERSION, **document}) + "\n").encode())


def put_json(document: "Mapping[str, object]", fd: int = STDOUT) -> None:
    """Write the one JSON document of a command.  Raises CommandError."""
    import json  # imports `re`, which takes half of our start-up time, and few runs need it

    document = {"schema": SCHEMA_VERSION, **document}
    put((json.dumps(document, indent=2) + "\n").encode(), fd)
