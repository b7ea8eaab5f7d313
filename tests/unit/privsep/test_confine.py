"""The order and the arguments of the steps by which a process gives up its rights.

Whether the kernel enforces them is tested in tests/process.
"""

import _thread
import errno
import posix
import subprocess
from collections.abc import Callable

import pytest

from tests.unit.privsep.test_seccomp import verdict
from vmd.privsep import confine, landlock, linux, refused, seccomp
from vmd.privsep.seccomp import NUMBERS, RET_ALLOW, RET_ERRNO, RET_KILL_PROCESS, RET_TRAP

NO_CALL = 9999
SETPCAP = 1 << linux.CAP_SETPCAP
Step = tuple[object, ...]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """The steps that `confine` takes, in a process without capabilities.  None of them has an effect."""
    found: list[Step] = []

    def record(name: str, result: object = None) -> Callable[..., object]:
        def step(*arguments: object, **named: object) -> object:
            found.append((name, *arguments, *named.values()))
            return result

        return step

    monkeypatch.setattr(linux, "set_limit", record("limit"))
    monkeypatch.setattr(linux, "hard_limit", lambda _number: 2000)
    monkeypatch.setattr(linux, "permitted_capabilities", lambda: 0)
    monkeypatch.setattr(linux, "limit_bounding_set", record("bound"))
    monkeypatch.setattr(linux, "set_capabilities", record("keep"))
    monkeypatch.setattr(linux, "prctl", record("prctl"))
    monkeypatch.setattr(landlock, "restrict", record("landlock", ["a warning"]))
    monkeypatch.setattr(seccomp, "install", record("filter"))
    monkeypatch.setattr(refused, "show", record("show"))
    monkeypatch.setattr(confine, "close_code", record("close code"))
    monkeypatch.setattr(_thread, "_count", lambda: 0)
    monkeypatch.delitem(posix.environ, confine.DEBUG, raising=False)
    return found


