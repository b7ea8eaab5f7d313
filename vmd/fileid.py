"""What tells whether two open files are the same."""

import stat

from vmd.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os


class FileId(Record):
    """Where a file is; of a block device also which one it is, for it may be found in several places."""

    device: int  # st_dev
    inode: int  # st_ino
    block_device: int = 0  # st_rdev

    @property
    def key(self) -> tuple[int, int]:
        """What is the same for the same file, or the same device."""
        return (-1, self.block_device) if self.block_device else (self.device, self.inode)


def file_id(status: "os.stat_result") -> FileId:
    """Return what tells a file from others, by what stat(2) says of it."""
    block_device = status.st_rdev if stat.S_ISBLK(status.st_mode) else 0
    return FileId(device=status.st_dev, inode=status.st_ino, block_device=block_device)
