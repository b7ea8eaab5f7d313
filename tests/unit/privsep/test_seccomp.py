"""The test interprets filter programs instruction by instruction, as the kernel does."""

import ctypes
import errno
import fcntl
import os
import socket
import struct
import subprocess
import termios
from types import SimpleNamespace

import pytest

from vmd.errors import HostError
from vmd.privsep import confine, linux, refused, seccomp
from vmd.privsep.seccomp import NUMBERS, RET_ALLOW, RET_ERRNO, RET_KILL_PROCESS, assemble

EVERY_CONFINEMENT = {
    name: value for name, value in vars(confine).items() if isinstance(value, confine.Confinement)
}


def verdict(program: bytes, number: int, *arguments: int, arch: int = seccomp.AUDIT_ARCH_X86_64) -> int:
    """Return the program's result for a system call."""
    padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("=IIQ6Q", number, arch, 0, *padded)
    instructions = list(struct.iter_unpack("=HBBI", program))
    at = accumulator = 0
    while True:
        code, jump_true, jump_false, k = instructions[at]
        at += 1
        match code:
            case seccomp.LD_ABS:
                (accumulator,) = struct.unpack_from("=I", data, k)
            case seccomp.ALU_AND:
                accumulator &= k
            case seccomp.JA:
                at += k
            case seccomp.JEQ:
                at += jump_true if accumulator == k else jump_false
            case seccomp.JGE:
                at += jump_true if accumulator >= k else jump_false
            case seccomp.JSET:
                at += jump_true if accumulator & k else jump_false
            case seccomp.RET:
                return int(k)
            case _:
                raise AssertionError(f"unknown instruction {code:#x}")


def test_numbers_are_the_kernels() -> None:
    """Every number equals that of <sys/syscall.h>."""
    source = "#include <sys/syscall.h>\n" + "".join(f"{name} = SYS_{name}\n" for name in NUMBERS)
    output = subprocess.run(["gcc", "-E", "-P", "-"], input=source, capture_output=True, text=True, check=True).stdout
    theirs = dict(line.split(" = ") for line in output.splitlines() if " = " in line)

    assert theirs == {name: str(number) for name, number in NUMBERS.items()}


def test_refused_calls_have_the_kernel_s_names() -> None:
    """Only calls that the headers here know are compared.  Calls in filters have the same number in both tables."""
    source = "#include <sys/syscall.h>\n" + "".join(f"{name} = SYS_{name}\n" for name in refused.NAMES.values())
    output = subprocess.run(["gcc", "-E", "-P", "-"], input=source, capture_output=True, text=True, check=True).stdout
    lines = dict(line.split(" = ") for line in output.splitlines() if " = " in line)
    theirs = {int(number): name for name, number in lines.items() if number.isdigit()}

    assert len(theirs) > 350
    assert theirs.items() <= refused.NAMES.items()
    assert {number: name for name, number in NUMBERS.items()}.items() <= refused.NAMES.items()


@pytest.mark.parametrize(
    ("header", "constant"),
    [
        ("asm/ioctls.h", "TCGETS"),
        ("asm/ioctls.h", "FIONREAD"),
        ("asm/ioctls.h", "FIONBIO"),
        ("asm/ioctls.h", "FIONCLEX"),
        ("asm/ioctls.h", "FIOCLEX"),
        ("linux/audit.h", "AUDIT_ARCH_X86_64"),
        ("linux/fcntl.h", "F_DUPFD_CLOEXEC"),
        ("linux/fcntl.h", "F_ADD_SEALS"),
        ("linux/fcntl.h", "F_GET_SEALS"),
        ("linux/fcntl.h", "AT_EMPTY_PATH"),
        ("linux/kvm.h", "KVMIO"),
        ("linux/prctl.h", "PR_GET_NAME"),
        ("linux/prctl.h", "PR_SET_VMA"),
        ("linux/sched.h", "CLONE_THREAD"),
        ("linux/mman.h", "PROT_EXEC"),
    ],
)
def test_constants_are_the_kernels(header: str, constant: str) -> None:
    """A compiler finds that each constant equals the kernel's."""
    value = getattr(seccomp, constant)
    source = f'#include <{header}>\n_Static_assert({constant} == {value}u, "{constant}");\n'

    subprocess.run(["gcc", "-fsyntax-only", "-x", "c", "-"], input=source, text=True, check=True)


