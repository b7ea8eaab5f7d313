"""Asks a leaf to do something with open files.  Turns every failure into a sentence."""

import errno

from vmd.errors import OperatorError
from vmd.ipc.probing import send_question, wait_patiently

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence
    from typing import TypeVar

    T = TypeVar("T")

LONGEST_S = 240.0  # for leaves that read and write images: storage may be slow


def ask_patiently(
    sock: "socket.socket",
    arguments: "Sequence[str]",
    files: "Sequence[int]",
    unpack: "Callable[[bytes], T]",
    go_on: "Callable[[], None]",
    *,
    longest_s: float,
    leaf: str,
    failed: str,
    late: str,
) -> "T":
    """Send a question to a leaf and return its answer.  `go_on` is called now and then while this waits.

    `unpack` parses the line of the answer.  It raises OSError, or ValueError if the line is malformed.  `failed` is the
    beginning of a sentence, as in "disk d: cannot be read"; `late` is a whole sentence.  Raises OperatorError.
    """
    line = b""
    try:
        send_question(sock, arguments, files)
        line = wait_patiently(sock, longest_s, go_on)
        return unpack(line)
    except TimeoutError:
        raise OperatorError(errno.ETIMEDOUT, late) from None
    except (BrokenPipeError, ConnectionResetError):
        raise OperatorError(errno.EIO, f"{failed}: {leaf} has ended") from None
    except OSError as error:
        raise OperatorError(error.errno or errno.EIO, f"{failed}: {error.strerror}") from None
    except ValueError as error:
        why = f"{leaf} answered nonsense: {error}" if line else f"{leaf} has ended"
        raise OperatorError(errno.EIO, f"{failed}: {why}") from None
