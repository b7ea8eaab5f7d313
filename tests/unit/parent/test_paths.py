"""Paths that clients send for disks, discs and boot files of a VM."""

import pytest

from vmd.config.model import DiskConfig, VmConfig
from vmd.errors import OperatorError
from vmd.parent.changes import check_path
from vmd.parent.requests import check_paths
from vmd.parent.vm import Vm

REFUSED = ("disc.iso", "./disc.iso", "/disc\0.iso", "\0")
ACCEPTED = ("/disc.iso", "/disc\\0.iso", "/0/\\0")


@pytest.mark.parametrize("path", REFUSED)
def test_an_invalid_path_is_refused_everywhere(path: str) -> None:
    """It is not absolute, or contains a NUL.  The message names the VM and the purpose of the path."""
    for config in (VmConfig(name="a", cdrom=path), VmConfig(name="a", disks=(DiskConfig(path=path),))):
        with pytest.raises(OperatorError, match=r"^vm a: (cdrom|disk): not an absolute path: "):
            check_paths(config)
    with pytest.raises(OperatorError, match=r"^vm a: cdrom: not an absolute path: "):
        check_path(Vm(1, VmConfig(name="a"), from_config=True), path)


@pytest.mark.parametrize("path", ACCEPTED)
def test_a_backslash_and_a_zero_are_not_a_nul(path: str) -> None:
    """They are ordinary characters of a name."""
    check_paths(VmConfig(name="a", cdrom=path, disks=(DiskConfig(path=path),)))
    check_path(Vm(1, VmConfig(name="a"), from_config=True), path)


def test_an_empty_path_is_for_a_disc_only() -> None:
    """For a disc it means that the drive is empty.  A disk needs a path."""
    check_paths(VmConfig(name="a"))
    check_path(Vm(1, VmConfig(name="a"), from_config=True), "")
    with pytest.raises(OperatorError, match=r"^vm a: disk: not an absolute path: $"):
        check_paths(VmConfig(name="a", disks=(DiskConfig(path=""),)))
