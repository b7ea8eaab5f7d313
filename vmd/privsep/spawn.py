"""Starting processes: fork and exec of this program, with exactly the descriptors that are named.

Without a `place` a process starts with its starter's view of the system: children of vmm and of VM processes share
their cell.  Otherwise it starts in a `Place` that root prepares, such as `cell.Cell`, or `cell.PrivPlace` for priv.
"""

import fcntl
import os
import sys

from vmd import signals as signal
from vmd.closing import close
from vmd.errors import HostError, VmdError
from vmd.privsep import confine, linux
from vmd.privsep.start import CHANNEL_FD, CODE_FD
from vmd.readable import readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import NoReturn, Protocol

    class HasFileno(Protocol):
        """A socket, or another object with a descriptor."""

        def fileno(self) -> int:
            """Return the descriptor."""

    class Place(Protocol):
        """The preparation, between fork and exec, of a process that gets fewer rights than its starter."""

        import_path: tuple[str, ...]
        code_fd: int  # becomes CODE_FD of the process, if it is not negative
        own_pids: bool  # the process is pid 1 of a pid namespace, so the processes that it starts end with it
        vital: bool  # VMs need the process: when memory runs out, the kernel kills others first

        def prepare(self) -> None:
            """Called in the starting process, before the fork.  Raises HostError."""

        def enter(self) -> None:
            """Move this process there, and give up privileges.  Called in the child.  Raises HostError."""


# -I: no environment variables, no user site.  -S: no site-packages, so that only our path can be imported besides the
# standard library.  Our path comes last, because it may be a directory of the distribution with other modules, which
# must not hide the standard library's.
LAUNCH = (
    "import gc, sys; gc.disable(); sys.path += {path!r}; "
    "from vmd.privsep.start import begin, run; begin({title!r}, {parent}, {uid}, {group}); "
    "from {module} import {function}; gc.freeze(); gc.enable(); run({function})"
)
ENTRY = "vmd.__main__:main"
OWN_PATH = (os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))),)
INTERPRETER = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)  # a venv hides it
ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C",  # with it Python uses UTF-8, and looks for no locale
    "MALLOC_ARENA_MAX": "1",  # otherwise each thread takes megabytes, in hundreds of processes
}
DEBUG = confine.DEBUG.decode()  # passed on to all processes that we start (`confine.is_debugged`)
FD_TARGETS = 64  # descriptors are first moved to numbers from here on, so that placing one never overwrites another
FAILED = 127
LEAF_SCORE = 0  # the least oom_score_adj of a process that is not vital; see `parent/oom.py`
RESET_SIGNALS = [signum for signum in range(1, signal.NSIG) if signum not in (9, 19, 32, 33)]  # 32, 33: glibc's


