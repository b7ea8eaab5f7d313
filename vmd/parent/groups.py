"""Control groups (cgroups(7), version 2): each VM has one with all its devices, to be bounded and ended as a whole.

They are below one directory, which is not below that of the daemon's unit: systemd cannot start a unit again while
guests are in there.

    vmd-guests-N.scope/    a transient unit of systemd's; without systemd vmd-guests-N, below the daemon's own group
        vmm/               vmm: where groups have controllers, the one above has no processes of its own
        vm-1/ vm-2/ ...    one for each VM process, made before the process is there

N is the lowest number that is free.  The scope ends with its last process.
"""

import contextlib
import errno
import itertools
import os
import select
import subprocess

from vmd.config.model import DEFAULT_WEIGHT, VmLimits
from vmd.errors import HostError, VmdError
from vmd.privsep.ids import TASKS_MAX
from vmd.privsep.spawn import ENVIRONMENT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

SYSTEMD = "/run/systemd/system"  # there where systemd runs the host (sd_booted(3))
PREFIX = "vmd-guests-"
SCOPE_END = ".scope"
CORE = "core"
GROUP = "vm-"
SCOPE_S = 30.0  # for systemd to make a scope
SCOPES_MAX = 64  # of other daemons, which run or are about to be gone
TAKEN = "already"  # what systemd says of a unit that is there
CONTROLLER = "pids"
# What memory was used before its controller is there is never counted, so this one is there from the start.  That for
# processors comes with the first limit: from then on VMs share them by VM, and no longer by thread.
MEMORY, CPU = "memory", "cpu"
CPU_PERIOD_US = 100_000
LIMIT, HOST = "memory limit", "host"  # whose end some process of a VM has come to


def directory_of(pid: int) -> str:
    """Return the directory of a process's group.  Raises HostError."""
    tried = "find the control groups of version 2"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            mounts = file.read()
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            found = located(mounts, file.read())
    except OSError as error:
        raise HostError(tried, error) from error
    if found is None:
        raise HostError(tried, errno.ENODEV)
    return found


def located(mountinfo: str, cgroup: str) -> str | None:
    """Return the directory of the group in a /proc/PID/cgroup; None if no mount shows it (proc_pid_mountinfo(5))."""
    group = next((line[3:] for line in cgroup.splitlines() if line.startswith("0::")), "")
    for before, _, after in (line.partition(" - ") for line in mountinfo.splitlines()):
        if after.startswith("cgroup2 ") and group:
            root, top = before.split()[3:5]
            inside = f"{group}/".startswith(f"{root.rstrip('/')}/") and "/.." not in group  # of our cgroup namespace
            return f"{top}{group.removeprefix(root.rstrip('/'))}".rstrip("/") if inside else None
    return None


def write(path: str, text: str) -> None:
    """Write to a file of a group.  Raises HostError."""
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(text)
    except OSError as error:
        raise HostError(f"write {text} to {path}", error) from error


def move(pid: int, group: str) -> None:
    """Move a process to a group, which is made if need be.  Raises HostError."""
    try:
        os.makedirs(group, 0o755, exist_ok=True)
    except OSError as error:
        raise HostError(f"make {group}", error) from error
    write(f"{group}/cgroup.procs", str(pid))


def give_controller(group: str, controller: str = CONTROLLER) -> bool:
    """Let groups in a group be limited by a controller; False where the host has no such one.  Raises HostError."""
    try:
        with open(f"{group}/cgroup.controllers", encoding="ascii") as file:
            known = file.read().split()
    except OSError as error:
        raise HostError(f"read {error.filename}", error) from error
    if controller in known:
        write(f"{group}/cgroup.subtree_control", f"+{controller}")
    return controller in known


def give_memory(group: str) -> None:
    """Have memory counted for groups in a group, where the host can."""
    with contextlib.suppress(HostError):  # whoever wants it to be limited is told
        give_controller(group, MEMORY)


def wanted(limits: VmLimits) -> list[str]:
    """Return what is limited, in words of vm.conf."""
    return [words for words, _, _, _, given in rows(limits) if given]


