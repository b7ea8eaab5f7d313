"""Has imgresize make a disk larger, whose images are open and locked."""

import errno
import time

from vmd.errors import OperatorError
from vmd.ipc.probemsg import unpack
from vmd.ipc.probing import send_question, wait_for_answer

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from vmd.files.images import OpenDisk

LOOK_S = 5.0  # between two signs of life
LONGEST_S = 240.0  # storage may be slow


def resize(sock: "socket.socket", disk: "OpenDisk", size: int, go_on: "Callable[[], None]") -> None:
    """Have a disk become larger; `go_on` is called now and then.  Raises OperatorError."""
    name = f"disk {disk.links[0].path}"
    arguments = [str(size)]
    for link in disk.links:
        arguments += [link.path, link.format, "1" if link.guessed else "0"]
    deadline_s = time.monotonic() + LONGEST_S
    line: bytes | None = b""
    try:
        send_question(sock, arguments, [link.fd for link in disk.links])
        while (line := wait_for_answer(sock, LOOK_S)) is None:
            if time.monotonic() > deadline_s:
                raise OperatorError(errno.ETIMEDOUT, f"{name}: its storage does not answer")
            go_on()
        answer = unpack(line)
    except OSError as error:
        raise OperatorError(error.errno or errno.EIO, f"{name}: cannot be resized: {error.strerror}") from None
    except ValueError as error:
        why = f"imgresize answered nonsense: {error}" if line else "imgresize has ended"
        raise OperatorError(errno.EIO, f"{name}: cannot be resized: {why}") from None
    if isinstance(answer, str):
        raise OperatorError(errno.EINVAL, f"{name}: {answer}")
