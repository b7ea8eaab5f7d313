"""The cell: the place that root prepares for unprivileged processes.  `privplace.py` has that of priv.

The cell is a root file system that has the interpreter, its shared libraries and our own code, all read-only, and
nothing else of the host.  It is built once, in a mount namespace of its own.  Each child enters that namespace, and
gets new IPC, network and host name namespaces.

    /usr/bin/python3.11, /usr/lib/python3.11 (their real places)   bind mounts, without site-packages
    /lib/x86_64-linux-gnu/libc.so.6, /lib64/ld-linux-x86-64.so.2, …  one bind mount each
    /etc/ld.so.cache  /dev/null                                      bind mounts
    /vmd                                                             a copy of vmd and msgpack
"""

import fcntl
import os
import socket

from vmd.errors import HostError, VmdError
from vmd.privsep import linux
from vmd.privsep.cellfiles import (
    NO_PACKAGES,
    PACKAGES,
    interpreter_mounts,
    loaded_libraries,
    package_directory,
    package_files,
)
from vmd.privsep.ids import Ids, limit_tasks
from vmd.privsep.spawn import FD_TARGETS
from vmd.privsep.start import CODE
from vmd.tasks import fork

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

SCAFFOLD = "/run"  # the root is built on this directory, which every Linux system has
BUILT = "built"  # the builder's report of success; otherwise it reports an errno and what was tried
OLD_ROOT = "/.old"
EMPTY = "/.empty"


class Cell:
    """A built cell, and the user of the processes in it.  Call `close` when no more children will be started."""

    import_path: tuple[str, ...] = (CODE,)
    code_fd = -1
    own_pids = False
    vital = False

    def __init__(self, uid: int, gid: int, namespace_fd: int, root_fd: int, ids: Ids | None = None) -> None:
        """Each process gets its own id from `ids`.  Without `ids` all processes have `uid` and `gid`."""
        self.ids = ids
        self.uid = uid
        self.gid = gid
        self.namespace_fd = namespace_fd
        self.root_fd = root_fd

    @classmethod
    def build(cls, uid: int, gid: int, packages: tuple[str, ...] = PACKAGES) -> "Cell":
        """Read our code, find the libraries and build the root.  Raises HostError or VmdError."""
        code = [file for package in packages for file in package_files(package)]
        libraries = loaded_libraries([package_directory(package) for package in packages])
        mounts = {**interpreter_mounts(libraries), "/etc/ld.so.cache": "/etc/ld.so.cache", "/dev/null": "/dev/null"}
        namespace, root = (above_targets(fd) for fd in build_in_namespace(mounts, code))
        return cls(uid, gid, namespace, root)

    def prepare(self) -> None:
        """Choose the id of the next process."""
        if self.ids is not None:
            self.uid = self.gid = self.ids.take()

    def enter(self) -> None:
        """Enter the cell and become the user, irrevocably."""
        self.leave_host()
        linux.limit_bounding_set(0)
        linux.become_user(self.uid, self.gid, 0)

    def leave_host(self) -> None:
        """Enter the cell and new namespaces."""
        if self.ids is not None:
            limit_tasks()
        linux.setns(self.namespace_fd, linux.CLONE_NEWNS)
        # If vmd itself runs in a chroot, the root after setns is not the one that pivot_root has put in place.
        os.fchdir(self.root_fd)
        os.chroot(".")
        linux.unshare(linux.CLONE_NEWIPC | linux.CLONE_NEWNET | linux.CLONE_NEWUTS)
        os.chdir("/")

    def close(self) -> None:
        """Close the descriptors of the cell.  Processes inside keep it alive."""
        os.close(self.namespace_fd)
        os.close(self.root_fd)


class VmmCell(Cell):
    """The cell as vmm enters it: also with a pid namespace, in which no VM process or device survives vmm.

    vmm outlives the parent.  When its channel ends, it asks its guests to shut down.

    If there are ids, vmm also enters a user namespace that has only these ids.  There it may give each VM's process an
    id, and may send it signals.
    """

    CAPABILITIES = 1 << linux.CAP_SETUID | 1 << linux.CAP_SETGID | 1 << linux.CAP_KILL  # in the user namespace
    vital = True

    def __init__(self, cell: Cell, users_fd: int | None, *, own_pids: bool) -> None:
        """The caller still has to close `cell`.  This object owns `users_fd` from now on."""
        super().__init__(cell.uid, cell.gid, cell.namespace_fd, cell.root_fd, cell.ids)
        self.own_pids = own_pids
        self.users_fd = None if users_fd is None else above_targets(users_fd)

    def enter(self) -> None:
        """Enter the cell, and become a user with capabilities over the ids of VMs only."""
        if self.users_fd is None:
            super().enter()
            return
        self.leave_host()
        linux.setns(self.users_fd, linux.CLONE_NEWUSER)
        # Inheritable capabilities stay available when the bounding set is empty.
        linux.set_capabilities(linux.permitted_capabilities(), inheritable=self.CAPABILITIES)
        linux.limit_bounding_set(0)
        linux.become_user(self.uid, self.gid, self.CAPABILITIES)


