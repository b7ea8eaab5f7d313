"""Landlock: restricts file names, network addresses and signals (landlock(7)).

It complements the cell and the system call filter, and still holds if one of them has a hole.  priv has no cell, so for
priv it restricts the view of the file system.  Unlike a filter it restricts only the calling thread and its children.
"""

import _stat as stat
import errno
import posix as os
import struct

from vmd import native
from vmd.errors import HostError
from vmd.privsep import linux

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REMOVE_FILE, MAKE_REG = 1 << 5, 1 << 8
TRUNCATE, IOCTL_DEV = 1 << 14, 1 << 15

READ = READ_FILE | READ_DIR
RUN = READ | EXECUTE
WRITE = READ | WRITE_FILE | TRUNCATE
OWN = WRITE | REMOVE_FILE | MAKE_REG

ON_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV  # the other rights are for directories only

ALL_SINCE = ((1, 0x1FFF), (2, 1 << 13), (3, TRUNCATE), (5, IOCTL_DEV))  # file system rights by ABI
NET_SINCE, NET_TCP = 4, 3  # bind and connect
SCOPE_SINCE = 6
SCOPE_SOCKETS, SCOPE_SIGNALS = 1, 2  # abstract unix sockets; signals, including parent death signals
SCOPE_ALL = SCOPE_SOCKETS | SCOPE_SIGNALS
MISSING_SINCE = (
    (3, "truncating files"),
    (4, "TCP"),
    (5, "ioctl on devices"),
    (6, "abstract unix sockets and signals"),
)
NONE = (
    "no landlock: files are kept away by namespaces and system call filters only; boot a kernel that has it with"
    " lsm=landlock,..., or let the container use it"
)
CREATE_RULESET_VERSION = 1
RULE_PATH_BENEATH = 1


def abi() -> int:
    """Return the version of the kernel's Landlock; 0 if the kernel lacks it, or it is switched off or refused."""
    try:
        return linux.syscall("ask for landlock", linux.SYS_LANDLOCK_CREATE_RULESET, None, 0, CREATE_RULESET_VERSION)
    except HostError as error:
        if error.number in (*linux.REFUSED, errno.EOPNOTSUPP):
            return 0
        raise


def missing(version: int) -> list[str]:
    """Return the warnings for the operator."""
    return [NONE] if version == 0 else []


def limits(version: int) -> list[str]:
    """Return a sentence about what this version cannot restrict.  It is no warning: only a newer kernel can do more."""
    what = [what for since, what in MISSING_SINCE if version < since]
    return [f"landlock {version} of this kernel cannot restrict {', '.join(what)}"] if version and what else []


def file_rights(version: int) -> int:
    """Return all file system rights that this version knows."""
    rights = 0
    for since, some in ALL_SINCE:
        if version >= since:
            rights |= some
    return rights


def ruleset(version: int, scopes: int = SCOPE_ALL) -> bytes:
    """Return the `landlock_ruleset_attr` that denies all rights that this version knows, and these scopes."""
    attr = struct.pack("=Q", file_rights(version))
    if version >= NET_SINCE:
        attr += struct.pack("=Q", NET_TCP)
    if version >= SCOPE_SINCE:
        attr += struct.pack("=Q", scopes)
    return attr


def restrict(files: tuple[tuple[str, int], ...], scopes: int = SCOPE_ALL) -> list[str]:
    """Deny everything except the given (path, rights).  Returns the warnings for the operator.

    Paths that do not exist are skipped.  The caller has set no_new_privs.  Raises HostError.
    """
    version = abi()
    if version == 0:
        return missing(version)
    attr = ruleset(version, scopes)
    fd = linux.syscall("make a landlock ruleset", linux.SYS_LANDLOCK_CREATE_RULESET, attr, len(attr), 0)
    try:
        for path, rights in files:
            allow(fd, path, rights & file_rights(version))
        linux.syscall("enter landlock", linux.SYS_LANDLOCK_RESTRICT_SELF, fd, 0)
    finally:
        os.close(fd)
    return missing(version)


def keep_signals_inside() -> None:
    """Restrict this thread's signals to itself and the processes that it starts from now on, if the kernel can do so.

    The caller has set no_new_privs.  Raises HostError.
    """
    if abi() < SCOPE_SINCE:
        return
    attr = struct.pack("=QQQ", 0, 0, SCOPE_SIGNALS)
    fd = linux.syscall("make a landlock ruleset", linux.SYS_LANDLOCK_CREATE_RULESET, attr, len(attr), 0)
    try:
        linux.syscall("enter landlock", linux.SYS_LANDLOCK_RESTRICT_SELF, fd, 0)
    finally:
        os.close(fd)


def allow(ruleset_fd: int, path: str, rights: int) -> None:
    """Grant rights on a file, or on a directory and everything beneath it."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= ON_FILES
        beneath = struct.pack("=Qi", rights, fd)
        rule = native.buffer(beneath)
        linux.syscall(f"allow {path} in landlock", linux.SYS_LANDLOCK_ADD_RULE, ruleset_fd, RULE_PATH_BENEATH, rule, 0)
    finally:
        os.close(fd)
