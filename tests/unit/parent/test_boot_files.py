"""What may be opened to boot from."""

import os
import stat

import pytest

from vmd.errors import OperatorError
from vmd.files import boot


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (stat.S_IFBLK, "kernel /dev/vda: not a regular file but a block device: give it as disk"),
        (stat.S_IFCHR, "kernel /dev/vda: not a regular file"),
        (stat.S_IFDIR, "kernel /dev/vda: not a regular file"),
    ],
)
def test_only_regular_files_are_booted(kind: int, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block device is named with the keyword that takes it."""
    fd = os.open("/dev/null", os.O_RDONLY)
    monkeypatch.setattr(os, "fstat", lambda fd: os.stat_result((kind | 0o600, *[0] * 9)))
    try:
        with pytest.raises(OperatorError) as refused:
            boot.require_regular(fd, "kernel /dev/vda")
    finally:
        os.close(fd)

    assert str(refused.value) == sentence
