"""Every failure has a number for programs, in the same attribute."""

import errno

import pytest

from vmctl.errors import NoSuchVm
from vmd.client import Refused
from vmd.errors import ConfigError, GuestError, HostError, ImageError, InUse, OperatorError, PeerError, VmdError, number
from vmd.fileid import FileId


@pytest.mark.parametrize(("error", "expected"), [
    (ConfigError("vm.conf", 3, "no such switch"), errno.EINVAL),
    (OperatorError(errno.EBUSY, "in use"), errno.EBUSY),
    (OperatorError(1002, "no disk"), 1002),
    (ImageError("/kernel", "is empty"), errno.EINVAL),
    (GuestError("a chain that does not end"), errno.EINVAL),
    (PeerError("vm/a", "no header"), errno.EPROTO),
    (HostError("open", OSError(errno.ENOENT, "")), errno.ENOENT),
    (HostError("open", OSError("without a number")), errno.EIO),
    (NoSuchVm("vm a not found"), errno.ENOENT),
    (Refused(errno.EPERM, "not yours"), errno.EPERM),
    (OSError(errno.EMFILE, "too many"), errno.EMFILE),
    (OSError("without a number"), errno.EIO),
    (OverflowError("too large"), errno.EINVAL),
])  # fmt: skip
def test_a_failure_has_a_number(error: Exception, expected: int) -> None:
    """It is never 0, which means success."""
    assert number(error) == expected


def test_there_is_one_name_for_it() -> None:
    """This holds for all of our exceptions.  Only an OSError has `errno`, which is the kernel's."""
    family = [OperatorError(1, ""), HostError("", 1), PeerError("", ""), InUse.__new__(InUse), Refused(1, "")]
    for error in family:
        assert isinstance(error, VmdError)
        assert not {"code", "errno"} & set(dir(error)), type(error)


@pytest.mark.parametrize(("error", "text"), [
    (ConfigError("vm.conf", 3, "no such switch"), "vm.conf:3: no such switch"),
    (OperatorError(errno.EBUSY, "in use"), "in use"),
    (ImageError("/kernel", "is empty"), "/kernel: is empty"),
    (PeerError("vm/a", "no header"), "vm/a: no header"),
    (PeerError("vm/a", "no header", b"\1\2"), "vm/a: no header (0102)"),
    (PeerError("vm/a", "no header", bytes(100)), f"vm/a: no header ({'00' * 64})"),
    (HostError("open /a", errno.ENOENT), "open /a: No such file or directory"),
    (HostError("open /a", OSError(errno.ENOENT, "is gone")), "open /a: is gone"),
    (HostError("open /a", OSError("without a number")), "open /a: without a number"),
    (HostError("clone", errno.ENOSYS), "clone: Function not implemented: this kernel, or the container or unit that vmd"
     " runs in, does not let it make the system call"),
    (InUse("disk /a", FileId(device=1, inode=2), doing=", which writes to it").held_by("vm web"),
     "disk /a: is in use by vm web, which writes to it"),
])  # fmt: skip
def test_a_failure_has_a_sentence(error: VmdError, text: str) -> None:
    """It is for people."""
    assert str(error) == text
