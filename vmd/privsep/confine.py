"""The rights that each process keeps, and the call `confine`, which gives up all others permanently.

    parent                       the capabilities in `PARENT_CAPABILITIES`
    control, log, agentx, consolelog, metrics, imgprobe, imgwriter, seeder, devices
                                 only the descriptors that they have
    vmm                          starts processes inside its cell; has the union of the rights of all processes below
                                 it, because filters are inherited over exec and can only narrow (arch. 9)
    vm                           like vmm until its device processes are started; then `VM_BUILDING`, while it reads
                                 the boot files or the stream; then `VM`
    opener                       opens files of the host, after it has become the user who named them
    logfile                      makes, renames and removes files in one directory, as the owner of a VM
    lockholder                   reads /proc of all processes, and has one capability for that
    priv                         two capabilities, and the needs of `nft`: files, programs, network sockets

A process calls `confine` after its last import, before its first thread and before the first byte from outside.
The sets of system calls are here and not in the packages that use them, because vmm needs the sets of devices and must
not import device code.
"""

import _thread
import codecs
import posix as os
import sys
import time

from vmd.privsep import landlock, linux, seccomp
from vmd.privsep.start import CODE_FD, CODE_OUTSIDE
from vmd.record import Record

DEBUG = b"VMD_DEBUG_SECCOMP"  # in the environment: log the name of a refused system call before it kills the process
DEBUGGING = ("statfs",)  # libffi calls it when a process below vmm prepares to log refused calls
CODECS = ("ascii", "latin-1", "utf-8")  # loaded before a process is confined; a codec is a file to import

# System calls of a running interpreter, for any program.
BASE = (
    "read", "write", "close", "lseek", "fstat", "newfstatat",  # os.read and friends; file objects on descriptors
    "fcntl", "ioctl", "dup", "dup2", "dup3",                   # descriptor flags; no device's requests
    "mmap", "munmap", "mremap", "mprotect", "madvise", "brk",  # allocators; no executable memory
    "futex", "sched_yield", "gettid", "getpid", "tgkill",      # locks; abort() signals its own process
    "clone", "rseq", "set_robust_list", "sched_getaffinity",   # threads, not processes
    "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "restart_syscall",  # Python-level signals
    "clock_gettime", "clock_getres", "clock_nanosleep", "nanosleep",  # time.*, timed waits
    "getrandom",                                               # hash seeds, os.urandom
    "getuid", "geteuid", "getgid", "getegid", "getppid", "uname", "umask",  # harmless; libraries call them
    "prctl",                                                   # thread names
    "exit", "exit_group",
)  # fmt: skip

# Waiting for descriptors, and communication over sockets that the process has.
CHANNEL = (
    "sendmsg", "recvmsg", "sendto", "recvfrom", "shutdown",    # no socket(): only sockets that were passed to it
    "getsockname", "getpeername", "getsockopt", "setsockopt",  # Python's socket objects query their socket
    "poll", "ppoll", "epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait", "epoll_pwait2",
    "eventfd2", "pipe2", "socketpair",                         # wake-ups between threads; all unnamed
)  # fmt: skip

# An interpreter from execve to its last import.
STARTUP = (
    "openat", "open", "newfstatat+path", "stat", "lstat", "statx", "readlink", "readlinkat", "getdents64",  # import
    "access", "faccessat", "faccessat2", "getcwd", "pread64",  # the dynamic loader and site-less path set-up
    "mmap+exec", "mprotect+exec",                              # shared objects
    "arch_prctl", "set_tid_address", "prlimit64", "sysinfo",   # the C library's own start
    "close_range",                                             # inherited descriptors are not passed on
)  # fmt: skip

# From the last import to the end of `confine`.
NARROW = (
    "seccomp", "landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self",
    "capget", "prlimit64",                                     # reads the capabilities; sets limits
    "prctl+confine",                                           # no_new_privs, not dumpable, die with the parent
)  # fmt: skip

# Starting our processes, and reaping them.
SPAWN = (
    "clone+process", "vfork", "execve", "setsid",              # no new namespaces
    "pidfd_open", "pidfd_send_signal", "waitid", "wait4",
    "tgkill+any",                                              # inherited; each VM narrows it to itself
)  # fmt: skip

