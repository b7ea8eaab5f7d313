"""Asks imgresize to enlarge a disk, whose images are open and locked."""

import errno

from vmd.errors import OperatorError
from vmd.files.asking import LONGEST_S, ask_patiently
from vmd.ipc.probemsg import unpack

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from vmd.files.images import OpenDisk



def resize(sock: "socket.socket", disk: "OpenDisk", size: int, go_on: "Callable[[], None]") -> None:
    """Enlarge a disk to `size` bytes.  `go_on` is called now and then while this waits.  Raises OperatorError."""
    name = f"disk {disk.links[0].path}"
    arguments = [str(size)]
    for link in disk.links:
        arguments += [link.path, link.format, "1" if link.guessed else "0"]
    answer = ask_patiently(
        sock, arguments, [link.fd for link in disk.links], unpack, go_on, longest_s=LONGEST_S, leaf="imgresize",
        failed=f"{name}: cannot be resized", late=f"{name}: its storage does not answer",
    )  # fmt: skip
    if isinstance(answer, str):
        raise OperatorError(errno.EINVAL, f"{name}: {answer}")
