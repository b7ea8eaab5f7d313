"""The open disks and the open disc of a VM, until their descriptors are handed over."""

import errno
import os
import stat
import time

from vmd.closing import close_all
from vmd.errors import InUse, OperatorError
from vmd.fileid import file_id
from vmd.files.images import OpenDisk, Use, discard_granularity, open_cdrom, open_disk
from vmd.images.locks import USES, WRITE
from vmd.ipc.messages.opener import OpenedFile
from vmd.ipc.messages.shared import DiskImages, ImageLink

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmd.config.model import DiskConfig
    from vmd.files.prober import Prober

NAME_MAX_BYTES = 240  # of a path for the logs of other processes; sixteen images fit into one message
RETRY_S = 0.02


class Media:
    """Open files.  `close` closes those that were not taken."""

    def __init__(self) -> None:
        self.disks: list[OpenDisk] = []
        self.cdrom: int | None = None
        self.cdrom_path = ""
        self.notes: list[str] = []  # sentences for the operator
        self.in_use: tuple[OpenedFile, ...] = ()  # disks that another process writes to (`others_have`)

    @classmethod
    def open(
        cls,
        disks: "Sequence[DiskConfig]",
        cdrom: str,
        prober: "Prober",
        *,
        in_conf: bool = True,
        patience_s: float = 0,
        at: "Callable[[str], None]" = lambda _what: None,
        others_have: bool = False,
        mends: bool = False,
        boots: bool = False,
    ) -> "Media":
        """Open and lock all files, or none.  `at` is called with the name of what is opened next.

        `boots`: find out whether the disks have boot code for a BIOS.

        `others_have`: a disk that another process writes to is not an error.  It is left out, and is in `in_use`.

        `patience_s`: how long to try again while a file is in use.  A VM that was just killed, or that is giving up its
        disks, holds the locks until the kernel has ended its device processes.

        Raises:
            OperatorError: a file cannot be opened, or is in use.
        """
        deadline_s = time.monotonic() + patience_s
        use = Use(in_conf=in_conf, mends=mends, boots=boots)
        while True:
            media = cls()
            try:
                for disk in disks:
                    try:
                        media.disks.append(open_disk(disk, prober, use, at))
                    except InUse as error:
                        if not others_have or error.name != f"disk {disk.path}" or USES + WRITE not in error.marks:
                            raise
                        media.in_use += (OpenedFile(what=shortened(error.name), file=error.file),)
                    else:
                        media.notes += media.disks[-1].notes
                media.cdrom_path = cdrom
                if cdrom:
                    at(f"cdrom {cdrom}")
                    media.cdrom, notes = open_cdrom(cdrom, prober)
                    media.notes += notes
            except OperatorError as error:
                media.close()
                if error.number != errno.EBUSY or time.monotonic() > deadline_s:
                    raise
                time.sleep(RETRY_S)
            except BaseException:
                media.close()
                raise
            else:
                return media

    def unused(self) -> tuple[str, ...]:
        """Return the paths of disks that are certainly not in use elsewhere: not devices, whose locks are local."""
        tops = (disk.links[0] for disk in self.disks if not disk.read_only)
        return tuple(shortened(top.path) for top in tops if not stat.S_ISBLK(os.fstat(top.fd).st_mode))

    def files(self) -> tuple[OpenedFile, ...]:
        """Return the identity of each image and of the disc.  Must be called before they are taken."""
        found = []
        for disk in self.disks:
            for link in disk.links:
                top = disk.links[0].path
                what = f"disk {top}" if link.path == top else f"disk {top}: backing file {link.path}"
                found.append(OpenedFile(what=shortened(what), file=file_id(os.fstat(link.fd))))
        if self.cdrom is not None:
            found.append(OpenedFile(what=shortened(f"cdrom {self.cdrom_path}"), file=file_id(os.fstat(self.cdrom))))
        return tuple(found)

    def describe(self) -> tuple[DiskImages, ...]:
        """Return the description of the disks for the VM process."""
        return tuple(
            DiskImages(
                images=tuple(
                    ImageLink(
                        path=shortened(link.path),
                        format=link.format,
                        guessed=link.guessed,
                        discard_granularity=discard_granularity(link.fd),
                    )
                    for link in disk.links
                ),
                read_only=disk.read_only,
            )
            for disk in self.disks
        )

    def take_disks(self) -> list[int]:
        """Return the images of all disks, disk by disk.  The caller owns the descriptors."""
        return [fd for disk in self.disks for fd in disk.take_fds()]

    def take_cdrom(self) -> list[int]:
        """Return the disc if there is one, else [].  The caller owns the descriptor."""
        cdrom, self.cdrom = self.cdrom, None
        return [cdrom] if cdrom is not None else []

    def close(self) -> None:
        """Close the descriptors that were not taken."""
        close_all((*self.take_disks(), *self.take_cdrom()))


def shortened(path: str) -> str:
    """Return a path, or the last part of a long one."""
    raw = os.fsencode(path)
    return path if len(raw) <= NAME_MAX_BYTES else "..." + raw[3 - NAME_MAX_BYTES :].decode("utf-8", "replace")
