"""System calls that Python lacks: their constants, and what replaces calls that are refused."""

import errno
import fcntl
import os
import posix
import re
import resource
import socket
import struct
import subprocess
from collections.abc import Callable
from ctypes import Array
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.descriptors import open_descriptors
from vmd import native
from vmd.errors import HostError, number
from vmd.privsep import linux

HEADERS = (
    "errno.h", "fcntl.h", "sched.h", "signal.h", "time.h", "sys/mount.h", "sys/prctl.h", "sys/resource.h",
    "sys/syscall.h", "sys/timerfd.h", "linux/capability.h", "linux/close_range.h", "linux/openat2.h",
)  # fmt: skip
OF_THE_KERNEL = re.compile(
    r"(PR|CLONE|MS|MNT|AT|RESOLVE|TFD|RLIMIT|CLOSE_RANGE|CAP|SYS|LINUX_CAPABILITY|CLOCK)_|SIGKILL$"
)
OWN = {"CAP_LAST"}


def constants() -> dict[str, int]:
    """Return the constants that the kernel defines, by their names in the headers."""
    found = {}
    for name, value in vars(linux).items():
        if OF_THE_KERNEL.match(name) and name not in OWN:
            kind, _, rest = name.partition("_")
            theirs = f"SYS_{rest.lower()}" if kind == "SYS" else f"_{name}" if kind == "LINUX" else name
            found[theirs] = value
    return found


def test_constants_are_the_kernels() -> None:
    """A compiler compares them."""
    found = constants()
    lines = [f"#include <{header}>" for header in HEADERS]
    lines += [f'_Static_assert({name} == {value}, "{name}");' for name, value in found.items()]

    subprocess.run(
        ["gcc", "-D_GNU_SOURCE", "-fsyntax-only", "-x", "c", "-"], input="\n".join(lines) + "\n", text=True, check=True
    )

    assert len(found) > 60


# --- refused calls ------------------------------------------------------------------------------------------------


class Refusing:
    """A kernel, or a filter, that refuses all calls by number."""

    def __init__(self) -> None:
        self.error = errno.ENOSYS

    def syscall(self, tried: str, *_: object) -> int:
        """Refuse a call."""
        raise HostError(tried, self.error)


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Refusing:
    """A kernel that refuses calls with ENOSYS, until the test says otherwise."""
    kernel = Refusing()
    monkeypatch.setattr(linux, "syscall", kernel.syscall)
    return kernel


@pytest.fixture(params=["with the call", errno.ENOSYS, errno.EPERM])
def either(request: pytest.FixtureRequest) -> None:
    """A kernel that has a call, and two in which it is refused."""
    if isinstance(request.param, int):
        request.getfixturevalue("refusing").error = request.param


@pytest.mark.usefixtures("either")
def test_descriptors_of_a_range_are_marked() -> None:
    """Both ends belong to the range, and others are not changed."""
    null = os.open(os.devnull, os.O_RDONLY)
    fds = [fcntl.fcntl(null, fcntl.F_DUPFD, at) for at in (900, 901, 903, 904)]
    try:
        for fd in fds:
            os.set_inheritable(fd, True)

        linux.close_on_exec_from(901, 903)
        linux.close_on_exec_from(904, 903)  # an empty range

        assert [os.get_inheritable(fd) for fd in fds] == [True, False, False, True]
        linux.close_on_exec_from(904)
        assert not os.get_inheritable(fds[3])
    finally:
        for fd in (null, *fds):
            os.close(fd)


def test_a_cell_has_no_list_of_descriptors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """There all numbers up to the limit are tried, and none beyond the range."""
    monkeypatch.setattr(linux, "DESCRIPTORS", str(tmp_path / "none"))

    assert list(linux.open_descriptors(5, 8)) == [5, 6, 7, 8]
    most = os.sysconf("SC_OPEN_MAX")
    assert list(linux.open_descriptors(most - 2, linux.FD_MAX)) == [most - 2, most - 1]