# Files and devices behind descriptors.
BLOCK = (
    "preadv", "preadv2", "pwritev", "pwritev2", "pread64", "pwrite64",  # CPython's os.preadv is preadv2
    "fsync", "fdatasync", "fallocate", "fadvise64",                     # flush, discard
    "ftruncate",                                                        # a disk that becomes larger
)  # fmt: skip
LIMITS = ("prlimit64",)  # lowers the process's own limit of memory, when the guest's memory is known
NET = ("readv", "writev")  # frames, directly to and from guest memory
TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8
TUN_IOCTLS = (TUNSETOFFLOAD, TUNSETVNETHDRSZ)

# /dev/vhost-net: owner, features, memory, rings and their eventfds, and the tap.  Not the log of changed memory, and
# not the IOTLB.  `devices/vionet/vhost.py` has the names.
VHOST_IOCTLS = (
    0xAF01, 0x8008AF00, 0x4008AF00, 0x4008AF03, 0x4008AF10, 0x4028AF11, 0x4008AF12, 0xC008AF12, 0x4008AF20, 0x4008AF21,
    0x4008AF22, 0x4008AF30,
)  # fmt: skip

TTY_IOCTLS = (0x540B,)  # TCFLSH: drops the output that waits in the pty, because the backlog has it

# The machine: guest memory, KVM's descriptors, vCPU threads; and sending and receiving a VM.
MACHINE = (
    "memfd_create", "ftruncate",                               # guest memory and shared pages
    "readv", "writev", "pread64", "pwrite64", "preadv2", "pwritev2",  # read boot images, write state
    "sendfile", "splice",                                      # send memory without copying it
    "tgkill",                                                  # kicks a vCPU thread out of KVM_RUN
    "waitid", "wait4",                                         # reap its devices
    "timerfd_create", "timerfd_settime",                       # to notice that the host was suspended
)  # fmt: skip

# Limits of open descriptors (RLIMIT_NOFILE).  The kernel applies the limit also to the descriptors in flight: a process
# can send none if all processes of its uid together have more in flight than its limit.  So a process that may be taken
# over has a lower limit than those that must go on.  A VM that has as many in flight as it can then stops neither the
# start of another VM, nor control, nor vmm.
CORE_FILES, BUILDING_FILES, RUNNING_FILES = 16384, 8192, 4096


class Confinement(Record):
    """The rights that a process keeps."""

    syscalls: tuple[str, ...]  # rules of `seccomp`; a tuple, because a set is larger, and each process has all of these
    # None: each refused call ends the process.  Otherwise only these calls do; others fail, and the kernel logs them.
    deadly: tuple[str, ...] | None = None
    ioctls: tuple[int, ...] = ()  # requests, besides those for all descriptors; needs the rule "ioctl"
    files: tuple[tuple[str, int], ...] = ()  # (path, rights of `landlock`)
    scopes: int = landlock.SCOPE_ALL
    capabilities: int = 0  # mask
    open_files: int = 1024
    writes_files: bool = True  # False: it can write no file, even if it has a writable descriptor (RLIMIT_FSIZE)
    sees_others: bool = False  # it inspects processes of others, so it does without Landlock, which forbids that


