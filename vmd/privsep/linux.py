"""System calls that Python 3.11 does not offer, each as a thin function that raises HostError.

Containers, and some settings of a systemd unit, refuse calls that are newer than their filters (`REFUSED`).  For calls
that can be replaced there is a fallback here.

The constants keep their C names.  Standard library only, because every process imports this module.
"""

import errno
import posix as os
import struct

from vmd import native
from vmd.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_SET_NAME = 15
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 47, 2

UCRED = struct.Struct("=iII")  # struct ucred: pid, uid, gid

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MNT_DETACH = 2

SIGKILL = 9  # not from `signal`, whose enumerations cost each process 3 ms and 800 KiB
AT_FDCWD = -100
RESOLVE_NO_MAGICLINKS = 2
# The errors of a call that the kernel lacks, or that the filter of our unit or container does not know.  Filters differ
# in which of the two errors they return.
REFUSED = (errno.ENOSYS, errno.EPERM)

CLOCK_REALTIME = 0
TFD_NONBLOCK, TFD_CLOEXEC = 0o4000, 0o2000000
TFD_TIMER_ABSTIME, TFD_TIMER_CANCEL_ON_SET = 1, 2
FAR_FUTURE_S = 1 << 33

# Not from the module `resource`, which would be one more shared library in every process.
RLIMIT_FSIZE, RLIMIT_CORE, RLIMIT_NOFILE, RLIMIT_AS = 1, 4, 7, 9

CLOSE_RANGE_CLOEXEC = 4
FD_MAX = 0x7FFFFFFF
DESCRIPTORS = "/proc/self/fd"

CAP_CHOWN = 0
CAP_DAC_OVERRIDE = 1
CAP_DAC_READ_SEARCH = 2
CAP_FOWNER = 3
CAP_KILL = 5
CAP_SETGID = 6
CAP_SETUID = 7
CAP_SETPCAP = 8
CAP_NET_ADMIN = 12
CAP_NET_RAW = 13
CAP_SYS_CHROOT = 18
CAP_SYS_PTRACE = 19
CAP_SYS_ADMIN = 21
CAP_SYS_RESOURCE = 24
CAP_LAST = 63  # the last capability for which the kernel's masks have room
LINUX_CAPABILITY_VERSION_3 = 0x20080522

SYS_PIVOT_ROOT = 155
SYS_CAPGET = 125
SYS_CAPSET = 126
SYS_SECCOMP = 317
SYS_CLOSE_RANGE = 436
SYS_TIMERFD_CREATE = 283
SYS_TIMERFD_SETTIME = 286
SYS_OPENAT2 = 437
SYS_LANDLOCK_CREATE_RULESET = 444
SYS_LANDLOCK_ADD_RULE = 445
SYS_LANDLOCK_RESTRICT_SELF = 446

libc = native.CDLL(None, use_errno=True)
libc.syscall.restype = native.c_long
libc.mount.argtypes = [native.c_char_p, native.c_char_p, native.c_char_p, native.c_ulong, native.c_char_p]


class cap_user_header(native.Structure):
    """The process whose capabilities are meant (struct __user_cap_header_struct)."""

    _fields_ = [("version", native.c_uint32), ("pid", native.c_int)]


class cap_user_data(native.Structure):
    """Half of each set (struct __user_cap_data_struct); two of them make 64 bits."""

    _fields_ = [("effective", native.c_uint32), ("permitted", native.c_uint32), ("inheritable", native.c_uint32)]


class open_how(native.Structure):
    """The options of openat2(2) (<linux/openat2.h>)."""

    _fields_ = [("flags", native.c_uint64), ("mode", native.c_uint64), ("resolve", native.c_uint64)]


class statfs_buf(native.Structure):
    """The first field of struct statfs, and room for the rest."""

    _fields_ = [("f_type", native.c_long), ("rest", native.c_char * 248)]


def syscall(tried: str, number: int, *arguments: object) -> int:
    """Make a system call by number.  Integers are passed as unsigned longs, other arguments unchanged."""
    wide = [native.c_ulong(value) if isinstance(value, int) else value for value in arguments]
    result: int = libc.syscall(native.c_long(number), *wide)
    if result < 0:
        raise HostError(tried, native.get_errno())
    return result


