"""System call filters: from a set of rule names to an installed BPF program (seccomp(2), x86-64).

A rule is the name of a system call.  Some calls have two rules: the plain name allows only harmless arguments,
`name+word` allows more.  `CONDITIONS` says which.  A call that no rule allows ends the process, as with pledge(2).
Calls in `SOFT` fail with an errno instead.  A process that runs programs of the host has a forgiving filter: a refused
call fails with an errno, and only a short list of calls ends the process.
"""

import errno
import posix as os
import struct

from vmd import native
from vmd.errors import HostError
from vmd.privsep import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    # (operation, argument index, value): see `test`
    Condition = tuple[str, int, int]

# fmt: off
NUMBERS = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8,
    "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14,
    "rt_sigreturn": 15, "ioctl": 16, "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21,
    "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32, "dup2": 33, "nanosleep": 35, "getpid": 39,
    "sendfile": 40, "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "shutdown": 48,
    "getsockname": 51, "getpeername": 52, "socketpair": 53, "setsockopt": 54, "getsockopt": 55, "clone": 56,
    "vfork": 58, "execve": 59, "exit": 60, "wait4": 61, "uname": 63, "fcntl": 72, "fsync": 74, "fdatasync": 75,
    "ftruncate": 77, "getcwd": 79, "readlink": 89, "umask": 95, "sysinfo": 99, "getuid": 102, "getgid": 104,
    "geteuid": 107, "getegid": 108, "getppid": 110, "setsid": 112,
    "setgroups": 116, "setresuid": 117, "setresgid": 119, "capget": 125, "capset": 126,
    "sigaltstack": 131, "prctl": 157, "arch_prctl": 158, "gettid": 186, "futex": 202, "sched_getaffinity": 204,
    "getdents64": 217, "set_tid_address": 218, "restart_syscall": 219, "fadvise64": 221, "clock_gettime": 228,
    "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233,
    "tgkill": 234, "waitid": 247, "openat": 257, "newfstatat": 262, "readlinkat": 267, "faccessat": 269,
    "ppoll": 271, "set_robust_list": 273, "splice": 275, "epoll_pwait": 281, "timerfd_create": 283,
    "fallocate": 285, "timerfd_settime": 286, "accept4": 288,
    "eventfd2": 290, "epoll_create1": 291, "dup3": 292, "pipe2": 293, "preadv": 295, "pwritev": 296,
    "prlimit64": 302, "getrandom": 318, "seccomp": 317, "memfd_create": 319, "preadv2": 327, "pwritev2": 328,
    "statx": 332, "rseq": 334, "pidfd_send_signal": 424, "pidfd_open": 434, "clone3": 435, "close_range": 436,
    "renameat": 264, "unlinkat": 263,
    "openat2": 437, "faccessat2": 439, "epoll_pwait2": 441, "landlock_create_ruleset": 444, "landlock_add_rule": 445,
    "landlock_restrict_self": 446,
    # Calls of programs of the host.
    "select": 23, "getrlimit": 97, "gettimeofday": 96, "getrusage": 98, "times": 100, "getpgrp": 111, "getgroups": 115,
    "getresuid": 118, "getresgid": 120, "getpgid": 121, "statfs": 137, "fstatfs": 138, "time": 201, "pselect6": 270,
    "flock": 73, "chdir": 80, "unlink": 87, "kill": 62, "socket": 41, "bind": 49, "recvmmsg": 299, "sendmmsg": 307,
    "membarrier": 324, "mincore": 27, "pause": 34, "rt_sigpending": 127, "rt_sigtimedwait": 128, "rt_sigsuspend": 130,
    # Calls that end a process with a forgiving filter.
    "ptrace": 101, "modify_ldt": 154, "pivot_root": 155, "chroot": 161, "acct": 163, "mount": 165, "umount2": 166,
    "swapon": 167, "swapoff": 168, "reboot": 169, "iopl": 172, "ioperm": 173, "init_module": 175, "delete_module": 176,
    "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250, "unshare": 272, "perf_event_open": 298,
    "open_by_handle_at": 304, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312,
    "finit_module": 313, "kexec_file_load": 320, "bpf": 321, "userfaultfd": 323, "io_uring_setup": 425,
    "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429, "fsopen": 430,
    "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_getfd": 438, "mount_setattr": 442,
}
# fmt: on