def test_a_call_without_a_rule_kills_the_process() -> None:
    """A filter lists the allowed calls."""
    assert verdict(assemble({"read"}), NUMBERS["write"]) == RET_KILL_PROCESS


def test_a_call_with_a_rule_is_allowed() -> None:
    """A rule without conditions allows any arguments."""
    assert verdict(assemble({"read", "write"}), NUMBERS["write"], 1, 2, 3) == RET_ALLOW


def test_other_architectures_kill() -> None:
    """The same numbers mean other calls there: 1 is write here, and exit in 32-bit code."""
    assert verdict(assemble({"read", "write"}), NUMBERS["read"], arch=0x40000003) == RET_KILL_PROCESS


def test_x32_calls_kill() -> None:
    """A number with the x32 bit is another call."""
    assert verdict(assemble({"read"}), NUMBERS["read"] | 0x40000000) == RET_KILL_PROCESS


@pytest.mark.parametrize("name", ["mmap", "mprotect"])
def test_memory_is_not_executable(name: str) -> None:
    """PROT_EXEC needs another rule."""
    number = NUMBERS[name]

    assert verdict(assemble({name}), number, 0, 4096, 3) == RET_ALLOW
    assert verdict(assemble({name}), number, 0, 4096, 7) == RET_KILL_PROCESS
    assert verdict(assemble({name, name + "+exec"}), number, 0, 4096, 7) == RET_ALLOW


def test_threads_are_not_processes() -> None:
    """The rule for clone allows threads.  Processes need another rule, and no rule allows namespaces."""
    thread, process, namespace = 0x3D0F00, 0x1200011, 0x10000000 | 17
    threads, processes = assemble({"clone"}), assemble({"clone", "clone+process"})

    assert [verdict(threads, 56, flags) for flags in (thread, process, namespace)] == [
        RET_ALLOW,
        RET_KILL_PROCESS,
        RET_KILL_PROCESS,
    ]
    assert [verdict(processes, 56, flags) for flags in (thread, process, namespace)] == [
        RET_ALLOW,
        RET_ALLOW,
        RET_KILL_PROCESS,
    ]


def test_clone3_is_not_implemented() -> None:
    """A filter cannot see its flags.  With ENOSYS glibc uses clone instead."""
    assert verdict(assemble({"clone", "clone+process"}), NUMBERS["clone3"]) == RET_ERRNO | errno.ENOSYS


def test_file_names_fail_softly() -> None:
    """A process that looks for a file is not killed, and fstat still works."""
    program = assemble({"newfstatat"})

    assert verdict(program, NUMBERS["openat"]) == RET_ERRNO | errno.EPERM
    assert verdict(program, NUMBERS["newfstatat"], 3, 0, 0, 0) == RET_ERRNO | errno.EPERM
    assert verdict(program, NUMBERS["newfstatat"], 3, 0, 0, seccomp.AT_EMPTY_PATH) == RET_ALLOW


def test_files_can_only_be_opened_for_reading() -> None:
    """Flags for writing or creating are refused in every combination."""
    program = assemble({"openat+reading"})
    reading, writing = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY, (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC)

    assert verdict(program, NUMBERS["openat"], 4, 0, reading) == RET_ALLOW
    for flag in writing:
        assert verdict(program, NUMBERS["openat"], 4, 0, reading | flag) == RET_ERRNO | errno.EPERM


