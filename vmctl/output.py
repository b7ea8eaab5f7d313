"""What vmctl writes: sentences to standard error, results to standard output.

Written without buffering, so that no text waits for an exit that a signal may prevent, and a reader that
has gone is noticed at once.  Everything but a console's bytes is cleaned of control characters: names and
sentences come from the daemon, and through it from others.
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
    """Return `text` with everything visible that a terminal would not simply show."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def write_all(fd: int, data: bytes) -> None:
    """Write everything; waits for a descriptor that somebody made non-blocking.  Raises OSError."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            poll.poll()


def warn(text: str) -> None:
    """Say one sentence, as warnx(3) does."""
    notice(f"vmctl: {clean(text)}\n")


def notice(text: str) -> None:
    """Write to standard error as it is; one that is closed or full does not stop a command."""
    try:
        write_all(STDERR, text.encode("utf-8", "backslashreplace"))
    except OSError:
        return


def put(data: bytes, fd: int = STDOUT) -> None:
    """Write to standard output, or to standard error what must arrive.  Raises CommandError."""
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
    import json  # reads `re`, half of our start-up time; few runs need it

    document = {"schema": SCHEMA_VERSION, **document}
    put((json.dumps(document, indent=2) + "\n").encode(), fd)