@pytest.fixture
def debugged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that was started to find a refused call."""
    monkeypatch.setitem(posix.environ, confine.DEBUG, b"1")


FILES = (("/", landlock.READ),)
SOME = confine.Confinement(syscalls=("read",), files=FILES, scopes=landlock.SCOPE_SOCKETS, open_files=77)


def test_all_steps_are_taken(steps: list[Step]) -> None:
    """The filter is last, because it forbids the calls of the other steps."""
    warnings = confine.confine(SOME)

    assert warnings == ["a warning"]
    assert steps == [
        ("close code",),
        ("limit", "limit resources", linux.RLIMIT_CORE, 0),
        ("limit", "limit open files", linux.RLIMIT_NOFILE, 77),
        ("prctl", "set no_new_privs", linux.PR_SET_NO_NEW_PRIVS, 1),
        ("prctl", "forbid being traced", linux.PR_SET_DUMPABLE, 0),
        ("landlock", FILES, landlock.SCOPE_SOCKETS),
        ("filter", confine.filter_of(SOME), False),
    ]


def test_a_process_that_writes_no_file(steps: list[Step]) -> None:
    """Its limit of file sizes is 0."""
    confine.confine(SOME.replace(writes_files=False))

    assert ("limit", "limit resources", linux.RLIMIT_FSIZE, 0) in steps


def test_a_process_that_sees_others(steps: list[Step]) -> None:
    """Landlock would forbid that, so there is nothing that the kernel lacks either."""
    assert confine.confine(SOME.replace(sees_others=True)) == []
    assert "landlock" not in [name for name, *_ in steps]


def test_refused_calls_are_logged_if_they_only_fail(steps: list[Step]) -> None:
    """By the kernel: nothing else would show them."""
    confine.confine(SOME.replace(deadly=("mount",)))

    assert steps[-1][2] is True


def test_a_filter_that_was_made_before_is_used(steps: list[Step]) -> None:
    """It is not made again."""
    confine.confine(SOME, b"the filter")
    confine.narrow_requests((1, 2), b"the requests")
    confine.narrow_requests((1, 2))

    assert [step[1] for step in steps if step[0] == "filter"] == [
        b"the filter", b"the requests", seccomp.assemble_requests((1, 2)),
    ]  # fmt: skip


def test_a_process_with_threads_is_not_confined(steps: list[Step], monkeypatch: pytest.MonkeyPatch) -> None:
    """Landlock would not hold for them."""
    monkeypatch.setattr(_thread, "_count", lambda: 1)

    with pytest.raises(RuntimeError, match="before the first thread"):
        confine.confine(SOME)

    assert steps == []


def test_a_refused_call_is_shown_to_developers(steps: list[Step], request: pytest.FixtureRequest) -> None:
    """This begins before the filter.  A process whose refused calls only fail does not show them."""
    request.getfixturevalue("debugged")
    confine.confine(SOME)
    assert steps[0] == ("show",)
    steps.clear()

    confine.confine(SOME.replace(deadly=("mount",)))
    assert ("show",) not in steps


# --- single steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "limit"), [(1999, 1999), (2000, 2000), (2001, 2000)])
def test_a_limit_is_only_lowered(steps: list[Step], most: int, limit: int) -> None:
    """The kernel refuses to raise it, and the process would not start."""
    confine.limit_open_files(most)
    confine.limit_memory(most)

    assert steps == [
        ("limit", "limit open files", linux.RLIMIT_NOFILE, limit),
        ("limit", "limit memory", linux.RLIMIT_AS, limit),
    ]


@pytest.mark.parametrize(
    ("permitted", "expected"),
    [
        (0, []),
        (0b11, []),
        (0b111, [("keep", 0b11, 0b11)]),
        (0b100, [("keep", 0, 0)]),
        (SETPCAP, [("bound", 0b11), ("keep", 0, 0)]),
        (SETPCAP | 0b110, [("bound", 0b11), ("keep", 0b10, 0b10)]),
    ],
)
def test_capabilities_are_given_up(
    steps: list[Step], monkeypatch: pytest.MonkeyPatch, permitted: int, expected: list[Step]
) -> None:
    """Those that are left pass on to programs.  None can be gained: the bounding set goes first, which needs one."""
    monkeypatch.setattr(linux, "permitted_capabilities", lambda: permitted)

    confine.give_up_capabilities(0b11)

    assert steps == expected


def test_a_call_without_a_rule() -> None:
    """It kills, except in a process that runs programs of the host."""
    forgiving = SOME.replace(deadly=("mount",))

    assert verdict(confine.filter_of(SOME), NO_CALL) == RET_KILL_PROCESS
    assert verdict(confine.filter_of(forgiving), NO_CALL) == RET_ERRNO | errno.EPERM
    assert verdict(confine.filter_of(forgiving), NUMBERS["mount"]) == RET_KILL_PROCESS


@pytest.mark.usefixtures("debugged")
def test_a_call_without_a_rule_is_trapped_for_developers() -> None:
    """libffi needs one more call then.  A process whose refused calls only fail is not changed."""
    assert verdict(confine.filter_of(SOME), NO_CALL) == RET_TRAP
    assert verdict(confine.filter_of(SOME), NUMBERS["statfs"]) == RET_ALLOW
    assert verdict(confine.filter_of_requests((1,)), NUMBERS["seccomp"]) == RET_TRAP
    forgiving = confine.filter_of(SOME.replace(deadly=("mount",)))
    assert verdict(forgiving, NO_CALL) == verdict(forgiving, NUMBERS["statfs"]) == RET_ERRNO | errno.EPERM


def test_signals_reach_the_process_itself() -> None:
    """The filter has the pid of the process that makes it."""
    program = confine.filter_of(SOME.replace(syscalls=("tgkill",)))

    assert verdict(program, NUMBERS["tgkill"], posix.getpid()) == RET_ALLOW
    assert verdict(program, NUMBERS["tgkill"], posix.getppid()) == RET_KILL_PROCESS


def test_a_c_library_without_that_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only glibc loads it later."""

    def fail(_name: str) -> None:
        raise OSError(errno.ENOENT, "no such library")

    monkeypatch.setattr(linux, "load_library", fail)

    confine.prime()


# --- who has which rights -----------------------------------------------------------------------------------------

