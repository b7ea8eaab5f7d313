"""Has imgresize make a disk larger, whose images are open and locked."""

import errno

from vmd.errors import OperatorError
from vmd.ipc.probemsg import unpack
from vmd.ipc.probing import send_question, wait_patiently

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from vmd.files.images import OpenDisk

LONGEST_S = 240.0  # storage may be slow


def resize(sock: "socket.socket", disk: "OpenDisk", size: int, go_on: "Callable[[], None]") -> None:
    """Have a disk become larger; `go_on` is called now and then.  Raises OperatorError."""
    name = f"disk {disk.links[0].path}"
    arguments = [str(size)]
    for link in disk.links:
        arguments += [link.path, link.format, "1" if link.guessed else "0"]
    line = b""
    try:
        send_question(sock, arguments, [link.fd for link in disk.links])
        line = wait_patiently(sock, LONGEST_S, go_on)
        answer = unpack(line)
    except TimeoutError:
        raise OperatorError(errno.ETIMEDOUT, f"{name}: its storage does not answer") from None
    except OSError as error:
        raise OperatorError(error.errno or errno.EIO, f"{name}: cannot be resized: {error.strerror}") from None
    except ValueError as error:
        why = f"imgresize answered nonsense: {error}" if line else "imgresize has ended"
        raise OperatorError(errno.EIO, f"{name}: cannot be resized: {why}") from None
    if isinstance(answer, str):
        raise OperatorError(errno.EINVAL, f"{name}: {answer}")