LEAF = Confinement(syscalls=BASE + CHANNEL + LIMITS, writes_files=False)  # the needs of all devices
VIOBLK = LEAF.replace(syscalls=LEAF.syscalls + BLOCK, writes_files=True)
VIOSCSI = VIOBLK.replace(writes_files=False)  # a disc is only read
IMGWRITER = Confinement(syscalls=BASE + CHANNEL + LIMITS + BLOCK, open_files=64)  # snapshots
IMGPROBE = Confinement(syscalls=BASE + CHANNEL + ("pread64", "preadv2"), open_files=64)
BOOTPROBE = IMGPROBE.replace(  # reads the files that a VM's process boots
    syscalls=BASE + CHANNEL + ("pread64", "preadv2", "memfd_create")
)
IMGBOOT = IMGPROBE.replace(  # copies a kernel out of a disk
    syscalls=BASE + CHANNEL + LIMITS + ("pread64", "preadv2", "pwrite64", "ftruncate")
)
IMGRESIZE = IMGPROBE.replace(syscalls=BASE + CHANNEL + BLOCK)
SEEDER = IMGPROBE.replace(syscalls=BASE + CHANNEL + ("pread64",))  # two memory files, which it writes and seals
STREAMPROBE = IMGPROBE.replace(syscalls=BASE + CHANNEL + ("readv",))
LOCKHOLDER = IMGPROBE.replace(
    syscalls=BASE + CHANNEL + ("openat+reading", "getdents64"),
    capabilities=1 << linux.CAP_SYS_PTRACE,
    writes_files=False,
    sees_others=True,
)
VIONET = LEAF.replace(syscalls=LEAF.syscalls + NET, ioctls=TUN_IOCTLS)
VIONET_KERNEL = VIONET.replace(  # with an address or an option its packet socket could send to any interface
    syscalls=tuple(call for call in VIONET.syscalls if call not in ("sendmsg", "setsockopt")),
    ioctls=TUN_IOCTLS + VHOST_IOCTLS,
)
LOG = Confinement(syscalls=BASE + CHANNEL, open_files=CORE_FILES)  # a socket for each VM
AGENTX = Confinement(syscalls=BASE + CHANNEL, open_files=64, writes_files=False)
CONSOLELOG = Confinement(syscalls=BASE + CHANNEL + ("pread64",), open_files=CORE_FILES)  # a backlog and a file for each
LOGFILE = Confinement(  # may also open, rename and remove files in a directory
    syscalls=BASE + CHANNEL + ("openat", "newfstatat+path", "renameat", "unlinkat", "flock"),
    capabilities=1 << linux.CAP_DAC_OVERRIDE,
    open_files=64,
)
METRICS = Confinement(syscalls=BASE + CHANNEL + ("accept4",), writes_files=False)  # accepts its clients itself
CONTROL = Confinement(syscalls=BASE + CHANNEL, open_files=CORE_FILES)  # a socket for each vmctl; the parent accepts

OPENER = Confinement(
    syscalls=BASE
    + CHANNEL
    + ("openat", "openat2", "newfstatat+path", "readlink", "fstatfs", "pread64")  # no file is renamed or removed
    + ("setgroups", "setresgid", "setresuid", "prlimit64"),
    # No right to run a program or to list a directory.  Rights to a file are fixed when it is opened: a device process
    # that gets the descriptor later has the rights that are listed here.
    files=(("/", landlock.READ_FILE | landlock.WRITE_FILE | landlock.TRUNCATE | landlock.IOCTL_DEV),),
    capabilities=1 << linux.CAP_DAC_OVERRIDE
    | 1 << linux.CAP_DAC_READ_SEARCH
    | 1 << linux.CAP_SETUID
    | 1 << linux.CAP_SETGID,
)

VM = Confinement(  # the process adds the KVM requests that it needs
    syscalls=BASE + CHANNEL + MACHINE,
    ioctls=TTY_IOCTLS,
    # The scope for signals is set earlier, before it starts its devices (`landlock.keep_signals_inside`).  Set here, it
    # would separate the process from its devices, and they would not be killed with it.
    scopes=landlock.SCOPE_SOCKETS,
    open_files=RUNNING_FILES,
)
VM_BUILDING = VM.replace(  # holds until `narrow_requests` and `limit_open_files`
    syscalls=BASE + CHANNEL + MACHINE + ("seccomp", "prlimit64"), open_files=BUILDING_FILES
)

VMM = Confinement(
    syscalls=BASE
    + CHANNEL
    + SPAWN
    # All calls of any process below it:
    + STARTUP
    + NARROW
    + MACHINE
    + BLOCK
    + NET
    + ("ioctl+kvm",)
    + ("setgroups", "setresgid", "setresuid", "capset"),  # each VM process becomes another user
    ioctls=TUN_IOCTLS + VHOST_IOCTLS + TTY_IOCTLS,
    files=(("/", landlock.RUN),),  # the cell: interpreter, libraries, our code
    capabilities=1 << linux.CAP_SETUID | 1 << linux.CAP_SETGID | 1 << linux.CAP_KILL,  # over ids of VMs; see `VmmCell`
    open_files=CORE_FILES,  # a pidfd, a channel and the kept descriptors of each VM
)

