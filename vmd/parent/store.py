"""Descriptors that outlive the daemon: the store of the service manager (sd_notify(3), sd_listen_fds(3)).

Each has a name.  The next daemon, after a crash, a restart or an upgrade, is started with all of them.

    state      the memory file with what parent knows
    listener   the control socket
    vmm-N      the channel of parent to the vmm of generation N
    log-N      the channel of parent to the log process of generation N

The store keeps a duplicate.  So the other end of a channel sees its end only after `Store.remove`, too.

A program that takes our place in this very process (`Store.execute`) has them under the numbers that they have here.
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

STORE_MAX = 512  # FileDescriptorStoreMax= of the unit: what is beyond it systemd drops, and does not say so
VMM = "vmm-"  # what the names of channels to a vmm begin with
FIRST_FD = 3  # SD_LISTEN_FDS_START
VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
OWN_VARIABLE = "VMD_STORED"  # name=descriptor, with spaces between them: what we ourselves have started a program with


def inherited() -> dict[str, int]:
    """Return the descriptors that this process was started with, by name; ours from here on.

    The environment does not speak of them any more, and programs that we start do not get them.
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
    """Return what the environment says of descriptors from a service manager (sd_listen_fds(3))."""
    pid, count, names = (os.environ.pop(variable, "") for variable in VARIABLES)
    if pid != str(os.getpid()) or not is_number(count):
        return []  # they are for somebody else, or there are none
    labels = names.split(":")
    fds = range(FIRST_FD, FIRST_FD + min(int(count), STORE_MAX))
    return [(label, fd) for label, fd in zip(labels + [""] * len(fds), fds, strict=False)]


def from_ourselves() -> list[tuple[str, int]]:
    """Return what the environment says of descriptors from an earlier program of this process, or a daemon."""
    words = (word.rpartition("=") for word in os.environ.pop(OWN_VARIABLE, "").split())
    return [(name, int(number)) for name, _, number in words if is_number(number)]


def environment(fds: "Mapping[str, int]") -> dict[str, str]:
    """Return an environment that tells a program of ours of descriptors, which it is started with."""
    return {**os.environ, OWN_VARIABLE: " ".join(f"{name}={fd}" for name, fd in fds.items())}


def is_number(text: str) -> bool:
    """Return whether a text is a number."""
    return text.isascii() and text.isdigit()


class Store:
    """What is in the store of the service manager.  Without a service manager: what would be."""

    def __init__(self, stored: "Mapping[str, int] | None" = None) -> None:
        """`stored` is what this process was started with (`inherited`).

        Those descriptors stay open, and belong to the store: whoever uses one makes a duplicate.
        """
        self._stored = dict(stored or {})

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of all that is stored."""
        return tuple(self._stored)

    @property
    def room(self) -> int:
        """Return how many more can be stored."""
        return STORE_MAX - len(self._stored)

    def duplicate(self, name: str) -> int:
        """Return a duplicate of what is stored under a name.  Raises KeyError, OSError."""
        return fcntl.fcntl(self._stored[name], fcntl.F_DUPFD_CLOEXEC, FIRST_FD)

    def put(self, name: str, fd: int, *, poll: bool = True) -> None:
        """Store a duplicate under a name, in the place of what is there.

        `poll`: the service manager drops it when it hangs up.  A memory file and a listening socket need False.
        Raises OSError if this process has no descriptor left.
        """
        assert ":" not in name, name  # which stands between the names
        kept = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_FD)
        self.remove(name)
        self._stored[name] = kept
        lines = ["FDSTORE=1", f"FDNAME={name}", *([] if poll else ["FDPOLL=0"])]
        if not service.notify("\n".join(lines), (fd,)):
            log.error(f"the service manager does not store {name}: the next daemon will not find it")

    def remove(self, name: str) -> None:
        """Forget what is stored under a name, if anything is."""
        fd = self._stored.pop(name, None)
        if fd is not None:
            close(fd)
            service.notify(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def execute(self, command: list[str]) -> "NoReturn":
        """Have a program take our place, with all that is stored.  Raises OSError; then nothing has changed."""
        fds = self._stored.values()
        try:
            for fd in fds:
                os.set_inheritable(fd, True)
            os.execve(command[0], command, environment(self._stored))  # noqa: S606  our own program
        finally:
            for fd in fds:
                os.set_inheritable(fd, False)
