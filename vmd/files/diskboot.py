"""Has imgboot read a kernel or initrd out of the file systems of a disk, whose images are open and locked.

Each is a memory file, which nobody can change any more once this has it.
"""

import errno
import os

from vmd.closing import close_all
from vmd.config.model import DiskFile
from vmd.errors import OperatorError
from vmd.files.asking import LONGEST_S, ask_patiently
from vmd.ipc.bootmsg import BootFile, BootLink, question, unpack_file
from vmd.memfile import CONSTANT, seal

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from vmd.files.images import OpenDisk



class NothingToStart(OperatorError):
    """On no disk of a VM a BIOS finds something to start; says what is known of each."""

    def __init__(self, disks: list[str]) -> None:
        super().__init__(errno.ENOEXEC, f"nothing to boot from: no boot sector on {'; '.join(disks)}")


class FromDisks:
    """What was read so far; whoever has this owns the descriptors."""

    def __init__(self) -> None:
        self.kernel: list[int] = []
        self.initrd: list[int] = []
        self.kernel_name = ""  # as DiskFile in words, with the partition where it was found
        self.options = ""  # of boot(8), without the hyphen

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
        what = f"{str(file).removesuffix(':')}: disk {top}"
        found = ask(sock, file, disk, what, [memory], go_on)
        try:
            seal(memory, CONSTANT)
        except OSError as error:
            raise OperatorError(error.errno or errno.EIO, f"{what}: cannot be kept: {error.strerror}") from None
        if not isinstance(found, str) and found.size != os.fstat(memory).st_size:
            found = f"imgboot answered nonsense: {found.size} bytes of {os.fstat(memory).st_size}"
        if isinstance(found, str):
            raise OperatorError(errno.EINVAL, f"{what}: {found}")
        if name == "kernel":
            self.kernel_name, self.options = found.name, found.options

    def close(self) -> None:
        """Let go of what was read."""
        close_all((*self.kernel, *self.initrd))


def look(sock: "socket.socket", index: int, disk: "OpenDisk", go_on: "Callable[[], None]") -> str:
    """Return what there is on a disk that no BIOS starts from, and what may be done.  Raises OperatorError."""
    name = f"disk {disk.links[0].path}"
    found = ask(sock, DiskFile(disk=index), disk, name, [], go_on)
    return f"{name}: {found if isinstance(found, str) else found.name}"


def ask(
    sock: "socket.socket",
    file: DiskFile,
    disk: "OpenDisk",
    what: str,
    memory: list[int],
    go_on: "Callable[[], None]",
) -> BootFile | str:
    """Return what imgboot answers.  Raises OperatorError, whose sentence begins with `what`."""
    copies: list[int] = []
    failed = f"{what}: cannot be read"
    try:
        for link in disk.links:
            # For reading only, and without our lock and claim.
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            copies.append(os.open(f"/proc/self/fd/{link.fd}", flags))
        links = [BootLink(path=one.path, format=one.format, guessed=one.guessed) for one in disk.links]
        return ask_patiently(
            sock, question(file, links), [*copies, *memory], unpack_file, go_on, longest_s=LONGEST_S, leaf="imgboot",
            failed=failed, late=f"{what}: its storage does not answer",
        )  # fmt: skip
    except OSError as error:
        raise OperatorError(error.errno or errno.EIO, f"{failed}: {error.strerror}") from None
    finally:
        close_all(copies)