def test_ioctl_by_number() -> None:
    """Only the listed requests pass, and those for any descriptor.  Long lists work, too."""
    requests = range(0xAE00, 0xAE00 + 200)
    program = assemble({"ioctl"}, ioctls=requests)

    assert all(verdict(program, 16, 3, request) == RET_ALLOW for request in requests)
    assert verdict(program, 16, 3, seccomp.FIONBIO) == RET_ALLOW
    assert verdict(program, 16, 3, 0xAE00 + 200) == RET_KILL_PROCESS
    assert verdict(program, 16, 3, 0x5412) == RET_KILL_PROCESS  # TIOCSTI types on the terminal


def test_ioctl_by_driver() -> None:
    """All requests of KVM pass, with all bits for direction and size.  No request of another driver passes."""
    program = assemble({"ioctl", "ioctl+kvm"})

    assert verdict(program, 16, 3, 0xC008AE05) == RET_ALLOW
    assert verdict(program, 16, 3, 0xAE80) == RET_ALLOW
    assert verdict(program, 16, 3, 0xAF80) == RET_KILL_PROCESS


def test_signals_reach_only_the_process_itself() -> None:
    """The plain rule for tgkill names one process."""
    assert verdict(assemble({"tgkill"}, pid=77), NUMBERS["tgkill"], 77, 78, 9) == RET_ALLOW
    assert verdict(assemble({"tgkill"}, pid=77), NUMBERS["tgkill"], 76, 76, 9) == RET_KILL_PROCESS
    assert verdict(assemble({"tgkill", "tgkill+any"}, pid=77), NUMBERS["tgkill"], 76, 76, 9) == RET_ALLOW


def test_data_can_only_be_sent_to_the_peer_of_the_socket() -> None:
    """An address has a length, and the kernel ignores an address without one."""
    number, length = NUMBERS["sendto"], 20

    assert verdict(assemble({"sendto"}), number, 3, 4096, 10, 0, 0, 0) == RET_ALLOW
    assert verdict(assemble({"sendto"}), number, 3, 4096, 10, 0, 8192, length) == RET_KILL_PROCESS
    assert verdict(assemble({"sendto", "sendto+any"}), number, 3, 4096, 10, 0, 8192, length) == RET_ALLOW


def test_trap_instead_of_kill() -> None:
    """For developers a refused call raises SIGSYS, except if it is of another ABI."""
    program = assemble({"mmap"}, refused=seccomp.RET_TRAP)

    assert verdict(program, NUMBERS["write"]) == seccomp.RET_TRAP
    assert verdict(program, NUMBERS["mmap"], 0, 0, seccomp.PROT_EXEC) == seccomp.RET_TRAP
    assert verdict(program, 0x40000000) == RET_KILL_PROCESS


@pytest.mark.parametrize("rule", ["opennat", "read+write", "+exec"])
def test_misspelt_rules_are_errors(rule: str) -> None:
    """An unknown rule is an error when the filter is made."""
    with pytest.raises(ValueError, match="no such system call rule"):
        confine.filter_of(confine.Confinement(syscalls=(rule,)))


def test_every_filter_can_be_made() -> None:
    """Otherwise an error would show only when the process starts, which may be rare."""
    written = {name: value for name, value in vars(confine).items() if isinstance(value, confine.Confinement)}

    assert len(written) > 20
    for name, confinement in written.items():
        assert confine.filter_of(confinement), name


def test_requests_can_be_restricted_later() -> None:
    """Only the given requests are left, with those for every descriptor.

    No filter can be added.  Other calls are not changed.
    """
    program = seccomp.assemble_requests((0xAE80,))

    allowed = (NUMBERS["ioctl"], 5, 0xAE80), (NUMBERS["ioctl"], 5, seccomp.FIONREAD), (NUMBERS["read"],), (9999,)
    assert {verdict(program, *call) for call in allowed} == {RET_ALLOW}
    killed = (NUMBERS["ioctl"], 5, 0xAE01), (NUMBERS["ioctl"], 5, 0x5412), (NUMBERS["seccomp"], 1, 1)
    assert verdict(program, NUMBERS["memfd_create"]) == RET_KILL_PROCESS
    assert {verdict(program, *call) for call in killed} == {RET_KILL_PROCESS}