def rows(limits: VmLimits) -> list[tuple[str, str, str, str, bool]]:
    """Return what is written for limits: words of vm.conf, controller, file, text, and whether there is a limit."""
    share, weight, memory = limits.cpu_percent, limits.weight, limits.memory_bytes
    quota = str(share * CPU_PERIOD_US // 100) if share else "max"
    return [
        ("cpu", CPU, "cpu.max", f"{quota} {CPU_PERIOD_US}", bool(share)),
        ("weight", CPU, "cpu.weight", str(weight or DEFAULT_WEIGHT), bool(weight)),
        ("memory", MEMORY, "memory.max", str(memory or "max"), bool(memory)),
        # Without some of its processes a VM is of no use.
        ("memory", MEMORY, "memory.oom.group", str(int(bool(memory))), False),
    ]


def limit(group: str, limits: VmLimits) -> dict[str, list[str]]:
    """Limit a VM's group; return what cannot be, in words of vm.conf, by the controller that is missing.

    Raises HostError.
    """
    missing: dict[str, list[str]] = {}
    for words, controller, file, text, given in rows(limits):
        path = f"{group}/{file}"
        if given and not os.path.exists(path):
            top = os.path.dirname(group)
            if not top.endswith(SCOPE_END):  # in a scope of its own systemd has seen to that
                with contextlib.suppress(HostError):
                    give_controller(os.path.dirname(top), controller)
            give_controller(top, controller)
        if os.path.exists(path):
            write(path, text)
        elif given:
            missing.setdefault(controller, []).append(words)
    return missing


def memory_lack(group: str) -> str:
    """Return for lack of which memory the kernel has killed a process of a group: LIMIT, HOST, or "" if it has not."""
    counted: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError), open(f"{group}/memory.events", encoding="ascii") as file:
        counted = dict(line.split() for line in file)
    if counted.get("oom_kill", "0") == "0":
        return ""
    return HOST if counted.get("oom", "0") == "0" else LIMIT