EVERY = {name: value for name, value in vars(confine).items() if isinstance(value, confine.Confinement)}
CAPABILITIES = {  # of all others: none
    "LOCKHOLDER": {"SYS_PTRACE"},
    "LOGFILE": {"DAC_OVERRIDE"},
    "OPENER": {"DAC_OVERRIDE", "DAC_READ_SEARCH", "SETUID", "SETGID"},
    "PRIV": {"NET_ADMIN", "NET_RAW"},
    "VMM": {"SETUID", "SETGID", "KILL"},
}
VMS = {"VM", "VM_BUILDING", "VMM"}
MAY_CALL = {  # these may make the call in some form, and no others
    "execve": {"VMM", "PRIV"},
    "vfork": {"VMM", "PRIV"},
    "openat2": {"OPENER"},
    "openat": {"VMM", "PRIV", "OPENER", "LOGFILE", "LOCKHOLDER"},
    "renameat": {"LOGFILE"},
    "unlinkat": {"LOGFILE"},
    "unlink": {"PRIV"},
    "socket": {"PRIV"},
    "bind": {"PRIV"},
    "accept4": {"METRICS"},
    "setresuid": {"OPENER", "VMM"},
    "setgroups": {"OPENER", "VMM"},
    "capset": {"VMM"},
    "seccomp": {"VM_BUILDING", "VMM"},
    "kill": {"PRIV"},
    "pidfd_send_signal": {"VMM", "PRIV"},
    "fallocate": {"VIOBLK", "VIOSCSI", "IMGRESIZE", "IMGWRITER", "VMM"},
    "ftruncate": {"VIOBLK", "VIOSCSI", "IMGRESIZE", "IMGWRITER", "IMGBOOT", "PRIV", *VMS},
    "memfd_create": {"BOOTPROBE", *VMS},
    "setsid": {"VMM", "PRIV"},
    "timerfd_create": VMS,
    "statfs": {"PRIV"},
}


@pytest.mark.parametrize("name", sorted(EVERY))
def test_capabilities(name: str) -> None:
    """Most processes have none."""
    masks = {getattr(linux, f"CAP_{each}"): each for each in CAPABILITIES.get(name, ())}

    assert EVERY[name].capabilities == sum(1 << number for number in masks)


@pytest.mark.parametrize("call", sorted(MAY_CALL))
def test_calls_of_few(call: str) -> None:
    """What an attacker gains by a process depends on them (docs/security.md)."""
    found = {
        name for name, confinement in EVERY.items() if call in map(seccomp.call_name, confinement.syscalls)
    }  # fmt: skip

    assert found == MAY_CALL[call]


def test_nobody_may_reach_named_sockets_or_other_processes() -> None:
    """No filter has these calls in any form."""
    calls = {seccomp.call_name(rule) for confinement in EVERY.values() for rule in confinement.syscalls}

    assert calls.isdisjoint(confine.NO_PROGRAM_DOES)
    assert calls.isdisjoint(("connect", "ptrace", "process_vm_readv", "mount", "setns", "unshare"))


def test_few_may_write_files() -> None:
    """Descriptors that the others have are sockets and pipes, or are only read."""
    assert {name for name, confinement in EVERY.items() if not confinement.writes_files} == {
        "LEAF", "VIOSCSI", "VIONET", "VIONET_KERNEL", "LOCKHOLDER", "AGENTX", "METRICS",
    }  # fmt: skip


def test_a_device_with_a_packet_socket_names_no_address() -> None:
    """It has all other rights of a network device."""
    lacks = set(confine.VIONET.syscalls) - set(confine.VIONET_KERNEL.syscalls)

    assert lacks == {"sendmsg", "setsockopt"}
    assert set(confine.VIONET_KERNEL.syscalls) < set(confine.VIONET.syscalls)


def test_a_process_that_may_be_taken_over_has_fewer_descriptors() -> None:
    """Those in flight count against the limit of the process that sends next, so the core has a higher limit."""
    core = {"CONSOLELOG", "CONTROL", "LOG", "VMM"}
    least = min(EVERY[name].open_files for name in core)

    assert all(confinement.open_files < least for name, confinement in EVERY.items() if name not in core)
    assert confine.VM.open_files < confine.VM_BUILDING.open_files


