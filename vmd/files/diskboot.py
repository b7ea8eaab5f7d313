"""Has imgboot read a kernel or initrd out of the file systems of a disk, whose images are open and locked.

Each is a memory file, which nobody can change any more once this has it.
"""

import errno
import os

from vmd.closing import close_all
from vmd.errors import OperatorError
from vmd.ipc.bootmsg import Link, question, unpack_file
from vmd.ipc.probing import send_question, wait_patiently
from vmd.memfile import CONSTANT, seal

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from vmd.config.model import DiskFile
    from vmd.files.images import OpenDisk

LONGEST_S = 240.0  # storage may be slow


class FromDisks:
    """What was read so far; whoever has this owns the descriptors."""

    def __init__(self) -> None:
        self.kernel: list[int] = []
        self.initrd: list[int] = []
        self.notes: list[str] = []  # sentences that the operator should read
        self.kernel_name = ""  # as DiskFile in words, with the partition where it was found

    def read(
        self,
        sock: "socket.socket",
        name: str,
        file: "DiskFile",
        disk: "OpenDisk",
        memory: int,
        go_on: "Callable[[], None]",
    ) -> None:
        """Have a file copied to `memory`, which is ours; `go_on` is called now and then.  Raises OperatorError."""
        (self.kernel if name == "kernel" else self.initrd).append(memory)
        top = disk.links[0].path
        what = f"{file}: disk {top}"
        copies: list[int] = []
        line = b""
        try:
            for link in disk.links:
                # For reading only, and without our lock and claim.
                flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                copies.append(os.open(f"/proc/self/fd/{link.fd}", flags))
            asked = question(file, [Link(path=one.path, format=one.format, guessed=one.guessed) for one in disk.links])
            send_question(sock, asked, [*copies, memory])
            line = wait_patiently(sock, LONGEST_S, go_on)
            found = unpack_file(line)
            seal(memory, CONSTANT)
        except TimeoutError:
            raise OperatorError(errno.ETIMEDOUT, f"{what}: its storage does not answer") from None
        except OSError as error:
            raise OperatorError(error.errno or errno.EIO, f"{what}: cannot be read: {error.strerror}") from None
        except ValueError as error:
            why = f"imgboot answered nonsense: {error}" if line else "imgboot has ended"
            raise OperatorError(errno.EIO, f"{what}: cannot be read: {why}") from None
        finally:
            close_all(copies)
        if not isinstance(found, str) and found.size != os.fstat(memory).st_size:
            found = f"imgboot answered nonsense: {found.size} bytes of {os.fstat(memory).st_size}"
        if isinstance(found, str):
            raise OperatorError(errno.EINVAL, f"{what}: {found}")
        if name == "kernel":
            self.kernel_name = found.name
        if found.note:
            self.notes.append(f"{what}: {found.note}")

    def close(self) -> None:
        """Let go of what was read."""
        close_all((*self.kernel, *self.initrd))
