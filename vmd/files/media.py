"""The disks and the disc of a VM, from their opening to their being handed over."""

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

NAME_MAX_BYTES = 240  # of a path, in what other processes log; sixteen images fit one message
RETRY_S = 0.02


class Media:
    """Open files; `close` closes what nobody took."""

    def __init__(self) -> None:
        self.disks: list[OpenDisk] = []
        self.cdrom: int | None = None
        self.cdrom_path = ""
        self.notes: list[str] = []  # sentences that the operator should read
        self.in_use: tuple[OpenedFile, ...] = ()  # disks that somebody else has, where that may be

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
        """Open and lock everything; all or nothing.  `at` is told what is next.

        With `boots` it is seen whether a BIOS finds something to start on the disks.

        With `others_have` disks are passed over that somebody else writes to: they are `in_use`.

        `patience_s` is for a VM that has just been killed, or is about to let go: its device processes hold the locks
        until the kernel has ended them.

        Raises:
            OperatorError: a file cannot be had, or is in use.
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
        """Return the paths of disks that nobody else has, but for devices: their locks are those of this host."""
        tops = (disk.links[0] for disk in self.disks if not disk.read_only)
        return tuple(shortened(top.path) for top in tops if not stat.S_ISBLK(os.fstat(top.fd).st_mode))

    def files(self) -> tuple[OpenedFile, ...]:
        """Return which file each image and the disc is; before they are taken."""
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
        """Return what a VM process is told of its disks."""
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
        """Return the images of all disks, one disk after the other; they are the caller's from now on."""
        return [fd for disk in self.disks for fd in disk.take_fds()]

    def take_cdrom(self) -> list[int]:
        """Return the disc, if there is one; it is the caller's from now on."""
        cdrom, self.cdrom = self.cdrom, None
        return [cdrom] if cdrom is not None else []

    def close(self) -> None:
        """Close what nobody took."""
        close_all((*self.take_disks(), *self.take_cdrom()))


def shortened(path: str) -> str:
    """Return a path, or the end of a long one, which tells most."""
    raw = os.fsencode(path)
    return path if len(raw) <= NAME_MAX_BYTES else "..." + raw[3 - NAME_MAX_BYTES :].decode("utf-8", "replace")