def prctl(tried: str, option: int, *arguments: int) -> int:
    """Call prctl(2).  Missing arguments are passed as zero, which the kernel demands for several options."""
    wide = [native.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    result: int = libc.prctl(option, *wide)
    if result < 0:
        raise HostError(tried, native.get_errno())
    return result


def unshare(flags: int) -> None:
    """Leave the namespaces named by CLONE_NEW* flags for new, empty ones."""
    if libc.unshare(flags):
        raise HostError("make namespaces", native.get_errno())


def setns(fd: int, kind: int) -> None:
    """Enter the namespace behind `fd`."""
    if libc.setns(fd, kind):
        raise HostError("enter a namespace", native.get_errno())


def new_pids() -> int:
    """Let the next child be pid 1 of a new pid namespace.  Returns a descriptor for `old_pids`.  Raises HostError."""
    try:
        own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError("make a pid namespace", error) from error
    try:
        unshare(CLONE_NEWPID)
    except HostError:
        os.close(own)
        raise
    return own


def old_pids(own: int) -> None:
    """Start children in our own pid namespace again.  Closes `own`."""
    try:
        setns(own, CLONE_NEWPID)
    finally:
        os.close(own)


def mount(source: str | None, target: str, fstype: str | None, flags: int, options: str | None = None) -> None:
    """Call mount(2)."""
    encoded = [None if text is None else text.encode() for text in (source, target, fstype, options)]
    if libc.mount(encoded[0], encoded[1], encoded[2], flags, encoded[3]):
        raise HostError(f"mount {source or fstype or 'flags'} on {target}", native.get_errno())


def umount_lazily(target: str) -> None:
    """Detach a mount and everything beneath it."""
    if libc.umount2(target.encode(), MNT_DETACH):
        raise HostError(f"detach {target}", native.get_errno())


def pivot_root(new_root: str, put_old: str) -> None:
    """Make `new_root` the root, and move the old root to `put_old`."""
    syscall(f"pivot_root to {new_root}", SYS_PIVOT_ROOT, new_root.encode(), put_old.encode())


def close_on_exec_from(first: int, last: int = FD_MAX) -> None:
    """Mark a range of descriptors close-on-exec.  Unused numbers are allowed."""
    if first > last:
        return
    try:
        syscall("close_range", SYS_CLOSE_RANGE, first, last, CLOSE_RANGE_CLOEXEC)
    except HostError as error:
        if error.number not in REFUSED:
            raise
        for fd in open_descriptors(first, last):
            try:
                os.set_inheritable(fd, False)
            except OSError:  # not open; one number was that of the listed directory
                continue


def open_descriptors(first: int, last: int) -> "Iterable[int]":
    """Return the open descriptors in a range; without /proc, as in a cell, all that could be open."""
    try:
        return [fd for fd in map(int, os.listdir(DESCRIPTORS)) if first <= fd <= last]
    except OSError:
        return range(first, min(last + 1, os.sysconf("SC_OPEN_MAX")))


def hard_limit(number: int) -> int:
    """Return a hard limit of this process (getrlimit(2)); 2**64 - 1 is no limit.  Raises HostError."""
    limits = (native.c_uint64 * 2)()
    if libc.getrlimit(number, limits):
        raise HostError("read a limit of resources", native.get_errno())
    return limits[1]


def set_limit(tried: str, number: int, most: int) -> None:
    """Set a soft and a hard limit of this process (setrlimit(2)).  Raises HostError."""
    if libc.setrlimit(number, (native.c_uint64 * 2)(most, most)):
        raise HostError(tried, native.get_errno())


def timerfd_create(clock: int, flags: int) -> int:
    """Make a timer that is a descriptor."""
    return syscall("timerfd_create", SYS_TIMERFD_CREATE, clock, flags)


def timerfd_cancel_on_set(fd: int) -> None:
    """Arm a timer of CLOCK_REALTIME that expires as soon as the clock is set.  Reading it then gives ECANCELED."""
    never = (native.c_int64 * 4)(0, 0, FAR_FUTURE_S, 0)  # interval, then the time of expiry
    syscall("timerfd_settime", SYS_TIMERFD_SETTIME, fd, TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET, never, None)


def die_with_parent(signum: int) -> None:
    """Make the kernel send us `signum` when the thread that started us ends."""
    prctl("set the parent death signal", PR_SET_PDEATHSIG, signum)


def permitted_capabilities() -> int:
    """Return our permitted set as a bit mask."""
    header = cap_user_header(LINUX_CAPABILITY_VERSION_3, 0)
    data = (cap_user_data * 2)()
    syscall("capget", SYS_CAPGET, native.byref(header), data)
    return int(data[0].permitted) | int(data[1].permitted) << 32


def limit_bounding_set(keep: int) -> None:
    """Remove all capabilities outside the mask from the bounding set: no exec gives them.  Needs CAP_SETPCAP."""
    for capability in range(CAP_LAST + 1):
        # The kernel knows fewer than 64 capabilities.  For other numbers it answers EINVAL.
        known = libc.prctl(PR_CAPBSET_READ, *map(native.c_ulong, (capability, 0, 0, 0))) == 1
        if known and not keep & 1 << capability:
            prctl(f"drop capability {capability}", PR_CAPBSET_DROP, capability)


def set_capabilities(mask: int, inheritable: int = 0) -> None:
    """Set the effective, permitted and inheritable sets.  Capabilities that are not inheritable stop being ambient."""
    header = cap_user_header(LINUX_CAPABILITY_VERSION_3, 0)
    data = (cap_user_data * 2)()
    for half in range(2):
        data[half].effective = data[half].permitted = mask >> 32 * half & 0xFFFFFFFF
        data[half].inheritable = inheritable >> 32 * half & 0xFFFFFFFF
    syscall("capset", SYS_CAPSET, native.byref(header), data)


def become_user(uid: int, gid: int, capabilities: int) -> None:
    """Become a user with these capabilities, which also survive an exec.  Raises HostError."""
    if capabilities:
        prctl("keep capabilities", PR_SET_KEEPCAPS, 1)
    try:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise HostError(f"become user {uid} and group {gid}", error) from error
    set_capabilities(capabilities, inheritable=capabilities)
    for capability in range(CAP_LAST + 1):
        if capabilities & 1 << capability:
            prctl(f"keep capability {capability}", PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability)


def openat2(path: bytes, flags: int, resolve: int) -> int:
    """Open a file, resolving its path by RESOLVE_* flags.  Returns a descriptor.  Raises HostError."""
    how = open_how(flags, 0, resolve)
    tried = f"open {path.decode('utf-8', 'backslashreplace')}"
    return syscall(tried, SYS_OPENAT2, AT_FDCWD, path, native.byref(how), native.sizeof(how))


def same_file(one: os.stat_result, other: os.stat_result) -> bool:
    """Return whether two files are the same one."""
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


def open_place(path: bytes) -> int:
    """Return a descriptor (O_PATH) of a file that is reached by names only, not over a link in /proc/PID/fd.

    Such a link leads to an open file of a process, which the user may not be able to reach by any name.
    Raises HostError or OSError; ELOOP for such a link.
    """
    try:
        return openat2(path, os.O_PATH | os.O_CLOEXEC, RESOLVE_NO_MAGICLINKS)
    except HostError as error:
        if error.number not in REFUSED:
            raise
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        # The name that the kernel has for the file has no links in it.  If it leads to the same file, the user could
        # have given that name.
        proper = os.open(os.readlink(f"{DESCRIPTORS}/{place}"), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if same_file(os.fstat(place), os.fstat(proper)):
                return os.dup(place)
        finally:
            os.close(proper)
    except FileNotFoundError:
        pass  # the file has no name any more, or none in this root
    finally:
        os.close(place)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def file_system_type(fd: int) -> int:
    """Return the magic number of a file's file system (statfs(2)).  Raises HostError."""
    buffer = statfs_buf()
    if libc.fstatfs(fd, native.byref(buffer)):
        raise HostError("ask for the type of a file system", native.get_errno())
    return int(buffer.f_type)


def getsockopt(fd: int, level: int, option: int, request: bytes) -> bytes:
    """Get a socket option for which the buffer first has a request; return the buffer.  Raises HostError."""
    buffer = native.buffer(request)
    size = native.c_uint32(len(request))
    if libc.getsockopt(fd, level, option, buffer, native.byref(size)):
        raise HostError(f"get socket option {option}", native.get_errno())
    return buffer.raw[: size.value]


def load_library(name: str) -> None:
    """Load a shared library; it is never unloaded.  Raises OSError."""
    native.CDLL(name)