# nft and its libraries come from the host and differ between distributions.  So a call that the filter lacks must not
# kill them.  But no genuine version of them makes one of the calls below.
NO_PROGRAM_DOES = (
    "ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "pidfd_getfd",  # other processes
    "mount", "umount2", "pivot_root", "chroot", "open_tree", "move_mount", "fsopen", "fsconfig", "fsmount", "fspick",
    "mount_setattr", "unshare", "setns", "open_by_handle_at",                  # another view of the host
    "init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot", "swapon", "swapoff",
    "acct", "iopl", "ioperm", "modify_ldt",                                    # the host itself
    "bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "io_uring_enter", "io_uring_register",
    "add_key", "request_key", "keyctl",                                        # large, and often attacked
)  # fmt: skip

PARENT_CAPABILITIES = (  # docs/security.md has the reason of each
    linux.CAP_CHOWN,
    linux.CAP_DAC_OVERRIDE,
    linux.CAP_DAC_READ_SEARCH,
    linux.CAP_FOWNER,
    linux.CAP_KILL,
    linux.CAP_SETGID,
    linux.CAP_SETUID,
    linux.CAP_SETPCAP,
    linux.CAP_NET_ADMIN,
    linux.CAP_NET_RAW,
    linux.CAP_SYS_CHROOT,
    linux.CAP_SYS_PTRACE,
    linux.CAP_SYS_ADMIN,
    linux.CAP_SYS_RESOURCE,
)

SIOCGIFNAME, SIOCGIFCONF, SIOCGIFFLAGS, SIOCGIFMTU, SIOCGIFINDEX = 0x8910, 0x8912, 0x8913, 0x8921, 0x8933
PRIV_DIRECTORY = "/run/vmd/priv"  # on the host, and as priv sees it

PRIV = Confinement(
    syscalls=BASE
    + CHANNEL
    + STARTUP
    + SPAWN  # nft
    + ("fcntl+flags",)  # nft makes its socket non-blocking
    + ("socket+network", "bind", "sendto+any", "recvmmsg", "sendmmsg", "readv", "writev")  # netlink; no connect()
    + ("flock", "ftruncate", "pwrite64", "unlink")  # its file of settings
    + ("statfs", "fstatfs", "chdir", "kill", "select", "pselect6", "pause")
    + ("getrlimit", "getrusage", "gettimeofday", "time", "times", "getpgrp", "getpgid", "getgroups")
    + ("getresuid", "getresgid", "capget", "membarrier", "mincore")
    + ("rt_sigpending", "rt_sigtimedwait", "rt_sigsuspend"),
    deadly=NO_PROGRAM_DOES,
    ioctls=(TUNSETIFF, SIOCGIFNAME, SIOCGIFCONF, SIOCGIFFLAGS, SIOCGIFMTU, SIOCGIFINDEX),
    capabilities=1 << linux.CAP_NET_ADMIN | 1 << linux.CAP_NET_RAW,
    files=(
        *((path, landlock.RUN) for path in ("/usr", "/bin", "/sbin", "/lib", "/lib64")),  # programs, libraries
        ("/etc/ld.so.cache", landlock.READ),  # where libraries are
        ("/etc/iproute2", landlock.READ),  # names of groups and tables
        ("/etc/localtime", landlock.READ),
        ("/dev/null", landlock.WRITE),
        ("/proc", landlock.READ),  # interfaces, modules and our own descriptors
        ("/proc/sys/net", landlock.WRITE),  # forwarding, per-interface IPv6
        ("/sys/class/net", landlock.READ),
        ("/sys/devices", landlock.READ),  # the target of the links in /sys/class/net
        (PRIV_DIRECTORY, landlock.OWN),  # host settings that have to be restored
    ),
)


def confine(confinement: Confinement, program: bytes | None = None) -> list[str]:
    """Give up all rights that `confinement` does not list.  Returns a sentence for each missing kernel feature.

    `program` is the result of `filter_of`, if it was called before to save time here.

    Raises:
        HostError: a restriction that must hold could not be put in place; the process has to end.
    """
    # Landlock restricts the calling thread only.
    if _thread._count():
        raise RuntimeError("confine must be called before the first thread is started")
    prime()
    if confinement.deadly is None and is_debugged():
        show_refused_calls()
    close_code()
    limit_resources(confinement.open_files, writes_files=confinement.writes_files)
    give_up_capabilities(confinement.capabilities)
    linux.prctl("set no_new_privs", linux.PR_SET_NO_NEW_PRIVS, 1)
    linux.prctl("forbid being traced", linux.PR_SET_DUMPABLE, 0)
    warnings = [] if confinement.sees_others else landlock.restrict(confinement.files, confinement.scopes)
    seccomp.install(program or filter_of(confinement), logged=confinement.deadly is not None)
    return warnings