class Child:
    """A process that we started.  Its owner calls `reap`, or reaps it otherwise and closes the pidfd."""

    def __init__(self, title: str, pid: int) -> None:
        self.title = title
        self.pid = pid
        self.status: int | None = None  # as `reap` has returned it
        self.killed = False
        try:
            self.pidfd = os.pidfd_open(pid)  # readable once the process has ended
        except OSError as error:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise HostError(f"watch {title} by pidfd_open(2)", error) from error

    def fileno(self) -> int:
        """Return the pidfd, for select and friends."""
        return self.pidfd

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Send a signal.  No effect if the process has ended."""
        if self.pidfd >= 0:
            self.killed = self.killed or signum == signal.SIGKILL
            try:
                signal.pidfd_send_signal(self.pidfd, signum)
            except ProcessLookupError:
                return

    def reap(self, timeout_s: float = 0) -> int | None:
        """Return the exit status, or minus the signal that killed it; None if it still runs after `timeout_s`."""
        if not readable(self.pidfd, timeout_s):
            return None
        _, status = os.waitpid(self.pid, 0)
        close(self.pidfd)
        self.pidfd = -1
        self.status = os.waitstatus_to_exitcode(status)
        return self.status


def spawn(
    title: str,
    arguments: "Sequence[str]" = (),
    *,
    channel: "HasFileno | None" = None,
    fds: "Mapping[int, int] | None" = None,
    log_fd: int = 2,
    place: "Place | None" = None,
    import_path: "tuple[str, ...] | None" = None,
    entry: str = ENTRY,
    outlives: bool = False,
    uid: int = 0,
    group: int = -1,
) -> Child:
    """Start a process that runs `entry` with `sys.argv[1:] == arguments`.

    It gets `channel` as fd 3, `fds` (number there -> descriptor here), `log_fd` as fd 2, and no other descriptors.  All
    of these stay open here.  It leads a session of its own.  It is killed when the calling *thread* ends, unless it
    `outlives` us, which needs a `place`.  With `uid` it first becomes that user and group, without capabilities.
    `group` is a number in `fds`: the process joins the control group whose file that descriptor is.

    Raises:
        HostError: the kernel refused a step; the error names the step.
        VmdError: the place could not be entered for another reason.
    """
    targets = {0: None, 1: None, 2: log_fd, **(fds or {})}
    if channel is not None:
        targets[CHANNEL_FD] = channel.fileno()
    if place is not None and place.code_fd >= 0:
        targets[CODE_FD] = place.code_fd
    assert all(0 <= target < FD_TARGETS for target in targets)
    path = import_path or (place.import_path if place else OWN_PATH)
    module, _, function = entry.partition(":")
    assert place is not None or not outlives
    parent = None if outlives else parent_pid(place)
    launch = LAUNCH.format(
        path=list(path), title=title, parent=parent, uid=uid, group=group, module=module, function=function
    )
    argv = [INTERPRETER, "-I", "-S", "-c", launch, *arguments]
    moved: dict[int, int] = {}
    try:
        try:
            for target, source in targets.items():
                moved[target] = copy_above_targets(source)
        except OSError as error:
            raise HostError(f"prepare descriptors for {title}", error) from error
        pid = start_here(title, argv, moved) if place is None else start_in(place, title, argv, moved, parent)
    finally:
        for fd in moved.values():
            close(fd)
    return Child(title, pid)


def environment() -> dict[str, str]:
    """Return the environment for the processes that we start."""
    return {**ENVIRONMENT, DEBUG: "1"} if DEBUG in os.environ else ENVIRONMENT


def copy_above_targets(source: int | None) -> int:
    """Return a copy of a descriptor, with a number that is not a target; for None a descriptor of the null device."""
    if source is not None:
        return fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, FD_TARGETS)
    try:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        # A confined process cannot open files.  Its own standard input is the null device: its starter has opened it.
        return fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, FD_TARGETS)
    try:
        return fcntl.fcntl(null, fcntl.F_DUPFD_CLOEXEC, FD_TARGETS)
    finally:
        close(null)


def start_here(title: str, argv: list[str], moved: "Mapping[int, int]") -> int:
    """Start a process with our own rights, without running Python between fork and exec.  Returns its pid."""
    actions = [(os.POSIX_SPAWN_DUP2, source, target) for target, source in moved.items()]
    try:
        return os.posix_spawn(
            INTERPRETER,
            argv,
            environment(),
            file_actions=actions,
            setsid=True,
            setsigmask=[],
            setsigdef=RESET_SIGNALS,
        )
    except OSError as error:
        raise HostError(f"start {title}", error) from error


def start_in(place: "Place", title: str, argv: list[str], moved: "Mapping[int, int]", parent: int | None) -> int:
    """Fork, enter the place and exec.  A failure in the child is raised here.  Returns the pid."""
    place.prepare()
    try:
        report, failure = os.pipe()  # close-on-exec: end of file means that exec has succeeded
    except OSError as error:
        raise HostError(f"start {title}", error) from error
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = fork_in_new_pids() if place.own_pids else os.fork()
        if pid == 0:
            become(place, argv, moved, parent, failure)
    except (OSError, HostError) as error:
        close(report)
        raise error if isinstance(error, HostError) else HostError(f"start {title}", error) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        close(failure)
    with open(report, "rb") as reader:
        words = reader.read()
    if words:
        os.waitpid(pid, 0)
        number, _, what = words.decode().partition(" ")
        raise HostError(f"start {title}: {what}", int(number)) if int(number) else VmdError(f"start {title}: {what}")
    return pid


def parent_pid(place: "Place | None") -> int:
    """Return our pid as the started process sees it."""
    return 0 if place is not None and place.own_pids else os.getpid()


def fork_in_new_pids() -> int:
    """Fork a child that is pid 1 of a new pid namespace.  Raises OSError."""
    own = linux.new_pids()
    try:
        pid = os.fork()
    except OSError:
        linux.old_pids(own)
        raise
    if pid:
        linux.old_pids(own)
    return pid


def become(
    place: "Place", argv: list[str], moved: "Mapping[int, int]", parent: int | None, failure: int
) -> "NoReturn":
    """Turn the forked child into the new process.  On failure write the reason to `failure` and exit.

    The process is killed when `parent` ends, unless that is None.
    """
    try:
        failure = fcntl.fcntl(failure, fcntl.F_DUPFD_CLOEXEC, FD_TARGETS)
        os.setsid()
        # All signals are still blocked, so that no handler of the parent runs here and writes to its wake-up fd.
        for signum in RESET_SIGNALS:
            signal.signal(signum, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for target, source in moved.items():
            os.dup2(source, target, inheritable=True)
        for first, last in gaps(sorted(moved)):
            linux.close_on_exec_from(first, last)
        os.umask(0o077)
        if not place.vital:
            raise_oom_score()
        place.enter()
        if parent is not None:
            linux.die_with_parent(signal.SIGKILL)  # after the change of ids, which clears the setting
            if os.getppid() != parent:
                os._exit(FAILED)
        linux.prctl("set no_new_privs", linux.PR_SET_NO_NEW_PRIVS, 1)
        os.execve(argv[0], argv, environment())  # noqa: S606 - no shell
    except HostError as error:
        words = f"{error.number} {error.tried}"
    except OSError as error:
        words = f"{error.errno} {error.filename or 'prepare the process'}"
    except BaseException as error:
        words = f"0 {error!r}"
    os.write(failure, words.encode("utf-8", "backslashreplace"))
    os._exit(FAILED)


def raise_oom_score() -> None:
    """Raise our oom_score_adj to LEAF_SCORE at least: the inherited value protects the parent when memory runs out."""
    try:
        with open("/proc/self/oom_score_adj", "r+", encoding="ascii") as file:
            if int(file.read()) < LEAF_SCORE:
                file.seek(0)
                file.write(str(LEAF_SCORE))
    except OSError:
        return


def gaps(used: list[int]) -> list[tuple[int, int]]:
    """Return the ranges of unused descriptor numbers between and after the used ones."""
    return [
        (before + 1, after - 1)
        for before, after in zip(used, [*used[1:], linux.FD_MAX + 1], strict=True)
        if before + 1 <= after - 1
    ]