def test_other_errors_are_not_hidden(refusing: Refusing, tmp_path: Path) -> None:
    """They are errors of the call, which has no substitute then."""
    refusing.error = errno.EINVAL
    file = tmp_path / "file"
    file.touch()

    with pytest.raises(HostError, match="close_range"):
        linux.close_on_exec_from(900)
    with pytest.raises(HostError, match="file"):
        linux.open_place(os.fsencode(file))


@pytest.mark.usefixtures("either")
def test_a_file_is_found_by_its_names(tmp_path: Path) -> None:
    """These are its own name, a link, and a path with `..`."""
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "link").symlink_to("file")

    for name in ("file", "link", f"../{tmp_path.name}/./link"):
        place = linux.open_place(os.fsencode(tmp_path / name))
        assert os.path.samestat(os.fstat(place), file.stat())
        assert not os.get_inheritable(place)
        os.close(place)


@pytest.mark.usefixtures("either")
def test_looking_for_files_leaves_no_descriptor(tmp_path: Path) -> None:
    """Found or not."""
    path = tmp_path / "file"
    with path.open("w") as file:
        before = open_descriptors()
        os.close(linux.open_place(os.fsencode(path)))
        path.unlink()
        for name in (b"/proc/self/fd/%d" % file.fileno(), os.fsencode(path)):
            with pytest.raises((HostError, OSError)):
                linux.open_place(name)
        assert open_descriptors() == before


@pytest.mark.usefixtures("either")
def test_an_open_file_without_a_name_is_not_found(tmp_path: Path) -> None:
    """A link in /proc leads to it, but its user could not reach it by any name."""
    path = tmp_path / "file"
    with path.open("w") as file:
        path.unlink()
        with pytest.raises((HostError, OSError)) as error:
            linux.open_place(b"/proc/self/fd/%d" % file.fileno())

    assert number(error.value) == errno.ELOOP


@pytest.mark.usefixtures("either")
def test_another_file_with_that_name_is_not_taken_for_it(tmp_path: Path) -> None:
    """The open file was replaced."""
    path = tmp_path / "file"
    with path.open("w") as file:
        path.rename(tmp_path / "aside")
        (tmp_path / "aside").unlink()
        path.touch()
        with pytest.raises((HostError, OSError)):
            linux.open_place(b"/proc/self/fd/%d" % file.fileno())


# --- single calls -------------------------------------------------------------------------------------------------


def test_limits_are_the_kernels() -> None:
    """The hard limit is returned, and both limits are set."""
    assert linux.hard_limit(linux.RLIMIT_NOFILE) == resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with pytest.raises(HostError, match="read a limit of resources"):
        linux.hard_limit(99)
    with pytest.raises(HostError, match="try it"):
        linux.set_limit("try it", 99, 1)


def test_a_limit_is_set() -> None:
    """A child sets its own, because a hard limit cannot be raised again."""
    pid = os.fork()
    if pid == 0:
        limits = None
        try:
            linux.set_limit("limit it", linux.RLIMIT_NOFILE, 77)
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        finally:
            os._exit(0 if limits == (77, 77) else 1)

    assert os.waitpid(pid, 0)[1] == 0


def test_the_type_of_a_file_system() -> None:
    """It is the magic number of <linux/magic.h>."""
    fd = os.open("/proc", os.O_RDONLY)
    try:
        assert linux.file_system_type(fd) == 0x9FA0
    finally:
        os.close(fd)
    with pytest.raises(HostError) as error:
        linux.file_system_type(fd)
    assert error.value.number == errno.EBADF