class Groups:
    """The groups of one daemon's VMs."""

    def __init__(self, top: str, *, limited: bool) -> None:
        """`limited`: tasks can be; HostError of `make` says otherwise what is missing.

        Groups that an earlier daemon has made there are not touched before `keep_only`.
        """
        self.top = top
        self.limited = limited
        self._numbers = itertools.count(1 + max(self._there(), default=0))
        self._over: set[int] = set()  # killed, and perhaps not empty yet

    def make(self) -> tuple[int, int]:
        """Make a group for a VM process; return its number, and what a process writes 0 to in order to be in it.

        Raises HostError.
        """
        number = next(self._numbers)
        path = self._path(number)
        try:
            os.mkdir(path, 0o755)
            if self.limited:
                write(f"{path}/pids.max", str(TASKS_MAX))
            return number, os.open(f"{path}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(f"make {path}", error) from error

    def end(self, number: int) -> str:
        """Kill what is left in a group of ours, and have it removed; return which memory it has lacked."""
        lack = memory_lack(self._path(number))
        with contextlib.suppress(HostError):  # before Linux 5.14 there is no such file
            write(f"{self._path(number)}/cgroup.kill", "1")
        self._over.add(number)
        return lack

    def remove(self) -> bool:
        """Remove the groups that are over; return whether some are left, with processes that have not ended yet."""
        for number in tuple(self._over):
            try:
                os.rmdir(self._path(number))
            except FileNotFoundError:
                pass
            except OSError:
                continue
            self._over.discard(number)
        return bool(self._over)

    def keep_only(self, numbers: "Sequence[int]") -> None:
        """Have all but these removed; an earlier daemon has made them, and nobody has them now."""
        for number in self._there() - set(numbers):
            self.end(number)

    def _there(self) -> set[int]:
        """Return the numbers of the groups that are there."""
        try:
            names = os.listdir(self.top)
        except OSError:
            return set()
        numbers = (name.removeprefix(GROUP) for name in names if name.startswith(GROUP))
        return {int(number) for number in numbers if number.isascii() and number.isdigit()}

    def _path(self, number: int) -> str:
        return f"{self.top}/{GROUP}{number}"


class Scope:
    """Where systemd runs the host: a unit of its own for our guests."""

    def groups(self, vmm: int) -> Groups:
        """Return the groups below a new unit, with vmm in one of them.  Raises VmdError."""
        own = directory_of(os.getpid())
        for number in range(SCOPES_MAX):
            groups = self._make(f"{PREFIX}{number}{SCOPE_END}", own, vmm)
            if groups is not None:
                return groups
        raise VmdError(f"make a control group: there are {SCOPES_MAX} units {PREFIX}N.scope")

    def _make(self, unit: str, own: str, vmm: int) -> Groups | None:
        """Make one unit; return None if there is one of this name.  Raises VmdError."""
        above, name = os.path.split(own)
        # Where systemd watches the memory of a scope it may stop the whole of it when the kernel kills one guest for
        # its memory (OOMPolicy=stop, since version 253; earlier ones do not take OOMPolicy= for a scope).
        options = ["Delegate=yes", "TasksMax=infinity", "MemoryAccounting=no"]
        if name.endswith(".service"):
            # Whoever limits the daemon's slice means its guests, too.  At the host's end the daemon stops its guests.
            options += [f"Before={name}", f"Slice={os.path.basename(above)}"]
        command = ["systemd-run", "--scope", "--quiet", "--collect", f"--unit={unit}", "--description=Guests of vmd"]
        command += [f"--property={option}" for option in options]
        tried = f"make {unit} by systemd-run"
        try:
            # systemd makes no unit without a process.  This one is in it as soon as it answers.
            holder = subprocess.Popen(
                [*command, "cat"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, bufsize=0,
            )  # fmt: skip
        except OSError as error:
            raise HostError(tried, error) from error
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stderr is not None
        with holder:
            try:
                with contextlib.suppress(OSError):  # it has failed, and says why
                    holder.stdin.write(b"\n")
                if not select.select([holder.stdout], [], [], SCOPE_S)[0]:
                    raise HostError(tried, errno.ETIMEDOUT)
                if not holder.stdout.read(1):
                    words = holder.stderr.read().decode(errors="replace").strip()
                    if TAKEN in words:
                        return None
                    raise VmdError(f"{tried}: {words}")
                top = directory_of(holder.pid)
                for pid in (vmm, holder.pid):
                    move(pid, f"{top}/vmm")
                give_memory(top)
                return Groups(top, limited=give_controller(top))
            finally:
                holder.kill()

    def adopt(self, _top: str) -> None:
        """Nothing: the unit ends with its last process."""

    def close(self) -> None:
        """Nothing: the unit ends with its last process."""


class Below:
    """Where there is no systemd: below our own group, which is not to have processes of its own then."""

    def __init__(self) -> None:
        """Move ourselves out of the way, before we have children.  Raises HostError."""
        self.own = directory_of(os.getpid())
        if os.path.basename(self.own) == CORE and guests_below(os.path.dirname(self.own)):
            self.own = os.path.dirname(self.own)  # we have been here before, as another program
        self.tops: list[str] = []
        move(os.getpid(), f"{self.own}/{CORE}")
        try:
            give_controller(self.own)
            give_memory(self.own)
        except HostError:  # others are in there, too
            with contextlib.suppress(HostError, OSError):
                move(os.getpid(), self.own)
                os.rmdir(f"{self.own}/{CORE}")
            raise

    def groups(self, vmm: int) -> Groups:
        """Remove what killed daemons have left; return groups below a new one, with vmm in one of them.

        Raises HostError.
        """
        with contextlib.suppress(OSError):
            for name in os.listdir(self.own):
                if name.startswith(PREFIX):
                    remove_if_empty(f"{self.own}/{name}")
        for number in itertools.count():
            top = f"{self.own}/{PREFIX}{number}"
            try:
                os.mkdir(top, 0o755)
                break
            except FileExistsError:
                continue
            except OSError as error:
                raise HostError(f"make {top}", error) from error
        self.tops.append(top)
        move(vmm, f"{top}/vmm")
        give_memory(top)
        return Groups(top, limited=give_controller(top))

    def adopt(self, top: str) -> None:
        """Remove these, too, when their vmm has ended."""
        self.tops.append(top)

    def close(self) -> None:
        """Remove all groups but `core`, where the log still is; all vmms have ended."""
        for top in self.tops:
            remove_if_empty(top)


def guests_below(directory: str) -> bool:
    """Return whether a daemon has had its guests below this group."""
    try:
        return any(name.startswith(PREFIX) for name in os.listdir(directory))
    except OSError:
        return False


def remove_if_empty(top: str) -> None:
    """Remove a group with all in it, unless there are processes."""
    with contextlib.suppress(OSError):
        with open(f"{top}/cgroup.events", encoding="ascii") as file:
            if "populated 0" not in file.read():
                return
        for directory, _, _ in os.walk(top, topdown=False):
            os.rmdir(directory)


def place() -> Scope | Below:
    """Return what can make groups here; called before the first child is there.  Raises HostError."""
    return Scope() if os.path.isdir(SYSTEMD) else Below()
