"""The pty of a VM's console."""

import contextlib
import errno
import fcntl
import os
import stat
import termios
import time

import pytest

from tests.support.daemon import DEADLINE_S
from tests.support.descriptors import open_descriptors
from tests.support.waiting import pause
from vmd.errors import HostError
from vmd.parent.resources import Pty


def test_a_pty_passes_bytes_on_as_they_are() -> None:
    """Nothing is echoed or translated, and the parent never waits for the pty."""
    pty = Pty()
    assert pty.write(b"a\r\n\x03") == 4
    assert os.read(pty.slave, 100) == b"a\r\n\x03"
    os.write(pty.slave, b"b\n")
    assert os.read(pty.master, 100) == b"b\n"
    assert not os.get_blocking(pty.master)
    while (written := pty.write(bytes(4096))) > 0:
        pass
    assert written == 0
    pty.close()


def test_output_that_no_viewer_has_read_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line discipline may not tell."""
    pty = Pty()
    assert pty.unread_bytes() == 0
    pty.write(b"x" * 700)
    deadline_s = time.monotonic() + DEADLINE_S
    while pty.unread_bytes() < 700:  # the kernel hands them over a little later
        assert time.monotonic() < deadline_s
        pause()
    assert pty.unread_bytes() == 700

    def refuse(*_: object) -> bytes:
        raise OSError(errno.EINVAL, "no such call")

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    assert pty.unread_bytes() == 0
    pty.close()


def test_a_pty_is_taken_over_as_it_is() -> None:
    """Its viewer may have changed the settings."""
    first = Pty()
    settings = termios.tcgetattr(first.slave)
    settings[3] |= termios.ECHO
    termios.tcsetattr(first.slave, termios.TCSANOW, settings)
    second = Pty((first.master, first.slave))

    assert second.path == first.path == os.ttyname(first.slave)
    assert termios.tcgetattr(second.slave) == settings
    second.close()


def test_a_pty_that_cannot_be_opened_or_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor is left open."""
    before = open_descriptors()
    reading, writing = os.pipe()
    with pytest.raises(HostError, match="take over the pty of a console: Inappropriate ioctl"):
        Pty((reading, writing))
    assert open_descriptors() == before

    def refuse() -> tuple[int, int]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "openpty", refuse)
    with pytest.raises(HostError, match="open a pty for the console: No space left on device"):
        Pty()


@pytest.mark.parametrize(("gid", "group", "mode"), [(None, -1, 0o600), (100, 100, 0o660), (0, 0, 0o660)])
def test_only_the_owner_and_group_of_the_vm_may_open_the_pty(
    monkeypatch: pytest.MonkeyPatch, gid: int | None, group: int, mode: int
) -> None:
    """Without a group of the VM, the group of the file stays, and has no rights."""
    owners: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "fchown", lambda *given: owners.append(given))
    pty = Pty()
    pty.give_to(5, gid)

    assert owners == [(pty.slave, 5, group)]
    assert stat.S_IMODE(os.stat(pty.path).st_mode) == mode
    pty.close()


def test_an_owner_that_cannot_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the pty."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", refuse)
    pty = Pty()
    with pytest.raises(HostError, match=f"change the owner of {pty.path}: Operation not permitted"):
        pty.give_to(5, None)
    pty.close()


def test_a_vm_process_gets_copies_of_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, or none: then no copy is left open."""
    pty = Pty()
    (master,), (slave,) = pty.fds().values()
    for copy, own in ((master, pty.master), (slave, pty.slave)):
        assert copy != own
        assert os.path.sameopenfile(copy, own)
        os.close(copy)
    before = open_descriptors()
    dup, copies = os.dup, [0]

    def second_fails(fd: int) -> int:
        copies[0] += 1
        if copies[0] == 2:
            raise OSError(errno.EMFILE, "Too many open files")
        return dup(fd)

    monkeypatch.setattr(os, "dup", second_fails)
    with pytest.raises(HostError, match=f"hand over {pty.path}: Too many open files"):
        pty.fds()
    assert open_descriptors() == before
    pty.close()


def test_the_viewer_of_a_pty_that_is_closed_sees_a_hangup() -> None:
    """Both sides are closed here."""
    before = open_descriptors()
    pty = Pty()
    viewer = os.open(pty.path, os.O_RDWR | os.O_NOCTTY)
    pty.close()

    with contextlib.suppress(OSError):  # EIO, or the end of file
        assert os.read(viewer, 1) == b""
    os.close(viewer)
    assert open_descriptors() == before