def test_an_option_whose_buffer_has_a_request() -> None:
    """The answer has the length that the kernel gives."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        raw = linux.getsockopt(ours.fileno(), socket.SOL_SOCKET, socket.SO_PEERCRED, bytes(64))

        assert linux.UCRED.unpack(raw) == (os.getpid(), os.getuid(), os.getgid())
        with pytest.raises(HostError, match="get socket option 9999"):
            linux.getsockopt(ours.fileno(), socket.SOL_SOCKET, 9999, bytes(4))


class Capabilities:
    """A kernel with capabilities, in two halves of 32 bits as capget(2) has them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, permitted: int = 0, inheritable: int = 0) -> None:
        self.sets = [permitted, permitted, inheritable]  # effective, permitted, inheritable
        monkeypatch.setattr(linux, "syscall", self.syscall)

    def syscall(self, _tried: str, call: int, _header: object, data: "Array[linux.cap_user_data]") -> int:
        """Serve capget and capset."""
        view = native.memory_at(native.addressof(data), 24)
        if call == linux.SYS_CAPGET:
            words = [each >> 32 * half & 0xFFFFFFFF for half in range(2) for each in self.sets]
            view.raw = struct.pack("=6I", *words)
        else:
            assert call == linux.SYS_CAPSET
            words = list(struct.unpack("=6I", view.raw))
            self.sets = [words[each] | words[3 + each] << 32 for each in range(3)]
        return 0


HIGH_AND_LOW = 1 << 41 | 1 << 40 | 1 << 31 | 1


def test_all_64_capabilities_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capabilities from 32 on are in the second half."""
    Capabilities(monkeypatch, permitted=HIGH_AND_LOW)

    assert linux.permitted_capabilities() == HIGH_AND_LOW


def test_all_64_capabilities_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capability is not inheritable unless that is asked for."""
    kernel = Capabilities(monkeypatch)

    linux.set_capabilities(HIGH_AND_LOW)
    assert kernel.sets == [HIGH_AND_LOW, HIGH_AND_LOW, 0]

    linux.set_capabilities(HIGH_AND_LOW, inheritable=1 << 40 | 1)
    assert kernel.sets == [HIGH_AND_LOW, HIGH_AND_LOW, 1 << 40 | 1]