def test_requests_are_the_kernels() -> None:
    """A compiler finds that the allowed numbers are those of these names."""
    groups: dict[tuple[int, ...], tuple[str, ...]] = {
        confine.TUN_IOCTLS: ("TUNSETOFFLOAD", "TUNSETVNETHDRSZ"),
        confine.TTY_IOCTLS: ("TCFLSH",),
        confine.VHOST_IOCTLS: (
            "VHOST_SET_OWNER", "VHOST_GET_FEATURES", "VHOST_SET_FEATURES", "VHOST_SET_MEM_TABLE", "VHOST_SET_VRING_NUM",
            "VHOST_SET_VRING_ADDR", "VHOST_SET_VRING_BASE", "VHOST_GET_VRING_BASE", "VHOST_SET_VRING_KICK",
            "VHOST_SET_VRING_CALL", "VHOST_SET_VRING_ERR", "VHOST_NET_SET_BACKEND",
        ),
        confine.PRIV.ioctls: (
            "TUNSETIFF", "SIOCGIFNAME", "SIOCGIFCONF", "SIOCGIFFLAGS", "SIOCGIFMTU", "SIOCGIFINDEX",
        ),
    }  # fmt: skip
    lines = [
        f"#include <{header}>"
        for header in ("sys/ioctl.h", "linux/if_tun.h", "linux/vhost.h", "linux/sockios.h", "asm/ioctls.h")
    ]
    for numbers, names in groups.items():
        lines += [
            f'_Static_assert({name} == {number}u, "{name}");' for name, number in zip(names, numbers, strict=True)
        ]

    subprocess.run(["gcc", "-fsyntax-only", "-x", "c", "-"], input="\n".join(lines) + "\n", text=True, check=True)


def test_requests_of_few() -> None:
    """All others have those of any descriptor only."""
    have = {name: confinement.ioctls for name, confinement in EVERY.items() if confinement.ioctls}

    assert have == {
        "VIONET": confine.TUN_IOCTLS,
        "VIONET_KERNEL": confine.TUN_IOCTLS + confine.VHOST_IOCTLS,
        "VM": confine.TTY_IOCTLS,
        "VM_BUILDING": confine.TTY_IOCTLS,
        "VMM": confine.TUN_IOCTLS + confine.VHOST_IOCTLS + confine.TTY_IOCTLS,
        "PRIV": confine.PRIV.ioctls,
    }


def test_scopes() -> None:
    """Only a VM's process restricts its signals earlier.  Only lockholder does without landlock."""
    assert {name for name, each in EVERY.items() if each.scopes != landlock.SCOPE_ALL} == {"VM", "VM_BUILDING"}
    assert confine.VM.scopes == landlock.SCOPE_SOCKETS
    assert {name for name, each in EVERY.items() if each.sees_others} == {"LOCKHOLDER"}


def test_files() -> None:
    """By path, those below included."""
    have = {name: dict(confinement.files) for name, confinement in EVERY.items() if confinement.files}
    assert set(have) == {"OPENER", "VMM", "PRIV"}

    opener, vmm, priv = have["OPENER"], have["VMM"], have["PRIV"]
    assert opener == {"/": landlock.READ_FILE | landlock.WRITE_FILE | landlock.TRUNCATE | landlock.IOCTL_DEV}
    assert vmm == {"/": landlock.RUN}
    writable = {path for path, rights in priv.items() if rights & (landlock.WRITE_FILE | landlock.MAKE_REG)}
    assert writable == {"/dev/null", "/proc/sys/net", confine.PRIV_DIRECTORY}
    assert {path for path, rights in priv.items() if rights & (landlock.MAKE_REG | landlock.REMOVE_FILE)} == {
        confine.PRIV_DIRECTORY
    }
    assert {path for path, rights in priv.items() if rights & landlock.EXECUTE} == {
        "/usr", "/bin", "/sbin", "/lib", "/lib64",
    }  # fmt: skip
