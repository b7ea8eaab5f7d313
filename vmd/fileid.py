"""The identity of a file, to compare open files."""

import _stat as stat

from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os


class FileId(Record):
    """The identity of a file.  Of a block device it has the device number too, since several files may lead to it."""

    device: int  # st_dev
    inode: int  # st_ino
    block_device: int = 0  # st_rdev

    @property
    def key(self) -> tuple[int, int]:
        """A key that is equal for the same file or the same block device."""
        return (-1, self.block_device) if self.block_device else (self.device, self.inode)


def file_id(status: "os.stat_result") -> FileId:
    """Return the identity of a file from the result of stat(2)."""
    block_device = status.st_rdev if stat.S_ISBLK(status.st_mode) else 0
    return FileId(device=status.st_dev, inode=status.st_ino, block_device=block_device)