NOT_BELOW_VMM = {"PRIV", "OPENER", "LOCKHOLDER", "LOGFILE", "METRICS"}


@pytest.mark.parametrize("name", sorted(EVERY_CONFINEMENT.keys() - NOT_BELOW_VMM))
def test_vmm_allows_the_calls_of_its_descendants(name: str) -> None:
    """Filters are inherited, so no VM or device can make a call that vmm's filter kills."""
    ours = EVERY_CONFINEMENT[name]
    vmm = confine.VMM.syscalls
    calls = {seccomp.call_name(rule) for rule in ours.syscalls}

    assert calls - {seccomp.call_name(rule) for rule in vmm} == set()
    assert set(ours.ioctls) <= set(confine.VMM.ioctls)


@pytest.mark.parametrize("name", sorted(EVERY_CONFINEMENT.keys() - {"PRIV"}))
def test_every_program_fits_the_kernel(name: str) -> None:
    """No filter is near the limit of instructions, and none allows a call that no process may make."""
    ours = EVERY_CONFINEMENT[name]
    program = assemble(ours.syscalls, ioctls=ours.ioctls, pid=1)

    assert len(program) // 8 < seccomp.BPF_MAXINSNS // 4
    for number in (41, 42, 49, 62, 101, 105, 161, 165, 175, 272, 308, 321, 323, 425):
        # socket connect bind kill ptrace setuid chroot mount init_module unshare setns bpf userfaultfd io_uring_setup
        assert verdict(program, number) == RET_KILL_PROCESS


def test_a_forgiving_filter_ends_a_process_for_few_calls_only() -> None:
    """priv runs a program of the host, whose libraries may make unexpected calls."""
    ours = confine.PRIV
    assert ours.deadly is not None
    program = assemble(
        ours.syscalls, ioctls=ours.ioctls, pid=1, refused=seccomp.RET_EPERM, deadly=ours.deadly
    )  # fmt: skip

    assert len(program) // 8 < seccomp.BPF_MAXINSNS // 4
    assert {verdict(program, NUMBERS[call]) for call in ours.deadly} == {RET_KILL_PROCESS}
    for number in (42, 105, 136, 288, 9999):  # connect setuid ustat accept4, and a future call
        assert verdict(program, number) == RET_ERRNO | errno.EPERM
    assert verdict(program, NUMBERS["socket"], socket.AF_UNIX) == RET_ERRNO | errno.EPERM
    assert verdict(program, NUMBERS["socket"], socket.AF_NETLINK) == RET_ALLOW


def test_the_allowed_commands_of_fcntl() -> None:
    """They are those that the processes and Python use.  Those that send signals or break leases are not allowed."""
    program = assemble({"fcntl"})
    allowed = {
        fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL,
        fcntl.F_OFD_GETLK, fcntl.F_OFD_SETLK, fcntl.F_ADD_SEALS, fcntl.F_GET_SEALS,
    }  # fmt: skip

    passing = {command for command in range(2048) if verdict(program, NUMBERS["fcntl"], 5, command) == RET_ALLOW}

    assert passing == allowed


@pytest.mark.parametrize("name", sorted(EVERY_CONFINEMENT))
def test_only_nft_changes_the_flags_of_open_files(name: str) -> None:
    """A process that has a log may append to it, and could overwrite it without this flag."""
    program = confine.filter_of(EVERY_CONFINEMENT[name])

    is_allowed = verdict(program, NUMBERS["fcntl"], 5, fcntl.F_SETFL, 0) == RET_ALLOW

    assert is_allowed == (name == "PRIV")