# Calls with a file name fail instead of killing: a traceback looks for source files, and the code for an exception may
# import a module.  They would find no file anyway.  clone3 passes its flags by a pointer, so a filter cannot check
# them; on ENOSYS glibc uses clone instead.
SOFT = {
    "open": errno.EPERM,
    "openat": errno.EPERM,
    "stat": errno.EPERM,
    "lstat": errno.EPERM,
    "newfstatat": errno.EPERM,
    "statx": errno.EPERM,
    "access": errno.EPERM,
    "faccessat": errno.EPERM,
    "faccessat2": errno.EPERM,
    "readlink": errno.EPERM,
    "readlinkat": errno.EPERM,
    "getcwd": errno.EPERM,
    "clone3": errno.ENOSYS,
}

PROT_EXEC = 4
CLONE_THREAD = 0x10000
# Without CLONE_NEWTIME (0x80): in clone that bit belongs to the exit signal, and only clone3 has the flag.
CLONE_NEW_ANYTHING = 0x7E020000
AT_EMPTY_PATH = 0x1000
AF_UNIX, AF_INET, AF_INET6, AF_NETLINK = 1, 2, 10, 16
KVMIO = 0xAE

TCGETS, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX = 0x5401, 0x541B, 0x5421, 0x5450, 0x5451
F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL = 0, 1, 2, 3, 4
F_OFD_GETLK, F_OFD_SETLK = 36, 37
F_DUPFD_CLOEXEC, F_ADD_SEALS, F_GET_SEALS = 1030, 1033, 1034
PR_GET_NAME = 16
PR_SET_VMA = 0x53564D41

# A call is allowed if one of its conditions holds.  A filter compares one 32-bit word at a time.  So conditions are
# only for arguments that the kernel takes as 32 bits, or whose upper half it ignores.
CONDITIONS: "Mapping[str, tuple[Condition, ...]]" = {
    "mmap": (("none-of", 2, PROT_EXEC),),
    "mprotect": (("none-of", 2, PROT_EXEC),),
    "clone": (("any-of", 0, CLONE_THREAD),),
    "clone+process": (("none-of", 0, CLONE_NEW_ANYTHING),),
    "prlimit64": (("is", 0, 0),),  # our own limits only
    "socketpair": (("is", 0, AF_UNIX),),
    "sendto": (("is", 5, 0),),  # without an address: only to the peer of a connected socket
    "socket+network": tuple(("is", 0, family) for family in (AF_NETLINK, AF_INET, AF_INET6)),  # no unix sockets
    "openat+reading": (("none-of", 2, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC),),
    "newfstatat": (("any-of", 3, AT_EMPTY_PATH),),  # glibc's fstat() calls it so; with a path it fails (`SOFT`)
    "fcntl": tuple(
        ("is", 1, command)
        for command in (
            *(F_DUPFD, F_DUPFD_CLOEXEC, F_GETFD, F_GETFL),
            F_SETFD,  # the C library, when a directory is listed by its descriptor
            *(F_OFD_GETLK, F_OFD_SETLK),  # the process that uses an image checks and keeps its lock
            *(F_ADD_SEALS, F_GET_SEALS),
        )
    ),
    "fcntl+flags": (("is", 1, F_SETFL),),  # with it a process can overwrite a file that it may only append to
    "ioctl": tuple(("is", 1, request) for request in (TCGETS, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX)),
    "ioctl+kvm": (("type", 1, KVMIO),),
    "prctl": tuple(("is", 0, option) for option in (linux.PR_SET_NAME, PR_GET_NAME, PR_SET_VMA)),
    "prctl+confine": tuple(
        ("is", 0, option) for option in (linux.PR_SET_PDEATHSIG, linux.PR_SET_DUMPABLE, linux.PR_SET_NO_NEW_PRIVS)
    ),
}
# Rules that allow the same call without any condition, for a process that is starting or that starts others.
UNCONDITIONAL = {
    "mmap+exec": "mmap",
    "mprotect+exec": "mprotect",
    "newfstatat+path": "newfstatat",
    "tgkill+any": "tgkill",
    "sendto+any": "sendto",
}

