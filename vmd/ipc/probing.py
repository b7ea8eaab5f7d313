"""Questions to a probe: over a socket at its fd 3, one question at a time, each with the files that it is about.

A question is a packet of arguments, each followed by a NUL.  Its files travel with it, open for reading.  The answer is
one line (`ipc/probemsg.py`).
"""

import time

from vmd.closing import close_all
from vmd.ipc import sockets as socket
from vmd.ipc.probemsg import ANSWER_MAX
from vmd.ipc.rights import receive, rights_of
from vmd.privsep.start import CHANNEL_FD
from vmd.readable import readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

QUESTION_MAX = 65536  # bytes; enough for a kernel's command line in hexadecimal
FILES_MAX = 5  # a chain of images, and the file to copy to
LOOK_S = 5.0  # time between two calls of `go_on` by `wait_patiently`


def serve(answer: "Callable[[list[str], list[int]], bytes]") -> int:
    """Run a probe: answer questions until the other end is closed.  Files are closed after each answer."""
    with socket.socket(fileno=CHANNEL_FD) as sock:
        try:
            while True:
                question, files, _ = receive(sock, QUESTION_MAX, FILES_MAX)
                if not question:
                    return 0
                try:
                    sock.send(answer(question.decode("utf-8", "surrogateescape").split("\0")[:-1], files))
                finally:
                    close_all(files)
        except (BrokenPipeError, ConnectionResetError):
            return 0


def ask(sock: socket.socket, arguments: "Sequence[str]", files: "Sequence[int]", timeout_s: float) -> bytes | None:
    """Ask a probe; return its line.  Returns b"" if the probe has ended, None after a time-out.  Raises OSError."""
    try:
        send_question(sock, arguments, files)
    except (BrokenPipeError, ConnectionResetError):
        return b""
    return wait_for_answer(sock, timeout_s)


def send_question(sock: socket.socket, arguments: "Sequence[str]", files: "Sequence[int]") -> None:
    """Send a question to a probe.  Raises OSError."""
    question = "".join(f"{each}\0" for each in arguments).encode("utf-8", "surrogateescape") or b"\0"
    sock.sendmsg([question], rights_of(files), socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)


def wait_for_answer(sock: socket.socket, timeout_s: float) -> bytes | None:
    """Wait for the answer to a question that was sent; return the same as `ask`.  Raises OSError."""
    try:
        if not readable(sock, timeout_s):
            return None
        return sock.recv(ANSWER_MAX + 1, socket.MSG_DONTWAIT)
    except (BrokenPipeError, ConnectionResetError):
        return b""


def wait_patiently(sock: socket.socket, longest_s: float, go_on: "Callable[[], None]") -> bytes:
    """Wait for a probe's line, and call `go_on` every LOOK_S meanwhile.  Returns b"" if the probe has ended.

    Raises:
        TimeoutError: the probe has not answered within `longest_s`.
        OSError: the socket fails.
    """
    deadline_s = time.monotonic() + longest_s
    while (left_s := deadline_s - time.monotonic()) > 0:
        if (line := wait_for_answer(sock, min(LOOK_S, left_s))) is not None:
            return line
        go_on()
    raise TimeoutError
