"""The identity of files: two names of one disk are one disk."""

import os
import stat
from pathlib import Path

import pytest

from vmd.fileid import FileId, file_id


def test_links_lead_to_one_file(tmp_path: Path) -> None:
    """Other files differ from it, whatever is in them."""
    (tmp_path / "disk").touch()
    (tmp_path / "other").touch()
    (tmp_path / "hard").hardlink_to(tmp_path / "disk")
    (tmp_path / "soft").symlink_to("disk")
    keys = {name: file_id((tmp_path / name).stat()).key for name in ("disk", "hard", "soft", "other")}
    assert keys["disk"] == keys["hard"] == keys["soft"] != keys["other"]


def status(kind: int, inode: int, number: int) -> os.stat_result:
    """Return the status of a device node."""
    return os.stat_result((kind | 0o600, inode, 5, 1, 0, 0, 0, 0, 0, 0), {"st_rdev": number})


def test_nodes_of_a_block_device_are_one_file() -> None:
    """Each name of a volume is a node of its own.  A number of another kind of file means nothing."""
    volume = [file_id(status(stat.S_IFBLK, inode, 0xFD01)) for inode in (7, 8)]
    other = file_id(status(stat.S_IFBLK, 7, 0xFD02))
    assert volume[0].key == volume[1].key != other.key
    character = [file_id(status(stat.S_IFCHR, inode, 0xFD01)) for inode in (7, 8)]
    assert len({each.key for each in (*volume, *character)}) == 3


@pytest.mark.parametrize("number", [1, 0xFD01])
def test_device_is_no_regular_file(number: int) -> None:
    """Their keys never agree."""
    assert file_id(status(stat.S_IFBLK, number, number)).key != file_id(status(stat.S_IFREG, number, 0)).key


def test_records_of_earlier_versions() -> None:
    """They have no number of a block device.  The number of a file system may be 0."""
    assert FileId(device=1, inode=2).key == (1, 2)
    assert file_id(status(stat.S_IFREG, 7, 0)) == FileId(device=5, inode=7, block_device=0)
    assert FileId(device=0, inode=7).key != FileId(device=0, inode=9, block_device=7).key