class LockholderCell(Cell):
    """The cell as lockholder enters it: with a capability for which the kernel shows it other users' locks."""

    CAPABILITIES = 1 << linux.CAP_SYS_PTRACE

    def __init__(self, cell: Cell) -> None:
        """The caller still has to close `cell`."""
        super().__init__(cell.uid, cell.gid, cell.namespace_fd, cell.root_fd, cell.ids)

    def enter(self) -> None:
        """Enter the cell, and become a user with this capability only."""
        self.leave_host()
        linux.limit_bounding_set(self.CAPABILITIES)
        linux.become_user(self.uid, self.gid, self.CAPABILITIES)


def above_targets(fd: int) -> int:
    """Move a descriptor to a number that no descriptor of a child gets.

    A child enters the cell after its own descriptors were placed, so they must not overwrite this one.
    """
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FD_TARGETS)
    except OSError as error:
        raise HostError("build the cell: keep its descriptors", error) from error
    finally:
        os.close(fd)


def build_in_namespace(mounts: dict[str, str], code: list[tuple[str, bytes]]) -> tuple[int, int]:
    """Build the root in a child with a mount namespace of its own.  Returns descriptors of namespace and root."""
    ours, theirs = socket.socketpair()
    pid = fork("build the cell")
    if pid == 0:
        run_builder(mounts, code, ours, theirs)
    theirs.close()
    try:
        report = ours.recv(4096).decode() or " its builder has died"
        if report != BUILT:
            number, _, what = report.partition(" ")
            raise HostError(f"build the cell: {what}", int(number)) if number else VmdError(f"build the cell: {what}")
        root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC), root
        except OSError:
            os.close(root)
            raise
    except OSError as error:
        raise HostError("build the cell: keep its mount namespace", error) from error
    finally:
        ours.close()  # the child waits for this, then exits
        os.waitpid(pid, 0)


def run_builder(
    mounts: dict[str, str], code: list[tuple[str, bytes]], ours: socket.socket, theirs: socket.socket
) -> "NoReturn":
    """Build the root and report the result, then wait until the parent has descriptors of the namespace."""
    try:
        ours.close()
        build_root(mounts, code)
        report = BUILT
    except HostError as error:
        report = f"{error.number} {error.tried}"
    except OSError as error:
        report = f"{error.errno} {error.filename}"
    except BaseException as error:
        report = f" {error!r}"
    try:
        theirs.send(report.encode("utf-8", "backslashreplace"))
        theirs.recv(1)
    finally:
        os._exit(0)


def build_root(mounts: dict[str, str], code: list[tuple[str, bytes]]) -> None:
    """Replace the root of a new mount namespace by one that has only these mounts and files."""
    os.umask(0o022)
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount(None, "/", None, linux.MS_REC | linux.MS_PRIVATE)  # the host must not see the mounts below
    flags = linux.MS_NOSUID | linux.MS_NODEV
    linux.mount("vmd", SCAFFOLD, "tmpfs", flags, "mode=0755,size=64m")
    for name in (OLD_ROOT, EMPTY):
        os.mkdir(SCAFFOLD + name, 0o755)
    for target, source in mounts.items():
        if os.path.exists(source):
            bind(source, SCAFFOLD + target)
    for target, source in mounts.items():
        for name in NO_PACKAGES:
            if os.path.isdir(os.path.join(source, name)):
                bind(SCAFFOLD + EMPTY, f"{SCAFFOLD}{target}/{name}")
    for target, content in code:
        os.makedirs(os.path.dirname(SCAFFOLD + target), 0o755, exist_ok=True)
        with open(SCAFFOLD + target, "xb") as file:
            file.write(content)
    linux.pivot_root(SCAFFOLD, SCAFFOLD + OLD_ROOT)
    os.chdir("/")
    linux.umount_lazily(OLD_ROOT)
    os.rmdir(OLD_ROOT)
    linux.mount(None, "/", None, linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY | flags)


def bind(source: str, target: str) -> None:
    """Bind-mount a file or directory at another place, read-only.  Devices do not work there, except /dev/null."""
    if os.path.isdir(source):
        os.makedirs(target, 0o755, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    linux.mount(source, target, None, linux.MS_BIND)
    flags = linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY | linux.MS_NOSUID
    linux.mount(None, target, None, flags | (linux.MS_NOEXEC if source == "/dev/null" else linux.MS_NODEV))
