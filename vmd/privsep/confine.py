"""What each process may still do, and the one call that makes it so, once and for ever.

    parent                       root's capabilities of `PARENT_CAPABILITIES`
    control, log, agentx, consolelog, metrics, imgprobe, imgwriter, seeder, devices
                                 nothing but the descriptors they hold
    vmm                          that, and to start processes inside its cell: the union of all below it, for
                                 filters are inherited over exec and only ever narrow (arch. 9)
    vm                           like vmm until its device processes are started; then `VM_BUILDING`, while it reads
                                 what its guest begins with; then `VM`
    opener                       to open files of the host, once it is who has named them
    logfile                      to make, rename and remove files in one directory, as the owner of a VM
    lockholder                   what /proc says of all processes, for reading, and one capability for that
    priv                         two capabilities, and what `nft` needs: files, programs, network sockets

A process calls `confine` after its last import, before its first thread and before the first byte from outside.
Sets of system calls are written down here and not in the packages that use them because vmm has to be able to name
what a device needs, and must not import it.
"""

import _thread
import codecs
import posix as os
import sys
import time

from vmd.privsep import landlock, linux, seccomp
from vmd.record import Record

DEBUG = b"VMD_DEBUG_SECCOMP"  # in the environment: name a system call that is refused, before it kills
DEBUGGING = ("statfs",)  # of libffi, when a process below vmm prepares to do that
CODECS = ("ascii", "latin-1", "utf-8")  # that every process has; others are files, and too late once it is confined

# What any running interpreter does, whatever the program.
BASE = (
    "read", "write", "close", "lseek", "fstat", "newfstatat",  # os.read and friends; file objects on descriptors
    "fcntl", "ioctl", "dup", "dup2", "dup3",                   # descriptor flags; no device's requests
    "mmap", "munmap", "mremap", "mprotect", "madvise", "brk",  # allocators; no executable memory
    "futex", "sched_yield", "gettid", "getpid", "tgkill",      # locks; abort() signals its own process
    "clone", "rseq", "set_robust_list", "sched_getaffinity",   # threads, not processes
    "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "restart_syscall",  # Python-level signals
    "clock_gettime", "clock_getres", "clock_nanosleep", "nanosleep",  # time.*, timed waits
    "getrandom",                                               # hash seeds, os.urandom
    "getuid", "geteuid", "getgid", "getegid", "getppid", "uname", "umask",  # harmless, asked by libraries
    "prctl",                                                   # thread names
    "exit", "exit_group",
)  # fmt: skip

# Waiting for descriptors and talking over those one holds.
CHANNEL = (
    "sendmsg", "recvmsg", "sendto", "recvfrom", "shutdown",    # no socket(): only sockets that were given
    "getsockname", "getpeername", "getsockopt", "setsockopt",  # socket objects ask what they were made from
    "poll", "ppoll", "epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait", "epoll_pwait2",
    "eventfd2", "pipe2", "socketpair",                         # wake-ups between threads; all unnamed
)  # fmt: skip

# An interpreter from execve to its last import.
STARTUP = (
    "openat", "open", "newfstatat+path", "stat", "lstat", "statx", "readlink", "readlinkat", "getdents64",  # import
    "access", "faccessat", "faccessat2", "getcwd", "pread64",  # the dynamic loader and site-less path set-up
    "mmap+exec", "mprotect+exec",                              # shared objects
    "arch_prctl", "set_tid_address", "prlimit64", "sysinfo",   # the C library's own start
    "close_range",                                             # what was inherited stays with us
)  # fmt: skip

# From the last import to being confined.
NARROW = (
    "seccomp", "landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self",
    "capget", "prlimit64",                                     # a look at what we have; limits
    "prctl+confine",                                           # no_new_privs, not dumpable, die with the parent
)  # fmt: skip

# Starting processes of ours, and outliving them.
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
LIMITS = ("prlimit64",)  # of its own, and only to lower them: memory, once the guest's is known
NET = ("readv", "writev")  # whole frames, straight from and to guest memory
TUN_IOCTLS = (0x400454D0, 0x400454D8)  # TUNSETOFFLOAD, TUNSETVNETHDRSZ

# /dev/vhost-net: an owner, features, memory, rings and their eventfds, a tap to move frames from and to.  Neither a log
# of what is written nor an IOTLB.  `devices/vionet/vhost.py` has their names.
VHOST_IOCTLS = (
    0xAF01, 0x8008AF00, 0x4008AF00, 0x4008AF03, 0x4008AF10, 0x4028AF11, 0x4008AF12, 0xC008AF12, 0x4008AF20, 0x4008AF21,
    0x4008AF22, 0x4008AF30,
)  # fmt: skip

TTY_IOCTLS = (0x540B,)  # TCFLSH: a console's backlog replaces what waits in it

# The machine: guest memory, KVM's descriptors, vCPU threads; and a running VM's way out and in (vmctl send).
MACHINE = (
    "memfd_create", "ftruncate",                               # guest memory and shared pages
    "readv", "writev", "pread64", "pwrite64", "preadv2", "pwritev2",  # boot images into it, state out of it
    "sendfile", "splice",                                      # memory runs leave without being copied
    "tgkill",                                                  # kicks a vCPU thread out of KVM_RUN
    "waitid", "wait4",                                         # its devices, which end with it
    "timerfd_create", "timerfd_settime",                       # notices that the host has slept
)  # fmt: skip

