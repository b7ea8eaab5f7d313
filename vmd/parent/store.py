"""Descriptors that outlive the daemon: the store of the service manager (sd_notify(3), sd_listen_fds(3)).

Each has a name.  The next daemon, after a crash, a restart or an upgrade, is started with all of them.

    state      the memory file with the state of the parent
    listener   the control socket
    vmm-N      the channel of the parent to the vmm of generation N
    log-N      the channel of the parent to the log process of generation N

The store keeps a duplicate of each.  So the peer of a channel sees the end of the channel only after `Store.remove`.

A program that is executed in this process (`Store.execute`) gets the descriptors under the same numbers.
"""

import fcntl
import os

from vmd.closing import close
from vmd.log import log
from vmd.parent import service

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import NoReturn

STORE_MAX = 512  # FileDescriptorStoreMax= of the unit: systemd drops further descriptors without a word
VMM = "vmm-"  # begins the names of channels to a vmm
FIRST_FD = 3  # SD_LISTEN_FDS_START
VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
OWN_VARIABLE = "VMD_STORED"  # name=descriptor, separated by spaces: set for a program that this one starts


def inherited() -> dict[str, int]:
    """Return the stored descriptors that this process was started with, by name.  The caller owns them.

    They are removed from the environment and made close-on-exec, so that child processes do not get them.
    """
    found: dict[str, int] = {}
    for name, fd in (*from_ourselves(), *from_service_manager()):
        try:
            os.set_inheritable(fd, False)
        except OSError as error:
            log.warn(f"descriptor {fd} ({name}), which was stored, is not there: {error.strerror}")
            continue
        if name in found:
            log.warn(f"two descriptors were stored as {name}: the first one is used")
            close(fd)
            continue
        found[name] = fd
    return found


def from_service_manager() -> list[tuple[str, int]]:
    """Take the descriptors of the service manager from the environment (sd_listen_fds(3))."""
    pid, count, names = (os.environ.pop(variable, "") for variable in VARIABLES)
    if pid != str(os.getpid()) or not is_number(count):
        return []  # they are for another process, or there are none
    labels = names.split(":")
    fds = range(FIRST_FD, FIRST_FD + min(int(count), STORE_MAX))
    return [(label, fd) for label, fd in zip(labels + [""] * len(fds), fds, strict=False)]


def from_ourselves() -> list[tuple[str, int]]:
    """Take from the environment the descriptors of the earlier program in this process, or of a rehearsing daemon."""
    words = (word.rpartition("=") for word in os.environ.pop(OWN_VARIABLE, "").split())
    return [(name, int(number)) for name, _, number in words if is_number(number)]


def environment(fds: "Mapping[str, int]") -> dict[str, str]:
    """Return an environment that names descriptors to a vmd that is started with them."""
    return {**os.environ, OWN_VARIABLE: " ".join(f"{name}={fd}" for name, fd in fds.items())}


def is_number(text: str) -> bool:
    """Return whether a text has only decimal digits."""
    return text.isascii() and text.isdigit()


class Store:
    """The store of the service manager.  Without one, it holds the same descriptors for `execute`."""

    def __init__(self, stored: "Mapping[str, int] | None" = None) -> None:
        """`stored` are the descriptors that this process was started with (`inherited`).

        They stay open and belong to the store.  A user of one calls `duplicate`.
        """
        self._stored = dict(stored or {})

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of all stored descriptors."""
        return tuple(self._stored)

    @property
    def room(self) -> int:
        """Return how many further descriptors can be stored."""
        return STORE_MAX - len(self._stored)

    def duplicate(self, name: str) -> int:
        """Return a duplicate of a stored descriptor.  The caller owns it.  Raises KeyError, OSError."""
        return fcntl.fcntl(self._stored[name], fcntl.F_DUPFD_CLOEXEC, FIRST_FD)

    def put(self, name: str, fd: int, *, poll: bool = True) -> None:
        """Store a duplicate of `fd` under a name, and remove the descriptor that was there.

        `poll`: the service manager drops the descriptor when it hangs up.  A memory file and a listening socket need
        False.
        Raises OSError if this process has no descriptor left.
        """
        assert ":" not in name, name  # LISTEN_FDNAMES separates names by colons
        kept = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_FD)
        self.remove(name)
        self._stored[name] = kept
        lines = ["FDSTORE=1", f"FDNAME={name}", *([] if poll else ["FDPOLL=0"])]
        if not service.notify("\n".join(lines), (fd,)):
            log.error(f"the service manager does not store {name}: the next daemon will not find it")

    def remove(self, name: str) -> None:
        """Remove a stored descriptor, if there is one of this name."""
        fd = self._stored.pop(name, None)
        if fd is not None:
            close(fd)
            service.notify(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def execute(self, command: list[str]) -> "NoReturn":
        """Execute a program in this process, with all stored descriptors.  Raises OSError; then nothing has changed."""
        fds = self._stored.values()
        try:
            for fd in fds:
                os.set_inheritable(fd, True)
            os.execve(command[0], command, environment(self._stored))  # noqa: S606  our own program
        finally:
            for fd in fds:
                os.set_inheritable(fd, False)