@pytest.mark.parametrize("fails", [False, True])
def test_a_new_user(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """Groups go first, because the user has no right to change them.  Capabilities survive the change and an exec."""
    steps: list[tuple[object, ...]] = []
    monkeypatch.setattr(linux, "prctl", lambda _tried, *arguments: steps.append(arguments))
    monkeypatch.setattr(linux, "set_capabilities", lambda mask, inheritable: steps.append((mask, inheritable)))
    for name in ("setgroups", "setresgid"):
        monkeypatch.setattr(posix, name, lambda *arguments, name=name: steps.append((name, *arguments)))

    def setresuid(*arguments: int) -> None:
        if fails:
            raise PermissionError(errno.EPERM, "no")
        steps.append(("setresuid", *arguments))

    monkeypatch.setattr(posix, "setresuid", setresuid)
    keep = 1 << linux.CAP_KILL | 1 << linux.CAP_SETUID
    if fails:
        with pytest.raises(HostError, match="become user 5 and group 6"):
            linux.become_user(5, 6, keep)
        return
    linux.become_user(5, 6, 0)
    change: list[tuple[object, ...]] = [("setgroups", []), ("setresgid", 6, 6, 6), ("setresuid", 5, 5, 5)]
    assert steps == [*change, (0, 0)]
    steps.clear()
    linux.become_user(5, 6, keep)

    assert steps == [
        (linux.PR_SET_KEEPCAPS, 1), *change, (keep, keep),
        (linux.PR_CAP_AMBIENT, linux.PR_CAP_AMBIENT_RAISE, linux.CAP_KILL),
        (linux.PR_CAP_AMBIENT, linux.PR_CAP_AMBIENT_RAISE, linux.CAP_SETUID),
    ]  # fmt: skip


def test_a_timer_notices_that_the_clock_is_set() -> None:
    """It is armed for a far time of the day, and cancelled when the clock is set."""
    fd = linux.timerfd_create(linux.CLOCK_REALTIME, linux.TFD_NONBLOCK | linux.TFD_CLOEXEC)
    try:
        linux.timerfd_cancel_on_set(fd)
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
        info = dict(line.split(": ") for line in lines if ": " in line)
    finally:
        os.close(fd)

    assert (info["clockid"], info["settime flags"]) == ("0", "03")
    assert int(info["it_value"].strip("()").split(",")[0]) > 1 << 31


def test_a_pid_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The descriptor of our own leads back.  It is closed then, and also if there can be no other one."""
    entered: list[tuple[str, int]] = []
    monkeypatch.setattr(linux, "unshare", lambda _flags: None)
    monkeypatch.setattr(linux, "setns", lambda fd, kind: entered.append((os.readlink(f"/proc/self/fd/{fd}"), kind)))
    before = open_descriptors()

    own = linux.new_pids()
    assert not os.get_inheritable(own)
    linux.old_pids(own)
    assert entered == [(os.readlink("/proc/self/ns/pid"), linux.CLONE_NEWPID)]
    assert open_descriptors() == before

    def refuse(_flags: int) -> None:
        raise HostError("make namespaces", errno.EPERM)

    monkeypatch.setattr(linux, "unshare", refuse)
    with pytest.raises(HostError, match="make namespaces"):
        linux.new_pids()
    assert open_descriptors() == before


def test_the_bounding_set_loses_what_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capabilities that the kernel does not know are left out."""
    dropped: list[int] = []
    known = {0, 1, 5, 40}

    def ask(option: int, capability: "native.c_ulong", *more: "native.c_ulong") -> int:
        assert (option, [each.value for each in more]) == (linux.PR_CAPBSET_READ, [0, 0, 0])
        return 1 if capability.value in known else -1

    monkeypatch.setattr(linux, "libc", SimpleNamespace(prctl=ask))
    monkeypatch.setattr(linux, "prctl", lambda _tried, option, number: dropped.append((option, number)[1]))

    linux.limit_bounding_set(1 << 5 | 1 << 7)

    assert dropped == [0, 1, 40]


def test_no_descriptor_has_a_larger_number() -> None:
    """The kernel's numbers of descriptors are ints."""
    assert linux.FD_MAX == 0x7FFFFFFF


def test_a_call_that_fails_names_what_was_tried() -> None:
    """With the kernel's error."""
    with pytest.raises(HostError, match="try it") as error:
        linux.syscall("try it", 9999)
    assert error.value.number == errno.ENOSYS
    with pytest.raises(HostError, match="try this") as error:
        linux.prctl("try this", linux.PR_SET_DUMPABLE, 77)
    assert error.value.number == errno.EINVAL
    assert linux.syscall("ask for the pid", 39) == os.getpid()
    assert linux.prctl("ask for it", 3) in (0, 1)


class Mounts:
    """A C library that records calls, and lets them fail if `result` is not 0."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.result = 0
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(linux, "libc", self)
        monkeypatch.setattr(linux, "syscall", lambda *given: self.calls.append(given))

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*given: object) -> int:
            self.calls.append((name, *given))
            return self.result

        return call


def test_mounts_and_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are passed as bytes, and errors say which step has failed."""
    library = Mounts(monkeypatch)
    linux.mount("vmd", "/run", "tmpfs", 6, "mode=0755")
    linux.mount(None, "/", None, 7)
    linux.umount_lazily("/old")
    linux.pivot_root("/new", "/new/old")
    linux.unshare(linux.CLONE_NEWNS)
    linux.setns(5, linux.CLONE_NEWPID)
    assert library.calls == [
        ("mount", b"vmd", b"/run", b"tmpfs", 6, b"mode=0755"), ("mount", None, b"/", None, 7, None),
        ("umount2", b"/old", linux.MNT_DETACH), ("pivot_root to /new", linux.SYS_PIVOT_ROOT, b"/new", b"/new/old"),
        ("unshare", linux.CLONE_NEWNS), ("setns", 5, linux.CLONE_NEWPID),
    ]  # fmt: skip
    library.result = -1
    calls: tuple[tuple[Callable[[], None], str], ...] = (
        (lambda: linux.mount("vmd", "/run", "tmpfs", 0), "mount vmd on /run"),
        (lambda: linux.mount(None, "/run", "tmpfs", 0), "mount tmpfs on /run"),
        (lambda: linux.mount(None, "/run", None, 0), "mount flags on /run"),
        (lambda: linux.umount_lazily("/old"), "detach /old"),
        (lambda: linux.unshare(0), "make namespaces"),
        (lambda: linux.setns(5, 0), "enter a namespace"),
    )
    for call, words in calls:
        with pytest.raises(HostError, match=words):
            call()
