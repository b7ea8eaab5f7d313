"""The place of priv.

priv sees the host's file system, because it runs nft.  But /run is hidden from it, except for a directory of its own,
where it records host settings that have to be restored.  So it reaches no named socket in /run: not the daemon's own,
and not that of another service.
"""

import contextlib
import os
import stat

from vmd.config.model import DEFAULT_FIRST_ID, IDS
from vmd.privsep import linux
from vmd.privsep.cellfiles import import_path
from vmd.privsep.confine import PRIV_DIRECTORY
from vmd.privsep.start import CODE_OUTSIDE


class PrivPlace:
    """The place of priv: an ordinary user of the host, with the capabilities for network interfaces."""

    own_pids = False
    vital = True
    # priv gives up the last two when it confines itself.  Before that it must read pyroute2, whose directory may be
    # readable for its owner only, and reduce its bounding set.
    CAPABILITIES = (
        1 << linux.CAP_NET_ADMIN | 1 << linux.CAP_NET_RAW | 1 << linux.CAP_DAC_READ_SEARCH | 1 << linux.CAP_SETPCAP
    )

    def __init__(self, cell_fd: int, uid: int = DEFAULT_FIRST_ID + IDS) -> None:
        """`cell_fd` is the root of the cell, which has our code.  The caller keeps it open.

        `uid` is priv's user.  It is not `_vmd`: VM processes may run as `_vmd`, and could then signal priv.

        Raises VmdError if pyroute2 is not installed.
        """
        self.import_path = CODE_OUTSIDE, *import_path(("pyroute2",))
        self.code_fd = cell_fd
        self.uid = uid

    def prepare(self) -> None:
        """Do nothing."""

    def enter(self) -> None:
        """Hide /run, become the user, and give up all other capabilities."""
        os.chdir("/")
        hide_run(self.uid)
        linux.limit_bounding_set(self.CAPABILITIES)
        linux.become_user(self.uid, self.uid, linux.permitted_capabilities() & self.CAPABILITIES)


def hide_run(uid: int) -> None:
    """Cover /run by a directory that has only `PRIV_DIRECTORY`, in a new mount namespace."""
    with contextlib.suppress(OSError):  # priv will report that it cannot write there
        make_priv_directory(uid)
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount(None, "/", None, linux.MS_REC | linux.MS_SLAVE)  # the host's unmounts take effect here too
    try:
        own = os.open(PRIV_DIRECTORY, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        own = -1
    flags = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
    linux.mount("vmd", "/run", "tmpfs", flags, "mode=0755,size=64k")
    if own >= 0:
        os.umask(0o022)
        os.makedirs(PRIV_DIRECTORY)
        os.umask(0o077)
        linux.mount(f"/proc/self/fd/{own}", PRIV_DIRECTORY, None, linux.MS_BIND)
        os.close(own)
    linux.mount(None, "/run", None, linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY | flags)


def make_priv_directory(uid: int) -> None:
    """Make priv's directory if it is missing; give it and its files to `uid`, which is priv's user now.

    Files that an earlier version has left in the directory above are moved into it.  Raises OSError.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(PRIV_DIRECTORY, 0o700)
    above = os.path.dirname(PRIV_DIRECTORY)
    for name in os.listdir(above):
        if name.startswith("network-"):
            os.rename(f"{above}/{name}", f"{PRIV_DIRECTORY}/{name}")
    # Only root and priv can put a file there.  A link that a taken-over priv has made is not followed.
    os.chown(PRIV_DIRECTORY, uid, uid)
    for name in os.listdir(PRIV_DIRECTORY):
        give_file(f"{PRIV_DIRECTORY}/{name}", uid)


def give_file(path: str, uid: int) -> None:
    """Give a file to a user, if it is a regular file without other hard links.  Raises OSError."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            os.chown(f"/proc/self/fd/{fd}", uid, uid)
    finally:
        os.close(fd)
