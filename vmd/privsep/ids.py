"""User ids that belong to no user of the host, for processes that must not affect each other.

Two processes with the same user id can signal each other, and share the same limits.  So each VM with its devices has
an id of its own.  vmm, control and each probe also have their own.
"""

import contextlib
import errno
import os
import resource
import socket
from collections import deque

from vmd.config.model import DEFAULT_FIRST_ID, IDS
from vmd.errors import HostError
from vmd.privsep import linux
from vmd.tasks import fork

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import NoReturn

RECENT_MAX = 256  # the last ids taken: a process with one of these may not have started yet
# Threads and processes that one id may have.  A VM with the most vCPUs, disks and interfaces has 600.
TASKS_MAX = 1024


class Ids:
    """Hands out one id after the other, and begins again after the last.  Ids that still have a process are skipped.

    A process may outlast a round of the ids because it waits for storage that does not answer, and cannot be killed.
    """

    def __init__(self, first: int = DEFAULT_FIRST_ID, count: int = IDS) -> None:
        self._all = range(first, first + count)
        self._round: Iterator[int] = iter(())
        self._recent: deque[int] = deque(maxlen=min(RECENT_MAX, count // 2))

    def take(self) -> int:
        """Return an id that no process has.  Raises HostError."""
        uid = next(self._round, 0)
        if not uid:
            busy = ids_in_use().union(self._recent)
            self._round = (each for each in self._all if each not in busy)
            uid = next(self._round, 0)
            if not uid:
                raise HostError("find a free user id for another process", errno.EAGAIN)
        self._recent.append(uid)
        return uid


def ids_in_use() -> set[int]:
    """Return the user ids of all processes.

    They are read from `status`, because /proc shows root as the owner of many processes' directories.
    """
    found: set[int] = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/status", encoding="utf-8", errors="replace") as file:
                found.update(int(word) for line in file if line.startswith("Uid:") for word in line.split()[1:])
    return found


def user_namespace(first: int = DEFAULT_FIRST_ID) -> int:
    """Return a descriptor of a new user namespace that has only our ids, under the same numbers.

    Raises HostError if none can be made, for example because our own user namespace lacks these ids.
    """
    ours, theirs = socket.socketpair()
    pid = fork("make a user namespace")
    if pid == 0:
        hold_user_namespace(ours, theirs)
    theirs.close()
    try:
        report = int(ours.recv(16) or b"-1")
        if report:
            raise HostError("make a user namespace", report)
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{pid}/{name}", "w", encoding="ascii") as file:
                file.write(f"{first} {first} {IDS}\n")
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError("make a user namespace", error) from error
    finally:
        ours.close()  # the child waits for this, then exits
        os.waitpid(pid, 0)


def hold_user_namespace(ours: socket.socket, theirs: socket.socket) -> "NoReturn":
    """Make a user namespace, report 0 or an errno, then wait until the parent has a descriptor of it."""
    try:
        ours.close()
        # The creator's limit would hold for all processes in the namespace together.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NPROC, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        try:
            linux.unshare(linux.CLONE_NEWUSER)
            theirs.send(b"0")
        except HostError as error:
            theirs.send(b"%d" % error.number)
        theirs.recv(1)
    finally:
        os._exit(0)


def limit_tasks() -> None:
    """Limit the threads and processes of our id to TASKS_MAX.  This process is the only one with the id.

    Raises HostError.
    """
    try:
        resource.setrlimit(resource.RLIMIT_NPROC, (TASKS_MAX, TASKS_MAX))
    except OSError as error:
        raise HostError("limit threads", error) from error