# Filter programs: <linux/bpf_common.h>, <linux/seccomp.h>
LD_ABS, JA, JEQ, JGE, JSET, ALU_AND, RET = 0x20, 0x05, 0x15, 0x35, 0x45, 0x54, 0x06
RET_KILL_PROCESS, RET_TRAP, RET_ERRNO, RET_ALLOW = 0x80000000, 0x00030000, 0x00050000, 0x7FFF0000
RET_EPERM = RET_ERRNO | errno.EPERM
AUDIT_ARCH_X86_64 = 0xC000003E
X32_SYSCALL_BIT = 0x40000000
OFFSET_NR, OFFSET_ARCH, OFFSET_ARGS = 0, 4, 16
SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, SECCOMP_FILTER_FLAG_LOG = 1, 1, 2
BPF_MAXINSNS = 4096


def instruction(code: int, k: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
    """Return one `struct sock_filter`."""
    return struct.pack("=HBBI", code, jump_true, jump_false, k)


def test(condition: "Condition") -> bytes:
    """Return instructions that allow the call if the condition holds, and fall through otherwise."""
    operation, argument, value = condition
    load = instruction(LD_ABS, OFFSET_ARGS + 8 * argument)
    allow = instruction(RET, RET_ALLOW)
    if operation == "is":
        return load + instruction(JEQ, value, 0, 1) + allow
    if operation == "any-of":
        return load + instruction(JSET, value, 0, 1) + allow
    if operation == "none-of":
        return load + instruction(JSET, value, 1, 0) + allow
    assert operation == "type"  # the second byte of an ioctl request names its driver
    return load + instruction(ALU_AND, 0xFF00) + instruction(JEQ, value << 8, 0, 1) + allow


def call_name(rule: str) -> str:
    """Return the name of a rule's system call."""
    return rule.partition("+")[0]


def allowed_calls(rules: "Iterable[str]", ioctls: "Iterable[int]", pid: int) -> "dict[str, tuple[Condition, ...]]":
    """Return the calls that the rules allow: call name -> conditions; without conditions it is always allowed."""
    given = set(rules)
    unknown = sorted(rule for rule in given if call_name(rule) not in NUMBERS)
    if unknown:
        raise ValueError(f"no such system call rule: {', '.join(unknown)}")
    always = {UNCONDITIONAL[rule] for rule in given if rule in UNCONDITIONAL}
    calls: dict[str, tuple[Condition, ...]] = {}
    for rule in sorted(given):
        name = call_name(rule)
        conditions = CONDITIONS.get(rule, ())
        if rule == "tgkill":
            conditions = (("is", 0, pid),)
        elif rule == "ioctl":
            conditions += tuple(("is", 1, request) for request in ioctls)
        elif name != rule and rule not in CONDITIONS and rule not in UNCONDITIONAL:
            raise ValueError(f"no such system call rule: {rule}")
        calls[name] = () if name in always else calls.get(name, ()) + conditions
    return calls


def assemble(
    rules: "Iterable[str]",
    *,
    ioctls: "Iterable[int]" = (),
    pid: int = 0,
    refused: int = RET_KILL_PROCESS,
    deadly: "Iterable[str]" = (),
) -> bytes:
    """Return the filter program.

    `pid` is the only process that tgkill may signal.  `refused` is the filter's result for calls that no rule allows.
    Calls in `deadly` end the process in any case.

    Calls with conditions come first.  Since 5.11 the kernel remembers the calls that are always allowed, and does not
    run the program for them.  So the length of their list costs nothing.
    """
    calls = allowed_calls(rules, ioctls, pid)
    program = [
        instruction(LD_ABS, OFFSET_ARCH),
        instruction(JEQ, AUDIT_ARCH_X86_64, 1, 0),
        instruction(RET, RET_KILL_PROCESS),  # int 0x80, where the numbers mean other calls
        instruction(LD_ABS, OFFSET_NR),
        instruction(JGE, X32_SYSCALL_BIT, 0, 1),
        instruction(RET, RET_KILL_PROCESS),
    ]
    for name, conditions in calls.items():
        if conditions:
            fallback = RET_ERRNO | SOFT[name] if name in SOFT else refused
            body = b"".join(test(condition) for condition in conditions) + instruction(RET, fallback)
            # A conditional jump spans at most 255 instructions, and a list of ioctls has more.  JA has no such limit.
            program += [instruction(JEQ, NUMBERS[name], 1, 0), instruction(JA, len(body) // 8), body]
    for name, conditions in calls.items():
        if not conditions:
            program += [instruction(JEQ, NUMBERS[name], 0, 1), instruction(RET, RET_ALLOW)]
    for name, error in SOFT.items():
        if name not in calls:
            program += [instruction(JEQ, NUMBERS[name], 0, 1), instruction(RET, RET_ERRNO | error)]
    for name in sorted(deadly):
        program += [instruction(JEQ, NUMBERS[name], 0, 1), instruction(RET, RET_KILL_PROCESS)]
    program.append(instruction(RET, refused))
    return b"".join(program)


def assemble_requests(ioctls: "Iterable[int]", refused: int = RET_KILL_PROCESS) -> bytes:
    """Return a program for a process that has a filter already.  `refused` is the result for refused calls.

    The program allows only these requests of ioctl, and no new filter.  It also refuses memfd_create, because memory in
    such files counts against no limit of the process.
    """
    (conditions,) = allowed_calls(("ioctl",), ioctls, 0).values()
    body = b"".join(test(condition) for condition in conditions) + instruction(RET, refused)
    program = [
        instruction(LD_ABS, OFFSET_NR),
        instruction(JEQ, NUMBERS["seccomp"], 1, 0),
        instruction(JEQ, NUMBERS["memfd_create"], 0, 1),
        instruction(RET, refused),
        instruction(JEQ, NUMBERS["ioctl"], 1, 0),
        instruction(RET, RET_ALLOW),
        body,
    ]
    return b"".join(program)


def install(program: bytes, *, logged: bool = False) -> None:
    """Install the filter for all threads of this process, and for all programs that it executes.  Raises HostError.

    With `logged` the kernel logs calls that fail.
    The caller has set no_new_privs.  A filter cannot be removed, and a second one can only forbid more.
    """
    if os.uname().machine != "x86_64":
        raise HostError(f"install a system call filter for {os.uname().machine}", errno.ENOSYS)
    count = len(program) // 8
    assert count <= BPF_MAXINSNS
    instructions = native.buffer(program)
    fprog = struct.pack("=H6xQ", count, native.addressof(instructions))
    stuck = linux.syscall(
        "install the system call filter",
        linux.SYS_SECCOMP,
        SECCOMP_SET_MODE_FILTER,
        SECCOMP_FILTER_FLAG_TSYNC | (SECCOMP_FILTER_FLAG_LOG if logged else 0),
        fprog,
    )
    if stuck:  # the id of a thread that has a different filter already
        raise HostError(f"bind thread {stuck} to the system call filter", errno.ESRCH)