def filter_of(confinement: Confinement) -> bytes:
    """Return the filter that `confine` installs in this process."""
    syscalls = confinement.syscalls
    refused = seccomp.RET_KILL_PROCESS if confinement.deadly is None else seccomp.RET_EPERM
    if refused == seccomp.RET_KILL_PROCESS and is_debugged():
        refused = seccomp.RET_TRAP
        syscalls += DEBUGGING
    return seccomp.assemble(
        syscalls,
        ioctls=confinement.ioctls,
        pid=os.getpid(),
        refused=refused,
        deadly=confinement.deadly or (),
    )


def narrow_requests(ioctls: tuple[int, ...], program: bytes | None = None) -> None:
    """Give up all ioctl requests but these, and memfd_create.  Forbid new filters too.

    `program` is the result of `filter_of_requests`, if it was called before to save time here.
    """
    seccomp.install(program or filter_of_requests(ioctls))


def filter_of_requests(ioctls: tuple[int, ...]) -> bytes:
    """Return the filter that `narrow_requests` installs."""
    return seccomp.assemble_requests(ioctls, seccomp.RET_TRAP if is_debugged() else seccomp.RET_KILL_PROCESS)


def prime() -> None:
    """Load modules and libraries that Python would load later, when this process can open no file any more."""
    for codec in CODECS:
        codecs.lookup(codec)
    time.localtime()
    if sys.version_info >= (3, 13):
        # Since 3.13 the interpreter prints an uncaught exception with these modules, and imports them only then.
        import linecache  # noqa: F401
        import tokenize  # noqa: F401
        import traceback  # noqa: F401
    try:
        # glibc loads this library when a thread is cancelled, as Python does with daemon threads, or aborts.
        linux.load_library("libgcc_s.so.1")
    except OSError:
        return  # other C libraries do not need it


def close_code() -> None:
    """Close the descriptor that this process has loaded its code by, if there is one."""
    if CODE_OUTSIDE in sys.path:
        sys.path.remove(CODE_OUTSIDE)
        os.close(CODE_FD)


def limit_resources(open_files: int, *, writes_files: bool) -> None:
    """Forbid core dumps, because they contain guest memory.  Limit open descriptors, and perhaps forbid writing files.

    Raises HostError.
    """
    linux.set_limit("limit resources", linux.RLIMIT_CORE, 0)
    if not writes_files:
        linux.set_limit("limit resources", linux.RLIMIT_FSIZE, 0)
    limit_open_files(open_files)


def limit_memory(most_bytes: int) -> None:
    """Limit the mapped memory of any kind to `most_bytes`, or to the host's lower limit.  Raises HostError."""
    lower_limit(linux.RLIMIT_AS, most_bytes, "memory")


def limit_open_files(most: int) -> None:
    """Limit the open descriptors to `most`, or to the host's lower limit.  Raises HostError."""
    lower_limit(linux.RLIMIT_NOFILE, most, "open files")


def lower_limit(number: int, most: int, what: str) -> None:
    """Set both limits of setrlimit(2), so that they cannot be raised; to no more than the host allows.

    Raises HostError.
    """
    linux.set_limit(f"limit {what}", number, min(most, linux.hard_limit(number)))


def give_up_capabilities(keep: int) -> None:
    """Give up all capabilities outside the mask `keep`.  A process that was started in a cell has none to give up."""
    permitted = linux.permitted_capabilities()
    if permitted & 1 << linux.CAP_SETPCAP:
        linux.limit_bounding_set(keep)
    if permitted & ~keep:
        # Inheritable, so that the ambient ones stay: programs that this process runs need them.
        linux.set_capabilities(permitted & keep, inheritable=permitted & keep)


def is_debugged() -> bool:
    """Return whether refused system calls are to be logged (`vmd.privsep.refused`).  The environment says so."""
    return DEBUG in os.environ


def show_refused_calls() -> None:
    """Log the name of a refused system call before it kills this process."""
    from vmd.privsep import refused  # imported only here, because it imports ctypes

    refused.show()