# How many descriptors a process may have open, and of all descriptors that processes of its uid have on their way to
# others.  Beyond that it can pass none on.  So whoever may be taken over has less than those who must go on: a VM that
# has sent itself all it can keeps neither another one from its start, nor control and vmm from their work.
CORE_FILES, BUILDING_FILES, RUNNING_FILES = 16384, 8192, 4096


class Confinement(Record):
    """What is left to a process."""

    syscalls: tuple[str, ...]  # rules of `seccomp`; every process has all of these records, and a set is large
    # None: every refused call ends the process.  Otherwise only these do: others fail, and the kernel logs them.
    deadly: tuple[str, ...] | None = None
    ioctls: tuple[int, ...] = ()  # requests, beside those of every descriptor; needs the rule "ioctl"
    files: tuple[tuple[str, int], ...] = ()  # (path, rights of `landlock`)
    scopes: int = landlock.SCOPE_ALL
    capabilities: int = 0  # mask
    open_files: int = 1024
    writes_files: bool = True  # else none can be written, even if it comes as a descriptor that may be
    sees_others: bool = False  # looks at processes of others, which Landlock keeps everybody from


LEAF = Confinement(syscalls=BASE + CHANNEL + LIMITS, writes_files=False)  # what every device needs
VIOBLK = LEAF.replace(syscalls=LEAF.syscalls + BLOCK, writes_files=True)
VIOSCSI = VIOBLK.replace(writes_files=False)  # an ISO is a disk image that is only read
IMGWRITER = Confinement(syscalls=BASE + CHANNEL + LIMITS + BLOCK, open_files=64)  # snapshots
IMGPROBE = Confinement(syscalls=BASE + CHANNEL + ("pread64", "preadv2"), open_files=64)
BOOTPROBE = IMGPROBE.replace(  # reads what vm processes load
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
VIONET_KERNEL = VIONET.replace(  # its packet socket could send to any interface of the host, by an address
    syscalls=tuple(call for call in VIONET.syscalls if call not in ("sendmsg", "setsockopt")),
    ioctls=TUN_IOCTLS + VHOST_IOCTLS,
)
LOG = Confinement(syscalls=BASE + CHANNEL, open_files=CORE_FILES)  # a socket for each VM
AGENTX = Confinement(syscalls=BASE + CHANNEL, open_files=64, writes_files=False)
CONSOLELOG = Confinement(syscalls=BASE + CHANNEL + ("pread64",), open_files=CORE_FILES)  # a backlog and a file for each
LOGFILE = Confinement(  # and what it may do with the names in one directory
    syscalls=BASE + CHANNEL + ("openat", "newfstatat+path", "renameat", "unlinkat", "flock"),
    capabilities=1 << linux.CAP_DAC_OVERRIDE,
    open_files=64,
)
METRICS = Confinement(syscalls=BASE + CHANNEL + ("accept4",), writes_files=False)  # it accepts its clients itself
CONTROL = Confinement(syscalls=BASE + CHANNEL, open_files=CORE_FILES)  # a socket for each vmctl; the parent accepts

OPENER = Confinement(
    syscalls=BASE
    + CHANNEL
    + ("openat", "openat2", "newfstatat+path", "readlink", "fstatfs", "pread64")  # nothing is made, renamed or removed
    + ("setgroups", "setresgid", "setresuid", "prlimit64"),
    # No program is run, and nothing listed.  What a device process may do with a file later is decided now.
    files=(("/", landlock.READ_FILE | landlock.WRITE_FILE | landlock.TRUNCATE | landlock.IOCTL_DEV),),
    capabilities=1 << linux.CAP_DAC_OVERRIDE
    | 1 << linux.CAP_DAC_READ_SEARCH
    | 1 << linux.CAP_SETUID
    | 1 << linux.CAP_SETGID,
)

VM = Confinement(  # and the KVM requests that the process names
    syscalls=BASE + CHANNEL + MACHINE,
    ioctls=TTY_IOCTLS,
    # Signals are kept inside before it starts its devices: here it would be shut off from them, and they would not die
    # with it.
    scopes=landlock.SCOPE_SOCKETS,
    open_files=RUNNING_FILES,
)
VM_BUILDING = VM.replace(  # until `narrow_requests` and `limit_open_files`
    syscalls=BASE + CHANNEL + MACHINE + ("seccomp", "prlimit64"), open_files=BUILDING_FILES
)

VMM = Confinement(
    syscalls=BASE
    + CHANNEL
    + SPAWN
    # ... and all that any process below it will ever do:
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
    open_files=CORE_FILES,  # a pidfd and a channel for each VM, and its files while they pass through
)

# nft and its libraries come from the host and differ between distributions: a call that is missing here must not end
# them.  No honest version of them makes one of these.
NO_PROGRAM_DOES = (
    "ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "pidfd_getfd",  # other processes
    "mount", "umount2", "pivot_root", "chroot", "open_tree", "move_mount", "fsopen", "fsconfig", "fsmount", "fspick",
    "mount_setattr", "unshare", "setns", "open_by_handle_at",                  # another view of the host
    "init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot", "swapon", "swapoff",
    "acct", "iopl", "ioperm", "modify_ldt",                                    # the host itself
    "bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "io_uring_enter", "io_uring_register",
    "add_key", "request_key", "keyctl",                                        # large, and often attacked
)  # fmt: skip

PARENT_CAPABILITIES = (  # docs/security.md says what for
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

TUNSETIFF = 0x400454CA
SIOCGIFNAME, SIOCGIFCONF, SIOCGIFFLAGS, SIOCGIFMTU, SIOCGIFINDEX = 0x8910, 0x8912, 0x8913, 0x8921, 0x8933

PRIV = Confinement(
    syscalls=BASE
    + CHANNEL
    + STARTUP
    + SPAWN  # nft
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
        ("/etc/ld.so.cache", landlock.READ),  # ... and how they are found
        ("/etc/iproute2", landlock.READ),  # names of groups and tables
        ("/etc/localtime", landlock.READ),
        ("/dev/null", landlock.WRITE),
        ("/proc", landlock.READ),  # interfaces, modules and our own descriptors
        ("/proc/sys/net", landlock.WRITE),  # forwarding, per-interface IPv6
        ("/sys/class/net", landlock.READ),
        ("/sys/devices", landlock.READ),  # what /sys/class/net points to
        ("/run/vmd/priv", landlock.OWN),  # what has to be put back
    ),
)


def confine(confinement: Confinement, program: bytes | None = None) -> list[str]:
    """Give up everything else; returns a sentence for each kernel feature that is missing.

    `program` is what `filter_of` has returned, if somebody has had the time to ask before.

    Raises:
        HostError: a restriction that must hold could not be put in place; the process has to end.
    """
    # Landlock binds the calling thread only.
    if _thread._count():
        raise RuntimeError("confine must be called before the first thread is started")
    prime()
    if confinement.deadly is None and is_debugged():
        show_refused_calls()
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
    """Of all requests that are left to this process, keep these, make no memory files, and let nothing change that.

    `program` is as for `confine`, of `filter_of_requests`.
    """
    seccomp.install(program or filter_of_requests(ioctls))


def filter_of_requests(ioctls: tuple[int, ...]) -> bytes:
    """Return the filter that `narrow_requests` installs."""
    return seccomp.assemble_requests(ioctls, seccomp.RET_TRAP if is_debugged() else seccomp.RET_KILL_PROCESS)


def prime() -> None:
    """Do what would otherwise be imported or opened late, when nothing can be opened any more."""
    for codec in CODECS:
        codecs.lookup(codec)
    time.localtime()
    if sys.version_info >= (3, 13):
        # From here on the interpreter shows an uncaught exception through these, and imports the last lazily.
        import linecache  # noqa: F401
        import tokenize  # noqa: F401
        import traceback  # noqa: F401
    try:
        # glibc loads it when a thread is ended from outside, as Python does with daemon threads, or aborts.
        linux.load_library("libgcc_s.so.1")
    except OSError:
        return  # other C libraries do without


def limit_resources(open_files: int, *, writes_files: bool) -> None:
    """No core dumps, for they hold guest memory; no more descriptors than asked for, nor files written.

    Raises HostError.
    """
    linux.set_limit("limit resources", linux.RLIMIT_CORE, 0)
    if not writes_files:
        linux.set_limit("limit resources", linux.RLIMIT_FSIZE, 0)
    limit_open_files(open_files)


def limit_memory(most_bytes: int) -> None:
    """Have no more memory mapped from now on, of whatever kind, nor than the host allows.  Raises HostError."""
    lower_limit(linux.RLIMIT_AS, most_bytes, "memory")


def limit_open_files(most: int) -> None:
    """Have no more descriptors from now on, nor than the host allows.  Raises HostError."""
    lower_limit(linux.RLIMIT_NOFILE, most, "open files")


def lower_limit(number: int, most: int, what: str) -> None:
    """Set a limit of setrlimit(2) for good, but to no more than the host allows.  Raises HostError."""
    linux.set_limit(f"limit {what}", number, min(most, linux.hard_limit(number)))


def give_up_capabilities(keep: int) -> None:
    """Keep no capability outside the mask; a process that came through a cell has none to begin with."""
    permitted = linux.permitted_capabilities()
    if permitted & 1 << linux.CAP_SETPCAP:
        linux.limit_bounding_set(keep)
    if permitted & ~keep:
        linux.set_capabilities(permitted & keep, inheritable=permitted & keep)  # what is ambient goes on to programs


def is_debugged() -> bool:
    """Return whether refused system calls are to be shown (`vmd.privsep.refused`): our starter decides that."""
    return DEBUG in os.environ


def show_refused_calls() -> None:
    """Have a refused system call named in the log before this process dies of it."""
    from vmd.privsep import refused  # not before: it brings ctypes along

    refused.show()