@pytest.mark.parametrize(
    ("rule", "argument", "allowed"),
    [
        ("ioctl", 1, {termios.TCGETS, termios.FIONREAD, termios.FIONBIO, termios.FIOCLEX, termios.FIONCLEX}),
        ("socketpair", 0, {socket.AF_UNIX}),
        ("socket+network", 0, {socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK}),
        ("prlimit64", 0, {0}),
        ("sendto", 5, {0}),
    ],
)
def test_the_allowed_values_of_an_argument(rule: str, argument: int, allowed: set[int]) -> None:
    """Many small numbers are tried."""
    program = assemble({rule})

    passing = set()
    for value in (*range(256), *range(0x5400, 0x5500)):
        arguments = [7] * 6
        arguments[argument] = value
        if verdict(program, NUMBERS[seccomp.call_name(rule)], *arguments) == RET_ALLOW:
            passing.add(value)

    assert passing == allowed


def test_instructions_are_the_kernels() -> None:
    """Each consists of a class, an operation and a mode of <linux/bpf_common.h>."""
    made_of = {
        "LD_ABS": "BPF_LD | BPF_W | BPF_ABS", "JA": "BPF_JMP | BPF_JA", "JEQ": "BPF_JMP | BPF_JEQ | BPF_K",
        "JGE": "BPF_JMP | BPF_JGE | BPF_K", "JSET": "BPF_JMP | BPF_JSET | BPF_K",
        "ALU_AND": "BPF_ALU | BPF_AND | BPF_K", "RET": "BPF_RET | BPF_K",
    }  # fmt: skip
    source = "#include <linux/bpf_common.h>\n" + "".join(f"{name} = {of}\n" for name, of in made_of.items())
    output = subprocess.run(["gcc", "-E", "-P", "-"], input=source, capture_output=True, text=True, check=True).stdout
    theirs = dict(line.split(" = ") for line in output.splitlines() if " = " in line)

    values = {name: sum(int(part, 0) for part in expression.split("|")) for name, expression in theirs.items()}
    assert values == {name: getattr(seccomp, name) for name in made_of}


def test_a_filter_without_a_pid_allows_no_signals() -> None:
    """The pid of the only process that may get signals is given when the filter is made."""
    program = assemble({"tgkill"})

    assert {verdict(program, NUMBERS["tgkill"], pid) for pid in (1, 2, 4711, 0xFFFFFFFF)} == {RET_KILL_PROCESS}


class Kernel:
    """A kernel that accepts filter programs, and returns `answer`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: int = 0) -> None:
        self.answer = answer
        self.calls: list[tuple[int, int, int]] = []
        self.program = b""
        monkeypatch.setattr(linux, "syscall", self.syscall)

    def syscall(self, _tried: str, number: int, operation: int, flags: int, fprog: bytes) -> int:
        """Record a call, and read the program from memory."""
        count, address = struct.unpack("=H6xQ", fprog)
        self.program = ctypes.string_at(address, 8 * count)
        self.calls.append((number, operation, flags))
        return self.answer


@pytest.mark.parametrize(("logged", "flags"), [(False, 1), (True, 3)])
def test_a_program_is_installed(monkeypatch: pytest.MonkeyPatch, logged: bool, flags: int) -> None:
    """It is for all threads: SECCOMP_SET_MODE_FILTER with TSYNC, and with LOG if refused calls are to be logged."""
    kernel = Kernel(monkeypatch)
    program = assemble({"read", "mmap"})

    seccomp.install(program, logged=logged)

    assert (kernel.program, kernel.calls) == (program, [(317, 1, flags)])


def test_a_thread_with_a_filter_of_its_own_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this case the kernel returns the thread's id, and has changed no thread."""
    Kernel(monkeypatch, answer=4711)

    with pytest.raises(HostError, match="thread 4711"):
        seccomp.install(assemble({"read"}))


def test_a_program_is_for_one_kind_of_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """On other machines the numbers mean other calls.  The kernel is not called."""
    kernel = Kernel(monkeypatch)
    monkeypatch.setattr("vmd.privsep.seccomp.os.uname", lambda: SimpleNamespace(machine="aarch64"))

    with pytest.raises(HostError, match="aarch64"):
        seccomp.install(assemble({"read"}))

    assert kernel.calls == []
