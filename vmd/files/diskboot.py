"""Asks imgboot to read a kernel or initrd from a file system of a disk, whose images are open and locked.

The file is copied to a memory file, which is then sealed against changes.
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
    """A BIOS finds no boot code on any disk of a VM; the sentence says what each disk has."""

    def __init__(self, disks: list[str]) -> None:
        super().__init__(errno.ENOEXEC, f"nothing to boot from: no boot sector on {'; '.join(disks)}")


class FromDisks:
    """The kernel and initrd that were read from disks.  Owns their descriptors."""

    def __init__(self) -> None:
        self.kernel: list[int] = []
        self.initrd: list[int] = []
        self.kernel_name = ""  # text of a DiskFile, with the partition in which it was found
        self.options = ""  # options of boot(8), without the hyphen

    def read(
        self,
        sock: "socket.socket",
        name: str,
        file: "DiskFile",
        disk: "OpenDisk",
        memory: int,
        go_on: "Callable[[], None]",
    ) -> None:
        """Copy a file of a disk to `memory`, and take that descriptor.  Raises OperatorError.

        `go_on` is called now and then while this waits.
        """
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
        """Close the descriptors."""
        close_all((*self.kernel, *self.initrd))


def look(sock: "socket.socket", index: int, disk: "OpenDisk", go_on: "Callable[[], None]") -> str:
    """Return a sentence about a disk without boot code: what it has, and what can be booted.  Raises OperatorError."""
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
    """Return the answer of imgboot.  Raises OperatorError, whose sentence begins with `what`."""
    copies: list[int] = []
    failed = f"{what}: cannot be read"
    try:
        for link in disk.links:
            # Opened again: for reading only, and without our locks and O_EXCL.
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
